"""What the evaluation measures, each against a slow or exact reference: by position and source, speed and memory, the needle, what is kept."""

import math
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedTokenizerFast
from transformers.modeling_outputs import CausalLMOutput

from distill.batches import PADDING
from minitron.measures.held_out import MOST_SOURCES, Reference, TokenSums, by_position, by_row, by_source, evaluate, token_sums
from minitron.measures.kept import kept, measurements_folder
from minitron.measures.needle import check_vocabulary, make_sample, measure_needle
from minitron.measures.paired import paired_difference
from minitron.measures.speed import _generate, _peak_bytes, make_prompts, measure_speed
from minitron.settings.data import DataSettings
from minitron.settings.evaluate import EvaluateSettings, NeedleSettings, SpeedSettings
from minitron.settings.training import Rows
from minitron.text.key_values import vocabulary_of
from minitron.text.samples import batches_of
from minitron.text.split_rows import SplitRows
from minitron.walk.store import Result

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def rows(token_ids) -> np.ndarray:
    """Seven rows of 21 tokens, the last of them padded after 9."""
    rows = token_ids(rows=7, tokens=21).numpy().astype(np.int32)
    rows[-1, 9:] = PADDING
    return rows


@pytest.fixture(scope="module")
def other(build_model) -> nn.Module:
    return build_model(seed=1)


@pytest.fixture(scope="module")
def sums(rows, teacher, other) -> TokenSums:
    return token_sums(other, teacher, batches_of(rows, 3, CPU))


@torch.no_grad()
def slow_losses(model, rows) -> dict[tuple[int, int], float]:
    """Loss of every predicted token, by row and position, one row at a time in float64."""
    found = {}
    for number, row in enumerate(rows):
        ids = torch.from_numpy(row[row != PADDING].astype(np.int64))
        losses = F.cross_entropy(model(ids[None], use_cache=False).logits[0, :-1].double(), ids[1:], reduction="none")
        found |= {(number, position): loss for position, loss in enumerate(losses.tolist(), start=1)}
    return found


def test_a_teacher_is_asked_once_for_the_same_rows(sums, rows, teacher, other):
    asked = []
    handle = teacher.base_model.register_forward_hook(lambda *_: asked.append(1))
    reference, batches = Reference(lambda: teacher), batches_of(rows, 3, CPU)
    for _ in range(2):
        assert np.array_equal(token_sums(other, reference, batches).by_row, sums.by_row)
    assert len(asked) == len(batches)
    token_sums(other, teacher, batches)  # the control
    handle.remove()
    assert len(asked) == 2 * len(batches)


# By position and by source.


def test_buckets_of_positions_hold_the_losses_of_those_positions(sums, rows, other):
    slow, buckets = slow_losses(other, rows), by_position(sums)
    assert [(bucket["from"], bucket["to"]) for bucket in buckets] == [(1, 1), (2, 3), (4, 7), (8, 15), (16, 20)]
    for bucket in buckets:
        inside = [loss for (_, position), loss in slow.items() if bucket["from"] <= position <= bucket["to"]]
        shifted = [loss for (_, position), loss in slow.items() if bucket["from"] < position <= bucket["to"] + 1]
        assert bucket["tokens"] == len(inside) and bucket["loss_nats_per_token"] == pytest.approx(np.mean(inside), rel=1e-6)
        assert bucket["loss_nats_per_token"] != pytest.approx(np.mean(shifted), rel=1e-3)


@pytest.mark.parametrize("value", ["loss_nats_per_token", "kl_to_teacher_nats_per_token", "top1_agreement"])
def test_parts_make_up_the_whole(value, sums, rows, teacher, other):
    whole = evaluate(other, teacher, batches_of(rows, 3, CPU))
    for parts in (by_position(sums), by_source(sums, ["a", "b", "a", "c", "b", "b", "a"])):
        assert sum(part["tokens"] for part in parts) == whole.tokens == 6 * 20 + 8
        assert sum(part["tokens"] * part[value] for part in parts) / whole.tokens == pytest.approx(getattr(whole, value), rel=1e-12)


def test_a_source_is_measured_on_its_own_rows(sums, rows, teacher, other):
    names = np.array(["a", "b", "a", "c", "b", "b", "a"])
    for part in by_source(sums, names.tolist()):
        own = evaluate(other, teacher, batches_of(rows[names == part["source"]], 2, CPU))
        foreign = evaluate(other, teacher, batches_of(rows[names != part["source"]], 2, CPU))
        assert (part["loss_nats_per_token"], part["tokens"]) == (pytest.approx(own.loss_nats_per_token, rel=1e-6), own.tokens)
        assert part["loss_nats_per_token"] != pytest.approx(foreign.loss_nats_per_token, rel=1e-4)


