"""Manners at the terminal: interrupts are heard however a run was started, a reader who goes ends nothing, an old Python is told so."""

import ast
import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from minitron.settings import hub

BACKGROUND = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"  # as a shell starts what ends in &
DOOR = BACKGROUND + "import sys, minitron.run; sys.exit(minitron.run.main())"
ALONE = BACKGROUND + "import sys; open(sys.argv[1]).read()"


def interrupted(fork_server, tmp_path, code: str, number: int, *arguments: str) -> tuple[int, str]:
    """Exit code and stderr of a process that gets the signal where it has begun to wait for somebody to write into a pipe, `order`."""
    os.mkfifo(tmp_path / "order")
    process = fork_server.start("snippet", [code, *arguments], folder=tmp_path)
    writer = os.open(tmp_path / "order", os.O_WRONLY)  # until it reads
    process.send_signal(number)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=0.5)
    os.close(writer)
    _, stderr = process.communicate(timeout=60)
    return process.returncode, stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_is_heard_in_the_background_too(number, fork_server, tmp_path):
    code, stderr = interrupted(fork_server, tmp_path, DOOR, number, "stage=search", "search.layer_order=order")
    assert (code, stderr) == (130, "interrupted; what is done is kept, and the same command goes on from there\n")


def test_another_process_in_the_background_does_not_hear_it(fork_server, tmp_path):
    """The control."""
    assert interrupted(fork_server, tmp_path, ALONE, signal.SIGINT, "order") == (0, "")


INTERRUPTED = "exec('raise KeyboardInterrupt')"
CAUGHT = f"import sys\ntry:\n    {INTERRUPTED}\nexcept KeyboardInterrupt:\n    sys.exit(130)"
AT_THE_DOOR = f"import minitron.door.command as door, minitron.run, sys\ndoor.command = lambda _: {INTERRUPTED}\nsys.exit(minitron.run.main())"


@pytest.mark.parametrize(("program", "code"), [(AT_THE_DOOR, 130), (CAUGHT, -signal.SIGINT)], ids=["the door", "control"])
def test_an_interrupt_while_a_library_makes_code_ends_in_130_too(program, code, environment, tmp_path):
    """dataclasses execute text; Python notes an interrupt inside it, and ends by SIGINT even where it is caught."""
    (tmp_path / "program.py").write_text(program)
    assert subprocess.run([sys.executable, "-m", "program"], env=environment, cwd=tmp_path, capture_output=True).returncode == code


def test_sigterm_while_libraries_are_imported_is_an_interrupt(environment, tmp_path):
    """hydra is a module here that says it is there and waits."""
    (tmp_path / "hydra.py").write_text("import os, time\nos.write(1, b'importing')\ntime.sleep(60)\n")
    process = subprocess.Popen([sys.executable, "-m", "minitron.run", "stage=report"], cwd=tmp_path, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               env=environment | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{environment['PYTHONPATH']}"})  # fmt: skip
    assert process.stdout.read(9) == "importing"
    process.send_signal(signal.SIGTERM)
    assert (process.communicate(timeout=60)[1].count("\n"), process.returncode) == (1, 130)


@pytest.fixture
def run_code(environment, tmp_path):
    """Runs `python -c …` in a process of its own, its output into files of this folder."""
    return lambda code, **options: subprocess.run([sys.executable, "-c", code], env=environment, cwd=tmp_path, text=True, capture_output=True, **options)


def test_a_reader_who_goes_ends_nothing(start, tmp_path):
    """`run … | head -1` with a pipe that nobody reads any more."""
    (tmp_path / "order").write_text("1 0 4 5")
    process = start(tmp_path, "stage=search", "search.layer_order=order")
    process.stdout.close(), process.stderr.close()
    assert process.wait(timeout=120) == 0
    assert (tmp_path / "runs" / "tiny" / "summary.json").exists()


def test_a_program_without_the_doors_output_ends_where_its_reader_goes(fork_server, tmp_path):
    """The control, and beside it what the door does to the same program."""
    code = "import sys, time\n{}\nfor _ in range(9): print('x' * 9000, flush=True)\nopen('done', 'w')"
    for prepared, done in (("", False), ("from minitron.door.output import outlive_readers; outlive_readers()", True)):
        process = fork_server.start("snippet", [code.format(prepared)], folder=tmp_path)
        process.stdout.close()
        assert (process.wait(timeout=60) == 0, (tmp_path / "done").exists()) == (done, done)


OLD = "import runpy, sys\nsys.version_info = (3, 9, 18, 'final', 0)\nrunpy.run_module({!r}, run_name='__main__', alter_sys=True)"


@pytest.mark.parametrize("module", ["minitron.run", "memory_budget"])
def test_an_older_python_is_told_so_in_one_line(module, run_code):
    finished = run_code(OLD.format(module))
    assert (finished.returncode, finished.stderr) == (2, "error: Python is 3.9; minitron needs 3.11 or later\n")


@pytest.mark.parametrize("name", ["minitron/__init__.py", "minitron/run.py", "memory_budget/__init__.py", "memory_budget/__main__.py"])
def test_what_says_so_is_read_by_an_older_python(name, repository):
    """As Python 3.8 parses it; the control is a file that it could not."""
    ast.parse((repository / name).read_text(encoding="utf-8"), feature_version=(3, 8))
    with pytest.raises(SyntaxError):
        ast.parse("match name:\n    case 1: pass", feature_version=(3, 8))


def test_a_python_without_the_libraries_is_told_how_to_get_them(environment, repository, tmp_path):
    code = "import sys\nsys.modules['hydra'] = None\nimport runpy\nrunpy.run_module('minitron.run', run_name='__main__')"
    finished = subprocess.run([sys.executable, "-c", code], env=environment, cwd=tmp_path, text=True, capture_output=True)
    assert finished.returncode == 2 and finished.stderr.startswith("error: hydra is not installed for ") and finished.stderr.count("\n") == 1
    assert Path(sys.executable).name in finished.stderr and "make install" in finished.stderr


@pytest.mark.parametrize(("seconds", "said"), [(0.3, "waiting for the Hub to give owner/name\n"), (0.0, "")])
def test_the_hub_is_waited_for_aloud_where_it_takes_long(seconds, said, capfd, monkeypatch):
    monkeypatch.setattr(hub, "SILENT_SECONDS", 0.1)
    with hub.said_while_waiting("owner/name"):
        time.sleep(seconds)
    time.sleep(0.3 - seconds)
    assert capfd.readouterr() == (said, "")
