"""From what Hydra composed to Settings: what an experiment leaves open is filled in, and what nobody gave is asked for."""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any, get_origin

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from memory_budget.budget import PRESETS
from minitron.settings.derived import budget_of, workload_of
from minitron.settings.follow import MOST_CONTEXT, Model, followed, run_name_of
from minitron.settings.names import is_setting, no_setting, setting_groups, setting_types
from minitron.settings.run import Settings
from minitron.settings.teachers import CONF_FOLDER, base_architecture, max_positions
from minitron.settings.words import for_hydra
from nas.axes import AXES

OPEN = "${follows:"  # what an experiment writes for a setting that follows from the model and the budget


def settings_of(config: DictConfig, *, processes: int = 1) -> Settings:
    """The settings, all there. Raises ValueError naming one that is missing, or what is wrong with the model that others follow from."""
    check_names(config)
    fill_in(config, processes=processes)
    if missing := sorted(OmegaConf.missing_keys(config)):
        raise ValueError(f"{missing[0]} has no value; it must be set, e.g. {missing[0]}=…")
    return OmegaConf.to_object(config)


def check_names(config: DictConfig) -> None:
    """Refuse names that are no settings, and groups and lists that are something else, as ${seed} would be. Raises ValueError."""
    kinds = dict.fromkeys(setting_groups(), (DictConfig, "a group of settings"))
    containers = {list: (ListConfig, "a list"), dict: (DictConfig, "a mapping")}
    kinds |= {name: containers[get_origin(kind)] for name, kind in setting_types().items() if get_origin(kind) in containers}
    for name, (kind, called) in kinds.items():
        with suppress(OmegaConfBaseException):  # what leads to nothing is told of where it is read, or follows from the model
            value = OmegaConf.select(config, name)
            if value is not None and not isinstance(value, kind):
                raise ValueError(f"{name} is {value!r}, but {name} is {called}")
    for name in unknown_names(OmegaConf.to_container(config)):
        raise ValueError(no_setting(name))


def unknown_names(values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Dotted names that are no settings: what a + has added."""
    for key, value in values.items():
        name = f"{prefix}{key}"
        if not is_setting(name):
            yield name
        elif name in setting_groups() and isinstance(value, dict):
            yield from unknown_names(value, f"{name}.")


def compose_settings(*words: str, config_dir: str | None = None, processes: int = 1) -> Settings:
    """The settings of what would be said on the command line, e.g. compose_settings("teacher.path=MODEL", "budget=l4"). Raises ValueError or what Hydra does.

    `config_dir` is --config-dir: a folder with an experiment/ of one's own; `processes` as launched.
    """
    from hydra import compose, initialize_config_dir

    register_schema()
    search_path = [f"hydra.searchpath=[file://{config_dir}]"] if config_dir else []
    with initialize_config_dir(str(CONF_FOLDER), version_base="1.3"):
        return settings_of(compose("run", overrides=[*search_path, *for_hydra(words)]), processes=processes)


def register_schema() -> None:
    """The types that conf/run.yaml is held against."""
    from hydra.core.config_store import ConfigStore

    ConfigStore.instance().store(name="settings_schema", node=Settings)


def fill_in(config: DictConfig, *, processes: int = 1) -> None:
    """Every ${follows:} gets its value, by the model and the budget (and rows at once by the processes of this launch), and `followed` their names."""
    open_names = open_settings(config)
    if not open_names:
        return
    part = _model_part(config)
    if part.teacher.path is None and part.teacher.gguf is None and part.teacher.package is None:
        raise ValueError("teacher.path is null; experiment=own is for a model of yours: teacher.path=DIR_OR_HUB_ID (or teacher.gguf, teacher.package)")
    positions = max_positions(part)  # refuses what is no model before anything is asked for
    if "budget.name" in open_names:
        if config.budget.device_gib is None:
            raise ValueError(f"budget.name has no value; name the card that the model must fit, budget={'|'.join(PRESETS)}, or its GiB, e.g. budget=24")
        config.budget.name = None
    text = config.data.files or config.data.dataset or config.data.arithmetic.problems
    values = {
        "run_name": run_name_of(part.teacher),
        "workload.context_tokens": min(positions, MOST_CONTEXT),
        "data.embedded": "code" if text else "prose",
    }
    values = {name: value for name, value in values.items() if name in open_names}
    _set(config, values)
    if "search.layers.low" in open_names:
        _close_given_axes(config, open_names)
    part = _model_part(config)
    model = Model(base_architecture(part), positions, workload_of(part), budget_of(part), processes)
    values |= followed(model, open_settings(config))
    _set(config, values)
    config.followed = sorted(values)


def open_settings(config: DictConfig, prefix: str = "") -> set[str]:
    """Full names of the settings that an experiment leaves open."""
    names = set()
    for key in config:
        if OmegaConf.is_interpolation(config, key):
            if str(config._get_node(key)._value()).startswith(OPEN):
                names.add(f"{prefix}{key}")
        elif isinstance(config._get_node(key), DictConfig) and config[key] is not None and not OmegaConf.is_missing(config, key):
            names |= open_settings(config[key], f"{prefix}{key}.")
    return names


def _model_part(config: DictConfig) -> Settings:
    """Of the settings those that others follow from: the model, the workload, the budget."""
    given = {name: OmegaConf.to_object(config[name]) for name in ("teacher", "base", "budget", "workload") if not open_settings(config[name])}
    return Settings(**given)


def _set(config: DictConfig, values: dict) -> None:
    for name, value in values.items():
        OmegaConf.update(config, name, value)


def _close_given_axes(config: DictConfig, open_names: set[str]) -> None:
    """An axis whose options are given, or all of them where the architecture itself or the order of removal is, follows from nothing."""
    fixed = any(value is not None for value in config.search.fixed.values()) or config.search.layer_order is not None
    for name in AXES:
        axis = config.search[name]
        given = {key: axis[key] for key in ("values", "high", "step") if axis[key] is not None}
        if f"search.{name}.low" in open_names and (fixed or given):
            axis.low = None
