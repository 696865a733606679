"""A short soak (`make soak` is the long one): whatever befalls a run, the next ones end in the student of a walk that nothing befell."""

import random
import shutil
import signal
from collections import Counter
from pathlib import Path

import pytest
import soak_standin
from soak_faults import Fault, codes_of
from soak_lives import Soak, can_mount, done_twice, flips, full_disk, one_run, read_only_disk, several_runs
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


@pytest.fixture
def disk(tmp_path) -> Path:
    """A folder in which a disk can be mounted."""
    if not can_mount(tmp_path):
        pytest.skip("mounting a disk needs root")
    return tmp_path


@pytest.fixture
def copy(soak, tmp_path) -> Path:
    """All that the walk has made, once more."""
    begin(soak.reference, tmp_path / "runs", len(soak.reference.places))
    return tmp_path / "runs"


def test_after_faults_of_every_kind_the_student_is_the_same_bit_for_bit(soak, tmp_path):
    faults: Counter = Counter()
    for number, (stage, times) in enumerate({"prune": 8, "search": 6, "shortlist": 6}.items()):
        folder = tmp_path / stage
        folder.mkdir()
        told = one_run(soak, folder, random.Random(f"suite/{number}"), first=soak.reference.number_of(stage), faults=times, alone=True)
        assert told.wrong == [], told.steps
        faults += told.faults
    assert faults.total() >= LEAST_FAULTS and len(faults) >= 5, faults


def test_of_three_runs_on_a_store_some_are_killed_and_the_others_end_as_ever(soak, tmp_path):
    told = several_runs(soak, tmp_path, random.Random("suite"), first=soak.reference.number_of("prune"), number=3, alone=True)
    assert told.wrong == [], told.steps


def test_a_flipped_bit_is_named_and_the_next_run_heals_it(soak, tmp_path):
    for told in flips(soak, tmp_path, random.Random("suite"), number=2):
        assert told.wrong == [], (told.title, told.steps)


def test_a_disk_that_is_full_loses_nothing(soak, disk):
    told = full_disk(soak, disk, random.Random("suite"), first=soak.reference.number_of("prune"), alone=True)
    assert told.wrong == [] and told.faults.total() >= 1, told.steps


def test_of_a_disk_that_cannot_be_written_to_what_is_done_is_reported(soak, disk):
    told = read_only_disk(soak, disk, random.Random("suite"), first=soak.reference.number_of("prune"), alone=True)
    assert told.wrong == [], told.steps
    assert told.faults == {"read-only disk": 1, "finished on a read-only disk": 3}


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

