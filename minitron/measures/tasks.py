"""Benchmarks: any task of lm-eval, by its own library (extra `eval`), which is imported only where a task is to run.

A task runs as `lm_eval run --model hf` runs it on the checkpoint's folder: same defaults, same seeds, one task at a time.
"""

import hashlib
import importlib.metadata
import io
import json
import logging
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from minitron.settings.evaluate import EvaluateSettings
from minitron.settings.names import did_you_mean
from minitron.sources.digests import content_digest
from minitron.walk.store import stage_key, write_json

EXTRA = "install it with: pip install 'minitron[eval]'"
# What a task's YAML, its code or its dataset can do wrong when it is loaded.
LOAD_ERRORS = (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, RuntimeError, yaml.YAMLError)


def tasks_identity(settings: EvaluateSettings) -> dict[str, Any] | None:
    """What a key says of the tasks: names, limit, lm-eval's version and every file of the folders; None without tasks. Imports no lm-eval.

    Raises ValueError for a folder that is none, and where lm-eval is not installed.
    """
    if not settings.tasks:
        return None
    try:
        version = importlib.metadata.version("lm-eval")
    except importlib.metadata.PackageNotFoundError:
        raise ValueError(f"evaluate.tasks is {list(settings.tasks)}, which needs the package lm-eval; {EXTRA}") from None
    return {"tasks": list(settings.tasks), "limit": settings.task_limit, "lm-eval": version, "files": _folder_digests(settings.task_folders)}


def check_tasks(settings: EvaluateSettings, store: Path) -> None:
    """Refuse tasks that are unknown or whose data cannot be loaded. Raises ValueError naming one.

    That takes seconds to minutes and lm-eval, so tasks that were found good are remembered in the store.
    """
    identity = tasks_identity(settings)
    if identity is None:
        return
    good = store / "tasks" / f"{stage_key('tasks', 1, identity, {})}.json"
    if not good.exists():
        for name in settings.tasks:
            load_task(name, settings)
        good.parent.mkdir(parents=True, exist_ok=True)
        write_json(good, identity)


def load_task(name: str, settings: EvaluateSettings) -> Any:
    """A task, group or tag by name, datasets included, as lm-eval's task manager gives it. Raises ValueError."""
    manager = _manager(tuple(settings.tasks), tuple(settings.task_folders))
    if name not in manager.all_tasks:
        folders = f" or in {', '.join(settings.task_folders)}" if settings.task_folders else " (evaluate.task_folders names folders of your own)"
        raise ValueError(f"evaluate.tasks names {name!r}, which is no task of lm-eval{folders}"
                         + (did_you_mean(name, manager.all_tasks) or "; `lm-eval ls tasks` lists them"))  # fmt: skip
    try:
        with _quiet():
            return manager.load([name])
    except LOAD_ERRORS as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"evaluate.tasks: {name} cannot be loaded ({type(error).__name__}: {reason})") from None


def task_identity(loaded: Mapping[str, Any], settings: EvaluateSettings) -> dict[str, Any]:
    """What the results of one loaded task follow from beside the model: its whole configuration, its local data and code, lm-eval's version."""
    configs = {name: task.dump_config() for name, task in loaded["tasks"].items()}
    for config in configs.values():
        config["metadata"] = {key: value for key, value in config.get("metadata", {}).items() if key != "config_source"}  # where its YAML lies
    groups = {name: str(group) for name, group in loaded["groups"].items()}
    text = re.sub(r" at 0x[0-9a-f]+", "", json.dumps([configs, groups], sort_keys=True, default=str))  # where a function lies says nothing
    files = sorted(_data_files(configs)) + [path for folder in settings.task_folders for path in sorted(Path(folder).rglob("*.py"))]
    return {"configuration": hashlib.sha256(text.encode()).hexdigest(), "files": [content_digest(path) for path in files], "limit": settings.task_limit,
            "lm-eval": importlib.metadata.version("lm-eval")}  # fmt: skip


