"""The Mamba-2 scan and convolution in plain torch against the sequential recurrence in float64 and transformers' own path.

Letters as in minitron/mamba/ssd.py: B batch, T tokens, M heads, P head dim, G groups, N state, E channels, K kernel.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from minitron.families.nemotron_h import FAMILY
from minitron.mamba import blockwise, chunks, dispatch, ssd

# Taken at import, before any test can have put ours in their place.
TRANSFORMERS_OWN = [(owner, name, getattr(owner, name)) for owner, name, _ in dispatch.replacements()]
NAMES = ("x", "dt", "A", "B", "C", "start", "D")


@pytest.fixture
def transformers_own(monkeypatch) -> None:
    """transformers' functions for this test, and afterwards whatever was there."""
    for owner, name, function in TRANSFORMERS_OWN:
        monkeypatch.setattr(owner, name, function)


def draw(tokens: int, groups: int, *, batch: int = 2, heads: int = 4, head_dim: int = 3, state: int = 5, decay: float = 1.0, seed: int = 0):
    """x, dt, A, B, C, start and D in float32; `decay` scales −A."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=random)

    dt = F.softplus(normal(batch, tokens, heads) - 1)
    A = -decay * torch.exp(normal(heads))
    return {
        "x": normal(batch, tokens, heads, head_dim), "dt": dt, "A": A, "B": normal(batch, tokens, groups, state), "C": normal(batch, tokens, groups, state),
        "start": normal(batch, heads, head_dim, state), "D": normal(heads),
    }  # fmt: skip


def sequential(x, dt, A, B, C, D=None, start=None):
    """h ← exp(dt·A)·h + dt·x⊗B, y = h·C + D·x, a token at a time (SSD, arXiv 2405.21060, §2)."""
    batch, tokens, heads, head_dim = x.shape
    per_group = heads // B.shape[2]
    state = x.new_zeros(batch, heads, head_dim, B.shape[-1]) if start is None else start
    outputs = []
    for token in range(tokens):
        B_BMN, C_BMN = (torch.stack([tensor[:, token, head // per_group] for head in range(heads)], dim=1) for tensor in (B, C))
        step = dt[:, token, :, None]
        state = torch.exp(step * A[:, None])[..., None] * state + (step * x[:, token])[..., None] * B_BMN[:, :, None]
        y = (state * C_BMN[:, :, None]).sum(-1)
        outputs.append(y if D is None else y + D[:, None] * x[:, token])
    return torch.stack(outputs, dim=1), state


def in_float64(tensors):
    return {name: tensor.double() for name, tensor in tensors.items()}


def call(function, tensors, names):
    """(y, final state) with only the optional arguments in `names`."""
    start, D = (tensors[name] if name in names else None for name in ("start", "D"))
    return function(*(tensors[name] for name in ("x", "dt", "A", "B", "C")), D, start)


def relative(left: torch.Tensor, right: torch.Tensor) -> float:
    return ((left.double() - right.double()).abs().max() / right.double().abs().max()).item()


LENGTHS = [1, 2, chunks.SCAN_TOKENS - 1, chunks.SCAN_TOKENS, chunks.SCAN_TOKENS + 1, 3 * chunks.SCAN_TOKENS - 5]


@pytest.mark.parametrize("names", [NAMES, NAMES[:5]], ids=["with state and D", "from zeros"])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("tokens", LENGTHS)
def test_scan_is_the_sequential_recurrence(tokens, groups, names):
    tensors = draw(tokens, groups)
    y, final = call(ssd.scan, tensors, names)
    expected_y, expected_final = call(sequential, in_float64(tensors), names)
    assert y.shape == expected_y.shape and final.shape == expected_final.shape
    assert relative(y, expected_y) <= 1e-5 and relative(final, expected_final) <= 1e-5


@pytest.mark.parametrize("change", ["A", "start", "D", "dt", "B"])
def test_the_sequential_recurrence_notices_a_change_of(change):
    tensors = draw(40, 2)
    y, final = call(ssd.scan, tensors, NAMES)
    tensors[change] = tensors[change] * 1.01
    expected_y, expected_final = call(sequential, in_float64(tensors), NAMES)
    assert max(relative(y, expected_y), relative(final, expected_final)) > 1e-4


def test_the_sequential_recurrence_notices_heads_of_another_group():
    tensors = draw(40, 2)
    y, _ = call(ssd.scan, tensors, NAMES)
    tensors["B"] = tensors["B"].flip(2)
    assert relative(y, call(sequential, in_float64(tensors), NAMES)[0]) > 0.1


def gradients(function, tensors, names, weights):
    """Gradients of a weighted sum of all outputs and final states, by name."""
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
    y, final = call(function, leaves, names)
    loss = (y * weights[0].to(y.dtype)).sum() + (final * weights[1].to(y.dtype)).sum()
    return dict(zip(names, torch.autograd.grad(loss, [leaves[name] for name in names]), strict=True))


def output_weights(tensors, seed=1):
    random = torch.Generator().manual_seed(seed)
    return torch.randn(tensors["x"].shape, generator=random), torch.randn(tensors["start"].shape, generator=random)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("tokens", [1, 32, 2 * 32 + 7])
def test_every_gradient_is_that_of_the_sequential_recurrence(tokens, groups):
    tensors = draw(tokens, groups)
    weights = output_weights(tensors)
    ours = gradients(ssd.scan, tensors, NAMES, weights)
    expected = gradients(sequential, in_float64(tensors), NAMES, weights)
    errors = {name: relative(ours[name], expected[name]) for name in NAMES}
    assert max(errors.values()) <= 1e-5, errors


@pytest.mark.parametrize("part", [0, 1], ids=["outputs alone", "final state alone"])
def test_gradients_of_one_part_alone_are_right_too(part):
    tensors = draw(45, 2)
    weights = list(output_weights(tensors))
    weights[1 - part] = torch.zeros_like(weights[1 - part])
    names = NAMES if part == 0 else NAMES[:4] + ("start",)  # C and D do not reach the final state
    ours, expected = gradients(ssd.scan, tensors, NAMES, weights), gradients(sequential, in_float64(tensors), NAMES, weights)
    assert max(relative(ours[name], expected[name]) for name in names) <= 1e-5


def test_a_final_state_that_nobody_uses_needs_no_gradient():
    tensors = draw(40, 2)
    leaf = tensors["x"].clone().requires_grad_()
    ssd.scan(leaf, *(tensors[name] for name in ("dt", "A", "B", "C")))[0].sum().backward()
    expected = in_float64(tensors)
    reference = expected["x"].clone().requires_grad_()
    sequential(reference, *(expected[name] for name in ("dt", "A", "B", "C")))[0].sum().backward()
    assert relative(leaf.grad, reference.grad) <= 1e-5


@pytest.mark.parametrize("decay", [50.0, 1e4, 1e8])
def test_large_decays_stay_finite_and_right(decay):
    tensors = draw(70, 2, decay=decay)
    y, final = call(ssd.scan, tensors, NAMES)
    expected_y, expected_final = call(sequential, in_float64(tensors), NAMES)
    assert torch.isfinite(y).all() and torch.isfinite(final).all()
    assert relative(y, expected_y) <= 1e-5 and relative(final, expected_final) <= 1e-5
    assert all(torch.isfinite(gradient).all() for gradient in gradients(ssd.scan, tensors, NAMES, output_weights(tensors)).values())


@pytest.mark.parametrize("steepest", [0.0, 20.0], ids=["all are steep", "some are steep"])
def test_heads_too_steep_to_divide_by_their_decay_are_as_exact(steepest, monkeypatch):
    tensors = draw(70, 2)
    weights = output_weights(tensors)
    gentle = gradients(ssd.scan, tensors, NAMES, weights)
    monkeypatch.setattr(chunks, "STEEPEST_LOG", steepest)
    numbers = []
    steep_rank = chunks.Chunk.steep_rank
    monkeypatch.setattr(chunks.Chunk, "steep_rank", lambda chunk, rank: numbers.append(rank) or steep_rank(chunk, rank))
    y, final = call(ssd.scan, tensors, NAMES)
    expected_y, expected_final = call(sequential, in_float64(tensors), NAMES)
    assert relative(y, expected_y) <= 1e-5 and relative(final, expected_final) <= 1e-5
    assert (0 < len(numbers) < 6) == bool(steepest)  # of two ranks in three chunks
    ours, expected = gradients(ssd.scan, tensors, NAMES, weights), gradients(sequential, in_float64(tensors), NAMES, weights)
    for name in expected:
        assert relative(ours[name], expected[name]) <= 1e-5
        assert not torch.equal(ours[name], gentle[name]) or name in {"D", "start"}  # another way was gone


def test_steep_heads_left_out_are_noticed(monkeypatch):
    """The control of the test above."""
    tensors = draw(70, 2)
    monkeypatch.setattr(chunks, "STEEPEST_LOG", 20.0)
    monkeypatch.setattr(chunks, "_steep_outputs", lambda chunk, rank, state: torch.zeros(chunk.C.shape[0], *chunk.shape[::2]))
    assert relative(call(ssd.scan, tensors, NAMES)[0], call(sequential, in_float64(tensors), NAMES)[0]) > 1e-2


def test_long_and_short_steps_in_one_chunk_lose_no_more_than_the_rounding_of_their_log_decay():
    """Decays are formed from differences of a float32 running sum, as in mamba_ssm's kernels; its rounding is their relative error."""
    tensors = draw(64, 2) | {"A": torch.full((4,), -4.0)}
    for long_step in (1.0, 10.0, 100.0):
        tensors["dt"] = torch.full_like(tensors["dt"], 1e-3)
        tensors["dt"][:, ::8] = long_step
        log_decay = 4 * long_step * 32 / 8
        error = relative(call(ssd.scan, tensors, NAMES)[0], call(sequential, in_float64(tensors), NAMES)[0])
        assert error <= 1e-6 + log_decay * torch.finfo(torch.float32).eps


