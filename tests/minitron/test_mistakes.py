"""What the system refuses is one line and an exit code, whoever hears of it first."""

import errno
import os
import resource

import numpy as np
import pytest

from minitron.door.mistakes import users_mistakes
from minitron.walk.integrity import named


def said(capsys, action) -> tuple[int, str]:
    """The exit code and stderr of something that fails at the door."""
    with pytest.raises(SystemExit) as ended, users_mistakes():
        action()
    return ended.value.code, capsys.readouterr().err


@pytest.fixture
def small_files():
    """Files may have 10,000 bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_numpy_finds_full_is_one_line(small_files, capsys, tmp_path):
    """numpy's own error has no number of the system's."""
    code, line = said(capsys, lambda: np.save(tmp_path / "rows.npy", np.zeros(10_000)))
    assert code == 2 and line.count("\n") == 1 and line.startswith("error: no room is left on the disk")


@pytest.mark.parametrize(("number", "code", "words"), [
    (errno.ENOSPC, 2, "no room is left"), (errno.EROFS, 2, "it cannot be written to (Read-only file system)"),
    (errno.EACCES, 2, "this user may not use it so (Permission denied)"), (errno.EIO, 1, "Input/output error"),
])  # fmt: skip
def test_what_the_system_refuses_is_one_line_that_names_the_file(number, code, words, capsys):
    def refused():
        raise OSError(number, os.strerror(number), "/runs/file")

    found, line = said(capsys, refused)
    assert found == code and line.startswith("error: /runs/file: ") and line.count("\n") == 1 and words in line


@pytest.mark.parametrize(("number", "named"), [(errno.ENOSPC, "/runs/to"), (errno.EIO, "/runs/from")], ids=["full", "control: unreadable"])
def test_of_a_copy_that_finds_no_room_the_file_that_is_written_is_named(number, named, capsys):
    def copied():
        raise OSError(number, os.strerror(number), "/runs/from", None, "/runs/to")

    assert said(capsys, copied)[1].startswith(f"error: {named}: ")


@pytest.mark.parametrize(("processes", "ends"), [("2", SystemExit), ("1", RuntimeError)], ids=["of a launch", "control: alone"])
def test_a_process_that_has_gone_is_one_line_in_those_that_are_left(processes, ends, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", processes)
    with pytest.raises(ends), users_mistakes():
        raise RuntimeError("[/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:39639.")
    assert capsys.readouterr().err.startswith("error: another process of this run has gone") == (ends is SystemExit)


def test_a_full_disk_that_numpy_tells_of_is_named_by_who_knows_the_folder(small_files, capsys, tmp_path):
    def written():
        with named(tmp_path):
            np.save(tmp_path / "rows.npy", np.zeros(10_000))

    assert said(capsys, written)[1].startswith(f"error: {tmp_path}: no room is left on the disk")


def test_an_error_of_another_kind_goes_on(capsys):
    """The control."""
    with pytest.raises(RuntimeError), users_mistakes():
        raise RuntimeError("a fault of ours")
