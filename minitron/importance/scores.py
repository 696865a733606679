"""Importance scores: what calibration measured, and the rankings derived from it.

Letters: D hidden, F ffn (with E: of one expert), M Mamba heads, P head dim, Q query heads, H attention head dim, E experts, S neurons of the shared one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from memory_budget.architecture import Architecture
from minitron.families.base import ATTENTION_HEAD, EXPERT, EXPERT_FFN, FFN, HIDDEN, MAMBA_HEAD, SHARED_FFN
from minitron.settings.run import Settings
from minitron.settings.teachers import base_architecture
from minitron.walk.integrity import synced, usual_mode
from minitron.walk.store import Result

SCORES_FILE = "scores.safetensors"  # in a score stage's folder

Site = tuple[str, int]
# Rows of a site's sums: Σ over samples of the mean |a| over tokens, its square, the L2 over tokens, its square.
AGGREGATION_ROWS = {("mean", "mean"): 0, ("mean", "l2"): 1, ("l2", "mean"): 2, ("l2", "l2"): 3}
# Rows of sums over the tokens sent to an expert. Of experts: their number, Σ of the output's norm ‖f‖ times what it is multiplied by, Σ ‖f‖; once each is
# divided by the number, these are the scores. Of an expert's neurons by search.aggregate_tokens: Σ |a|, Σ a².
EXPERT_ROWS = {"frequency": 0, "reap": 1, "activation": 2}
NEURON_ROWS = {"mean": 0, "l2": 1}


@dataclass(frozen=True, slots=True)
class WidthSums:
    """Sums over samples, so that blocks and processes add up and any aggregation can be formed without another pass.

    `sums[(axis, layer)]`, the layer a sublayer, is [4, …] as AGGREGATION_ROWS says, with hidden [D] · ffn [F] · mamba_head [M, P] (the x slice) ·
    attention_head [Q, H] · shared_ffn [S]; of expert [3, E] as EXPERT_ROWS says, of expert_ffn [2, E, F] as NEURON_ROWS says. `block_influence` [L] is Σ over
    tokens of 1 − cos(before, after).
    """

    sums: Mapping[Site, np.ndarray]
    block_influence: np.ndarray
    num_samples: int
    num_tokens: int

    def __add__(self, other: "WidthSums") -> "WidthSums":
        added = {site: value + other.sums[site] for site, value in self.sums.items()}
        samples, tokens = self.num_samples + other.num_samples, self.num_tokens + other.num_tokens
        return WidthSums(added, self.block_influence + other.block_influence, samples, tokens)

    def save(self, path: Path) -> None:
        from safetensors.numpy import save_file

        tensors = {f"{axis}/{layer}": np.ascontiguousarray(value) for (axis, layer), value in self.sums.items()}
        counts = np.array([self.num_samples, self.num_tokens], dtype=np.int64)
        partial = path.with_name(path.name + ".partial")
        with usual_mode(partial):
            save_file({**tensors, "block_influence": self.block_influence, "counts": counts}, partial)
        synced(partial)
        partial.rename(path)


def load_sums(path: Path) -> WidthSums:
    """What WidthSums.save wrote."""
    from safetensors.numpy import load_file

    tensors = load_file(path)
    samples, tokens = tensors.pop("counts").tolist()
    influence = tensors.pop("block_influence")
    sums = {(name.split("/")[0], int(name.split("/")[1])): value for name, value in tensors.items()}
    return WidthSums(sums, influence, samples, tokens)


@dataclass(frozen=True, slots=True)
class ImportanceScores:
    """`sites[(axis, layer)]` is the activation norm of every unit under one aggregation; of expert all three scores [3, E], of which `rank` is the one that
    experts are ranked by. `protected` are experts by sublayer that come before all others.

    Source: Minitron (MT1, arXiv 2407.14679, §2.2, table 12: mean over tokens, then L2 over samples won); the Mamba part
    SSM (arXiv 2504.11409, §3); experts by reap: REAP (arXiv 2510.13999), with what multiplies an output in this model, whatever its router.
    """

    sites: Mapping[Site, np.ndarray]
    rank: str = "reap"
    protected: Mapping[int, Sequence[int]] = field(default_factory=dict)

    def hidden(self) -> np.ndarray:
        """One global score per residual channel, [D]: the sum over all norm outputs."""
        return np.sum([score for (axis, _), score in sorted(self.sites.items()) if axis == HIDDEN], axis=0)

    def ffn(self, layer: int) -> np.ndarray:
        """Score per neuron, [F]."""
        return self.sites[FFN, layer]

    def mamba_channels(self, layer: int) -> np.ndarray:
        """Score per channel shared by all heads of a layer, [P]: L2 over heads."""
        return np.linalg.norm(self.sites[MAMBA_HEAD, layer], axis=0)

    def mamba_heads(self, layer: int, channels: tuple[int, ...] | None = None) -> np.ndarray:
        """Score per head, [M]: L2 over the kept channels (all when None)."""
        per_channel = self.sites[MAMBA_HEAD, layer]
        return np.linalg.norm(per_channel if channels is None else per_channel[:, list(channels)], axis=1)

    def attention_heads(self, layer: int) -> np.ndarray:
        """Score per query head, [Q]: L2 over the head's channels."""
        return np.linalg.norm(self.sites[ATTENTION_HEAD, layer], axis=1)

    def key_value_heads(self, layer: int, number: int) -> np.ndarray:
        """Score per KV head, [K], of `number`: L2 over the query heads that share it."""
        return np.linalg.norm(self.attention_heads(layer).reshape(number, -1), axis=1)

    def experts(self, layer: int) -> np.ndarray:
        """Score per expert, [E]: 0 for one that no token was sent to, infinite for a protected one."""
        scores = self.sites[EXPERT, layer][EXPERT_ROWS[self.rank]].copy()
        scores[list(self.protected.get(layer, ()))] = np.inf
        return scores

    def expert_neurons(self, layer: int) -> np.ndarray:
        """Score per neuron of every expert, [E, F], over the tokens sent to it: to be compared within an expert alone."""
        return self.sites[EXPERT_FFN, layer]

    def shared_neurons(self, layer: int) -> np.ndarray:
        """Score per neuron of the expert that all tokens see, [S]."""
        return self.sites[SHARED_FFN, layer]