def test_dividing_by_the_decay_would_overflow():
    """The control of the test above: exp(c_l)·exp(−c_s) in place of exp(c_l − c_s)."""
    tensors = draw(32, 2, decay=50.0)
    log_decay = torch.cumsum(tensors["dt"] * tensors["A"], dim=1)
    assert not torch.isfinite(torch.exp(-log_decay)).all()


def test_no_decay_at_all_sums_everything():
    tensors = draw(70, 2) | {"A": torch.zeros(4)}
    assert relative(call(ssd.scan, tensors, NAMES)[0], call(sequential, in_float64(tensors), NAMES)[0]) <= 1e-5


def test_a_scan_in_two_halves_is_the_scan_of_the_whole():
    tensors = draw(75, 2)
    names = ("x", "dt", "B", "C")
    whole, final = call(ssd.scan, tensors, NAMES)
    first, state = call(ssd.scan, tensors | {name: tensors[name][:, :41] for name in names}, NAMES)
    second, last = call(ssd.scan, tensors | {name: tensors[name][:, 41:] for name in names} | {"start": state}, NAMES)
    assert relative(torch.cat([first, second], dim=1), whole) <= 1e-6 and relative(last, final) <= 1e-6


def test_later_tokens_do_not_reach_earlier_outputs():
    tensors = draw(75, 2)
    changed = tensors | {"x": torch.cat([tensors["x"][:, :50], tensors["x"][:, 50:] + 1], dim=1)}
    one, other = (call(ssd.scan, each, NAMES)[0] for each in (tensors, changed))
    assert torch.equal(one[:, :50], other[:, :50]) and not torch.equal(one[:, 50], other[:, 50])


