"""Everything of the student in one folder, from what is done; it runs no other stage and is made anew every time."""

import json
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from distill.states import best_state, newest_state
from memory_budget.hf_config import architecture_from_config, read_config
from memory_budget.units import GIB, format_gib
from minitron.checkpoints.files import Checkpoint, PlannedTensor
from minitron.checkpoints.local_paths import is_local, public, without_paths
from minitron.checkpoints.publish import Licence, formats_of, licence_of, state_tensors, write_planned
from minitron.families.base import Family
from minitron.families.known import family_of
from minitron.hand_over.card import Exported, distilled, export_card
from minitron.hand_over.compatibility import Finding, Folder, check_folder, remarks, verdicts
from minitron.hand_over.rules import RULES
from minitron.report.summary import build_summary
from minitron.report.text import nats
from minitron.settings.hand_over import StudentState
from minitron.settings.hub import HUB_ID
from minitron.settings.rules import key_settings
from minitron.settings.run import Settings, Stage
from minitron.settings.teachers import is_tiny
from minitron.walk.console import Console
from minitron.walk.shown import all_without_secrets
from minitron.walk.stage import Lap
from minitron.walk.store import locked, write_json
from minitron.walk.table import inputs_of, order_of, stage_folder

MARK_FILE, MADE_BY = "export.json", "minitron, stage=export"


@dataclass(frozen=True, slots=True)
class Student:
    """What is exported: tensors to write, the folder its config and tokenizer come from, and what the card says of it."""

    planned: list[PlannedTensor]
    companions: Path
    exported: Exported


def export_student(settings: Settings, laps: Sequence[Lap], console: Console) -> None:
    """Writes the export's folder beside its place and renames it into it. Raises ValueError naming what is missing or in the way."""
    wanted, lap = settings.export, laps[-1]
    folder = Path(wanted.folder) if wanted.folder else Path(settings.runs_folder) / settings.run_name / "export"
    check_place(folder, overwrite=wanted.overwrite)
    check_push(wanted.push)
    check_done(lap, wanted.state)
    family = family_of(read_config(lap.results["prune"].model_folder))
    partial = folder.with_name(f".{folder.name}.partial")
    with locked(folder, console.say):
        shutil.rmtree(partial, ignore_errors=True)
        try:
            student = _student(family, lap, wanted.state)
            findings = _write(partial, family, student, laps, console)
        except FileNotFoundError as error:
            if wanted.state is StudentState.student:
                raise
            raise ValueError(f"export.state is {wanted.state.name}, but {error.filename} went while it was read: training has saved another; "
                             "run the same command again") from None  # fmt: skip
        _put_in_place(partial, folder)
    for text in (*verdicts(findings), *remarks(findings)):
        console.say(text)
    total = format_gib(sum(tensor.num_bytes for tensor in student.planned))
    console.headline("export", f"{folder}: {student.exported.name}, {total} of weights in {formats_of(student.planned)}")
    if wanted.push is not None:
        _push(folder, wanted.push)
        console.headline("export", f"uploaded to {wanted.push} (private)")


def check_place(folder: Path, *, overwrite: bool) -> None:
    """Refuse a place that holds something else. Raises ValueError."""
    if folder.is_dir() and not any(folder.iterdir()):
        return
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"export.folder is {str(folder)!r}, which is a file; it must be a new folder, or an earlier export")
    if folder.exists() and not overwrite and not is_export(folder):
        raise ValueError(f"export.folder is {str(folder)!r}, which is there and is no export; name another, or export.overwrite=true deletes what it holds")


def is_export(folder: Path) -> bool:
    """Whether a folder was made by this stage."""
    try:
        return json.loads((folder / MARK_FILE).read_text()).get("made_by") == MADE_BY
    except (OSError, ValueError, AttributeError):
        return False


def check_push(hub_id: str | None) -> None:
    """Refuse an upload that cannot begin: no Hub id, offline, or no token. Raises ValueError."""
    if hub_id is None:
        return
    from huggingface_hub import constants, get_token

    if not HUB_ID.match(hub_id):
        raise ValueError(f"export.push is {hub_id!r}; it must be a Hub id of the form owner/name")
    if constants.HF_HUB_OFFLINE:
        raise ValueError(f"export.push is {hub_id!r}, but HF_HUB_OFFLINE is set; an upload needs the network")
    if get_token() is None:
        raise ValueError(f"export.push is {hub_id!r}, but there is no token for the Hub; `hf auth login` or HF_TOKEN gives one")


def check_done(lap: Lap, state: StudentState) -> None:
    """Refuse to export what is not there yet. Raises ValueError naming the stages that are missing."""
    done = {label.split(" ")[0] for label in lap.results}
    needed = order_of(replace(lap.settings, stage=Stage.distill))
    missing = [name for name in needed if name not in done and (name != "distill" or state is StudentState.student)]
    if missing:
        store = Path(lap.settings.runs_folder) / "store"
        raise ValueError(f"stage=export needs what is not done under these settings in {store}: {', '.join(missing)}; run stage=distill first")


