"""Output whose reader may go before the work is done: what is left to say then goes nowhere, and the work goes on."""

import errno
import io
import os
import sys

GONE = (errno.EPIPE, errno.EIO)  # of a pipe without a reader; of a terminal that has hung up


class _Lasting(io.FileIO):
    """A file descriptor that a reader may leave."""

    def write(self, data) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in GONE:
                raise
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.fileno())
        os.close(nowhere)
        return len(data)


def outlive_readers() -> None:
    """Makes sys.stdout and sys.stderr such files, where they are files of the system's at all and not yet such."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        buffer = getattr(stream, "buffer", None)
        if type(getattr(buffer, "raw", buffer)) is not io.FileIO:  # something else's, a notebook's or a test's
            continue
        stream.flush()
        lasting = _Lasting(stream.fileno(), "wb", closefd=False)
        below = io.BufferedWriter(lasting) if hasattr(buffer, "raw") else lasting  # PYTHONUNBUFFERED has none
        again = io.TextIOWrapper(below, stream.encoding, stream.errors, line_buffering=stream.line_buffering, write_through=stream.write_through)
        setattr(sys, name, again)