def test_rows_hold_their_own_losses_and_tokens(sums, rows, other):
    slow, found = slow_losses(other, rows), by_row(sums)
    assert found["tokens"] == [20] * 6 + [8]
    assert found["loss"] == pytest.approx([sum(loss for (row, _), loss in slow.items() if row == number) for number in range(7)], rel=1e-6)


def test_a_paired_difference_is_the_difference_of_means_and_of_equal_rows_has_the_textbooks_error():
    """Of rows of one length it is the standard error of a mean. Losses of another order, the control, have the same mean and a larger error."""
    generator = np.random.default_rng(0)
    hard_R, apart_R, tokens_R = generator.gamma(3.0, 20.0, 60), generator.normal(0.1, 0.02, 60), np.full(60, 20.0)
    one, other = ({"loss": (20 * losses_R).tolist(), "tokens": tokens_R.tolist()} for losses_R in (hard_R + apart_R, hard_R))
    found = paired_difference(one, other)
    assert found.nats_per_token == pytest.approx(apart_R.mean(), rel=1e-9)
    assert found.standard_error == pytest.approx(apart_R.std(ddof=1) / math.sqrt(60), rel=1e-6)
    unpaired = paired_difference(one, other | {"loss": other["loss"][::-1]})
    assert unpaired.nats_per_token == pytest.approx(found.nats_per_token) and unpaired.standard_error > 100 * found.standard_error


def test_the_error_of_rows_of_unequal_lengths_is_the_bootstraps():
    generator = np.random.default_rng(1)
    tokens_R = generator.integers(5, 200, 400)
    apart_R = tokens_R * generator.normal(0.05, 0.3, 400)
    found = paired_difference({"loss": apart_R, "tokens": tokens_R}, {"loss": np.zeros(400), "tokens": tokens_R})
    drawn = generator.integers(400, size=(4000, 400))
    means = apart_R[drawn].sum(1) / tokens_R[drawn].sum(1)
    assert found.standard_error == pytest.approx(means.std(), rel=0.1) and found.standard_error != pytest.approx(means.std() / 2, rel=0.1)
    assert paired_difference({"loss": [1.0], "tokens": [4]}, {"loss": [2.0], "tokens": [4]}).standard_error is None


def test_small_sources_beyond_twenty_are_one():
    by_row = np.stack([np.arange(30.0), np.zeros(30), np.zeros(30), np.arange(1.0, 31.0)])
    parts = by_source(TokenSums(np.zeros((4, 1)), by_row), [f"file{number}" for number in range(30)])
    assert len(parts) == MOST_SOURCES and parts[0]["source"] == "file29" and parts[-1]["source"] == "11 others"
    assert sum(part["tokens"] for part in parts) == by_row[3].sum() and parts[-1]["tokens"] == sum(range(1, 12))


@pytest.mark.parametrize("limit", [None, 40])
def test_every_row_knows_its_source(limit, tmp_path):
    split = SplitRows("heldout", DataSettings(sequence_length=4, rows=Rows.documents), tmp_path / "rows.npy", limit=limit)
    for source, lengths in ((1, [3, 1, 9]), (2, [2, 2]), (1, [5]), (3, [1]), (3, [4] * 9)):
        split.add([[source] * length for length in lengths], str(source))
    split.finish()
    rows = np.load(tmp_path / "rows.npy")
    named = [int(source) for source, number in split.counts.runs for _ in range(number)]
    assert named == rows[:, 0].tolist() and len(named) == (14 if limit is None else 11)
    assert named[1:] + named[:1] != rows[:, 0].tolist()


# Speed and memory.


def test_peak_memory_is_of_what_is_alive_at_once():
    def used(at_once: bool) -> int:
        with _peak_bytes(CPU) as peak:
            first = torch.ones(1000) + 1  # two of 4,000 bytes while the sum is made
            first = first if at_once else None
            second = torch.zeros(500)
            second.add_(1), second[10:], second.reshape(10, 50)  # views and in-place work take nothing
        del first
        return peak()

    assert (used(at_once=False), used(at_once=True)) == (8000, 8000)
    with _peak_bytes(CPU) as peak:
        held = [torch.zeros(1000) for _ in range(5)]
    assert peak() == 20_000 and len(held) == 5


