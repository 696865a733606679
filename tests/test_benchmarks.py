"""The scripts under benchmarks/ that make checkpoints or need hardware: what of them can be held without 25 GB or a GPU."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

from memory_budget.hf_config import architecture_from_config, read_config
from minitron.checkpoints import Checkpoint, write_weights
from minitron.families.nemotron_h import FAMILY
from minitron.pruning.plan import check_is_cut


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
