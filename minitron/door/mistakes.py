"""A user's mistakes: one line and exit code 2, whether found here, by Hydra or by OmegaConf; and what the system refuses, a full disk say, in one line too."""

import errno
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from minitron.machine.interrupts import heard
from minitron.machine.processes import world_size
from minitron.settings.names import did_you_mean, nearest, no_setting
from minitron.walk.shown import shown
from minitron.walk.store import NOT_WRITABLE

MOST_LETTERS = 2000  # of a line: what is shown of a value may be anything
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
NUMPYS = re.compile(r"Not enough free space to write|\d+ requested and \d+ written")  # of a disk that is full, without an errno
OS_ERROR = re.compile(r"(.*?)\s*\(os error (\d+)\)")  # as safetensors words it
PROCESS_GONE = re.compile(r"gloo/transport|Dist\w+Error|NCCL")  # as torch words it in the processes that are left


@contextmanager
def users_mistakes() -> Iterator[None]:
    """Turns what the user can mend into one line and exit code 2, and what the system refuses otherwise into one line and 1."""
    try:
        yield
    except Exception as error:
        if heard():  # a library has made an error of its own of an interrupt
            raise KeyboardInterrupt from error
        said = _said(error)
        if said is None or os.environ.get("MINITRON_FULL_ERROR"):
            raise
        line = shown(said[0])
        print(f"error: {line if len(line) <= MOST_LETTERS else line[:MOST_LETTERS] + '…'}", file=sys.stderr)
        sys.exit(said[1])


def _said(error: Exception) -> tuple[str, int] | None:
    """The line and the exit code; None for what is neither the user's nor the system's."""
    if isinstance(error, ValueError | HydraException | OmegaConfBaseException) or _is_too_large(error):
        return one_line(error), 2
    if isinstance(error, RuntimeError) and world_size() > 1 and PROCESS_GONE.search(f"{type(error).__name__} {error}"):
        return "another process of this run has gone, or cannot be reached; what is done is kept, and the same command goes on from there", 1
    if isinstance(error, OSError) and error.errno is None and error.args and NUMPYS.match(str(error.args[0])):
        error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), error.filename)
    named = OS_ERROR.search(str(error)) if type(error).__name__ == "SafetensorError" else None
    if named:
        error = OSError(int(named[2]), os.strerror(int(named[2])))
    return _systems(error) if isinstance(error, OSError) and error.errno is not None and not isinstance(error, ConnectionError | TimeoutError) else None


def _is_too_large(error: Exception) -> bool:
    """OmegaConf's, of a number that no float is."""
    return isinstance(error, OverflowError) and "full_key: " in str(error)


def _systems(error: OSError) -> tuple[str, int]:
    """What the system refused, of which file, and what to do."""
    name = error.filename2 if error.errno in NO_ROOM + NOT_WRITABLE and error.filename2 else error.filename  # of a copy, where it goes to
    place = f"{os.fsdecode(name)}: " if isinstance(name, str | bytes) else ""
    if error.errno in NO_ROOM:
        return f"{place}no room is left on the disk; what is done is kept, and the same command goes on from there once there is some", 2
    if error.errno in NOT_WRITABLE:
        barred = "it cannot be written to" if error.errno == errno.EROFS else "this user may not use it so"
        return f"{place}{barred} ({os.strerror(error.errno)}); what is done is kept", 2
    return f"{place}{error.strerror or os.strerror(error.errno)}; what is done is kept, and the same command goes on from there", 1


def one_line(error: Exception) -> str:
    """The message of a user's mistake in one line; Hydra's and OmegaConf's are put in our words."""
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    key = getattr(cause, "full_key", None)
    first = str(cause).strip().splitlines()[0]
    if isinstance(cause, ConfigAttributeError | ConfigKeyError):
        return _no_key(str(key))
    if isinstance(cause, OmegaConfBaseException) and key:
        return _no_member(key, first) or f"{key}: {first}"
    if isinstance(error, MissingConfigException) and error.options:
        group, _, name = str(error.missing_cfg_file).rpartition("/")
        return f"{group}/{name} is not in conf/; there are: {', '.join(error.options)}{did_you_mean(name, error.options)}"
    if isinstance(error, HydraException):
        return _hydras(error)
    if _is_too_large(error):
        return f"{re.search('full_key: (.*)', str(error))[1]}: {first}"
    return " ".join(str(error).split())


def _no_key(key: str) -> str:
    if key == "experiment" or key.startswith("experiment."):
        return f"{key} is no setting; the file of an experiment must begin with the line `# @package _global_`"
    return no_setting(key)


def _no_member(key: str, message: str) -> str | None:
    """For a word that is none of an Enum's but near to one of many."""
    found = re.search(r"Invalid value '(.*)', expected one of \[(.*)\]", message)
    near = nearest(found[1], found[2].split(", ")) if found else None
    return f"{key} is {found[1]!r}; did you mean {near}?" if near else None


def _hydras(error: HydraException) -> str:
    """Arguments that Hydra refuses."""
    several = re.match(r"Ambiguous value for argument '(.*?)=(.*?)'\n", str(error), re.DOTALL)
    if several:
        name, value = several.groups()
        return f"{name} is {value!r}, several values; -m runs one job for each, and a list goes in brackets: {name}='[{value}]'"
    if isinstance(error, OverrideParseException):
        name, _, value = error.override.partition("=")
        return f"{name} is {value!r}, which cannot be read as a value ({str(error).splitlines()[0]})"
    in_file = re.match(r"In '(.+?)':.*?\n\s*full_key: (\S+)", str(error), re.DOTALL)
    if in_file:
        return f"{in_file[1]}.yaml: {_no_key(in_file[2])}"
    return " ".join(str(error).split()).replace("Additional config directory", "--config-dir: the folder")
