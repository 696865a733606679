"""The chosen architecture cut out of the teacher, tensor by tensor from disk to disk, compensated or as it is."""

from collections.abc import Mapping
from typing import Any

from minitron.pruning.plan import LOCAL_STEPS
from minitron.settings.derived import base_stage, check_rotates
from minitron.settings.rules import key_settings
from minitron.settings.run import PruneMethod, Settings
from minitron.settings.teachers import base_architecture
from minitron.stages.score import width_scoring
from minitron.walk.stage import StageContext, StoredStage
from minitron.walk.store import Result
from nas.axes import WIDTHS

MADE = {"balanced": 4}  # how a compensated cut is made, counted up where that changes; a slice is what it was


def needs(settings: Settings) -> tuple[str, ...]:
    return (base_stage(settings), "score", "search", *(("data",) if settings.prune.method is PruneMethod.compensated else ()))


def what(settings: Settings) -> Any:
    if settings.prune.method is PruneMethod.slice:
        return {}  # nothing else to choose
    return compensated(settings) | {"held_out": settings.search.screen_samples}


def compensated(settings: Settings) -> dict[str, Any]:
    """What a compensated cut follows from beside its inputs."""
    return {**key_settings(settings.prune), "rotate": settings.prune.rotate is not False, **MADE}


def cut_from(settings: Settings, inputs: Mapping[str, Result], candidate: Mapping[str, Any]) -> dict[str, Any]:
    """What a candidate's weights follow from: its sizes and layers, the checkpoint they are cut from, and, where widths are cut, what ranks their units.
    Not how it was chosen: two budgets that choose one architecture share its cut, and all that is made of it."""
    architecture, base = candidate["architecture"], base_architecture(settings)
    cuts_widths = any(architecture[width] != getattr(base, width) for width in WIDTHS)
    of_experts = architecture["moe_num_experts"] != base.moe_num_experts
    units = {"units": width_scoring(settings, inputs["score"], of_experts=of_experts)} if cuts_widths else {}
    default = settings.prune.method is PruneMethod.compensated and settings.prune.local_steps is None and architecture["moe_num_experts"]
    trained = {"local_steps": LOCAL_STEPS} if default else {}
    return {"base": inputs[base_stage(settings)].identity, "architecture": architecture, "kept_layers": candidate["kept_layers"], **units, **trained}


def of_inputs(settings: Settings, inputs: Mapping[str, Result]) -> dict[str, Any]:
    calibration = {"data": inputs["data"].identity} if "data" in inputs else {}
    return cut_from(settings, inputs, inputs["search"].facts["chosen"]) | calibration


def run(context: StageContext) -> dict:
    from minitron.pruning.disk_to_disk import prune_teacher

    return prune_teacher(context)


STAGE = StoredStage(version=3, needs=needs, what=what, of_inputs=of_inputs, check=check_rotates, run=run)
