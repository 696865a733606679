"""Every architecture that passes the filters, a diversified few of them, and their zero-shot losses."""

from dataclasses import asdict
from typing import Any

from memory_budget.architecture import Architecture, as_dict
from minitron.pruning.plan import set_ridge
from minitron.search.layer_order import given_layer_order
from minitron.search.space import check_search, serving_of
from minitron.settings.derived import (
    asked_candidate_samples,
    base_stage,
    budget_of,
    fixed_sizes,
    ranks_refitted,
    ranks_rotated,
    refitted_widths,
    workload_of,
)
from minitron.settings.rules import key_settings
from minitron.settings.run import Settings
from minitron.settings.search import CHOOSING
from minitron.settings.teachers import base_architecture
from minitron.walk.stage import StageContext, StoredStage
from nas.throughput import Serving


def needs(settings: Settings) -> tuple[str, ...]:
    # A given layer order makes the search plain arithmetic on config.json: no weights, no scores.
    return () if settings.search.layer_order else ("data", base_stage(settings), "teacher", "score")


def what(settings: Settings) -> Any:
    # Numbers, not the names that they go by: two labels of one budget or device, or two files of one order, are one search.
    base, order = base_architecture(settings), settings.search.layer_order
    return {
        **{name: value for name, value in key_settings(settings.search).items() if name not in CHOOSING},
        "base": as_dict(base),
        "layer_order": given_layer_order(order, base) if order else None,
        "fixed": fixed_sizes(settings, base),
        "workload": {name: "float32" if value == "fp32" else value for name, value in asdict(workload_of(settings)).items()},
        "budget_bytes": budget_of(settings).bytes,
        "served": _numbers(serving_of(settings), settings.throughput.batch),
        **({"rotated_samples": asked_candidate_samples(settings)} if ranks_rotated(settings) else {}),
        **({"refitted": _refits(settings, base)} if ranks_refitted(settings) else {}),
    }


def _refits(settings: Settings, base: Architecture) -> dict[str, Any]:
    """What follows from the settings of the refits; widths are said of a model with experts, for which some are asked for and others not."""
    widths = {"widths": refitted_widths(settings, base)} if "E" in base.pattern else {}
    return {"samples": asked_candidate_samples(settings), "ridge": set_ridge(settings.prune), **widths}


def _numbers(serving: Serving | None, batch: int | None) -> Any:
    """The throughput model without the device's name; a batch of None is the largest that fits."""
    if serving is None:
        return None
    device = serving.device
    return {**asdict(serving), "device": [device.bytes_per_second, device.flops_per_second], "batch": batch}


def check(settings: Settings) -> None:
    base = base_architecture(settings)
    check_search(settings, base)
    if settings.search.layer_order:
        given_layer_order(settings.search.layer_order, base)


def run(context: StageContext) -> dict:
    from minitron.search.shortlist import make_shortlist

    return make_shortlist(context)


STAGE = StoredStage(version=2, needs=needs, what=what, check=check, run=run, in_one_lap=lambda settings: bool(settings.search.layer_order))
