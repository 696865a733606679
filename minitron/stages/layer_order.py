"""Where the search takes its order of removal from: the given file, or the score stage."""

import json
from collections.abc import Mapping
from pathlib import Path

from memory_budget.architecture import Architecture
from minitron.pipeline import StageContext
from nas.depth import check_layer_order


def order_and_damage(context: StageContext, teacher: Architecture) -> tuple[list[int], list[float]]:
    """(layers in order of removal, score of each removal where measured). Raises ValueError for layers the teacher lacks."""
    if context.settings.search.layer_order:
        order, damage = read_layer_order(context.settings.search.layer_order), []
    else:
        facts = json.loads((context.inputs["score"].folder / "layers.json").read_text())
        order, damage = facts["removal_order"], [entry["score"] for entry in facts["rounds"]]
    check_layer_order(order, teacher.pattern)
    return order, damage


def read_layer_order(path: str | Path) -> list[int]:
    """Layers in the order in which they are to be removed, from a JSON list, an object with removal_order, or numbers in text.

    Raises ValueError where the file holds none of these.
    """
    text = Path(path).read_text()
    try:
        value = json.loads(text)
    except ValueError:
        value = text.replace(",", " ").split()
    if isinstance(value, Mapping):
        value = value.get("removal_order", value.get("removed_layers"))
    try:
        order = [int(item) for item in (value if isinstance(value, list) else [value])]
    except (TypeError, ValueError):
        raise ValueError(
            f"search.layer_order {str(path)!r} must hold layer numbers, least important first: a JSON list, an object with removal_order, or plain numbers"
        ) from None
    return order