def run_task(model: Any, tokenizer: Any, name: str, settings: EvaluateSettings) -> dict[str, Any]:
    """Results of the task, or of each that a group holds: {task: {"samples", "shots", "metrics": {metric: {value, standard_error, higher_is_better}}}}.

    A metric behind a filter of its own is named `metric (filter)`; a standard error is None where lm-eval has none. Texts end at every end_ids of the
    model, of which lm-eval by itself knows those of generation_config.json.
    """
    from lm_eval import evaluate

    loaded = load_task(name, settings)
    with _quiet():
        _as_by_its_command(loaded)
        found = evaluate(language_model(model, tokenizer, settings.batch), loaded, limit=settings.task_limit, log_samples=False)
    return {task: _results_of(task, metrics, found) for task, metrics in found["results"].items()}


def language_model(model: Any, tokenizer: Any, batch: int) -> Any:
    """The model as lm-eval asks it, its texts ending at every id that ends one."""
    from lm_eval.models.huggingface import HFLM

    from minitron.generation.ends import end_ids, without_end

    ends = end_ids(model, tokenizer)

    class Ending(HFLM):
        def _model_generate(self, context: Any, max_length: int, stop: list[str], **settings: Any) -> Any:
            made = super()._model_generate(context, max_length, stop, **{"eos_token_id": ends or None} | settings)
            for row in made:  # an id that ends a text is text too unless the tokenizer calls it special
                text = row[context.shape[1] :]
                text[len(without_end(text.tolist(), ends)) :] = self.tokenizer.pad_token_id
            return made

    return Ending(pretrained=model, tokenizer=tokenizer, batch_size=batch)


def _as_by_its_command(loaded: Mapping[str, Any]) -> None:
    """The seeds and defaults of `lm_eval run`. Its simple_evaluate would set them, but also ask git, pip and the machine who they are."""
    import numpy as np
    import torch
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED

    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)
    torch.manual_seed(DEFAULT_OTHER_SEED)
    for task in loaded["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)


def _results_of(task: str, metrics: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    better = found["higher_is_better"].get(task, {})
    shown = {}
    for key, value in metrics.items():
        metric, comma, filtered = key.partition(",")
        if comma and not metric.endswith("_stderr"):
            error = metrics.get(f"{metric}_stderr,{filtered}")
            title = metric if filtered == "none" else f"{metric} ({filtered})"
            shown[title] = {"value": value, "standard_error": error if isinstance(error, float) else None, "higher_is_better": better.get(metric)}
    return {"samples": found["n-samples"].get(task, {}).get("effective"), "shots": found["n-shot"].get(task), "metrics": shown}


@lru_cache(maxsize=1)
def _manager(names: tuple[str, ...], folders: tuple[str, ...]) -> Any:
    """lm-eval's task manager; its own 14,000 tasks take it many seconds to find, so they are left out where no name needs them."""
    from lm_eval.tasks import TaskManager

    with _quiet():
        own = TaskManager(include_path=list(folders), include_defaults=False)
        if set(names) <= set(own.all_subtasks):
            return own
        return TaskManager(include_path=list(folders))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without lm-eval's log lines and bars."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _folder_digests(folders: Sequence[str]) -> list[list[str]]:
    """Name and content of every file in the folders, and of data files that their YAML names. Raises ValueError for what is no folder."""
    found = []
    for name in folders:
        folder = Path(name)
        if not folder.is_dir():
            raise ValueError(f"evaluate.task_folders names {name!r}; it must be a folder with tasks in YAML")
        files = sorted(path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
        found += [[path.relative_to(folder).as_posix(), content_digest(path)] for path in files]
        described = [_described(path) for path in files if path.suffix == ".yaml"]
        found += [[path.name, content_digest(path)] for path in sorted(_data_files(described))]
    return found


def _described(path: Path) -> Any:
    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader=_AnyTag)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"evaluate.task_folders: {path} is no YAML ({' '.join(str(error).split())[:200]})") from None


def _data_files(value: Any, *, named: bool = False) -> set[Path]:
    """Local files that stand anywhere under a `data_files` in plain values."""
    if isinstance(value, Mapping):
        return {path for key, inside in value.items() for path in _data_files(inside, named=named or key == "data_files")}
    if isinstance(value, list | tuple):
        return {path for inside in value for path in _data_files(inside, named=named)}
    return {Path(value)} if named and isinstance(value, str) and Path(value).is_file() else set()


class _AnyTag(yaml.SafeLoader):
    """Reads YAML whatever tags stand in it (`!function`), which are of no interest here."""


_AnyTag.add_multi_constructor("!", lambda loader, suffix, node: None)
