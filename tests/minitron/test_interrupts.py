"""An interrupt that Python's own KeyboardInterrupt would lose, or show as a trace, ends the door in one line and exit code 130 all the same."""

import signal
import textwrap

import pytest

LINE = "interrupted; what is done is kept, and the same command goes on from there\n"
# A command in the place of the door's, which works for a while beside what is tested.
PROGRAM = """
import atexit, ctypes, os, signal, sys, threading, time
sys.path.insert(0, os.getcwd())
import minitron.door.command as door, minitron.run
from minitron.door.mistakes import users_mistakes
from minitron.machine import interrupts
def interrupt(*_):
    signal.raise_signal(signal.SIGINT)
    return 0
def work():
    for _ in range(80):
        time.sleep(0.01)
def command(_):
    {}
    print("worked to the end")
    return 0
"""
HEARS = PROGRAM + "door.command = command\nsys.exit(minitron.run.main())"
DEAF = PROGRAM + "signal.signal(signal.SIGINT, signal.default_int_handler)\nsys.exit(command(()))"  # the control: Python's own ways
LOST = {
    "a finaliser": "type('Fragile', (), {'__del__': interrupt})(); work()",
    "a callback from C": "ctypes.CFUNCTYPE(ctypes.c_int)(interrupt)(); work()",
    "a library that passes it over": """
        try:
            interrupt()
        except BaseException:
            pass
        work()""",
}
TOLD_OTHERWISE = {
    "an error of a library's own": """
        try:
            interrupt()
        except BaseException as error:
            raise RuntimeError("<KeyboardInterrupt>") from error""",
    "a user's mistake": """
        with users_mistakes():
            try:
                interrupt()
            except BaseException:
                raise ValueError("cannot be read")""",
    "a panic": """
        class Panic(BaseException):
            pass
        try:
            interrupt()
        except BaseException:
            raise Panic""",
    "a finaliser that finds half of its object": """
        class Half:
            def __init__(self):
                interrupt()
                self.whole = True
            def __del__(self):
                self.whole
        Half()""",
}


@pytest.fixture
def run(snippet, tmp_path):
    return lambda program, does: snippet(tmp_path, program.format(textwrap.indent(textwrap.dedent(does), "    ").strip()))


@pytest.mark.parametrize("where", [*LOST, *TOLD_OTHERWISE])
def test_an_interrupt_gets_through_from_anywhere(where, run):
    finished = run(HEARS, (LOST | TOLD_OTHERWISE)[where])
    assert (finished.returncode, finished.stdout, finished.stderr) == (130, "", LINE)


@pytest.mark.parametrize("where", LOST)
def test_pythons_own_is_lost_there(where, run):
    """The control."""
    assert run(DEAF, LOST[where]).stdout == "worked to the end\n"


@pytest.mark.parametrize("where", TOLD_OTHERWISE)
def test_pythons_own_is_told_otherwise_there(where, run):
    """The control."""
    finished = run(DEAF, TOLD_OTHERWISE[where])
    assert finished.returncode != 130 and finished.stderr != LINE


def test_an_import_is_not_broken_off(run, tmp_path):
    (tmp_path / "library.py").write_text("import signal\nsignal.raise_signal(signal.SIGINT)\nopen('whole', 'w')")
    finished = run(HEARS, "import library; work()")
    assert (finished.returncode, finished.stdout, finished.stderr, (tmp_path / "whole").exists()) == (130, "", LINE, True)


def test_an_import_that_does_not_end_is_not_waited_for(run, tmp_path):
    (tmp_path / "library.py").write_text("import signal, time\nsignal.raise_signal(signal.SIGINT)\ntime.sleep(60)")
    finished = run(HEARS, "interrupts.IMPORT_SECONDS = 0.2; import library")
    assert (finished.returncode, finished.stderr) == (130, LINE) and finished.seconds < 30


def test_who_is_dealing_with_an_interrupt_is_left_in_peace(run):
    finished = run(HEARS, """
        try:
            interrupt()
        finally:
            time.sleep(6 * interrupts.AGAIN_SECONDS)
            print("cleaned")""")  # fmt: skip
    assert (finished.returncode, finished.stdout, finished.stderr) == (130, "cleaned\n", LINE)


def test_who_holds_interrupts_back_is_left_in_peace(run):
    """A state that is being saved because of one."""
    finished = run(HEARS, """
        from distill.trainer import interrupts_wait
        try:
            interrupt()
        except KeyboardInterrupt:
            with interrupts_wait():
                interrupt()
                time.sleep(6 * interrupts.AGAIN_SECONDS)
                print("saved")
            raise""")  # fmt: skip
    assert (finished.returncode, finished.stdout, finished.stderr) == (130, "saved\n", LINE)


def test_a_second_one_while_the_first_is_answered_leaves_one_line(run):
    finished = run(HEARS, """
        before = interrupts.nothing_left
        interrupts.nothing_left = lambda code: (interrupt(), before(code))
        interrupt()""")  # fmt: skip
    assert (finished.returncode, finished.stderr) == (130, LINE)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_threads_that_it_breaks_off_say_nothing(number, run):
    finished = run(HEARS, f"""
        gone = threading.Event()
        thread = threading.Thread(target=lambda: (gone.wait(), 1 / 0))
        thread.start()
        try:
            signal.raise_signal({int(number)})
        finally:
            gone.set()
            thread.join()""")  # fmt: skip
    assert (finished.returncode, finished.stderr) == (130, LINE)


def test_what_fails_without_an_interrupt_is_told(run):
    """The control of all: a finaliser, a thread and the command itself."""
    finished = run(HEARS, """
        type("Fragile", (), {"__del__": lambda self: self.missing})()
        thread = threading.Thread(target=lambda: 1 / 0)
        thread.start()
        thread.join()
        raise RuntimeError("broken")""")  # fmt: skip
    assert finished.returncode == 1
    assert all(said in finished.stderr for said in ("no attribute 'missing'", "ZeroDivisionError", "RuntimeError: broken"))
