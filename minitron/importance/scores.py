"""Importance scores: what calibration measured, and the rankings derived from it.

Stored per site (one norm, one FFN layer, one Mamba layer …) so that rankings can be formed in other ways
without another pass over the data.

Letters: D hidden, F ffn, M Mamba heads, P head dim, Q query heads, H attention head dim.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from minitron.families.base import ATTENTION_HEAD, FFN, HIDDEN, MAMBA_HEAD


@dataclass(frozen=True, slots=True)
class ImportanceScores:
    """`sites[(axis, layer)]` is the activation norm of every unit: L2 over samples of the mean |a| over tokens.

    Shapes: hidden [D] · ffn [F] · mamba_head [M, P] (the x slice) · attention_head [Q, H].
    Source: Minitron (MT1, arXiv 2407.14679, §2.2); the Mamba part SSM (arXiv 2504.11409, §3).
    """

    sites: Mapping[tuple[str, int], np.ndarray]

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

    def save(self, path: Path) -> None:
        from safetensors.numpy import save_file

        save_file({f"{axis}/{layer}": np.ascontiguousarray(score) for (axis, layer), score in self.sites.items()}, path)


def load_scores(path: Path) -> ImportanceScores:
    from safetensors.numpy import load_file

    sites = {}
    for name, score in load_file(path).items():
        axis, layer = name.split("/")
        sites[axis, int(layer)] = score
    return ImportanceScores(sites=sites)
