"""SIGINT and SIGTERM, heard from a command's first import to its last word: one line, exit code 130.

An interrupt is raised as KeyboardInterrupt wherever Python happens to be, and not from everywhere does it get through. A callback of other languages' code or
a finaliser has it printed and forgotten; a library makes an error of its own of it, or passes it over; an import that is broken off there is taken for a
library that is missing. So what was heard is remembered: within an import it waits for the import's end, and where nobody deals with it it is raised again.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import FrameType

NUMBERS = (signal.SIGINT, signal.SIGTERM)
INTERRUPTED = 130
LINE = "interrupted; what is done is kept, and the same command goes on from there\n"
AGAIN_SECONDS = 0.05  # after which an interrupt that was passed over is raised again
IMPORT_SECONDS = 2.0  # an import that takes longer is not waited for
IMPORTING = "<frozen importlib._bootstrap>"

_heard_at: float | None = None  # when the first was heard, of time.monotonic()
_stderr = 2  # where the line goes


def hear() -> None:
    """From here on SIGINT and SIGTERM raise KeyboardInterrupt, also in what a shell has started in the background, which would ignore the first."""
    global _heard_at
    _heard_at = None
    for number in NUMBERS:
        signal.signal(number, _on_signal)
    signal.signal(signal.SIGALRM, _on_alarm)
    sys.unraisablehook = _unless_heard(sys.unraisablehook)
    threading.excepthook = _unless_heard(threading.excepthook)
    sys.excepthook = _at_the_top(sys.excepthook)


def heard() -> bool:
    """Whether there was one: whatever fails from then on does so because of it."""
    return _heard_at is not None


def nothing_left(code: int) -> None:
    """From here on nothing is left to do but to go, which takes torch a moment: an interrupt then ends it, with the command's own exit code."""
    for number in NUMBERS:
        signal.signal(number, lambda _number, _frame: _leave(code))
    signal.setitimer(signal.ITIMER_REAL, 0)
    _flush()


def say() -> None:
    """The line, on whatever stderr is."""
    with suppress(OSError):
        os.write(_stderr, LINE.encode())


def say_on(file: int) -> None:
    """From here on the line goes to this file: while 2 is another one than the command's stderr."""
    global _stderr
    _stderr = file


def _on_signal(_number: int, frame: FrameType | None) -> None:
    global _heard_at
    if _heard_at is None:
        _heard_at = time.monotonic()
        signal.setitimer(signal.ITIMER_REAL, AGAIN_SECONDS, AGAIN_SECONDS)
    _interrupt(frame)


def _on_alarm(_number: int, frame: FrameType | None) -> None:
    if heard() and not _is_dealt_with() and signal.getsignal(signal.SIGINT) is _on_signal:  # nobody holds them back
        _interrupt(frame)


def _interrupt(frame: FrameType | None) -> None:
    if not _is_importing(frame):
        raise KeyboardInterrupt
    if time.monotonic() - _heard_at > IMPORT_SECONDS:
        say()
        _leave(INTERRUPTED)


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None and frame.f_code.co_filename != IMPORTING:
        frame = frame.f_back
    return frame is not None


def _is_dealt_with() -> bool:
    """Whether this comes within a block that is there because of an interrupt: finally, except, the end of with."""
    error, seen = sys.exception(), set()
    while error is not None and id(error) not in seen:
        if isinstance(error, KeyboardInterrupt):
            return True
        seen.add(id(error))
        error = error.__context__
    return False


def _unless_heard(hook: Callable) -> Callable:
    """What fails in finalisers and threads is told, but for what an interrupt has broken off."""
    return lambda what: None if heard() else hook(what)


def _at_the_top(hook: Callable) -> Callable:
    """An interrupt that came while another one was being answered is nobody's any more."""

    def at_the_top(kind: type[BaseException], error: BaseException, trace: object) -> None:
        if heard():
            say()
            _leave(INTERRUPTED)
        hook(kind, error, trace)

    return at_the_top


def _leave(code: int) -> None:
    _flush()
    os._exit(code)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, RuntimeError, AttributeError):  # nobody reads it any more, or it is being written
            stream.flush()
