"""Speeds are measured by one process at a time, and marked where others kept the cores busy."""

import subprocess
import sys
import time

import pytest

from minitron.machine import alone
from minitron.machine.alone import busy_seconds, had_cores, measured_alone

STAT = """cpu  900 0 0 9000 0 0 0 0 0 0
cpu0 100 20 30 5000 7 1 2 4 50 0
cpu1 1000 0 0 400 0 0 0 0 0 0
intr 1 2 3
"""


def test_busy_is_what_any_process_worked_on_the_cores_that_are_ours():
    """Idle, waiting for a disk, and a guest's time, which is in user already, are not."""
    tick = 1 / alone.os.sysconf("SC_CLK_TCK")
    assert busy_seconds(STAT, {0}) == pytest.approx(157 * tick) and busy_seconds(STAT, {0, 1}) == pytest.approx(1157 * tick)


@pytest.mark.parametrize(("busy", "own", "expected"), [(2.0, 2.0, True), (2.2, 2.0, True), (2.3, 2.0, False), (1.0, 0.0, False), (0.0, 0.0, True)])
def test_alone_is_who_did_nearly_all_the_work(busy, own, expected):
    assert had_cores(busy, own, elapsed=1.0, cores=2) is expected


def spin(seconds: float) -> float:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        pass
    return seconds


def test_work_of_another_process_is_seen_and_measured_once_more():
    asked = []
    cores = len(alone._cores())
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(cores)]
    try:
        time.sleep(0.2)
        found, had = measured_alone(lambda: asked.append(1) or spin(0.3))
    finally:
        for process in others:
            process.kill()
            process.wait()
    assert (found, had, len(asked)) == (0.3, False, 2)


def test_own_work_is_not_taken_for_others(monkeypatch):
    """The control, with a machine on which nothing else runs: what it says to be busy is what this process was."""
    before = time.process_time()
    monkeypatch.setattr(alone, "_busy_seconds", lambda: time.process_time() - before)
    asked = []
    assert measured_alone(lambda: asked.append(1) or spin(0.1)) == (0.1, True) and len(asked) == 1


def test_where_the_system_does_not_say_it_is_not_known(monkeypatch, tmp_path):
    monkeypatch.setattr(alone, "STAT", tmp_path / "none")
    assert measured_alone(lambda: 1) == (1, None)


HOLDER = """
from minitron.machine.alone import measured_alone
import time
measured_alone(lambda: print("measuring", flush=True) or time.sleep(0.6))
"""


def test_two_processes_do_not_measure_at_once(environment, monkeypatch):
    monkeypatch.setattr(alone, "_busy_seconds", lambda: None)  # one try each
    process = subprocess.Popen([sys.executable, "-c", HOLDER], env=environment, text=True, stdout=subprocess.PIPE)
    assert process.stdout.readline() == "measuring\n"
    started = time.monotonic()
    measured_alone(lambda: None)
    assert time.monotonic() - started > 0.4
    process.kill()
    process.wait()
