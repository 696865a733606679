"""What scoring found out about experts, for people and for programs that drop experts when they load a model. Loads no torch.

Layers are numbered as config.json counts them. Letters: E experts.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from memory_budget.architecture import Architecture
from minitron.families.base import EXPERT
from minitron.importance.scores import EXPERT_ROWS, WidthSums, aggregate
from minitron.settings.run import ScoringSettings

RANKING_FILE = "ranking.jsonl"  # in a score stage's folder
CRITERION = "reap"  # of its order; a score follows from no setting of the search


def expert_scores(width: WidthSums, architecture: Architecture) -> dict[int, dict[str, list[float]]]:
    """Of every layer with experts, lists by expert: `tokens` that were sent to it, its `reap` and `activation` score, to six digits."""
    found = {}
    for (axis, sublayer), rows in sorted(aggregate(width).sites.items()):
        if axis == EXPERT:
            scores = {name: [float(f"{score:.6g}") for score in rows[EXPERT_ROWS[name]]] for name in ("reap", "activation")}
            found[sublayer // architecture.sublayers_per_layer] = {"tokens": rows[EXPERT_ROWS["frequency"]].astype(int).tolist(), **scores}
    return found


def write_ranking(path: Path, experts: Mapping[int, Mapping[str, list[float]]]) -> None:
    """A JSON line a layer: {"layer", "criterion", "experts": best first, and in their order "scores" and "tokens"}, and under "activation" and "frequency" the
    experts in the order of the other criteria. Ties go to the lower number, as in a cut."""
    path.write_text("".join(json.dumps(line) + "\n" for line in _ranked(experts)))


def _ranked(experts: Mapping[int, Mapping[str, list[float]]]) -> Iterator[dict[str, Any]]:
    for layer, of_layer in experts.items():
        order = best_first(of_layer[CRITERION])
        in_order = {"scores": [of_layer[CRITERION][expert] for expert in order], "tokens": [of_layer["tokens"][expert] for expert in order]}
        others = {"activation": best_first(of_layer["activation"]), "frequency": best_first(of_layer["tokens"])}
        yield {"layer": layer, "criterion": CRITERION, "experts": order, **in_order, **others}


def best_first(scores: list[float]) -> list[int]:
    """Experts by falling score."""
    return np.argsort(-np.array(scores), kind="stable").tolist()


def reach(experts: Mapping[int, Mapping[str, list[float]]], least: int) -> dict[str, int]:
    """How far tokens reached: numbers of layers, of experts of one, of `unreached` ones in all, of those with fewer than `least` tokens (`few`), and the least
    reached expert of all with its tokens."""
    tokens, layer, expert = min((number, layer, expert) for layer, one in experts.items() for expert, number in enumerate(one["tokens"]))
    every = [number for one in experts.values() for number in one["tokens"]]
    return {"layers": len(experts), "experts": len(every) // len(experts), "unreached": every.count(0), "few": sum(number < least for number in every),
            "least_tokens": tokens, "least_layer": layer, "least_expert": expert}  # fmt: skip


def describe_reach(found: Mapping[str, int]) -> str:
    """The same for a headline."""
    of = f"{found['experts']} experts in each of {found['layers']} layers" if found["layers"] > 1 else f"{found['experts']} experts in one layer"
    if found["unreached"]:
        return f"{of}, {found['unreached']} of them in all reached by no token and ranked last"
    return f"{of}, each reached by {found['least_tokens']:,} token{'s' * (found['least_tokens'] > 1)} at least"


def few_tokens_note(found: Mapping[str, int], scoring: ScoringSettings, num_samples: int) -> str | None:
    """What to say where experts saw fewer tokens than scoring.least_expert_tokens; `num_samples` were scored. None where all saw as many."""
    if not found["few"]:
        return None
    seen, least, number = found["least_tokens"], scoring.least_expert_tokens, found["layers"] * found["experts"]
    said = (f"{found['few']} of {number} experts saw fewer tokens than scoring.least_expert_tokens, {least}: too few to be sure of their places; "
            f"expert {found['least_expert']} of layer {found['least_layer']} the fewest, {seen:,}")  # fmt: skip
    if seen:
        return f"{said}; scoring.samples={-(-num_samples * least // seen)} would do for it"
    return f"{said}, and what no token reaches is ranked last, which is right only if the text is what the model is for; more scoring.samples may reach it"
