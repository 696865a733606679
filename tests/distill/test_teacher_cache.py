"""The teacher's top k on disk: what training from it costs, that a cut-off write goes on, and what is refused."""

import json
import resource
import signal
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import NemotronHConfig, NemotronHForCausalLM

from distill.batches import PADDING, split_padding
from distill.losses import forward_kl, forward_kl_top_k
from distill.teacher_cache import META, TeacherCache, write_teacher_cache
from distill.top_k import TopK, TopKCode, top_k_of_logits

VOCABULARY = 64


def build_model(seed: int) -> NemotronHForCausalLM:
    """A tiny model; a head ten times a fresh one's size makes it as sure of some tokens as a trained one is."""
    torch.manual_seed(seed)
    config = NemotronHConfig(
        vocab_size=VOCABULARY, hidden_size=16, layers_block_type=["linear_attention", "mlp", "full_attention"], intermediate_size=24,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, mamba_num_heads=4, mamba_head_dim=4, n_groups=2, ssm_state_size=8, chunk_size=8,
    )  # fmt: skip
    model = NemotronHForCausalLM(config).float().eval().requires_grad_(False)
    model.lm_head.weight.normal_(std=0.5)
    return model


@dataclass
class CountingTeacher:
    """A model's top k, and which rows it was asked for."""

    model: NemotronHForCausalLM
    k: int
    asked: list

    def __call__(self, rows_BT: torch.Tensor) -> TopK:
        self.asked += rows_BT[:, 0].tolist()
        return top_k_of_logits(logits_of(self.model, rows_BT), self.k)


@torch.no_grad()
def logits_of(model, rows_BT: torch.Tensor) -> torch.Tensor:
    return model(split_padding(rows_BT)[0], use_cache=False).logits


@pytest.fixture(scope="module")
def teacher() -> NemotronHForCausalLM:
    return build_model(1)


@pytest.fixture(scope="module")
def rows() -> np.ndarray:
    """10 rows of 3 to 12 tokens, each beginning with its own index."""
    rows = np.random.default_rng(0).integers(VOCABULARY, size=(10, 12), dtype=np.int32)
    rows[:, 0] = range(10)
    for row in range(0, 10, 3):
        rows[row, 3 + row :] = PADDING
    return rows


def write(folder: Path, teacher, rows, k=8, name="teacher-a", **more) -> list[int]:
    """The rows that the teacher was asked for."""
    counting = CountingTeacher(teacher, k, [])
    write_teacher_cache(folder, rows, teacher=name, vocabulary=VOCABULARY, k=k, top_k_of_rows=counting, **more)
    return counting.asked


def test_rows_come_back_in_the_order_asked_for(teacher, rows, tmp_path):
    write(tmp_path, teacher, rows, block_rows=4)
    cache, chosen = TeacherCache(tmp_path), [7, 0, 7, 9]
    read, expected = cache.rows(chosen), top_k_of_logits(logits_of(teacher, torch.from_numpy(rows[chosen]).long()), 8)
    ids, order = expected.ids_BTK.sort(-1)
    mask = torch.from_numpy(rows[chosen] != PADDING)
    assert torch.equal(read.ids_BTK[mask], ids[mask]) and read.ids_BTK.shape == (4, 12, 8)
    off = (read.log_probabilities_BTK - expected.log_probabilities_BTK.gather(-1, order))[mask].abs()
    assert off.max() < 0.1 and read.tail_log_mass_BT.shape == (4, 12)
    assert not torch.equal(cache.rows([0, 7, 7, 9]).ids_BTK[mask], ids[mask])


def test_a_cache_takes_no_more_room_than_its_tokens_need(teacher, rows, tmp_path):
    write(tmp_path, teacher, rows)
    least = rows.size * TeacherCache(tmp_path).meta.code.bytes_per_token
    assert least <= sum(path.stat().st_size for path in tmp_path.iterdir()) < least + 1000


def kl_from_cache(folder: Path, teacher, rows, k: int) -> tuple[float, float]:
    """Nats per token of a student against the teacher: from a cache of k tokens, and from whole logits."""
    write(folder, teacher, rows, k=k)
    rows_BT = torch.from_numpy(rows).long()
    student, mask = logits_of(build_model(2), rows_BT), split_padding(rows_BT)[1]
    cached = forward_kl_top_k(student, TeacherCache(folder).rows(slice(None)), mask_BT=mask)
    return cached.item(), forward_kl(student, logits_of(teacher, rows_BT), mask_BT=mask).item()


def test_the_whole_distribution_gives_the_whole_divergence(teacher, rows, tmp_path):
    cached, whole = kl_from_cache(tmp_path, teacher, rows, VOCABULARY)
    assert cached == pytest.approx(whole, rel=1e-3) and whole > 0.5  # float16 log-probabilities


