"""Learning rate over a run: linear warm-up, then half a cosine down to a share of the peak."""

import math


def learning_rate_share(step: int, total_steps: int, *, warmup_share: float, final_share: float) -> float:
    """Share of the peak learning rate at a step (from 0), in (0, 1]."""
    warmup = max(1, round(total_steps * warmup_share))
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, total_steps - warmup)
    return final_share + (1 - final_share) * 0.5 * (1 + math.cos(math.pi * progress))
