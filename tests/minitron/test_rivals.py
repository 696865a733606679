"""Published ways to cut a Llama, as benchmarks/rivals/ has them: what each of them states of its student."""

import re
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.real_sides import Base
from benchmarks.rivals.linear_depth import chosen_run, ghosted, replaceme
from benchmarks.rivals.low_rank_clone import low_rank_clone
from benchmarks.rivals.projections import begun, writes
from benchmarks.rivals.slicegpt import sliced_bases, slicegpt
from benchmarks.rivals.walks import narrower, shallower, stored_parameters
from distill.objectives import head_of
from minitron.families.state import load_tensors, model_tensors


@pytest.fixture(scope="module")
def base(build_tiny) -> Base:
    """A tied Llama without biases."""
    one = build_tiny("llama tied")
    return Base(one.family, one.model, one.config, one.architecture)


@pytest.fixture(scope="module")
def rows(token_ids) -> list[torch.Tensor]:
    return [token_ids(rows=4, seed=seed) for seed in (3, 4)]


@pytest.fixture(scope="module")
def ffn_kept(base) -> dict[int, tuple[int, ...]]:
    return {layer: tuple(range(1, base.architecture.ffn, 2)) for layer, mixer in enumerate(base.architecture.mixers) if mixer == "-"}


def test_slicegpt_that_leaves_nothing_out_is_the_same_function(base, rows, logits_of):
    student, stored = slicegpt(base, base.architecture.hidden, rows)
    assert torch.allclose(logits_of(student), logits_of(base.model), atol=1e-4)
    extra = 2 * base.architecture.num_layers * base.architecture.hidden**2 + base.architecture.vocab * base.architecture.hidden
    assert stored == stored_parameters(base.model) + extra  # a matrix on each shortcut, and a head of its own
    with torch.no_grad():
        student.model.layers[1].past_ffn.copy_(torch.eye(base.architecture.hidden))
    assert not torch.allclose(logits_of(student), logits_of(base.model), atol=0.1)


@pytest.mark.parametrize("normalised", [False, True])
def test_slicegpt_at_full_hidden_with_fewer_neurons_is_the_plain_slice_of_those(base, rows, ffn_kept, logits_of, normalised):
    student, _ = slicegpt(base, base.architecture.hidden, rows, ffn_kept=ffn_kept, slice_head=True, normalised=normalised)
    assert torch.allclose(logits_of(student), logits_of(narrower(base, ffn_kept).model), atol=1e-4)


def test_the_sliced_student_is_what_walking_the_projected_base_gives(base, rows, logits_of, token_ids):
    """The one with a narrower stream, against the base with the stream projected before every sublayer; without the last projection, the control, it is not."""
    student, _ = slicegpt(base, 24, rows, slice_head=True)
    bases = sliced_bases(base, [24] * (base.architecture.num_sublayers + 1), rows, False)
    parts, found = base.family.parts(base.model), {}
    with torch.no_grad():
        for last in (True, False):
            stream = parts.embed(token_ids())
            for sublayer, basis in zip(parts.layers, bases, strict=False):
                stream = sublayer(stream @ (basis @ basis.t()).float())
            found[last] = parts.head(parts.norm(stream @ (bases[-1] @ bases[-1].t()).float() if last else stream))
    assert torch.allclose(logits_of(student), found[True], atol=1e-4) and not torch.allclose(logits_of(student), found[False], atol=1e-2)


def with_a_linear_block(base: Base, *, of_ffn: bool) -> Base:
    """The base, whose block 2 adds a matrix times what the FFN before it gave, or times the whole stream."""
    model = deepcopy(base.model)
    before, block = model.model.layers[1:3]
    matrix, last = 0.3 * torch.randn(base.architecture.hidden, base.architecture.hidden, generator=torch.Generator().manual_seed(5)), {}
    block.self_attn.o_proj.weight.data.zero_()
    if of_ffn:
        before.mlp.register_forward_hook(lambda _module, _inputs, output: last.update(given=output))
    else:
        block.post_attention_layernorm.register_forward_hook(lambda _module, inputs, _output: last.update(given=inputs[0]))
    block.mlp.forward = lambda _normed: last["given"] @ matrix
    return replace(base, model=model)