def aggregate(sums: WidthSums, *, tokens: str = "mean", samples: str = "l2") -> ImportanceScores:
    """Scores from sums: `tokens` and `samples` are "mean" or "l2". A token is sent to an expert alone, so over samples there is nothing to choose there."""
    row = AGGREGATION_ROWS[tokens, samples]
    finish = np.sqrt if samples == "l2" else lambda value: value / sums.num_samples
    sites = {}
    for (axis, layer), value in sums.sums.items():
        if axis == EXPERT:
            number_E = value[0]
            sites[axis, layer] = np.stack([number_E, *(value[1:] / np.maximum(number_E, 1))])
        elif axis == EXPERT_FFN:
            mean_EF = value[NEURON_ROWS[tokens]] / np.maximum(sums.sums[EXPERT, layer][0], 1)[:, None]
            sites[axis, layer] = np.sqrt(mean_EF) if tokens == "l2" else mean_EF
        else:
            sites[axis, layer] = finish(value[row])
    return ImportanceScores(sites)


def load_scores(path: Path, *, tokens: str = "mean", samples: str = "l2") -> ImportanceScores:
    """The scores of a file of WidthSums under an aggregation."""
    return aggregate(load_sums(path), tokens=tokens, samples=samples)


def scores_of(score: Result, settings: Settings) -> ImportanceScores:
    """The scores of a finished score stage, under the aggregation and the ranking of the settings. Raises ValueError as protected_experts does."""
    search = settings.search
    scores = load_scores(score.folder / SCORES_FILE, tokens=search.aggregate_tokens.name, samples=search.aggregate_samples.name)
    return replace(scores, rank=search.rank_experts.name, protected=protected_experts(settings))


def protected_experts(settings: Settings, base: Architecture | None = None) -> dict[int, list[int]]:
    """search.protect_experts by sublayer; `base` where it is known, else as the settings name it. Raises ValueError for a layer without experts and an expert
    that is not there."""
    if not settings.search.protect_experts:
        return {}
    architecture, found = base or base_architecture(settings), {}
    for name, experts in settings.search.protect_experts.items():
        moe = [sublayer for sublayer in architecture.sublayers_of([int(name)]) if architecture.mixers[sublayer : sublayer + 1] == "E"]
        if not moe:
            there = [str(layer) for layer, kind in enumerate(architecture.layer_kinds) if "E" in kind]
            raise ValueError(f"search.protect_experts names layer {name}; it must be one with experts: {', '.join(there) or 'this model has none'}")
        if max(experts) >= architecture.moe_num_experts:
            raise ValueError(f"search.protect_experts names expert {max(experts)} of layer {name}; its experts are 0 to {architecture.moe_num_experts - 1}")
        found[moe[0]] = list(experts)
    return found
