"""sweep.yaml: the run's own command for every candidate of its shortlist, as a sweep of wandb's."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

NOT_OF_A_TRIAL = ("stage=", "candidate=", "tracking=")  # settings of the run that a trial has of its own


def sweep_yaml(summary: Mapping[str, Any], arguments: Sequence[str]) -> str | None:
    """The sweep of a run that was started with these arguments; None where there is nothing to compare: no weights, one candidate, or Hydra's own sweep.
    Strings are written as JSON, which YAML reads."""
    candidates = [candidate["id"] for candidate in summary["candidates"] if candidate["zero_shot_loss"] is not None]
    if len(candidates) < 2 or {"-m", "--multirun"} & set(arguments):
        return None
    own = [argument for argument in arguments if not argument.lstrip("+").startswith(NOT_OF_A_TRIAL)]
    command = ["${env}", "python", "-m", "minitron.run", "stage=screen", "tracking=online", *own, "${args_no_hyphens}"]
    return "\n".join((
        "# One trial for each candidate of this run's shortlist, cut, distilled briefly and measured. In the folder where the run was started:",
        "#   wandb sweep THIS_FILE              says ENTITY/minitron/SWEEP",
        "#   wandb agent ENTITY/minitron/SWEEP  one candidate after another; start one agent per device",
        "# and then the run's own command again, which counts them all. WANDB_MODE=offline in the agent's environment comes before tracking=online.",
        "project: minitron",
        f"name: {json.dumps(summary['run_name'])}",
        "program: minitron/run.py",
        "command:",
        *(f"  - {json.dumps(part)}" for part in command),
        "method: grid",
        "metric: {name: short_distill_loss, goal: minimize}",
        "parameters:",
        f"  candidate: {{values: {json.dumps(candidates)}}}",
        "",
    ))  # fmt: skip
