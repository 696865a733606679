"""Where the search takes its order of removal from: the given file, or the score stage."""

import json

from memory_budget.architecture import Architecture
from minitron.pipeline import StageContext
from nas.depth import check_layer_order


def order_and_damage(context: StageContext, teacher: Architecture) -> tuple[list[int], list[float]]:
    """(layers in order of removal, score of each removal where measured). Raises ValueError for layers the teacher lacks."""
    if context.settings.search.layer_order:
        from minitron.screening import read_layer_order

        order, damage = read_layer_order(context.settings.search.layer_order), []
    else:
        facts = json.loads((context.inputs["score"].folder / "layers.json").read_text())
        order, damage = facts["removal_order"], [entry["score"] for entry in facts["rounds"]]
    check_layer_order(order, teacher.pattern)
    return order, damage
