"""A distribution's top k: what is kept of it, the bytes it takes, and what coding it loses."""

import numpy as np
import pytest
import torch

from distill.top_k import LEVEL_BITS, TopK, TopKCode, top_k_of_hidden, top_k_of_logits


def some_logits(vocabulary: int, tokens: int = 6) -> torch.Tensor:
    return 3 * torch.randn(2, tokens, vocabulary, generator=torch.Generator().manual_seed(vocabulary))


def by_id(top_k: TopK) -> TopK:
    ids, order = top_k.ids_BTK.sort(-1)
    return TopK(ids, top_k.log_probabilities_BTK.gather(-1, order), top_k.tail_log_mass_BT)


def round_trip(top_k: TopK, vocabulary: int) -> TopK:
    code = TopKCode(vocabulary, top_k.ids_BTK.shape[-1])
    codes = code.encode(top_k)
    assert codes.shape == (top_k.tail_log_mass_BT.numel(), code.bytes_per_token) and codes.dtype == np.uint8
    return code.decode(codes.reshape(*top_k.tail_log_mass_BT.shape, -1))


def test_what_is_kept_is_the_likeliest_tokens_and_the_mass_of_the_others():
    logits = some_logits(97)
    top_k, expected = top_k_of_logits(logits, 5), logits.double().log_softmax(-1).sort(-1, descending=True)
    assert torch.equal(top_k.ids_BTK, expected.indices[..., :5])
    torch.testing.assert_close(top_k.log_probabilities_BTK.double(), expected.values[..., :5], rtol=0, atol=1e-6)
    torch.testing.assert_close(top_k.tail_log_mass_BT.double(), expected.values[..., 5:].logsumexp(-1), rtol=0, atol=1e-6)


def test_a_tail_far_below_rounding_is_still_told():
    logits = torch.tensor([[20.0, 0.0, -20.0, -30.0]])
    tail = top_k_of_logits(logits, 2).tail_log_mass_BT.item()
    assert tail == pytest.approx(logits.double().log_softmax(-1)[0, 2:].logsumexp(-1).item(), rel=1e-6) and np.expm1(tail) + 1 < 1e-17


def test_top_k_of_hidden_states_is_that_of_their_logits():
    random = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(2, 7, 8, generator=random), torch.randn(97, 8, generator=random)
    whole, chunked = top_k_of_logits(hidden @ weight.T, 5), top_k_of_hidden(hidden, weight, 5, chunk_tokens=4)
    assert torch.equal(whole.ids_BTK, chunked.ids_BTK)
    torch.testing.assert_close(whole.log_probabilities_BTK, chunked.log_probabilities_BTK, rtol=0, atol=1e-6)
    torch.testing.assert_close(whole.tail_log_mass_BT, chunked.tail_log_mass_BT, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("vocabulary", "k"), [(131072, 128), (512, 511), (512, 128), (97, 13), (97, 1), (97, 97), (2, 1), (1, 1)])
def test_ids_come_back_as_they_were_and_log_probabilities_within_half_a_step(vocabulary, k):
    top_k = by_id(top_k_of_logits(some_logits(vocabulary), k))
    read = round_trip(top_k, vocabulary)
    assert torch.equal(read.ids_BTK, top_k.ids_BTK)
    log_probabilities = top_k.log_probabilities_BTK
    spread = log_probabilities.amax(-1, keepdim=True) - log_probabilities.amin(-1, keepdim=True)
    # Half a step, what the float16 of range and tail add, and as much again by which the kept mass is off before it is scaled.
    step = 2.0**-10 * log_probabilities.abs() if k == vocabulary else spread / (2**LEVEL_BITS - 1)
    bound = step.amax(-1, keepdim=True) + 2.0**-10 * (spread + 1)
    assert ((read.log_probabilities_BTK - log_probabilities).abs() <= bound).all()
    if k < vocabulary:
        torch.testing.assert_close(read.tail_log_mass_BT, top_k.tail_log_mass_BT, rtol=2.0**-11, atol=1e-7)


@pytest.mark.parametrize("part", range(4))
def test_every_part_of_the_code_is_read(part):
    """The control of the round trip: the low bits, the high bits, the levels or the ends of another token give another TopK."""
    code, logits = TopKCode(97, 13), some_logits(97)
    first, second = (code.encode(top_k_of_logits(value, 13))[:1] for value in (logits, logits.flip(0)))
    ends = np.cumsum((0, *code.part_bytes))
    spliced = first.copy()
    spliced[:, ends[part] : ends[part + 1]] = second[:, ends[part] : ends[part + 1]]
    read, whole = code.decode(spliced), code.decode(first)
    assert any(not torch.equal(getattr(read, name), getattr(whole, name)) for name in TopK.__slots__)


@pytest.mark.parametrize(("vocabulary", "k"), [(131072, 128), (97, 13), (97, 97)])
def test_kept_mass_and_tail_add_up_to_one(vocabulary, k):
    read = round_trip(top_k_of_logits(some_logits(vocabulary), k), vocabulary)
    mass = read.log_probabilities_BTK.double().exp().sum(-1) + read.tail_log_mass_BT.double().exp()
    torch.testing.assert_close(mass, torch.ones_like(mass), rtol=0, atol=1e-6)


def test_a_token_takes_at_most_300_bytes_at_the_real_sizes():
    assert TopKCode(131072, 128).bytes_per_token == 292
    assert TopKCode(131072, 256).bytes_per_token > 300


@pytest.mark.parametrize(("vocabulary", "k"), [(512, 128), (2048, 8), (131072, 8)])
def test_a_smaller_vocabulary_or_k_takes_fewer_bytes(vocabulary, k):
    assert TopKCode(vocabulary, k).bytes_per_token < 292


def test_equal_probabilities_and_a_tail_of_nothing_come_back():
    logits = torch.tensor([[5.0, 5.0, 5.0, -300.0]])
    read = round_trip(top_k_of_logits(logits, 3), 4)
    torch.testing.assert_close(read.log_probabilities_BTK.exp(), torch.full((1, 3), 1 / 3))
    assert read.tail_log_mass_BT.exp().item() == 0.0


@pytest.mark.parametrize("k", [0, 98])
def test_a_k_outside_the_vocabulary_is_refused(k):
    for ask in (lambda: TopKCode(97, k), lambda: top_k_of_logits(some_logits(97), k)):
        with pytest.raises(ValueError, match=rf"k = {k}\) must be from 1 to the vocabulary, 97"):
            ask()


@pytest.mark.parametrize(("vocabulary", "bad"), [(97, float("nan")), (13, float("nan")), (97, float("inf"))])
def test_a_teacher_that_broke_down_is_not_stored(vocabulary, bad):
    logits = some_logits(vocabulary)
    TopKCode(vocabulary, 13).encode(top_k_of_logits(logits, 13))
    logits[0, 0, 0] = bad
    with pytest.raises(FloatingPointError, match="not all finite"):
        TopKCode(vocabulary, 13).encode(top_k_of_logits(logits, 13))
