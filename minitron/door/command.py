"""The command: words to settings, settings to a run. Hydra composes, and runs one job, or with -m several."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from minitron.door.composed import check_names, fill_in, register_schema, settings_of
from minitron.door.jobs import run_name_of_job
from minitron.door.mistakes import users_mistakes
from minitron.door.output import outlive_readers
from minitron.settings.run import Settings
from minitron.settings.teachers import CONF_FOLDER, is_stored
from minitron.settings.words import asks_for_help, for_hydra

register_schema()


def command(arguments: Sequence[str]) -> int:
    """Does what the arguments ask for; gives the exit code."""
    outlive_readers()
    if asks_for_help(arguments):
        from minitron.door.help import help_page

        print(help_page())
        return 0
    typed = sys.argv
    with users_mistakes():
        try:
            words, shows = _without_cfg_job(for_hydra(arguments))
            sys.argv = [typed[0], *words]
            _composed(typed, print_settings if shows else run_job)
        finally:
            sys.argv = typed
    return 0


def _without_cfg_job(arguments: list[str]) -> tuple[list[str], bool]:
    """Arguments without `--cfg job`, and whether it was there: the job itself prints its settings, with what follows from the model and the budget."""
    options = {"-p", "--package", "--resolve"} & {argument.partition("=")[0] for argument in arguments}
    for asks in (["--cfg", "job"], ["-c", "job"], ["--cfg=job"]):
        for place in range(len(arguments)):
            if arguments[place : place + len(asks)] == asks and not options:
                return arguments[:place] + arguments[place + len(asks) :], True
    return arguments, False


def _composed(typed: list[str], do: Callable[[DictConfig], None]) -> None:
    """Hydra reads the arguments; reports show those that were typed."""

    @hydra.main(version_base="1.3", config_path=str(CONF_FOLDER), config_name="run")
    def run(config: DictConfig) -> None:
        sys.argv = typed
        do(config)

    run()


def run_job(config: DictConfig) -> None:
    """One run, from its composed settings to its report."""
    from minitron.door.runs_own import with_the_runs_own
    from minitron.machine import processes
    from minitron.walk.console import Console
    from minitron.walk.pipeline import run_pipeline

    outlive_readers()  # in a process of a sweep too
    with users_mistakes():
        hydras = HydraConfig.get()
        check_names(config)
        config = with_the_runs_own(config, [override.partition("=")[0] for override in hydras.overrides.task])
        settings = settings_of(config, processes=processes.world_size())
        check_teacher_overrides(settings, hydras.overrides.task)
        if hydras.mode is RunMode.MULTIRUN:
            left_out = hydras.job.config.override_dirname.exclude_keys
            settings = replace(settings, run_name=run_name_of_job(settings.run_name, hydras.overrides.task, left_out))
        run_pipeline(settings, Console(quiet=processes.rank() > 0))


def print_settings(config: DictConfig) -> None:
    """All settings as YAML, with their values."""
    with users_mistakes():
        check_names(config)
        fill_in(config)
        sys.stdout.write(OmegaConf.to_yaml(config))


def check_teacher_overrides(settings: Settings, overrides: Sequence[str]) -> None:
    """Refuse what would be passed over: how to train a tiny teacher where none is trained. Raises ValueError."""
    given = [override.partition("=")[0] for override in overrides if override.lstrip("+").startswith("teacher.train.")]
    if given and is_stored(settings):
        raise ValueError(f"{given[0]} is given, but the tiny teacher that comes with the package is not trained here; teacher.train_anew=true trains one")
