"""Zero-shot screening: the held-out loss of a candidate cut from the teacher in memory, before any training."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from memory_budget.architecture import Architecture
from minitron.evaluation import held_out_loss
from minitron.families.base import Family
from minitron.importance.scores import ImportanceScores
from minitron.pruning.cut import cut_state
from minitron.pruning.plan import PruningPlan, make_plan
from nas.candidates import Candidates


def build_pruned(family: Family, teacher: nn.Module, plan: PruningPlan, teacher_config: dict) -> nn.Module:
    """The student of a plan as a model in memory, cut from the teacher's weights."""
    with torch.device("meta"):
        student = family.build(family.hf_config(teacher_config, plan.student))
    state = cut_state(family, plan, teacher.state_dict())
    names = {family.canonical_name(name): name for name in student.state_dict()}
    student.load_state_dict({names[name]: tensor for name, tensor in state.items()}, assign=True)
    return student.eval()


@dataclass(frozen=True, slots=True)
class Screen:
    """Everything needed to measure candidates of one teacher."""

    family: Family
    teacher: nn.Module
    teacher_config: dict
    architecture: Architecture
    scores: ImportanceScores
    batches: list[torch.Tensor]

    def zero_shot_loss(self, student: Architecture, kept_layers: tuple[int, ...]) -> float:
        """Held-out loss of the candidate as cut, nats per token."""
        plan = make_plan(self.architecture, student, kept_layers, self.scores)
        return held_out_loss(build_pruned(self.family, self.teacher, plan, self.teacher_config), self.batches)


def retained_importance(candidates: Candidates, scores: ImportanceScores, removal_scores: list[float]) -> np.ndarray:
    """Share of importance each candidate keeps, [rows]: the product over axes of the kept share of score mass.

    For depth it is 1 / (1 + score of the last removal), the damage of that depth as a whole.
    """
    teacher = candidates.teacher
    kept = np.ones(len(candidates))
    kept *= _kept_share(scores.hidden(), candidates.hidden)
    for kind, column, score_of in (("-", candidates.ffn, scores.ffn), ("M", candidates.mamba_num_heads, scores.mamba_heads)):
        layers = [layer for layer, letter in enumerate(teacher.pattern) if letter == kind]
        if layers:
            kept *= np.mean([_kept_share(score_of(layer), column) for layer in layers], axis=0)
    removed = teacher.num_layers - candidates.num_layers
    damage = np.array([0.0, *removal_scores])
    return kept / (1 + damage[np.minimum(removed, len(damage) - 1)])


def _kept_share(scores: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """Share of the scores' sum held by the highest `numbers` of them."""
    running = np.concatenate([[0.0], np.cumsum(np.sort(scores)[::-1])])
    return running[numbers] / running[-1]
