"""Where the search takes its order of removal from: the given file, or the score stage."""

import json
from collections.abc import Mapping
from pathlib import Path

from memory_budget.architecture import Architecture
from memory_budget.json_files import LARGEST_CONFIG, parse_json
from minitron.walk.stage import StageContext
from nas.depth import check_layer_order


def order_and_damage(context: StageContext, teacher: Architecture) -> tuple[list[int], list[float]]:
    """(layers in order of removal, score of each removal where measured). Raises ValueError as given_layer_order does."""
    if context.settings.search.layer_order:
        return given_layer_order(context.settings.search.layer_order, teacher), []
    facts = json.loads((context.inputs["score"].folder / "layers.json").read_text())
    return facts["removal_order"], [entry["score"] for entry in facts["rounds"]]


def given_layer_order(path: str | Path, teacher: Architecture) -> list[int]:
    """The order of a file. Raises ValueError where it cannot be read, holds no order, or names layers the teacher lacks."""
    order = read_layer_order(path)
    check_layer_order(order, teacher.num_layers)
    return order


def read_layer_order(path: str | Path) -> list[int]:
    """Layers in the order in which they are to be removed, from a JSON list, an object with removal_order, or numbers in text.

    Raises ValueError where the file holds none of these.
    """
    try:
        with open(path, "rb") as file:
            content = file.read(LARGEST_CONFIG)
    except OSError as error:
        raise ValueError(f"search.layer_order is {str(path)!r}, which cannot be read: {error.strerror}") from None
    try:
        value = parse_json(content)
    except ValueError:
        value = content.decode("utf-8", errors="replace").replace(",", " ").split() or None
    if isinstance(value, Mapping):
        value = value.get("removal_order", value.get("removed_layers"))
    try:
        order = [int(item) for item in (value if isinstance(value, list) else [value])]
    except (TypeError, ValueError, OverflowError):
        raise ValueError(
            f"search.layer_order {str(path)!r} must hold layer numbers, least important first: a JSON list, an object with removal_order, or plain numbers"
        ) from None
    return order