def test_peak_memory_of_generating_is_what_the_profiler_counts(teacher, token_ids):
    prompts = token_ids(rows=3, tokens=24)
    _generate(teacher, prompts, 4, use_cache=True)
    with _peak_bytes(CPU) as peak:
        _generate(teacher, prompts, 4, use_cache=True)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        _generate(teacher, prompts, 4, use_cache=True)
    changes = sorted((event.start_ns(), event.nbytes()) for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]")
    counted = max(np.cumsum([change for _, change in changes]))
    assert peak() == pytest.approx(counted, rel=0.01) and counted > 10_000  # scratch inside an operation is the profiler's alone


def test_longer_sequences_take_more_memory_and_weights_are_counted(teacher, rows):
    lengths = [SpeedSettings(input_tokens=8, output_tokens=2), SpeedSettings(input_tokens=64, output_tokens=2, batch=4)]
    small, large = (measure_speed(teacher, make_prompts(rows, at.input_tokens, at.batch), at, can_decode=True) for at in lengths)
    weights = sum(parameter.numel() * 4 for parameter in teacher.parameters())
    assert weights <= small["weights_bytes"] < small["peak_bytes"] < large["peak_bytes"]
    assert min(small["prefill_tokens_per_second"], small["decode_tokens_per_second"]) > 0 and small["prefill_seconds"] > 0


def test_a_slower_model_has_a_lower_speed(teacher, rows):
    class Slowed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = teacher

        def forward(self, *arguments, **named):
            time.sleep(0.02)
            return self.inner(*arguments, **named)

    at = SpeedSettings(input_tokens=8, output_tokens=4, batch=2)
    fast, slow = (measure_speed(model, make_prompts(rows, 8, 2), at, can_decode=True) for model in (teacher, Slowed()))
    assert slow["prefill_seconds"] > 0.02 and slow["decode_tokens_per_second"] <= 2 * 4 / (4 * 0.02)
    assert fast["decode_tokens_per_second"] > slow["decode_tokens_per_second"]


def test_without_attention_only_prefill_is_measured(build_model, rows):
    found = measure_speed(build_model(pattern="M-M-"), make_prompts(rows, 8, 1), SpeedSettings(input_tokens=8), can_decode=False)
    assert found["decode_tokens_per_second"] is None and found["prefill_tokens_per_second"] > 0


def test_prompts_are_held_out_tokens_repeated_where_they_end(rows):
    real = rows[rows != PADDING]
    prompts = make_prompts(rows, 100, 2)
    assert prompts.shape == (2, 100) and prompts.flatten().tolist() == [*real, *real][:200] and len(real) < 200


# The needle.