@pytest.mark.parametrize(("core_numbers", "num_parts"), [(2**20, 1), (400, 5), (1, 10)], ids=["one part", "a part per row", "a part per group"])
def test_parts_of_any_size_give_the_same_scan_and_gradients(core_numbers, num_parts, monkeypatch):
    tensors = draw(70, 2, batch=5)
    weights = output_weights(tensors)
    expected = gradients(sequential, in_float64(tensors), NAMES, weights)
    monkeypatch.setattr(blockwise, "CORE_NUMBERS", core_numbers)
    assert len(list(chunks.parts(5, 4, 3, 2, 5, torch.device("cpu")))) == num_parts
    ours = gradients(ssd.scan, tensors, NAMES, weights)
    assert max(relative(ours[name], expected[name]) for name in NAMES) <= 1e-5


def test_autocast_leaves_the_scan_and_its_gradients_in_float32():
    tensors = draw(70, 2)
    weights = output_weights(tensors)
    expected = gradients(ssd.scan, tensors, NAMES, weights)
    with torch.autocast("cpu", torch.bfloat16):
        ours = gradients(ssd.scan, tensors, NAMES, weights)
        assert (tensors["x"].flatten(0, 2) @ torch.eye(3)).dtype == torch.bfloat16  # the control: autocast is on
    assert all(torch.equal(ours[name], expected[name]) for name in NAMES)