@pytest.mark.parametrize(("method", "of_ffn"), [(replaceme, True), (ghosted, False)])
def test_a_block_that_is_linear_is_replaced_exactly(base, rows, logits_of, method, of_ffn):
    """In what the FFN before it adds (ReplaceMe), or in the stream (Ghosted Layers). The other kind, the control, is not."""
    for kind, exact in ((of_ffn, True), (not of_ffn, False)):
        linear = with_a_linear_block(base, of_ffn=kind)
        student, _ = method(linear, range(2, 3), rows)
        assert torch.allclose(logits_of(student), logits_of(linear.model), atol=1e-3) == exact


def test_an_operator_stands_behind_the_block_before_each_run(base, rows, logits_of):
    """Of blocks that do nothing; the middle one of the three that stay does something, so a wrong place would be seen."""
    model = deepcopy(base.model)
    for block in (1, 3):
        model.model.layers[block].self_attn.o_proj.weight.data.zero_()
        model.model.layers[block].mlp.down_proj.weight.data.zero_()
    student, _ = ghosted(replace(base, model=model), [1, 3], rows)
    assert [type(block).__name__ for block in student.model.layers] == ["MappedBlock", "MappedBlock"]
    assert torch.allclose(logits_of(student), logits_of(model), atol=1e-4)
    assert not torch.allclose(logits_of(shallower(base, [1, 3])), logits_of(base.model), atol=0.1)


def test_the_run_is_the_one_that_turns_the_stream_least(base, rows):
    model = deepcopy(base.model)
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        model.model.layers[2].get_submodule(name).weight.data.mul_(0.01)
    assert chosen_run(replace(base, model=model), 1, rows) == range(2, 3)
    model.model.layers[0].load_state_dict(model.model.layers[2].state_dict())  # the first never goes
    assert chosen_run(replace(base, model=model), 1, rows) == range(2, 3)


def test_a_student_of_fewer_blocks_is_an_ordinary_llama(base, rows, logits_of, tmp_path):
    student, stored = replaceme(base, 2, rows)
    student.save_pretrained(tmp_path)
    read = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(logits_of(read), logits_of(student)) and read.config.num_hidden_layers == base.architecture.num_layers - 2
    assert stored == stored_parameters(read) == stored_parameters(ghosted(base, 2, rows)[0]) - base.architecture.hidden**2


@pytest.mark.parametrize("tied", [True, False])
def test_a_clone_is_products_of_projections_and_learns(base, rows, ffn_kept, tied, monkeypatch):
    """Its loss on the rows that it sees falls, and falls further in more passes; what it ends as is the products, at full rank the teacher's own."""
    losses, kept = {}, {}

    def remember(*arguments):
        kept["clone"] = begun(*arguments)
        return kept["clone"]

    monkeypatch.setattr("benchmarks.rivals.low_rank_clone.begun", remember)
    for passes in (1, 4):
        heard: list[float] = []
        student, stored = low_rank_clone(base, 36, rows, ffn_kept=ffn_kept, tied=tied, passes=passes, rows_a_step=2, rate=3e-3, on_step=heard.append)
        losses[passes] = sum(heard[-4:]) / 4
        assert len(heard) == 4 * passes
    assert losses[4] < 0.9 * losses[1]
    tensors, clone = model_tensors(base.family, student), kept["clone"]
    assert all(torch.equal(tensors[name], (left.t() @ clone.matrices[name]) if writes(name) else clone.matrices[name] @ left)
               for name, left in clone.projections.items())  # fmt: skip
    assert set(tensors) == set(clone.projections) | set(clone.norms) and tensors["layers.1.mixer.up_proj.weight"].shape == (28, 36)
    assert student.config.tie_word_embeddings == tied and stored == sum(tensor.numel() for tensor in tensors.values())


