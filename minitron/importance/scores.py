"""Importance scores: what calibration measured, and the rankings derived from it.

Letters: D hidden, F ffn, M Mamba heads, P head dim, Q query heads, H attention head dim.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from minitron.families.base import ATTENTION_HEAD, FFN, HIDDEN, MAMBA_HEAD
from minitron.settings.run import Settings
from minitron.walk.store import Result

SCORES_FILE = "scores.safetensors"  # in a score stage's folder

Site = tuple[str, int]
# Rows of a site's sums: Σ over samples of the mean |a| over tokens, its square, the L2 over tokens, its square.
AGGREGATION_ROWS = {("mean", "mean"): 0, ("mean", "l2"): 1, ("l2", "mean"): 2, ("l2", "l2"): 3}


@dataclass(frozen=True, slots=True)
class WidthSums:
    """Sums over samples, so that blocks and processes add up and any aggregation can be formed without another pass.

    `sums[(axis, layer)]` is [4, …] as AGGREGATION_ROWS says, with hidden [D] · ffn [F] · mamba_head [M, P] (the x slice) ·
    attention_head [Q, H]; `block_influence` [L] is Σ over tokens of 1 − cos(before, after).
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
        save_file({**tensors, "block_influence": self.block_influence, "counts": counts}, partial)
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
    """`sites[(axis, layer)]` is the activation norm of every unit under one aggregation.

    Source: Minitron (MT1, arXiv 2407.14679, §2.2, table 12: mean over tokens, then L2 over samples won); the Mamba part
    SSM (arXiv 2504.11409, §3).
    """

    sites: Mapping[Site, np.ndarray]

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


def aggregate(sums: WidthSums, *, tokens: str = "mean", samples: str = "l2") -> ImportanceScores:
    """Scores from sums: `tokens` and `samples` are "mean" or "l2"."""
    row = AGGREGATION_ROWS[tokens, samples]
    finish = np.sqrt if samples == "l2" else lambda value: value / sums.num_samples
    return ImportanceScores(sites={site: finish(value[row]) for site, value in sums.sums.items()})


def load_scores(path: Path, *, tokens: str = "mean", samples: str = "l2") -> ImportanceScores:
    """The scores of a file of WidthSums under an aggregation."""
    return aggregate(load_sums(path), tokens=tokens, samples=samples)


def scores_of(score: Result, settings: Settings) -> ImportanceScores:
    """The scores of a finished score stage, under the aggregation of the settings."""
    search = settings.search
    return load_scores(score.folder / SCORES_FILE, tokens=search.aggregate_tokens.name, samples=search.aggregate_samples.name)