def _student(family: Family, lap: Lap, state: StudentState) -> Student:
    """The distilled checkpoint, or a saved state of its distillation in the pruned checkpoint's names and dtypes."""
    name = f"{public(lap.results['teacher'].facts['name'])}, pruned and distilled"
    if state is StudentState.student:
        checkpoint = Checkpoint(lap.results["distill"].model_folder)
        planned = [checkpoint.planned(entry.name, new_name=entry.name, dtype=entry.dtype) for entry in checkpoint.entries.values()]
        return Student(planned, checkpoint.folder, Exported(name, distilled(lap.results["distill"].facts), is_final=True))
    folder = stage_folder("distill", lap.settings, lap.results)
    saved = newest_state(folder) if state is StudentState.newest else best_state(folder)
    if saved is None:
        other = {StudentState.newest: "its last one is export.state=student" if "distill" in lap.results else "none is saved yet",
                 StudentState.best: "the first is kept after distill.held_out_every steps, without it none is"}[state]  # fmt: skip
        raise ValueError(f"export.state is {state.name}, but there is no such state of the distillation in {folder}: {other}")
    pruned, record = Checkpoint(lap.results["prune"].model_folder), saved.facts["record"]
    trained = f"Distilled from the teacher on {record['tokens']:,} tokens, {record['step'] + 1:,} of {record['total_steps']:,} steps: a state saved on the way"
    if state is StudentState.best and saved.facts["best"] is not None:
        trained += f", the one with the lowest held-out loss ({nats(saved.facts['best'])} nats per token)"
    tensors = state_tensors(family, saved.folder, like=pruned)
    return Student(tensors, pruned.folder, Exported(f"{name} ({state.name} state)", trained + ".", is_final=False))


def _write(partial: Path, family: Family, student: Student, laps: Sequence[Lap], console: Console) -> list[Finding]:
    """The whole export in a folder of its own; gives what other programs would say to it."""
    settings, results, given = laps[-1].settings, laps[-1].results, read_config(student.companions)
    config = family.handed_over(family.hf_config(given, architecture_from_config(given)))  # of a student that an earlier version made too
    licence = licence_of(results["teacher"].model_folder, settings.card.licence)
    files = [path.name for path in student.companions.iterdir()]
    folder = Folder(config, [tensor.name for tensor in student.planned], files, own_tokenizer=is_tiny(settings))
    findings = check_folder(folder, RULES[family.model_type])
    card = export_card(build_summary(laps), laps, student.exported, licence=licence, findings=findings, arguments=sys.argv[1:])
    card = without_paths(card, paths_of(settings))
    total = sum(tensor.num_bytes for tensor in student.planned)
    with console.track("exporting", total / GIB, "GiB") as advance:
        check = write_planned(partial, family, student.planned, config=config, companions=student.companions, card=card,
                              max_shard_bytes=int(settings.prune.max_shard_gib * GIB), on_bytes=lambda num_bytes: advance(num_bytes / GIB))  # fmt: skip
    console.say(check)
    _copy_licence(licence, partial)
    write_json(partial / MARK_FILE, all_without_secrets(_mark(settings, laps[-1], student, findings)))
    return findings


def _copy_licence(licence: Licence, folder: Path) -> None:
    for path in licence.files:
        shutil.copyfile(path, folder / path.name)


def _mark(settings: Settings, lap: Lap, student: Student, findings: Sequence[Finding]) -> dict[str, Any]:
    """export.json: what this folder is, the settings that made it, and the keys of the stages behind it."""
    what = {name: value for name, value in key_settings(settings).items() if name not in ("stage", "runs_folder", "export", "merge")}
    stages = {label: result.key for label, result in {**inputs_of("distill", settings, lap.results), **lap.results}.items()}
    refused = [{"program": one.program, "field": one.field, "value": one.value, "rule": one.rule} for one in findings if one.accepted is False]
    return {"made_by": MADE_BY, "name": student.exported.name, "trained": student.exported.trained, "stages": stages, "refused": refused,
            "remarks": remarks(findings), "settings": public(what)}  # fmt: skip


def paths_of(settings: Settings) -> set[str]:
    """Every place of this machine that a card may name: those of the settings, as given and in full, and where the run is."""

    def texts(value: Any) -> Iterator[str]:
        if isinstance(value, str):
            yield value
        for item in value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ():
            yield from texts(item)

    given = {text for text in texts(key_settings(settings)) if is_local(text)} | {settings.runs_folder}
    return given | {str(Path(text).expanduser().resolve()) for text in given} | {str(Path.home()), str(Path.cwd())}


def _put_in_place(partial: Path, folder: Path) -> None:
    """Rename the finished folder into its place; what was there goes once the new one has it."""
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def _push(folder: Path, hub_id: str) -> None:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError

    try:
        HfApi().create_repo(hub_id, private=True, exist_ok=True)
        HfApi().upload_folder(repo_id=hub_id, folder_path=folder, commit_message="Exported by minitron")
    except (OSError, HFValidationError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"export.push is {hub_id!r}, but the Hub refused it ({type(error).__name__}: {reason}); the export is in {folder}") from None
