"""Zero-shot screening: held-out loss and KL of many candidates at once, before any training.

Per batch the teacher runs once, and so does every candidate, each up to its last norm; then the output heads are walked
a chunk of tokens at a time, the teacher's log-probabilities made once per chunk for all. Logits of [tokens × vocabulary]
never exist for more than a chunk.

With logits h·Wᵀ the teacher's expectation of a candidate's logit is h·(p·W), and candidates that are views of one model share W:
p·W is one product for all of them, and what is left for each is its log-sum-exp.

Letters: N tokens, V vocabulary, D hidden.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, replace

import numpy as np
import torch
from torch import nn

from distill.batches import PADDING, split_padding
from distill.losses import next_token_labels
from distill.products import logits_of
from minitron.importance.scores import ImportanceScores
from minitron.text.samples import check_predicted
from nas.candidates import Candidates

CACHED_LOGITS, LEAST_CHUNK_TOKENS = 2**19, 64  # two MiB of float32
GPU_CHUNK_TOKENS = 1024  # of which a product is no longer bound by reading the head


@dataclass(frozen=True, slots=True)
class Distance:
    """Sums of nats over predicted tokens that count; they add up over batches."""

    loss: float = 0.0
    kl: float = 0.0
    tokens: int = 0

    def __add__(self, other: "Distance") -> "Distance":
        return Distance(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def means(self) -> dict[str, float]:
        """Nats per token. Raises ValueError where none counts."""
        check_predicted(self.tokens)
        return {"loss": self.loss / self.tokens, "kl": self.kl / self.tokens}


@torch.inference_mode()
def measure_batch(teacher: nn.Module, candidates: Mapping[str, nn.Module], rows_BT: torch.Tensor, *, chunk_tokens: int | None = None) -> dict[str, Distance]:
    """Every candidate's distance to the data and to the teacher over one batch of rows (padding −1).

    `chunk_tokens` None takes as many as keep a chunk's logits in a processor's cache, but enough for a matrix product.
    """
    if chunk_tokens is None:
        cached = max(LEAST_CHUNK_TOKENS, CACHED_LOGITS // teacher.get_output_embeddings().weight.shape[0])
        chunk_tokens = GPU_CHUNK_TOKENS if rows_BT.device.type == "cuda" else cached
    ids_BT, _ = split_padding(rows_BT)
    predicted = (next_token_labels(rows_BT)[:, :-1] != PADDING).reshape(-1)
    targets_N = ids_BT[:, 1:].reshape(-1)[predicted]

    def states(model: nn.Module) -> torch.Tensor:
        hidden_BTD = model.base_model(ids_BT, use_cache=False).last_hidden_state
        return hidden_BTD[:, :-1].flatten(0, 1)[predicted]

    teacher_ND, teacher_VD = states(teacher), _head(teacher)
    states_ND = {name: states(model) for name, model in candidates.items()}
    heads_VD = {name: _head(model) for name, model in candidates.items()}
    widest_VD = _widest(heads_VD.values())
    sums = {name: torch.zeros(2, dtype=torch.float64, device=rows_BT.device) for name in candidates}
    for start in range(0, len(targets_N), chunk_tokens):
        chunk = slice(start, start + chunk_tokens)
        log_p_NV = torch.log_softmax(logits_of(teacher_ND[chunk], teacher_VD), dim=-1)
        p_NV = log_p_NV.exp()
        negative_entropy_N = torch.linalg.vecdot(p_NV, log_p_NV)
        expected_ND = {_storage(head_VD): p_NV @ head_VD for head_VD in widest_VD}
        for name, head_VD in heads_VD.items():
            logits_NV = logits_of(states_ND[name][chunk], head_VD)
            if _storage(head_VD) in expected_ND:
                expected_N = torch.linalg.vecdot(states_ND[name][chunk], expected_ND[_storage(head_VD)][:, : head_VD.shape[1]])
            else:
                expected_N = torch.linalg.vecdot(p_NV, logits_NV)
            own_N = logits_NV.gather(-1, targets_N[chunk][:, None])[:, 0]
            normaliser_N = _log_sum_exp(logits_NV, own_N)
            distances = torch.stack([normaliser_N - own_N, negative_entropy_N + normaliser_N - expected_N])
            sums[name] += distances.sum(1, dtype=torch.float64)
    return {name: Distance(*values.tolist(), tokens=len(targets_N)) for name, values in sums.items()}


def _head(model: nn.Module) -> torch.Tensor:
    return model.get_output_embeddings().weight


def _storage(head_VD: torch.Tensor) -> int:
    """The same number for prefixes of one matrix."""
    return head_VD.data_ptr()


def _widest(heads_VD: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """Of every float32 matrix that output heads are prefixes of, the widest one there is; in bf16 p·W would not be exact enough."""
    by_width = sorted(heads_VD, key=lambda head_VD: head_VD.shape[1])
    return list({_storage(head_VD): head_VD for head_VD in by_width if head_VD.dtype == torch.float32}.values())


def _log_sum_exp(logits_NV: torch.Tensor, own_N: torch.Tensor) -> torch.Tensor:
    """log Σ exp of every row, [N]. One logit of each row stands in for the highest: the sum is at least 1, and only where it overflows
    is the highest looked for."""
    if logits_NV.device.type == "cuda":  # where a look is dearer than a second pass
        return torch.logsumexp(logits_NV, dim=-1)
    sums_N = torch.sub(logits_NV, own_N[:, None]).exp_().sum(-1)
    return sums_N.log_() + own_N if torch.isfinite(sums_N).all() else torch.logsumexp(logits_NV, dim=-1)


def best_first(losses: Mapping[str, float]) -> list[str]:
    """Names by ascending loss; those whose loss is no number are left out."""
    return sorted((name for name, loss in losses.items() if math.isfinite(loss)), key=losses.get)


def retained_importance(candidates: Candidates, scores: ImportanceScores, removal_scores: Sequence[float]) -> np.ndarray:
    """Share of importance each candidate keeps, [rows]: the product over axes of the kept share of score mass.

    For depth it is 1 / (1 + score of the last removal), the damage of that depth as a whole. Experts count by their scores also where some are protected.
    """
    teacher, scores = candidates.teacher, replace(scores, protected={})
    kept = _kept_shares(scores.hidden())[candidates.hidden]

    def key_value_heads(layer: int) -> np.ndarray:
        return scores.key_value_heads(layer, teacher.num_key_value_heads)

    axes = (("-", "ffn", scores.ffn), ("M", "mamba_num_heads", scores.mamba_heads), ("*", "num_key_value_heads", key_value_heads),
            ("E", "moe_num_experts", scores.experts), ("E", "moe_ffn", scores.expert_neurons), ("E", "moe_shared_ffn", scores.shared_neurons))  # fmt: skip
    for kind, field, score_of in axes:
        column, layers = getattr(candidates, field), [layer for layer, letter in enumerate(teacher.mixers) if letter == kind]
        if layers and (column != getattr(teacher, field)).any():
            kept = kept * np.mean([_kept_shares(score_of(layer)) for layer in layers], axis=0)[column]
    removed = teacher.num_layers - candidates.num_layers
    damage = np.array([0.0, *removal_scores])
    return kept / (1 + damage[np.minimum(removed, len(damage) - 1)])


def _kept_shares(scores: np.ndarray) -> np.ndarray:
    """By number of units from 0 on, the share of the scores' sum held by so many of the highest; of several rows of scores the mean over rows, but for those of
    nothing, which are an unreached expert's."""
    running = np.cumsum(-np.sort(-np.atleast_2d(scores), axis=1), axis=1)
    running = running[running[:, -1] > 0]
    return np.concatenate([[0.0], (running / running[:, -1:]).mean(0)])
