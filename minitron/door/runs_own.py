"""A run's own settings, found by its name: for stages that use what is done."""

from collections.abc import Collection
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from minitron.settings.run import Settings, Stage
from minitron.walk.saved import SETTINGS_FILE
from minitron.walk.stage import UsingStage
from minitron.walk.table import stages


def with_the_runs_own(config: DictConfig, given: Collection[str]) -> DictConfig:
    """Of a stage that uses what is done, asked for with a run's name and without a model or an experiment, that run's settings under those that are given.

    `given` are the names on the command line. Any other config is returned as it is. Raises ValueError where the kept settings cannot be read.
    """
    names = {name.lstrip("+~").partition("@")[0] for name in given}
    uses = config.stage is Stage.merge or isinstance(stages().get(config.stage.value), UsingStage)
    if not uses or "run_name" not in names or any(name == "experiment" or name.startswith("teacher.") for name in names):
        return config
    file = Path(config.runs_folder) / config.run_name / SETTINGS_FILE
    if not file.exists():
        return config
    try:
        saved = OmegaConf.merge(OmegaConf.structured(Settings), OmegaConf.load(file))
    except (OmegaConfBaseException, YAMLError, OSError) as error:
        raise ValueError(f"{file} cannot be read ({str(error).splitlines()[0]}); delete it, and give the run's settings on the command line") from None
    for name in names | {"runs_folder"}:  # which may have been moved
        OmegaConf.update(saved, name, OmegaConf.select(config, name))
    return saved
