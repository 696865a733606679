"""From everything that fits to a shortlist that is no row of twins."""

import numpy as np
import pytest

from memory_budget.architecture import Architecture
from memory_budget.workload import Workload
from nas.candidates import enumerate_candidates
from nas.shortlist import STRATUM, diversified, largest
from nas.space import SearchSpace

TEACHER = Architecture(
    model_type="nemotron_h", pattern="M-M-M*-M-M*-M-M*-M-M-", hidden=128, vocab=2048, ffn=512, num_attention_heads=8, num_key_value_heads=2,
    attention_head_dim=16, mamba_num_heads=16, mamba_head_dim=16, mamba_num_groups=2, mamba_state_size=32, mamba_conv_kernel=4,
)  # fmt: skip
DEPTHS = (17, 19, 21)
SPACE = SearchSpace(DEPTHS, (96, 112, 128), tuple(range(320, 513, 8)), (12, 14, 16), {})


@pytest.fixture(scope="module")
def candidates():
    return enumerate_candidates(TEACHER, SPACE, {depth: tuple(range(depth)) for depth in DEPTHS}, Workload(context_tokens=4096))


@pytest.fixture(scope="module")
def retained(candidates):
    return candidates.parameters / candidates.parameters.max()


def strata(candidates, rows) -> list[tuple]:
    return [(int(candidates.num_layers[row]), int(candidates.hidden[row]), int(candidates.mamba_num_heads[row])) for row in rows]


def test_the_shortlist_has_every_depth_in_turn(candidates, retained):
    rows = diversified(candidates, retained, 9)
    assert [sum(candidates.num_layers[row] == depth for row in rows) for depth in DEPTHS] == [3, 3, 3]


def test_no_two_of_the_shortlist_share_depth_hidden_and_heads(candidates, retained):
    rows = diversified(candidates, retained, 27)
    assert len(set(strata(candidates, rows))) == len(rows) == 27


def test_the_largest_are_near_twins(candidates):
    """The control: the plain rule fails both claims above."""
    rows = largest(candidates, 9)
    assert len(set(strata(candidates, rows))) < 9 and {int(candidates.num_layers[row]) for row in rows} == {21}


def test_every_one_is_the_best_of_its_stratum(candidates, retained):
    every = strata(candidates, range(len(candidates)))
    for row, stratum in zip(rows := diversified(candidates, retained, 9), strata(candidates, rows), strict=True):
        assert retained[row] == max(retained[other] for other, same in enumerate(every) if same == stratum)


def by_queues(candidates, retained, size: int) -> list[int]:
    """The oracle, row by row: round after round a queue per depth of the strata's best left, taken in turns."""
    left, rows, depths = np.argsort(-retained, kind="stable").tolist(), [], []
    while left and len(rows) < size:
        best = {}
        for row in left:
            stratum = tuple(int(getattr(candidates, name)[row]) for name in STRATUM)
            best.setdefault(stratum, row)
            depths += [stratum[0]] if stratum[0] not in depths else []
        queues = {depth: [row for (of, *_), row in best.items() if of == depth] for depth in depths}
        turns = [[queue[turn] for queue in queues.values() if turn < len(queue)] for turn in range(len(best))]
        rows += [row for turn in turns for row in turn]
        left = [row for row in left if row not in set(best.values())]
    return rows[:size]


@pytest.mark.parametrize("seed", range(6))
def test_it_is_the_shortlist_of_the_row_by_row_rule(seed):
    """Also with ties, with depths of unlike numbers of strata, and with channels and attention heads cut."""
    random = np.random.default_rng(seed)
    space = SearchSpace(DEPTHS, (96, 128), (320, 512), (12, 16), {}, (8, 16), (4, 8))
    every = enumerate_candidates(TEACHER, space, {depth: tuple(range(depth)) for depth in DEPTHS}, Workload(context_tokens=4096))
    some = every.take(np.flatnonzero(random.random(len(every)) < np.array([0.2, 0.5, 0.9])[(every.num_layers - 17) // 2]))
    retained = random.integers(0, 5, len(some)) / 5
    for size in (1, 5, 17, 1000):
        assert diversified(some, retained, size) == by_queues(some, retained, size)


def test_channels_and_attention_heads_make_strata_of_their_own(candidates, retained):
    assert len(set(strata(candidates, diversified(candidates, retained, 27)))) == 27
    space = SearchSpace(DEPTHS, SPACE.hidden, (320, 512), SPACE.mamba_num_heads, {}, (8, 16), (4, 6, 8))
    wider = enumerate_candidates(TEACHER, space, {depth: tuple(range(depth)) for depth in DEPTHS}, Workload(context_tokens=4096))
    columns = ("num_layers", "hidden", "mamba_num_heads", "mamba_head_dim", "num_attention_heads")
    rows = diversified(wider, wider.parameters / 1e6, 27 * 6)
    assert len({tuple(int(getattr(wider, name)[row]) for name in columns) for row in rows}) == 27 * 6


def test_second_bests_fill_a_shortlist_longer_than_the_strata(candidates, retained):
    rows = diversified(candidates, retained, 40)
    assert len(set(rows)) == 40 and sorted(strata(candidates, rows[:27])) == sorted(set(strata(candidates, rows)))


def test_the_shortlist_is_no_longer_than_asked_nor_than_what_fits(candidates, retained):
    assert len(diversified(candidates, retained, 4)) == 4
    assert len(diversified(candidates, retained, 100_000)) == len(candidates)


def test_the_largest_come_by_memory(candidates):
    rows = largest(candidates, 5)
    assert candidates.total_bytes[rows].tolist() == np.sort(candidates.total_bytes)[::-1][:5].tolist()