def test_the_more_tokens_are_kept_the_nearer_the_divergence(teacher, rows, tmp_path):
    missed = []
    for k in (1, 4, 16, VOCABULARY):
        cached, whole = kl_from_cache(tmp_path / str(k), teacher, rows, k)
        missed.append(1 - cached / whole)
    assert missed[0] > missed[1] > missed[2] > abs(missed[3]) and missed[0] > 0.1 and missed[2] < 0.1


KILLED = """
import os, signal, sys
sys.path[:0] = [{tests!r}]
import numpy as np
from pathlib import Path
import test_teacher_cache as here
def die(done, rows):
    if done >= 4:
        os.kill(os.getpid(), signal.SIGKILL)
here.write(Path({folder!r}), here.build_model(1), np.load({rows!r}), block_rows=2, on_block=die)
"""


def test_a_write_that_was_killed_goes_on_where_it_stopped(teacher, rows, tmp_path, snippet):
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    np.save(tmp_path / "rows.npy", rows)
    code = KILLED.format(tests=str(Path(__file__).parent), folder=str(killed), rows=str(tmp_path / "rows.npy"))
    assert snippet(tmp_path, code).returncode == -signal.SIGKILL
    with pytest.raises(ValueError, match="holds no whole cache; its writing was cut off"):
        TeacherCache(killed)
    assert write(killed, teacher, rows, block_rows=3) == [4, 5, 6, 7, 8, 9]
    assert write(whole, teacher, rows, block_rows=2) == list(range(10))
    read, expected = (TeacherCache(folder).rows(slice(None)) for folder in (killed, whole))
    assert all(torch.equal(getattr(read, name), getattr(expected, name)) for name in TopK.__slots__)


def test_a_whole_cache_asks_the_teacher_nothing(teacher, rows, tmp_path):
    assert len(write(tmp_path, teacher, rows)) == 10
    assert write(tmp_path, teacher, rows) == []


def test_processes_share_the_rows_and_the_last_makes_the_cache_whole(teacher, rows, tmp_path):
    first = write(tmp_path, teacher, rows, block_rows=2, share=(0, 2))
    assert not (tmp_path / META).exists()
    second = write(tmp_path, teacher, rows, block_rows=2, share=(1, 2))
    assert (first, second) == ([0, 1, 4, 5, 8, 9], [2, 3, 6, 7]) and (tmp_path / META).exists()


OTHERS = {"teacher": {"name": "teacher-b"}, "k": {"k": 4}, "rows": {}}


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("difference", OTHERS)
def test_a_folder_made_otherwise_is_refused_by_name(teacher, rows, tmp_path, difference, whole):
    write(tmp_path, teacher, rows, share=(0, 1) if whole else (5, 9))
    other_rows = (rows + (rows != PADDING)) % VOCABULARY if difference == "rows" else rows
    with pytest.raises(ValueError, match=f"was made with {difference} .*, but .* is asked for"):
        write(tmp_path, teacher, other_rows, **OTHERS[difference])
    write(tmp_path, teacher, rows)


def test_reading_for_another_teacher_vocabulary_or_rows_is_refused_by_name(teacher, rows, tmp_path):
    write(tmp_path, teacher, rows)
    TeacherCache(tmp_path, teacher="teacher-a", vocabulary=VOCABULARY, rows_RT=rows)
    wrong = {"teacher": "teacher-b", "vocabulary": 65, "rows_RT": rows[:9]}
    for name, value in wrong.items():
        with pytest.raises(ValueError, match=f"was made with {name.removesuffix('_RT')} "):
            TeacherCache(tmp_path, **{name: value})


def test_a_cache_that_the_disk_cannot_hold_is_refused_before_the_teacher_is_asked(teacher, rows, tmp_path):
    least = rows.size * TopKCode(VOCABULARY, 8).bytes_per_token
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (least - 1, limits[1]))
        before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        asked = []
        with pytest.raises(OSError):
            write_teacher_cache(tmp_path, rows, teacher="a", vocabulary=VOCABULARY, k=8, top_k_of_rows=asked.append)
    finally:
        signal.signal(signal.SIGXFSZ, before)
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert asked == [] and len(write(tmp_path, teacher, rows, name="a")) == 10


def test_a_damaged_cache_is_refused(teacher, rows, tmp_path):
    write(tmp_path, teacher, rows)
    with open(tmp_path / "codes.bin", "r+b") as file:
        file.truncate(100)
    with pytest.raises(ValueError, match="codes.bin has 100 bytes; its meta.json says"):
        TeacherCache(tmp_path)
    (tmp_path / META).write_text(json.dumps({"teacher": "x"}))
    with pytest.raises(ValueError, match="meta.json is not a cache's"):
        TeacherCache(tmp_path)


def test_no_cache_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no whole cache$"):
        TeacherCache(tmp_path / "absent")