def test_bfloat16_inputs_are_computed_in_float32(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    tensors = {name: tensor if name in ("A", "dt") else tensor.bfloat16() for name, tensor in draw(40, 2).items()}
    y, final = call(ssd.scan, tensors, NAMES)
    assert y.dtype == final.dtype == torch.float32
    assert relative(y, call(sequential, in_float64(tensors), NAMES)[0]) <= 1e-5


@pytest.mark.parametrize(("has_amx", "dtype", "expected"), [(True, torch.bfloat16, "bf16"), (True, torch.float32, None), (False, torch.bfloat16, None)])
def test_products_are_in_bf16_only_where_inputs_are_and_the_cpu_has_amx(has_amx, dtype, expected, monkeypatch):
    """What is computed with: torch's own setting, seen from inside both passes, and as it was after them."""
    before, seen, exp = torch.backends.mkldnn.matmul.fp32_precision, [], chunks._exp
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: has_amx)
    monkeypatch.setattr(chunks, "_exp", lambda log: (seen.append(torch.backends.mkldnn.matmul.fp32_precision), exp(log))[1])
    tensors = draw(40, 2)
    x = tensors["x"].to(dtype).requires_grad_()
    y, _ = ssd.scan(x, tensors["dt"], tensors["A"], tensors["B"], tensors["C"])
    forward = len(seen)
    y.sum().backward()
    assert len(seen) > forward > 0 and set(seen) == {expected or before}
    assert torch.backends.mkldnn.matmul.fp32_precision == before


@pytest.mark.skipif(not torch.cpu._is_amx_tile_supported(), reason="no AMX")
def test_products_in_bf16_stay_within_their_rounding():
    tensors = {name: tensor if name in ("A", "dt") else tensor.bfloat16() for name, tensor in draw(70, 2, head_dim=32, state=64).items()}
    y, final = call(ssd.scan, tensors, NAMES)
    expected = call(sequential, in_float64(tensors), NAMES)
    assert y.dtype == torch.float32 and max(relative(y, expected[0]), relative(final, expected[1])) <= 5e-3


# In transformers' place.