WORDS = [f"Ġ{first}{second}word" for first in "abcdef" for second in "abcde"]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, 30 of which are words to be asked for."""
    names = ["<unk>", "Ċ", "The", "Ġword", "Ġof", "Ġis", ".", *WORDS]
    inner = Tokenizer(models.WordLevel({name: number for number, name in enumerate(names)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=inner)


class Reader(nn.Module):
    """Answers with what stood after the last earlier occurrence of the `seen` tokens before the answer; likelihoods count occurrences where it is 0."""

    def __init__(self, seen: int, vocab: int = 200):
        super().__init__()
        self.seen, self.vocab, self.weight = seen, vocab, nn.Parameter(torch.zeros(1))

    def forward(self, ids_BT, **_):
        logits = torch.zeros(len(ids_BT), 1, self.vocab)
        for row, ids in enumerate(ids_BT.tolist()):
            asked = ids[len(ids) - self.seen :]
            for place in range(len(ids) - self.seen):
                if self.seen and ids[place : place + self.seen] == asked:
                    logits[row, 0, ids[place + self.seen]] = 10.0 + place
                elif not self.seen:
                    logits[row, 0, ids[place]] += 1
        return CausalLMOutput(logits=logits)


def accuracies(model, tokenizer, **settings) -> list[float]:
    wanted = NeedleSettings(**{"lengths": [64, 100], "depths": 3, "samples": 25, "alternatives": 8} | settings)
    vocabulary = vocabulary_of(tokenizer)
    found = measure_needle(model, vocabulary, np.full((4, 50), 1, dtype=np.int32), wanted, batch_tokens=1000)
    assert found["chance"] == 1 / wanted.alternatives and found["samples"] == 75
    return [at["accuracy"] for at in found["by_length"]]


def test_a_prompt_has_its_length_its_needle_at_its_depth_and_its_question(tokenizer):
    wanted = NeedleSettings(lengths=[64], needles=3)
    vocabulary = vocabulary_of(tokenizer)
    for place, depth in enumerate([0.0, 0.5, 1.0]):
        sample = make_sample(vocabulary, np.array([1, 0]), wanted, length=64, depth=depth, seed=[place])
        key, value = sample.prompt[64 - len(vocabulary.says) - 1], sample.alternatives[sample.right]
        needle, text = vocabulary.line(key, value), sample.prompt
        (at,) = [start for start in range(64) if text[start : start + len(needle)] == needle]
        assert len(text) == 64 and text[-len(vocabulary.question(key)) :] == vocabulary.question(key)
        assert len(set(sample.alternatives)) == 8 and sample.alternatives.count(value) == 1
        assert depth - 0.55 <= at / 64 <= depth + 0.55 and (depth > 0 or at < 30) and (depth < 1 or at > 20)


@pytest.mark.parametrize("needles", [1, 4, 8])
def test_a_model_that_reads_finds_every_needle(needles, tokenizer):
    longest = len(vocabulary_of(tokenizer).question(0))
    assert accuracies(Reader(longest), tokenizer, needles=needles, lengths=[128, 200]) == [1.0, 1.0]


def test_a_model_that_saw_nothing_is_at_chance(tokenizer):
    class Blind(Reader):
        def forward(self, ids_BT, **_):
            return CausalLMOutput(logits=torch.arange(self.vocab, dtype=torch.float32).expand(len(ids_BT), 1, -1))

    for accuracy in accuracies(Blind(0), tokenizer):
        assert abs(accuracy - 1 / 8) < 4 * math.sqrt(1 / 8 * 7 / 8 / 75)


def test_knowing_what_was_said_is_enough_for_one_needle_and_not_for_several(tokenizer):
    assert accuracies(Reader(0), tokenizer) == [1.0, 1.0]
    for accuracy in accuracies(Reader(0), tokenizer, needles=8, lengths=[128, 200]):
        assert abs(accuracy - 1 / 8) < 4 * math.sqrt(1 / 8 * 7 / 8 / 75)


def test_a_needle_does_not_depend_on_the_batch(teacher, tokenizer):
    wanted = NeedleSettings(lengths=[60], samples=4)
    small = vocabulary_of(tokenizer)
    found = [measure_needle(teacher, small, np.full((1, 50), 1, dtype=np.int32), wanted, batch_tokens=tokens) for tokens in (1, 200, 10_000)]
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"alternatives": 30}, "evaluate.needle.alternatives is 30; it must be at most 29: the tokenizer has 30 words of one token"),
        ({"lengths": [64, 14]}, "evaluate.needle.lengths has 14; it must be at least"),
    ],
)
def test_a_needle_that_the_tokenizer_does_not_allow_is_refused(settings, said, tokenizer):
    with pytest.raises(ValueError, match=said):
        check_vocabulary(vocabulary_of(tokenizer), NeedleSettings(**settings))
    check_vocabulary(vocabulary_of(tokenizer), NeedleSettings())


# Settings.


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: EvaluateSettings(speed=[SpeedSettings(batch=0)]), r"evaluate.speed\[0\].batch is 0; it must be at least 1"),
        (lambda: EvaluateSettings(tasks=["a", "a"]), "evaluate.tasks names 'a' twice"),
        (lambda: NeedleSettings(needles=9), "evaluate.needle.needles is 9; it must be at most evaluate.needle.alternatives, 8"),
        (lambda: EvaluateSettings(speed=[SpeedSettings(input_tokens=80)]).check_positions(143), "80 input and 64 output .* together they must be at most 143"),
        (lambda: EvaluateSettings(needle=NeedleSettings(lengths=[144])).check_positions(143), "evaluate.needle.lengths has 144; .* at most 143"),
    ],
)
def test_settings_that_cannot_be_are_refused(make, said):
    with pytest.raises(ValueError, match=said):
        make()
    EvaluateSettings(speed=[SpeedSettings(input_tokens=79)], needle=NeedleSettings(lengths=[143])).check_positions(143)


# What is kept.


def test_a_measurement_is_made_once_and_again_where_anything_differs(tmp_path):
    made = []

    def measured(checkpoint: str, of: dict) -> int:
        folder = measurements_folder(tmp_path, Result(tmp_path, {"stage": "distill", "key": checkpoint, "facts": {}}))
        return kept(folder, "speed", of=of, make=lambda: made.append(0) or {"number": len(made)}, say=print)["number"]

    assert [measured("a", {"batch": 1}), measured("a", {"batch": 1})] == [1, 1]
    assert [measured("a", {"batch": 2}), measured("b", {"batch": 1}), measured("a", {"batch": 1})] == [2, 3, 1]


def test_a_measurement_that_fails_is_not_kept(tmp_path):
    with pytest.raises(ZeroDivisionError):
        kept(tmp_path / "one", "speed", of={}, make=lambda: 1 / 0, say=print)
    assert kept(tmp_path / "one", "speed", of={}, make=lambda: 7, say=print) == 7
