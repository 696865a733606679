"""What the system refuses is one line and an exit code, whoever hears of it first."""

import errno
import os
import resource

import numpy as np
import pytest

from minitron.door.mistakes import users_mistakes


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


def test_an_error_of_another_kind_goes_on(capsys):
    """The control."""
    with pytest.raises(RuntimeError), users_mistakes():
        raise RuntimeError("a fault of ours")
