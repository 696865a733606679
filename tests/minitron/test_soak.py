"""A short soak (`make soak` is the long one): whatever befalls a run, the next ones end in the student of a walk that nothing befell."""

import random
import shutil
import signal
from collections import Counter
from pathlib import Path

import pytest
import soak_standin
from soak_faults import Fault, codes_of
from soak_lives import Soak, Told, can_mount, done_twice, flips, full_disk, one_run, read_only_disk, several_runs
from soak_runs import Ended
from soak_stores import begin, differences, half_made, read_reference

LEAST_FAULTS = 15


@pytest.fixture(scope="module")
def soak(walk, fork_server, tmp_path_factory) -> Soak:
    """Runs that hear of faults by the stand-in, and the session's walk, as it is now, to hold them against."""
    runs = tmp_path_factory.mktemp("reference") / "runs"
    shutil.copytree(walk.runs, runs, symlinks=True)

    def start(arguments, **how):
        return fork_server.start("snippet", [soak_standin.SNIPPET, *arguments], **how)

    return Soak(start, walk.settings[1:], read_reference(runs, "tiny"), False)


@pytest.fixture(scope="module")
def lives(soak, tmp_path_factory) -> dict[str, Told]:
    """Every kind of life once; those on disks of their own where this user may mount one."""

    def folder(name: str) -> Path:
        return tmp_path_factory.mktemp(name).resolve()

    prune, shortlist = soak.reference.number_of("prune"), soak.reference.number_of("shortlist")
    lived = {
        "prune": one_run(soak, folder("prune"), random.Random("suite/0"), first=prune, faults=7, alone=True),
        "shortlist": one_run(soak, folder("shortlist"), random.Random("suite/2"), first=shortlist, faults=7, alone=True),
        "three": several_runs(soak, folder("three"), random.Random("suite"), first=prune, number=3, alone=True),
    }
    lived |= {f"flip {number}": told for number, told in enumerate(flips(soak, folder("flips"), random.Random("suite"), number=2))}
    if can_mount(disk := folder("full")):
        lived["full"] = full_disk(soak, disk, random.Random("suite"), first=prune, times=2, alone=True)
        lived["read-only"] = read_only_disk(soak, folder("read-only"), random.Random("suite"), first=prune, alone=True)
    return lived


@pytest.fixture
def copy(soak, tmp_path) -> Path:
    """All that the walk has made, once more."""
    begin(soak.reference, tmp_path / "runs", len(soak.reference.places))
    return tmp_path / "runs"


def told_of(lives: dict[str, Told], name: str) -> Told:
    if name not in lives:
        pytest.skip("mounting a disk needs root")
    return lives[name]


@pytest.mark.parametrize("name", ["prune", "shortlist", "three", "flip 0", "flip 1", "full", "read-only"])
def test_whatever_befalls_a_run_the_student_is_the_same_bit_for_bit(name, lives):
    told = told_of(lives, name)
    assert told.wrong == [], (told.title, told.steps)


def test_the_faults_were_many_and_of_many_kinds(lives):
    faults = sum((told.faults for told in lives.values()), Counter())
    assert faults.total() >= LEAST_FAULTS and len(faults) >= 5, (faults, [told.steps for told in lives.values()])


def test_of_a_disk_that_cannot_be_written_to_what_is_done_is_reported(lives):
    assert told_of(lives, "read-only").faults == {"read-only disk": 1, "finished on a read-only disk": 3}


# Controls: what the soak looks at is seen.


def test_another_student_a_missing_file_and_one_left_over_are_seen(soak, copy):
    assert differences(soak.reference, copy) == half_made(soak.reference, copy) == []
    student = next(copy.glob("store/distill/*/checkpoint"))
    shutil.copyfile(next(copy.glob("store/prune/*/checkpoint/model.safetensors")), student / "model.safetensors")
    (student / "config.json").unlink()
    (student / "model.partial").touch()
    assert [line.split(" ", 1)[1] for line in differences(soak.reference, copy)] == ["is missing", "is not what it is undisturbed", "is left over"]
    assert any("says that it is done" in line for line in half_made(soak.reference, copy))


@pytest.mark.parametrize(("code", "stderr", "is_wrong"), [
    (1, "error: x: Input/output error\n", False), (130, "interrupted; what is done is kept\n", True), (1, "", True), (0, "a warning\n", True), (0, "", False),
    (1, "Traceback (most recent call last):\n  File\nOSError: x\n", True), (-9, "", True), (3, "error: x\n", True),
])  # fmt: skip
def test_an_end_that_is_not_one_line_is_seen(code, stderr, is_wrong):
    assert bool(Ended(code, "", stderr, 1.0, Fault("EIO")).wrong()) == is_wrong


@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -9), (signal.SIGTERM, 130), (signal.SIGINT, 130)])
def test_a_signal_ends_a_run_as_it_should(number, code):
    assert codes_of(number) == (code,)


@pytest.mark.parametrize(("pids", "is_wrong"), [("11222", False), ("11", False), ("1121", True)])
def test_a_stage_that_two_processes_do_by_turns_is_seen(tmp_path, pids, is_wrong):
    file = tmp_path / "runs" / "store" / "prune" / "key" / "plan.json"
    assert bool(done_twice("".join(f"{pid} o {file}\n" for pid in pids), tmp_path / "runs", set())) == is_wrong


def test_a_stage_that_is_finished_twice_is_seen(tmp_path):
    file = tmp_path / "runs" / "store" / "prune" / "key" / "done.json"
    assert done_twice(f"1 n {file}\n2 n {file}\n", tmp_path / "runs", set()) and done_twice(f"1 n {file}\n", tmp_path / "runs", {file.parent})
    assert not done_twice(f"1 n {file}\n", tmp_path / "runs", set())