def logits_and_gradients(model, ids):
    model.zero_grad(set_to_none=True)
    output = model(ids, use_cache=False).logits
    F.cross_entropy(output[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    return output.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


def flat(gradients) -> torch.Tensor:
    return torch.cat([gradient.flatten() for gradient in gradients.values()])


def test_install_puts_our_functions_in_transformers_place(transformers_own):
    assert not any(getattr(owner, name) is function for owner, name, function in dispatch.replacements())
    dispatch.install()
    assert len(dispatch.replacements()) == 25 and all(getattr(owner, name) is function for owner, name, function in dispatch.replacements())


@pytest.mark.parametrize("core_numbers", [2**20, 1500, 100], ids=["one part", "a part per row", "a part per group"])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_logits_and_gradients_of_a_model_are_those_of_transformers_own_path(groups, core_numbers, transformers_own, monkeypatch, build_model, token_ids):
    monkeypatch.setattr(blockwise, "CORE_NUMBERS", core_numbers)
    model, ids = build_model(mamba_num_groups=groups), token_ids(2, 75)
    expected, expected_gradients = logits_and_gradients(model, ids)
    dispatch.install()
    ours, own_gradients = logits_and_gradients(model, ids)
    assert relative(ours, expected) <= 1e-5
    assert relative(flat(own_gradients), flat(expected_gradients)) <= 1e-5
    # Tensor by tensor, transformers' own gradients in float32 are up to 2.3e-5 from those of the same model in float64, ours up to 4.1e-5.
    errors = {name: relative(own_gradients[name], expected_gradients[name]) for name in expected_gradients}
    assert {name: error for name, error in errors.items() if error > 1e-4} == {}


def test_a_wrong_decay_moves_logits_and_gradients(transformers_own, monkeypatch, build_model, token_ids):
    model, ids = build_model(), token_ids(2, 75)
    expected, expected_gradients = logits_and_gradients(model, ids)
    dispatch.install()
    exp = chunks._exp
    monkeypatch.setattr(chunks, "_exp", lambda log: exp(1.01 * log))
    ours, own_gradients = logits_and_gradients(model, ids)
    assert relative(ours, expected) > 1e-4 and relative(flat(own_gradients), flat(expected_gradients)) > 1e-4
    name = "model.layers.0.mixer.A_log"
    assert relative(own_gradients[name], expected_gradients[name]) > 1e-3


def test_who_listens_inside_a_feed_forward_layer_hears_what_transformers_own_says(transformers_own, build_model, token_ids):
    model, ids, heard = build_model(), token_ids(2, 20), []
    layer = next(module for module in model.modules() if type(module).__name__ == "NemotronHMLP")
    hook = layer.down_proj.register_forward_pre_hook(lambda _module, arguments: heard.append(arguments[0].detach()))
    expected = model(ids, use_cache=False).logits
    dispatch.install()
    assert relative(model(ids, use_cache=False).logits, expected) <= 1e-5
    assert len(heard) == 2 and relative(heard[1], heard[0]) <= 1e-5
    hook.remove()
    assert relative(model(ids, use_cache=False).logits, expected) <= 1e-5 and len(heard) == 2  # the control: nobody listens, nothing is said


@pytest.mark.parametrize("part", ["in_proj", "out_proj"])
def test_who_listens_inside_a_mixer_hears_what_transformers_own_says(part, transformers_own, build_model, token_ids):
    """out_proj hears the norm with its weight, which is otherwise multiplied into out_proj's own."""
    model, ids, heard = build_model(), token_ids(2, 60), []
    mixers = [module for module in model.modules() if type(module).__name__ == "NemotronHMamba2Mixer"]
    for layer in mixers:
        torch.nn.init.uniform_(layer.norm.weight, 0.5, 2.0)
    hook = getattr(mixers[0], part).register_forward_hook(lambda _module, arguments, output: heard.append((arguments[0].detach(), output.detach())))
    expected = model(ids, use_cache=False).logits
    dispatch.install()
    assert relative(model(ids, use_cache=False).logits, expected) <= 1e-5
    assert len(heard) == 2 and all(relative(ours, theirs) <= 1e-5 for theirs, ours in zip(*heard, strict=True))
    hook.remove()
    assert relative(model(ids, use_cache=False).logits, expected) <= 1e-5 and len(heard) == 2  # the control: nobody listens, nothing is said


@pytest.mark.parametrize("has", [False, True], ids=["no biases", "all biases"])
def test_biases_are_as_in_transformers_own_path(has, transformers_own, build_model, token_ids):
    model, ids = build_model(mamba_conv_bias=has, mamba_projection_bias=has, ffn_bias=has), token_ids(2, 40)
    expected, expected_gradients = logits_and_gradients(model, ids)
    dispatch.install()
    ours, own_gradients = logits_and_gradients(model, ids)
    assert relative(ours, expected) <= 1e-5 and relative(flat(own_gradients), flat(expected_gradients)) <= 1e-5


@torch.no_grad()
def test_a_bfloat16_model_is_no_farther_from_its_float32_self_than_transformers_own(transformers_own, build_model, token_ids):
    model, ids = build_model().bfloat16(), token_ids(2, 75)
    exact = model.float()(ids, use_cache=False).logits
    theirs = relative(model.bfloat16()(ids, use_cache=False).logits, exact)
    dispatch.install()
    assert relative(model(ids, use_cache=False).logits, exact) <= theirs < 0.1


def test_the_mixer_keeps_less_than_a_third_of_what_transformers_keeps_for_the_backward_pass(transformers_own, build_model, token_ids):
    model, ids = build_model(pattern="M"), token_ids(4, 64)

    def kept() -> int:
        found = {}

        def keep(tensor):
            found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model.base_model(ids, use_cache=False)
        return sum(found.values())

    theirs = kept()
    dispatch.install()
    assert kept() < theirs / 3


@torch.no_grad()
def test_left_padding_with_its_mask_leaves_the_logits(transformers_own, teacher, token_ids):
    dispatch.install()
    ids, mask = token_ids(2, 40), torch.ones(2, 50, dtype=torch.long)
    padded = torch.cat([torch.zeros(2, 10, dtype=torch.long), ids], dim=1)
    mask[:, :10] = 0
    expected = teacher(ids, use_cache=False).logits
    assert relative(teacher(padded, attention_mask=mask, use_cache=False).logits[:, 10:], expected) <= 1e-5
    assert relative(teacher(padded, use_cache=False).logits[:, 10:], expected) > 1e-3  # the control: the state runs through the padding


# Decoding.


@torch.no_grad()
def decode_error(model, ids_BT, prompt: int) -> float:
    """Relative difference between logits of a prompt followed by one token at a time and of the whole text at once."""
    expected = model(ids_BT, use_cache=False).logits
    output = model(ids_BT[:, :prompt], use_cache=True)
    parts = [output.logits]
    for token in range(prompt, ids_BT.shape[1]):
        output = model(ids_BT[:, token : token + 1], past_key_values=output.past_key_values, use_cache=True)
        parts.append(output.logits)
    return relative(torch.cat(parts, dim=1), expected)


@pytest.fixture
def slow_model(build_model, config_of, tiny, write_checkpoint, tmp_path):
    """A model, as our loader gives it, whose time steps fall below transformers' floor of 0.001."""
    model = build_model()
    with torch.no_grad():
        for block in model.model.layers:
            if hasattr(block.mixer, "dt_bias"):
                block.mixer.dt_bias.sub_(6)
    return FAMILY.load(write_checkpoint(tmp_path / "slow", model, config_of(tiny)))


@pytest.mark.parametrize("installed", [True, False], ids=["our scan", "transformers' scan"])
@pytest.mark.parametrize("prompt", [1, 33])
def test_decoding_token_by_token_equals_reading_at_once(prompt, installed, transformers_own, slow_model, token_ids):
    if installed:
        dispatch.install()
    assert decode_error(slow_model, token_ids(2, 45), prompt) <= 1e-5


def test_with_the_time_step_clamped_from_below_decoding_differs(transformers_own, slow_model, token_ids):
    dispatch.install()
    for block in slow_model.model.layers:
        if hasattr(block.mixer, "time_step_limit"):
            block.mixer.time_step_limit = (0.001, math.inf)  # transformers' own
    assert decode_error(slow_model, token_ids(2, 45), 33) > 1e-3


def test_loaded_by_transformers_itself_decoding_differs(transformers_own, slow_model, token_ids, tmp_path):
    dispatch.install()
    assert decode_error(AutoModelForCausalLM.from_pretrained(tmp_path / "slow").eval(), token_ids(2, 45), 33) > 1e-3


def test_a_prompt_shorter_than_the_convolution_is_decoded_right(transformers_own, teacher, token_ids):
    dispatch.install()
    assert decode_error(teacher, token_ids(2, 12), 2) <= 1e-5


@torch.no_grad()
def test_right_padding_leaves_the_logits_before_it(transformers_own, teacher, token_ids):
    dispatch.install()
    ids = token_ids(2, 50)
    padded = torch.cat([ids[:, :40], torch.zeros(2, 10, dtype=torch.long)], dim=1)
    before, after = teacher(ids, use_cache=False).logits[:, :40], teacher(padded, use_cache=False).logits
    assert relative(after[:, :40], before) <= 1e-6
    left = torch.cat([torch.zeros(2, 10, dtype=torch.long), ids[:, :40]], dim=1)  # the control: state runs through it
    assert relative(teacher(left, use_cache=False).logits[:, 10:], before) > 1e-3
