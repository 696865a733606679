"""Panics of libraries written in Rust, which are neither exceptions nor quiet."""

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from minitron.machine import interrupts

STDERR = 2


@contextmanager
def panics_caught() -> Iterator[None]:
    """Raises RuntimeError in a panic's stead, with what it says. What is written on stdout and stderr meanwhile, also past Python as a panic's trace is, comes
    when this has ended well, and not at all where it fails: the error says it.
    """
    with _held_back(1), _held_back(STDERR):
        try:
            yield
        except BaseException as error:
            if type(error).__name__ != "PanicException":
                raise
            raise RuntimeError(str(error) or "it panicked") from None


@contextmanager
def _held_back(output: int) -> Iterator[None]:
    try:
        before = os.dup(output)
    except OSError:  # there is none
        yield
        return
    ended_well = False
    with tempfile.TemporaryFile() as said:
        _flush(output)
        _turn(output, said.fileno(), line_to=before)
        try:
            yield
            ended_well = True
        finally:
            _flush(output)
            _turn(output, before, line_to=output)
            os.close(before)
            said.seek(0)
            with suppress(OSError):  # its reader has gone
                os.write(output, said.read() if ended_well else b"")


def _turn(output: int, file: int, line_to: int) -> None:
    """An interrupt's line, which may have to be said meanwhile, is not held back."""
    os.dup2(file, output)
    if output == STDERR:
        interrupts.say_on(line_to)


def _flush(output: int) -> None:
    with suppress(OSError, ValueError, AttributeError):  # without a reader, closed, None
        (sys.stderr if output == STDERR else sys.stdout).flush()
