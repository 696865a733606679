"""Learning rate over a phase: linear warm-up, then down to a share of the peak in one of three ways."""

import math

from distill.plan import TrainPlan

SCHEDULES = ("cosine", "linear", "wsd")


def learning_rate_share(step: int, total_steps: int, *, warmup_share: float, final_share: float, schedule: str = "cosine", decay_share: float = 0.2) -> float:
    """Share of the peak learning rate at a step (from 0), in (0, 1].

    cosine and linear fall from the end of the warm-up on; wsd (warm-up, stable, decay: MiniCPM, arXiv 2404.06395, §4)
    stays at the peak and falls linearly over the last `decay_share` of the steps.
    """
    warmup = max(1, round(total_steps * warmup_share))
    if step < warmup:
        return (step + 1) / warmup
    begin = max(warmup, total_steps - round(total_steps * decay_share)) if schedule == "wsd" else warmup
    progress = max(0, step - begin) / max(1, total_steps - begin)
    left = 0.5 * (1 + math.cos(math.pi * progress)) if schedule == "cosine" else 1 - progress
    return final_share + (1 - final_share) * left


def learning_rate(plan: TrainPlan, step: int, total_steps: int) -> float:
    """The plan's learning rate at a step of its phase."""
    return plan.learning_rate * learning_rate_share(
        step, total_steps, warmup_share=plan.warmup_share, final_share=plan.final_learning_rate_share, schedule=plan.schedule, decay_share=plan.decay_share
    )
