"""The scripts under benchmarks/ that make checkpoints or need hardware: what of them can be held without 25 GB or a GPU."""

import importlib.util
import json
import math
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from memory_budget.architecture import Architecture
from memory_budget.hf_config import architecture_from_config, read_config
from memory_budget.parameters import count_total_parameters
from minitron.checkpoints.files import Checkpoint
from minitron.checkpoints.shards import write_weights
from minitron.families.base import MAMBA_HEAD
from minitron.families.nemotron_h import FAMILY
from minitron.importance.scores import ImportanceScores
from minitron.pruning.plan import make_plan
from nas.depth import check_is_cut


def load_script(repository: Path, name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, repository / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def make_teacher(repository) -> ModuleType:
    return load_script(repository, "make_teacher")


@pytest.fixture
def twelve(make_teacher):
    return architecture_from_config(read_config(make_teacher.PRESETS["nano2-12b"]))


def test_the_random_teacher_has_the_published_pattern_names_and_size(make_teacher, twelve, published_patterns):
    tensors = list(make_teacher.planned_tensors(twelve, 0))
    assert twelve.pattern == published_patterns[0]
    assert sum(tensor.num_bytes for tensor in tensors) == 2 * 12_310_001_152
    assert all(tensor.name.startswith(("backbone.", "lm_head.")) for tensor in tensors)


def test_the_random_mixture_of_experts_has_the_published_size_and_its_first_layers_are_what_score_30b_takes(make_teacher, repository):
    nano3 = architecture_from_config(read_config(make_teacher.PRESETS["nano3-30b"]))
    assert count_total_parameters(nano3) == 31_577_937_344
    first = replace(nano3, pattern=nano3.pattern[: load_script(repository, "score_30b").LAYERS])
    assert first.num_layers >= 10 and first.pattern.count("E") >= 4 and {"M", "*"} < set(first.pattern)
    tensors = list(make_teacher.planned_tensors(first, 0))
    biases = [tensor.num_bytes for tensor in tensors if tensor.dtype == "F32"]  # of the routers
    assert sum(tensor.num_bytes for tensor in tensors) == 2 * count_total_parameters(first) + sum(biases) and biases == [4 * 128] * 4


def test_a_random_teacher_is_the_same_for_the_same_seed(make_teacher, twelve, tmp_path):
    small = replace(twelve, pattern="M-*", hidden=64, ffn=96, vocab=50, num_attention_heads=2, num_key_value_heads=1, mamba_num_heads=8, mamba_head_dim=4)
    for name, seed in (("one", 0), ("again", 0), ("other", 1)):
        (tmp_path / name).mkdir()
        write_weights(tmp_path / name, make_teacher.planned_tensors(small, seed), max_shard_bytes=2**30)
    one, again, other = (Checkpoint(tmp_path / name) for name in ("one", "again", "other"))
    assert all(torch.equal(one.read(name), again.read(name)) and not torch.equal(one.read(name), other.read(name)) for name in one.entries)
    (tmp_path / "one" / "config.json").write_text(json.dumps(FAMILY.hf_config(read_config(make_teacher.PRESETS["nano2-12b"]), small)))
    logits = FAMILY.load(tmp_path / "one", dtype=torch.float32)(torch.arange(20)[None], use_cache=False).logits
    assert torch.isfinite(logits).all() and 0.1 < logits.std() < 10


def test_pieces_of_a_random_tensor_differ_and_are_small(make_teacher):
    pieces = list(make_teacher.random_tensor("lm_head.weight", (5000, 5120), 0))
    assert sum(map(len, pieces)) == 5000 and max(piece.nbytes for piece in pieces) <= make_teacher.PIECE_BYTES
    assert not torch.equal(pieces[0], pieces[1])


def test_a_teacher_that_the_disk_cannot_hold_is_refused_in_one_line(make_teacher, tmp_path, monkeypatch, capsys):
    config = read_config(make_teacher.PRESETS["nano2-12b"]) | {"vocab_size": 2**40}  # 10 PiB
    (tmp_path / "config.json").write_text(json.dumps(config))
    monkeypatch.setitem(make_teacher.PRESETS, "huge", tmp_path / "config.json")
    monkeypatch.setattr("sys.argv", ["make_teacher.py", "--preset", "huge", "--out", str(tmp_path / "out")])
    assert make_teacher.main() == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: --out: ") and "the weights to write there need" in line
    assert list((tmp_path / "out").iterdir()) == []


def test_prune_12b_cuts_the_published_student(repository, twelve, published_patterns):
    student = load_script(repository, "prune_12b").published_student(twelve, 0).student
    assert (student.pattern, student.hidden, student.ffn, student.mamba_num_heads) == (published_patterns[1], 4480, 15680, 128)
    check_is_cut(twelve, student, load_script(repository, "prune_12b").published_student(twelve, 0).kept_layers)


def test_the_tokens_ratio_is_the_median_of_the_smallest_shares_that_reach_the_slice(repository):
    ratio = load_script(repository, "compensated").tokens_ratio
    slices = {1.0: [2.0, 2.0, 2.0]}
    assert ratio({"slice": slices, "compensated": {0.1: [2.1, 2.0, 2.3], 0.3: [1.9, 1.9, 2.2], 1.0: [1.8, 1.8, 1.9]}}) == 0.3
    assert ratio({"slice": slices, "compensated": {0.3: [2.1, 2.1, 1.0], 1.0: [2.1, 1.9, 1.9]}}) is None


@pytest.fixture
def claims(repository) -> ModuleType:
    return load_script(repository, "claims")


@pytest.fixture
def sides(claims) -> ModuleType:
    return importlib.import_module("benchmarks.sides")


@pytest.fixture
def claim_students(claims) -> ModuleType:
    return importlib.import_module("benchmarks.claim_students")


def test_the_interval_is_students_own(claims):
    """Student 1908: the hours of sleep that one drug gave ten patients more than another, mean 1.58 and 95 % interval 0.70 to 2.46."""
    mean, half = claims.interval([1.2, 2.4, 1.3, 1.3, 0.0, 1.0, 1.8, 0.8, 4.6, 1.4])
    assert (mean, mean - half, mean + half) == pytest.approx((1.58, 0.7001, 2.4599), abs=1e-4)


def test_a_claim_holds_only_where_its_interval_leaves_out_zero(claims):
    verdicts = [claims.verdict(*claims.interval(gains)) for gains in ([0.2, 0.21, 0.19], [-0.2, -0.21, -0.19], [0.2, -0.1, 0.1], [0.0, 0.0, 0.0])]
    assert verdicts == ["holds", "does not hold", "not decided", "not decided"]


def blind_heads(claim_students, heads: list[float], *, by_score: bool = False) -> tuple[tuple[int, ...], tuple[int, ...], float]:
    """Of eight heads in two groups with these scores: the four kept group by group, the four kept blindly, and the share of those that moved."""
    teacher = Architecture(model_type="nemotron_h", pattern="M", hidden=8, vocab=8, mamba_num_heads=8, mamba_head_dim=1, mamba_num_groups=2,
                           mamba_state_size=2, mamba_conv_kernel=2)  # fmt: skip
    scores = ImportanceScores({(MAMBA_HEAD, 0): np.array(heads)[:, None]})
    aware = make_plan(teacher, replace(teacher, mamba_num_heads=4), (0,), scores)
    blind = claim_students.group_blind(aware, scores, by_score=by_score)
    assert replace(blind, units=aware.units) == aware and claim_students.moved_share(aware) == 0
    return aware.units[MAMBA_HEAD][0], blind.units[MAMBA_HEAD][0], claim_students.moved_share(blind)


def test_a_group_blind_cut_keeps_the_best_heads_of_all_groups_and_moves_what_one_has_too_many(claim_students):
    assert blind_heads(claim_students, [8, 7, 6, 1, 5, 4, 3, 2]) == ((0, 1, 4, 5), (0, 1, 2, 4), 0.25)
    assert blind_heads(claim_students, [1, 3, 6, 8, 2, 4, 5, 7]) == ((2, 3, 6, 7), (2, 3, 6, 7), 0.0)  # as many in each: nothing moves
    assert blind_heads(claim_students, [1, 3, 6, 8, 2, 4, 5, 7], by_score=True) == ((2, 3, 6, 7), (3, 7, 2, 6), 0.5)


def test_the_best_rate_is_walked_to_from_either_side(claim_students):
    for lowest in (0.0001, 0.002, 0.005, 0.02, 0.08):
        assert claim_students.best_rate(lambda rate, lowest=lowest: abs(math.log(rate / lowest))) == lowest


def test_what_was_measured_is_not_measured_again(sides, tmp_path):
    one, beside = (sides.Measured(tmp_path / "of" / "a.jsonl") for _ in range(2))
    for value, measured in ((1.5, one), (2.5, beside)):
        assert measured.get("loss", lambda value=value: value) == 1.5
    assert one.get("other loss", lambda: 2.5) == 2.5


def test_a_remembered_teacher_gives_what_the_teacher_gives(sides):
    class Counted(nn.Module):
        asked = 0

        def base_model(self, ids_BT, *, use_cache, position_ids):
            self.asked += len(ids_BT)
            return SimpleNamespace(last_hidden_state=(ids_BT * 2 + position_ids)[..., None])

    teacher = Counted()
    remembering = sides.RememberingTeacher(teacher)
    for rows in ([0, 5], [5, 7], [7, 0], [0, 5]):
        ids_BT, position_ids = torch.tensor(rows)[:, None] + torch.arange(4), torch.tensor([[0, 1, 0, 1], [0, 1, 2, 3]])[[row % 2 for row in rows]]
        found = remembering.base_model(ids_BT, use_cache=False, position_ids=position_ids).last_hidden_state
        assert torch.equal(found, (ids_BT * 2 + position_ids)[..., None])
    assert teacher.asked == 3
