"""The library's stand-in where there is none: the same SOAK_ variables, heard from within, by what Python says of its own calls on files.

It reaches opening, renaming, removing, making folders and syncing; not single writes and reads, and nothing that other languages' code calls. `snippet` is
what to run in the place of `python -m minitron.run`.
"""

import os
import sys
from pathlib import Path

SNIPPET = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import soak_standin; sys.exit(soak_standin.main(sys.argv[1:]))"
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


class Plan:
    """What the environment says, and how often it has been asked."""

    def __init__(self) -> None:
        self.under, self.calls = os.environ["SOAK_UNDER"], os.environ.get("SOAK_CALLS", "")
        self.action, _, number = os.environ.get("SOAK_DO", "nothing 0").partition(" ")
        self.number, self.at, self.seen = int(number), int(os.environ.get("SOAK_AT", "0")), 0
        self.is_after, self.strikes = os.environ.get("SOAK_WHEN") == "after", False

    def hear(self, event: str, args: tuple) -> None:
        """An event of Python's; raises OSError where the call is to fail."""
        if self.strikes:  # the call before this one is through
            self.strikes = False
            self._strike()
        kind, path = _call_of(event, args)
        if kind is None or kind not in self.calls or not _text(path).startswith(self.under):
            return
        self.seen += 1
        if self.seen < self.at:
            return
        if self.action == "stay" or (self.action == "once" and self.seen == self.at):
            raise OSError(self.number, os.strerror(self.number), _text(path))
        if self.seen == self.at:
            self.strikes = self.is_after
            if not self.is_after:
                self._strike()

    def _strike(self) -> None:
        if self.action == "kill":
            os.kill(os.getpid(), self.number)
        elif self.action == "vanish":
            os.rename(os.environ["SOAK_VANISHES"], os.environ["SOAK_VANISHES"] + ".vanished")


def _text(path: object) -> str:
    return os.fsdecode(path) if isinstance(path, str | bytes | os.PathLike) else ""


def _call_of(event: str, args: tuple) -> tuple[str | None, object]:
    if event == "open":
        path, _mode, flags = args
        return ("o" if flags & WRITING else "r"), path
    if event == "os.rename":
        return "n", args[1]
    if event in ("os.remove", "os.rmdir"):
        return "u", args[0]
    return ("m" if event in ("os.mkdir", "os.symlink") else None), args[-1 if event == "os.symlink" else 0] if args else ""


def main(arguments: list[str]) -> int:
    import minitron.run

    sys.argv = [minitron.run.__file__, *arguments]
    sys.addaudithook(Plan().hear)
    return minitron.run.main()