@pytest.mark.parametrize("tied", [True, False])
def test_a_clone_at_full_hidden_begins_as_the_teacher(base, rows, logits_of, tied):
    """In another basis; one that begins at random, the control, does not."""
    student = base.family.build(base.config | {"tie_word_embeddings": tied}).eval()
    for calibration, same in ((rows, True), (None, False)):
        load_tensors(base.family, student, begun(base, base, base.architecture.hidden, calibration, tied, 0).tensors())
        assert torch.allclose(logits_of(student), logits_of(base.model), atol=1e-4) == same


@pytest.mark.parametrize("method", [
    lambda base, rows, kept: slicegpt(base, 36, rows, ffn_kept=kept), lambda base, rows, kept: ghosted(base, 1, rows),
    lambda base, rows, kept: replaceme(base, 1, rows), lambda base, rows, kept: low_rank_clone(base, 36, rows, ffn_kept=kept),
], ids=["slicegpt", "ghosted", "replaceme", "low_rank_clone"])  # fmt: skip
def test_every_student_can_be_distilled(base, rows, ffn_kept, method):
    """Through the head that objectives read, which gives the logits, and down to each of its parameters; the base gets no gradient."""
    student, _ = method(base, rows, ffn_kept)
    head = head_of(student, rows[0])
    logits = head.hidden_BTD @ head.weight_VD.t()
    assert torch.allclose(logits, student(rows[0]).logits, atol=1e-5)
    logits.square().mean().backward()
    assert all(parameter.grad is not None and parameter.dtype == torch.float32 for parameter in student.parameters())
    assert all(parameter.grad is None for parameter in base.model.parameters())


@pytest.mark.parametrize(("call", "said"), [
    (lambda base, rows: slicegpt(base, 36, rows, tied=True), "tied is true; SliceGPT turns embeddings"),
    (lambda base, rows: slicegpt(base, 40, rows), "hidden is 40; a Llama needs hidden % num_attention_heads == 0"),
    (lambda base, rows: slicegpt(base, 54, rows), "hidden is 54; it must be from 1 to the base's 48"),
    (lambda base, rows: slicegpt(base, 36, [rows[0][:1]]), "calibration has 40 tokens; a principal direction for every channel needs at least 48"),
    (lambda base, rows: slicegpt(base, 36, [rows[0].index_fill(1, torch.tensor([39]), -1)]), "calibration has padded rows"),
    (lambda base, rows: slicegpt(base, 36, rows, ffn_kept={1: (0,)}), "ffn_kept has sublayers [1]"),
    (lambda base, rows: replaceme(base, 4, rows), "blocks to remove are 4; they must be from 1 to 3"),
    (lambda base, rows: ghosted(base, [0, 1], rows), "blocks to remove are 0 to 1; they must lie between 1 and 3"),
    (lambda base, rows: replaceme(base, 1, [rows[0][:1]]), "calibration has 40 tokens; a linear map of every channel needs at least 48"),
    (lambda base, rows: low_rank_clone(base, 36, rows, passes=0), "passes is 0; it must be 1 or more"),
    (lambda base, rows: low_rank_clone(base, 36, rows, start="zero"), "start is zero; it must be one of principal, random"),
], ids=lambda value: value if isinstance(value, str) else "")  # fmt: skip
def test_what_cannot_be_is_refused_in_one_line(base, rows, call, said):
    with pytest.raises(ValueError, match=re.escape(said)) as caught:
        call(base, rows)
    assert "\n" not in str(caught.value)


def test_other_forms_than_a_llama_without_biases_are_refused(build_tiny, rows):
    for name, said in (("llama untied", "without biases"), ("qwen3 tied", "model_type is qwen3; SliceGPT is written here for llama")):
        one = build_tiny(name)
        with pytest.raises(ValueError, match=said):
            slicegpt(Base(one.family, one.model, one.config, one.architecture), 36, rows)
