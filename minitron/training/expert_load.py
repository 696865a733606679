"""How evenly a student's experts were busy while it was distilled, for people to read. Loads no torch."""

import json
from pathlib import Path
from statistics import fmean
from typing import Any

from memory_budget.architecture import Architecture
from minitron.families.known import FAMILIES
from minitron.families.table import has_router_bias
from minitron.settings.training import Balance, TrainSettings

STEPS = 20  # at the beginning and at the end, over which means are taken


def expert_load(metrics: Path, student: Architecture, train: TrainSettings) -> dict[str, Any]:
    """From every step's line of metrics.jsonl (distill.engines.loads), of the first and the last steps: how many times the mean the busiest expert was sent,
    how many experts were sent nothing, and a `sentence` of both. Empty for a student without experts."""
    if "E" not in student.mixers:
        return {}
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    ends = {"first": lines[:STEPS], "last": lines[-STEPS:]}
    busiest, idle = ({name: round(fmean(line[key] for line in part), 3) for name, part in ends.items()} for key in ("busiest_expert", "idle_experts"))
    return {"busiest_over_mean": busiest, "idle": idle, "experts": student.moe_num_experts * student.num_layers_of("E"),
            "sentence": _sentence(busiest, idle, min(STEPS, len(lines)), student, train)}  # fmt: skip


def _sentence(busiest: dict[str, float], idle: dict[str, float], steps: int, student: Architecture, train: TrainSettings) -> str:
    layers = student.num_layers_of("E")
    steps_said = f"{steps} steps" if steps > 1 else "step"
    of = f"The busiest of {student.moe_num_experts} experts in {'each of ' if layers > 1 else ''}{layers} layer{'s' * (layers > 1)}"
    sent = f"{of} was sent {busiest['first']:.1f} times the mean in the first {steps_said} and {busiest['last']:.1f} times in the last"
    none = f"{idle['first']:.1f} and {idle['last']:.1f} of all {student.moe_num_experts * layers} were sent nothing in a step"
    if train.balance is Balance.bias:
        return f"{sent}; {none}. Correction biases were moved against the load."
    could = has_router_bias(FAMILIES[student.model_type], student)
    why = "distill.train.balance is none" if could else f"routers of {student.model_type} have no correction bias"
    return f"{sent}; {none}. Nothing kept the load even: {why}."
