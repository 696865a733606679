"""Zero-shot screening: held-out loss and KL of many candidates at once, before any training.

Per batch the teacher runs once, and so does every candidate, each up to its last norm; then the output heads are walked
a chunk of tokens at a time, the teacher's log-probabilities made once per chunk for all. Logits of [tokens × vocabulary]
never exist for more than a chunk.

Letters: N tokens, V vocabulary, D hidden.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass

import numpy as np
import torch
from torch import nn

from distill.batches import split_padding
from minitron.importance.scores import ImportanceScores
from nas.candidates import Candidates

CACHED_LOGITS, LEAST_CHUNK_TOKENS = 2**18, 64  # one MiB of float32


@dataclass(frozen=True, slots=True)
class Distance:
    """Sums of nats over predicted tokens; they add up over batches."""

    loss: float = 0.0
    kl: float = 0.0
    tokens: int = 0

    def __add__(self, other: "Distance") -> "Distance":
        return Distance(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def means(self) -> dict[str, float]:
        """Nats per token."""
        return {"loss": self.loss / self.tokens, "kl": self.kl / self.tokens}


@torch.no_grad()
def measure_batch(teacher: nn.Module, candidates: Mapping[str, nn.Module], rows_BT: torch.Tensor, *, chunk_tokens: int | None = None) -> dict[str, Distance]:
    """Every candidate's distance to the data and to the teacher over one batch of rows (padding −1).

    `chunk_tokens` None takes as many as keep a chunk's logits in a processor's cache, but enough for a matrix product.
    """
    chunk_tokens = chunk_tokens or max(LEAST_CHUNK_TOKENS, CACHED_LOGITS // teacher.get_output_embeddings().weight.shape[0])
    ids_BT, mask_BT = split_padding(rows_BT)
    predicted = mask_BT[:, 1:].reshape(-1)
    targets_N = ids_BT[:, 1:].reshape(-1)[predicted]

    def states(model: nn.Module) -> torch.Tensor:
        hidden_BTD = model.base_model(ids_BT, use_cache=False).last_hidden_state
        return hidden_BTD[:, :-1].flatten(0, 1)[predicted]

    teacher_ND = states(teacher)
    states_ND = {name: states(model) for name, model in candidates.items()}
    sums = {name: torch.zeros(2, dtype=torch.float64) for name in candidates}
    for start in range(0, len(targets_N), chunk_tokens):
        chunk = slice(start, start + chunk_tokens)
        reference = _Reference(teacher.get_output_embeddings()(teacher_ND[chunk]).float())
        for name, model in candidates.items():
            logits_NV = model.get_output_embeddings()(states_ND[name][chunk]).float()
            sums[name] += reference.distances(logits_NV, targets_N[chunk])
    return {name: Distance(*values.tolist(), tokens=len(targets_N)) for name, values in sums.items()}


class _Reference:
    """The teacher's distribution over a chunk, against which logits are held."""

    def __init__(self, logits_NV: torch.Tensor):
        log_p_NV = torch.log_softmax(logits_NV, dim=-1)
        self.p_NV = log_p_NV.exp()
        self.negative_entropy_N = torch.linalg.vecdot(self.p_NV, log_p_NV)

    def distances(self, logits_NV: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
        """[loss, KL(teacher ‖ candidate)], float64 sums. log q = logits − logsumexp, so no softmax is formed; the logits are used up."""
        own_N = logits_NV.gather(-1, targets_N[:, None])[:, 0]
        expected_N = torch.bmm(self.p_NV[:, None], logits_NV[:, :, None])[:, 0, 0]
        highest_N = logits_NV.amax(-1)
        normaliser_N = logits_NV.sub_(highest_N[:, None]).exp_().sum(-1).log_() + highest_N
        return torch.stack([normaliser_N - own_N, self.negative_entropy_N + normaliser_N - expected_N]).sum(1, dtype=torch.float64).cpu()


def best_first(losses: Mapping[str, float]) -> list[str]:
    """Names by ascending loss; those whose loss is no number are left out."""
    return sorted((name for name, loss in losses.items() if math.isfinite(loss)), key=losses.get)


def retained_importance(candidates: Candidates, scores: ImportanceScores, removal_scores: Sequence[float]) -> np.ndarray:
    """Share of importance each candidate keeps, [rows]: the product over axes of the kept share of score mass.

    For depth it is 1 / (1 + score of the last removal), the damage of that depth as a whole.
    """
    teacher = candidates.teacher
    kept = _kept_share(scores.hidden(), candidates.hidden)
    for kind, column, score_of in (("-", candidates.ffn, scores.ffn), ("M", candidates.mamba_num_heads, scores.mamba_heads)):
        layers = [layer for layer, letter in enumerate(teacher.pattern) if letter == kind]
        if layers:
            kept = kept * np.mean([_kept_share(score_of(layer), column) for layer in layers], axis=0)
    removed = teacher.num_layers - candidates.num_layers
    damage = np.array([0.0, *removal_scores])
    return kept / (1 + damage[np.minimum(removed, len(damage) - 1)])


def _kept_share(scores: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """Share of the scores' sum held by the highest `numbers` of them."""
    running = np.concatenate([[0.0], np.cumsum(np.sort(scores)[::-1])])
    return running[numbers] / running[-1]
