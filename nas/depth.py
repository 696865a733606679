"""Which layers stay at a given depth, from an order of removal."""

from collections.abc import Sequence

from nas.space import Floors


def check_layer_order(order: Sequence[int], pattern: str) -> None:
    """Refuse an order that names layers the teacher lacks, or one twice. Raises ValueError."""
    for layer in order:
        if not 0 <= layer < len(pattern):
            raise ValueError(f"layer order names layer {layer}; the teacher has layers 0 to {len(pattern) - 1}")
    if len(set(order)) != len(order):
        twice = next(layer for position, layer in enumerate(order) if layer in order[:position])
        raise ValueError(f"layer order names layer {twice} twice; every layer may stand once")


def kept_layers(pattern: str, removal_order: Sequence[int], num_layers: int, floors: Floors) -> tuple[int, ...]:
    """The layers that stay when layers go in `removal_order` (least important first) until `num_layers` are left.

    A removal that would leave fewer than `floors[kind]` layers of a kind is passed over.
    Raises ValueError where the order is too short for that depth.
    """
    kept = list(range(len(pattern)))
    for layer in removal_order:
        if len(kept) == num_layers:
            break
        left = sum(pattern[other] == pattern[layer] for other in kept)
        if left > floors.get(pattern[layer], 0):
            kept.remove(layer)
    if len(kept) > num_layers:
        raise ValueError(f"search.layers has the option {num_layers}, but the layer order and the floors reach only {len(kept)} layers")
    return tuple(kept)
