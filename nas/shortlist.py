"""From everything that fits to the few worth a forward pass."""

from collections import defaultdict

import numpy as np

from nas.candidates import Candidates


def diversified(candidates: Candidates, retained: np.ndarray, size: int) -> list[int]:
    """Rows of at most `size` candidates: the best of every stratum (depth × hidden × Mamba heads), depths taking turns.

    `retained` [rows] is the importance a candidate keeps. "Largest first" would return near twins:
    thousands of points lie between a good candidate and the budget.
    """
    best_of_stratum: dict[tuple[int, int, int], int] = {}
    for row in np.argsort(-retained, kind="stable").tolist():
        stratum = (int(candidates.num_layers[row]), int(candidates.hidden[row]), int(candidates.mamba_num_heads[row]))
        best_of_stratum.setdefault(stratum, row)
    by_depth: dict[int, list[int]] = defaultdict(list)
    for (depth, _, _), row in best_of_stratum.items():  # already best first
        by_depth[depth].append(row)
    queues, chosen = sorted(by_depth.values(), key=lambda rows: -retained[rows[0]]), []
    while queues and len(chosen) < size:
        for queue in queues:
            chosen.append(queue.pop(0))
        queues = [queue for queue in queues if queue]
    return chosen[:size]


def largest(candidates: Candidates, size: int) -> list[int]:
    """Rows of the candidates that use most memory, for comparison."""
    return np.argsort(-candidates.total_bytes, kind="stable")[:size].tolist()
