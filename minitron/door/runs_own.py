"""A run's own settings, found by its name: for stages that use what is done, and of all runs for who asks what is used at all."""

import json
from collections.abc import Callable, Collection
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from minitron.settings.run import Settings, Stage
from minitron.walk.pipeline import finished_laps
from minitron.walk.saved import SETTINGS_FILE
from minitron.walk.stage import UsingStage
from minitron.walk.table import stages


def with_the_runs_own(config: DictConfig, given: Collection[str]) -> DictConfig:
    """Of a stage that uses what is done, asked for with a run's name and without a model or an experiment, that run's settings under those that are given.

    `given` are the names on the command line. Any other config is returned as it is. Raises ValueError where the kept settings cannot be read, and for a
    stage that works under the name of a run of another teacher: it would be the demo's.
    """
    names = {name.lstrip("+~").partition("@")[0] for name in given}
    uses = config.stage is Stage.merge or isinstance(stages().get(config.stage.value), UsingStage)
    if "run_name" not in names or any(name == "experiment" or name.startswith("teacher.") for name in names):
        return config
    file = Path(config.runs_folder) / config.run_name / SETTINGS_FILE
    if not file.exists():
        return config
    if not uses:
        _check_whose(file, config)
        return config
    try:
        saved = _saved(file)
    except ValueError as error:
        raise ValueError(f"{error}; delete it, and give the run's settings on the command line") from None
    for name in names | {"runs_folder"}:  # which may have been moved
        OmegaConf.update(saved, name, OmegaConf.select(config, name))
    return saved


def _check_whose(file: Path, config: DictConfig) -> None:
    try:
        saved = _saved(file).teacher
    except ValueError:
        return  # whoever they were of, they are written anew
    for name in ("path", "gguf", "package"):
        if saved[name] is not None and saved[name] != config.teacher[name]:
            whose = f"teacher.{name}={saved[name]}"
            raise ValueError(f"run_name={config.run_name} is the run of {whose}, and stage={config.stage.value} wants its settings again: {whose} and what "
                             f"else was given; or experiment=tiny, for the demo by that name")  # fmt: skip


def places_used(folder: Path, say: Callable[[str], None]) -> tuple[dict[str, set[str]], bool]:
    """By the name of every run in a runs folder the places in the store, stage/key, that its settings and its summary lead to; and whether that is known of
    all: not of a run whose settings cannot be read, or whose teacher is gone."""
    used, all_known = {}, True
    for run in sorted(path.parent for path in (*folder.glob(f"*/{SETTINGS_FILE}"), *folder.glob("*/summary.json"))):
        used.setdefault(run.name, set()).update(_summarised(run / "summary.json"))
    for file in sorted(folder.glob(f"*/{SETTINGS_FILE}")):
        try:
            saved = _saved(file)
            saved.runs_folder = str(folder)
            laps = finished_laps(OmegaConf.to_object(saved))
        except (ValueError, OmegaConfBaseException) as error:
            say(f"{file.parent.name}: what it uses is not known, so nothing is removed ({str(error).splitlines()[0]})")
            all_known = False
            continue
        used[file.parent.name] |= {"/".join(result.folder.parts[-2:]) for lap in laps for result in lap.results.values()}
    return used, all_known


def _summarised(path: Path) -> set[str]:
    """The results that a summary tells of."""
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
        laps = [summary["stages"], summary.get("depth_lap", {}).get("stages", {})]
        return {"/".join(Path(stage["path"]).parts[-2:]) for lap in laps for stage in lap.values()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return set()


def _saved(file: Path) -> DictConfig:
    try:
        return OmegaConf.merge(OmegaConf.structured(Settings), OmegaConf.load(file))
    except (OmegaConfBaseException, YAMLError, OSError) as error:
        raise ValueError(f"{file} cannot be read ({str(error).splitlines()[0]})") from None
