"""In which order layers go: by a criterion asked once, or asked again after every removal."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

from minitron.settings.derived import by_kind
from minitron.settings.run import Settings
from nas.depth import with_sight

Kinds = Sequence[str]  # of every layer its letter, or of a block its letters (Architecture.layer_kinds)
Ask = Callable[[Sequence[int], Sequence[int]], Mapping[int, float]]


@dataclass(frozen=True, slots=True)
class LayerRules:
    """What may go: floors and ceilings are the least and most layers of a kind (by letter) that stay; `protected` always stay."""

    floors: Mapping[str, int]
    ceilings: Mapping[str, int]
    protected: tuple[int, ...] = ()


def layer_rules(settings: Settings, kinds: Kinds) -> LayerRules:
    """What may go when layers of these kinds are removed."""
    least, most = (by_kind({kind: number for kind, number in numbers.items() if number is not None}, kinds)
                   for numbers in (settings.search.floors, settings.scoring.ceilings))  # fmt: skip
    return LayerRules(with_sight(kinds, least), most, tuple(settings.scoring.protect))


@dataclass(frozen=True, slots=True)
class Removal:
    """One round: the layer that went, its score, and the score of every layer that might have gone."""

    layer: int
    score: float
    scores: Mapping[int, float]

    def to_json(self) -> dict:
        return asdict(self)


def check_rules(kinds: Kinds, num_layers: int, rules: LayerRules) -> None:
    """Refuse rules that no removal down to `num_layers` can keep. Raises ValueError naming the setting, value and rule."""
    for layer in rules.protected:
        if not 0 <= layer < len(kinds):
            raise ValueError(f"scoring.protect names layer {layer}; the teacher has layers 0 to {len(kinds) - 1}")
    stay = sum(max(min(rules.floors.get(kind, 0), kinds.count(kind)), _protected_of(kind, kinds, rules)) for kind in set(kinds))
    if num_layers < stay:
        raise ValueError(f"{len(kinds) - num_layers} removals were asked for; search.floors and scoring.protect keep {stay} of {len(kinds)} layers")
    excess = sum(max(0, kinds.count(kind) - ceiling) for kind, ceiling in rules.ceilings.items())
    if num_layers < len(kinds) and excess > len(kinds) - num_layers:
        raise ValueError(f"scoring.ceilings asks for {excess} removals; down to {num_layers} layers there are only {len(kinds) - num_layers}")
    for kind, ceiling in rules.ceilings.items():
        if kind not in kinds and any(kind in block for block in kinds):
            raise ValueError(f"scoring.ceilings keeps at most {ceiling} layers of kind {kind!r}; the teacher's layers are of the kinds {sorted(set(kinds))}")
        if ceiling < max(rules.floors.get(kind, 0), _protected_of(kind, kinds, rules)):
            raise ValueError(f"scoring.ceilings keeps at most {ceiling} layers of kind {kind!r}, below its floor or its protected layers")


def _protected_of(kind: str, kinds: Kinds, rules: LayerRules) -> int:
    return sum(kinds[layer] == kind for layer in rules.protected)


def removable_layers(kinds: Kinds, kept: Sequence[int], num_layers: int, rules: LayerRules) -> list[int]:
    """The layers that may go next, on the way from `kept` down to `num_layers`."""
    count = {kind: sum(kinds[layer] == kind for layer in kept) for kind in set(kinds)}
    free = [layer for layer in kept if layer not in rules.protected and count[kinds[layer]] > rules.floors.get(kinds[layer], 0)]
    excess = {kind: max(0, count.get(kind, 0) - ceiling) for kind, ceiling in rules.ceilings.items()}
    if sum(excess.values()) >= len(kept) - num_layers > 0:  # every removal left is owed to a ceiling
        free = [layer for layer in free if excess.get(kinds[layer], 0) > 0]
    return free


def rank_iteratively(kinds: Kinds, num_layers: int, rules: LayerRules, ask: Ask, on_round: Callable[[Removal], None] = lambda _: None,
                     done: Sequence[Removal] = ()) -> list[Removal]:  # fmt: skip
    """Drop the layer with the lowest score, score again, down to `num_layers` (N2, arXiv 2508.14444).

    `ask(kept, removable)` gives the scores of a round; `done` are rounds of an interrupted ranking.
    """
    kept, removals = list(range(len(kinds))), list(done)
    for removal in removals:
        kept.remove(removal.layer)
    while len(kept) > num_layers:
        removable = removable_layers(kinds, kept, num_layers, rules)
        scores = ask(kept, removable)
        lowest = min(removable, key=lambda layer: scores[layer])
        kept.remove(lowest)
        removals.append(Removal(layer=lowest, score=scores[lowest], scores=dict(scores)))
        on_round(removals[-1])
    return removals


def rank_once(kinds: Kinds, num_layers: int, rules: LayerRules, scores: Mapping[int, float]) -> list[Removal]:
    """Drop layers in the order of scores asked once, skipping those the rules keep."""
    return rank_iteratively(kinds, num_layers, rules, lambda kept, removable: {layer: scores[layer] for layer in removable})
