"""The door: `python -m minitron.run stage=prune key=value …`. Hydra stays on this side of it.

Exit codes: 0 done · 2 the user's mistake, one line on stderr · 1 anything else that failed · 130 interrupted.
"""

import os
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# One line and exit code 2 instead of Hydra's own several lines and 1; set by the user, it gives full traces as always.
_FULL_ERROR = os.environ.get("HYDRA_FULL_ERROR")
os.environ["HYDRA_FULL_ERROR"] = "1"

# What matters of its warnings (the slow reference kernels) is dealt with in families/ssd.py.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

# Threads of OpenMP that wait for each other spin for milliseconds: on a machine that has other work too, in place of who they wait for. A spin of
# about 0.1 ms costs a step 6 to 9 % where nothing else runs (benchmarks/README.md). Read when torch is loaded.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

# Read when torch and Triton are loaded, and by GPUs alone: buffers of the loss come and go without leaving holes; what autotuning chose stays on disk.
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
os.environ.setdefault("TRITON_CACHE_AUTOTUNING", "1")

import hydra  # noqa: E402
from hydra.core.hydra_config import HydraConfig  # noqa: E402
from hydra.errors import HydraException, MissingConfigException  # noqa: E402
from omegaconf import DictConfig, OmegaConf  # noqa: E402
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException  # noqa: E402

from minitron.settings.composed import fill_in, register_schema, settings_of  # noqa: E402
from minitron.settings.run import Settings  # noqa: E402
from minitron.settings.teachers import CONF_FOLDER, is_stored  # noqa: E402


def stage_lines() -> str:
    """What --help says of the stages, in the order of a walk: the first sentence of each one's file."""
    from minitron.walk.table import order_of, stages, stored_stages

    walk = order_of(Settings())
    groups = {
        "Stages of a walk, each of which runs what it needs first (stage=all, the default, runs them and writes the report)": walk,
        "Stages that run where settings ask for them, or by name": [name for name in stored_stages() if name not in walk],
        "Stages that use what is done and run nothing else": [name for name in stages() if name not in stored_stages()],
    }
    says = {name: sys.modules[f"minitron.stages.{name}"].__doc__.partition("\n")[0] for name in stages()}
    return "\n\n".join("\n".join([f"{title}:", *(f"  {name:<14} {says[name]}" for name in names)]) for title, names in groups.items())


_shows_config = False
_asked_for_help = {"--help", "-h"} & set(sys.argv)
register_schema(stage_lines() if _asked_for_help else "")


@hydra.main(version_base="1.3", config_path=str(CONF_FOLDER), config_name="run")
def _run(config: DictConfig) -> None:
    from minitron.machine import processes
    from minitron.walk.console import Console
    from minitron.walk.pipeline import run_pipeline
    from minitron.walk.saved import with_the_runs_own

    with users_mistakes():
        overrides = HydraConfig.get().overrides.task
        if _shows_config:
            fill_in(config)
            sys.stdout.write(OmegaConf.to_yaml(config))
            return
        settings = settings_of(with_the_runs_own(config, [override.partition("=")[0] for override in overrides]))
        check_teacher_overrides(settings, overrides)
        run_pipeline(settings, Console(quiet=processes.rank() > 0))


def check_teacher_overrides(settings: Settings, overrides: list[str]) -> None:
    """Refuse what would be passed over: how to train a tiny teacher where none is trained. Raises ValueError."""
    given = [override.partition("=")[0] for override in overrides if override.lstrip("+").startswith("teacher.train.")]
    if given and is_stored(settings):
        raise ValueError(f"{given[0]} is given, but the tiny teacher that comes with the package is not trained here; teacher.train_anew=true trains one")


@contextmanager
def users_mistakes() -> Iterator[None]:
    """Turns what the user can mend into one line and exit code 2."""
    try:
        yield
    except (ValueError, HydraException, OmegaConfBaseException) as error:
        if _FULL_ERROR:
            raise
        print(f"error: {one_line(error)}", file=sys.stderr)
        sys.exit(2)


def _shown_filled_in(arguments: list[str]) -> list[str]:
    """Arguments without `--cfg job`, which is then shown by the job itself: with what follows from the model and the budget."""
    global _shows_config
    for words in (["--cfg", "job"], ["-c", "job"], ["--cfg=job"]):
        for place in range(len(arguments)):
            if arguments[place : place + len(words)] == words and not {"-p", "--package", "--resolve"} & set(arguments):
                _shows_config = True
                return arguments[:place] + arguments[place + len(words) :]
    return arguments


def main() -> int:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a scheduler's notice is an interrupt too
    try:
        sys.argv[1:] = _shown_filled_in([_verbatim(argument) for argument in sys.argv[1:]])
        with users_mistakes():
            _run()
    except KeyboardInterrupt:
        print("interrupted; what is done is kept, and the same command goes on from there", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader, `head` say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _verbatim(argument: str) -> str:
    """`prompt=…` and `teacher.package=NAME==VERSION` as Hydra reads them back unchanged, whatever they hold."""
    name, given, text = argument.partition("=")
    if name not in ("prompt", "teacher.package") or not given or text == "null" or text[:1] in "'\"":
        return argument
    escaped = re.sub(r"\\+(?='|$)", lambda some: some[0] * 2, text).replace("'", "\\'").replace("${", "\\${")  # of backslashes, only those before a quote count
    return f"{name}='{escaped}'"


def one_line(error: Exception) -> str:
    """The message of a user's mistake in one line; Hydra's and OmegaConf's are put in our words."""
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    key = getattr(cause, "full_key", None)
    first = str(cause).strip().splitlines()[0]
    if isinstance(cause, ConfigAttributeError | ConfigKeyError):
        return f"{key} is no setting; --cfg job lists them all"
    if isinstance(cause, OmegaConfBaseException) and key:
        return f"{key}: {first}"
    if isinstance(error, MissingConfigException) and error.options:
        return f"{error.missing_cfg_file} is not in conf/; there are: {', '.join(error.options)}"
    return " ".join(str(error).split())


if __name__ == "__main__":
    sys.exit(main())
