"""Long rows by blocks of tokens: the same numbers as the whole row, with what a block hands on to the next."""

from functools import partial

import pytest
import torch

from memory_budget.architecture import Architecture
from minitron.families.nemotron_h import FAMILY
from minitron.mamba import block_sizes, dispatch, token_blocks
from minitron.training.tiny_teacher import TINY_CONFIG

SMALL = Architecture(
    model_type="nemotron_h", pattern="M-*", hidden=32, vocab=64, ffn=48, num_attention_heads=4, num_key_value_heads=2, attention_head_dim=8,
    mamba_num_heads=8, mamba_head_dim=8, mamba_num_groups=2, mamba_state_size=16, mamba_conv_kernel=4,
)  # fmt: skip
TOKENS, BLOCK = 77, 32  # blocks of 32 and 45: a rest shorter than half a block stays with the one before


@pytest.fixture(scope="module")
def layers() -> tuple[torch.nn.Module, ...]:
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        for owner, name, function in dispatch.replacements():
            patch.setattr(owner, name, function)
        model = FAMILY.build(FAMILY.hf_config(TINY_CONFIG, SMALL))
        mixer, ffn, attention = (layer.mixer for layer in model.model.layers)
        with torch.no_grad():  # at the start weights are so small that the state would not be missed
            mixer.in_proj.weight.mul_(20)
            mixer.dt_bias.fill_(-3)
        yield mixer, ffn, attention


def passed(module, function, hidden) -> dict[str, torch.Tensor]:
    """Output and gradients by name, of the input and of every weight."""
    hidden = hidden.clone().requires_grad_()
    output = function(hidden)
    weighted = (output * torch.randn(output.shape, generator=torch.Generator().manual_seed(2))).sum()
    names, parameters = zip(*module.named_parameters(), strict=True)
    return {"output": output.detach()} | dict(zip(("input", *names), torch.autograd.grad(weighted, [hidden, *parameters]), strict=True))


def check_same(found, expected) -> None:
    differences = {name: ((found[name].double() - wanted.double()).norm() / wanted.double().norm()).item() for name, wanted in expected.items()}
    decays = [differences.pop(name, 0.0) for name in ("A_log", "dt_bias")]  # the scan's gradients of decays lose digits beside a large D, by blocks or whole
    assert max(differences.values()) < 3e-6 and max(decays) < 1e-3, (differences, decays)


@pytest.fixture(scope="module")
def hidden():
    return torch.randn(2, TOKENS, 32, generator=torch.Generator().manual_seed(1))


def test_a_mamba_mixer_by_blocks_gives_what_it_gives_whole(layers, hidden):
    mixer, _, _ = layers
    by_blocks = passed(mixer, lambda rows: token_blocks.mix_by_blocks(mixer, rows, None, BLOCK), hidden)
    check_same(by_blocks, passed(mixer, mixer, hidden))


@pytest.mark.parametrize("forgotten", ["last_inputs", "state"])
def test_what_a_block_hands_on_is_needed(forgotten, layers, hidden, monkeypatch):
    mixer, _, _ = layers
    start = token_blocks.BlockCache.__init__
    monkeypatch.setattr(token_blocks.BlockCache, "__init__", lambda self, *args: (start(self, *args), setattr(self, forgotten, None))[0])
    with torch.no_grad():
        by_blocks, whole = token_blocks.mix_by_blocks(mixer, hidden, None, BLOCK), mixer(hidden)
    difference = (by_blocks - whole).norm(dim=(0, 2)) / whole.norm(dim=(0, 2))
    assert difference[:BLOCK].max() < 1e-5 and difference[BLOCK] > 1e-3, difference


def test_an_ffn_by_blocks_gives_what_it_gives_whole(layers, hidden):
    _, ffn, _ = layers
    by_blocks = passed(ffn, lambda rows: token_blocks.feed_by_blocks(ffn, rows, BLOCK), hidden)
    check_same(by_blocks, passed(ffn, ffn, hidden))


def test_attention_by_heads_gives_what_it_gives_whole(layers, hidden):
    _, _, attention = layers
    by_heads = passed(attention, lambda rows: token_blocks.attend_by_heads(attention, rows, None)[0], hidden)
    check_same(by_heads, passed(attention, lambda rows: attention(rows)[0], hidden))


@pytest.mark.parametrize(("tokens", "sizes"), [(64, [32, 32]), (77, [32, 45]), (80, [32, 48]), (81, [32, 32, 17]), (33, [33]), (16, [16])])
def test_no_block_is_shorter_than_half_a_block(tokens, sizes):
    assert block_sizes.block_sizes(tokens, BLOCK) == sizes


def test_only_rows_longer_than_a_block_go_by_blocks(monkeypatch, hidden):
    calls = []
    feed = partial(dispatch._feed_long, lambda rows: calls.append(rows.shape[1]) or rows)
    feed(hidden)
    monkeypatch.setattr(block_sizes, "LONG_TOKENS", BLOCK)
    monkeypatch.setattr(block_sizes, "BLOCK_TOKENS", BLOCK)
    feed(hidden)
    assert calls == [TOKENS, 32, 45]
