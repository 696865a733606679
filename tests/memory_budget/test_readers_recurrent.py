"""Hybrids of Mamba, short convolutions and gated delta nets: parameters and caches against transformers', sums against published ones, and what is refused.

recurrent.json: tiny configs of every type, and sizes of published ones with their parameters and where these are said.
"""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from memory_budget.calculator import memory_report
from memory_budget.configs import delta, hybrids
from memory_budget.configs.registry import model_from_config
from memory_budget.parameters import count_active_parameters, count_parameters, count_total_parameters
from memory_budget.workload import Workload

CONFIGS = json.loads((Path(__file__).parent / "recurrent.json").read_text())
TINY, PUBLISHED = CONFIGS["tiny"], CONFIGS["published"]
READERS = {**hybrids.MODELS, **delta.MODELS, "granitemoehybrid": model_from_config}
DEFAULTS = {name: {"model_type": name} for name in READERS if not name.endswith("_text")}
DEFAULTS["lfm2_moe"]["layer_types"] = ["conv", "full_attention"] * 16  # which it lacks by default
ALL = {**TINY, **DEFAULTS, **{name: said["config"] for name, said in PUBLISHED.items()}}


def read(config: dict):
    return READERS[config["model_type"]](config)


def hf_config(config: dict):
    from transformers import AutoConfig

    return AutoConfig.for_model(**config)


@cache
def built_parameters(name: str) -> dict[str, int]:
    """Numbers of every parameter of transformers' model; a tied tensor comes once."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(hf_config(ALL[name]))
    return {parameter: tensor.numel() for parameter, tensor in model.named_parameters()}


def kind_of(parameter: str) -> str:
    """The kind that a parameter of transformers counts under. A norm in front of a mixer has its name alone; Zamba2's matrix behind a block is the block's."""
    mixers = {".mamba.": "mamba", ".linear_attn.": "mamba", ".conv.": "mamba", ".self_attn.": "attention", ".linear.": "ffn"}
    experts = (".experts.", ".router.", ".gate.", ".shared_expert.", ".shared_expert_gate.", ".block_sparse_moe.")
    if "embed_tokens" in parameter:
        return "embedding"
    if "lm_head" in parameter:
        return "head"
    if mixer := next((kind for part, kind in mixers.items() if part in parameter), None):
        return mixer
    if any(part in parameter for part in experts):
        return "moe"
    return "ffn" if ".mlp." in parameter or ".feed_forward." in parameter or ".shared_mlp." in parameter else "norm"


@pytest.mark.parametrize("name", ALL)
def test_every_kind_counts_as_many_numbers_as_the_model_of_transformers(name):
    model, truth = read(ALL[name]), {}
    for parameter, numbers in built_parameters(name).items():
        truth[kind_of(parameter)] = truth.get(kind_of(parameter), 0) + numbers
    if model.count_of("moe") and "shared_intermediate_size" in ALL[name] or ALL[name] == DEFAULTS["granitemoehybrid"]:  # Granite's shared expert
        truth["moe"] += truth.pop("ffn")
    assert count_parameters(model) == {kind: truth.get(kind, 0) for kind in count_parameters(model)}


@pytest.mark.parametrize("name", ALL)
def test_active_parameters_leave_out_the_idle_experts_and_nothing_else(name):
    config = hf_config(ALL[name]).get_text_config()
    experts, chosen = (getattr(config, key, 0) or 0 for key in ("num_experts", "num_experts_per_tok"))
    experts = getattr(config, "num_local_experts", experts)
    routed = sum(numbers for parameter, numbers in built_parameters(name).items() if ".experts." in parameter)
    idle = routed // experts * (experts - chosen) if experts else 0
    model = read(ALL[name])
    assert count_active_parameters(model) == sum(built_parameters(name).values()) - idle
    assert (count_active_parameters(model) < count_total_parameters(model)) == (idle > 0)


@pytest.mark.parametrize("name", PUBLISHED)
def test_sum_is_the_published_one(name):
    assert count_total_parameters(read(PUBLISHED[name]["config"])) == PUBLISHED[name]["parameters"]


def test_active_parameters_of_qwen3_next_are_the_published_ones():
    assert count_active_parameters(read({"model_type": "qwen3_next"})) == 3_874_929_408


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("granite-experts", {"shared_intermediate_size": 29}),
        ("granite-experts", {"layer_types": ["mamba", "attention", "attention", "mamba"]}),
        ("granite-dense", {"mamba_conv_bias": True}),
        ("falcon-h1", {"mamba_rms_norm": True}),
        ("falcon-h1", {"projectors_bias": True}),
        ("falcon-h1", {"mamba_proj_bias": True}),
        ("bamba", {"attn_layer_indices": [1]}),
        ("jamba", {"expert_layer_offset": 0, "expert_layer_period": 4}),
        ("jamba", {"mamba_dt_rank": 4}),
        ("zamba2", {"num_mem_blocks": 3}),
        ("zamba2", {"use_shared_attention_adapter": False}),
        ("zamba2", {"adapter_rank": 4}),
        ("lfm2", {"conv_bias": True}),
        ("lfm2", {"block_auto_adjust_ff_dim": False}),
        ("lfm2-moe", {"num_dense_layers": 2}),
        ("qwen3-next", {"shared_expert_intermediate_size": 29}),
        ("qwen3-next", {"mlp_only_layers": [0]}),
        ("qwen3.5", {"linear_value_head_dim": 13}),
        ("qwen3.5-moe", {"full_attention_interval": 2}),
    ],
    ids=str,
)
def test_a_wrong_size_or_flag_is_noticed_against_transformers(name, change):
    assert count_total_parameters(read({**TINY[name], **change})) != sum(built_parameters(name).values())


# Columns of a convolution's state: ours are kernel − 1, as in vLLM; transformers' (5.23) layers of every type here hand the kernel to update_conv_state and
# keep as many columns. The oldest is not read again.
KERNEL_KEYS = ("mamba_d_conv", "conv_L_cache", "linear_conv_kernel_dim")


@cache
def tiny_model(name: str):
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(hf_config(TINY[name])).eval()


def numbers_in(name: str, prompt: int, decoded: int, batch: int = 2) -> dict[str, int]:
    """Numbers in the tensors of transformers' cache after a prompt and some more tokens; of a convolution's columns all but the oldest."""
    import torch

    config = hf_config(TINY[name])
    kernel = next(getattr(config, key) for key in KERNEL_KEYS if hasattr(config, key))
    kept = None
    with torch.no_grad():
        for tokens in (prompt, *[1] * decoded):
            kept = tiny_model(name)(torch.ones(batch, tokens, dtype=torch.long), past_key_values=kept, use_cache=True).past_key_values
    numbers = {"kv_cache": 0, "ssm_state": 0, "conv_state": 0}
    for layer in kept.layers:
        for tensor in (getattr(layer, "keys", None), getattr(layer, "values", None)):
            numbers["kv_cache"] += 0 if tensor is None else tensor.numel()
        for tensor in filter(torch.is_tensor, getattr(layer, "recurrent_states", {}).values()):
            numbers["ssm_state"] += tensor.numel()
        for tensor in filter(torch.is_tensor, getattr(layer, "conv_states", {}).values()):
            assert tensor.shape[-1] == kernel
            numbers["conv_state"] += tensor[..., 1:].numel()
    return numbers


def counted_bytes(model, tokens: int, batch: int = 2) -> dict[str, int]:
    report = memory_report(model, Workload(context_tokens=tokens, batch=batch, weights_dtype="fp32", kv_dtype="fp32", ssm_dtype="fp32"))
    return {name: report.as_dict()[name] for name in ("kv_cache", "ssm_state", "conv_state")}


@pytest.mark.parametrize("name", [name for name in TINY if name != "granite-mamba-alone"])  # which transformers (5.23) cannot run: no layer counts its tokens
@pytest.mark.parametrize(("prompt", "decoded"), [(2, 0), (5, 3)])
def test_caches_are_the_ones_of_transformers_to_the_byte(name, prompt, decoded):
    truth = {kind: 4 * numbers for kind, numbers in numbers_in(name, prompt, decoded).items()}
    assert counted_bytes(read(TINY[name]), prompt + decoded) == truth
    model = read(TINY[name])
    for layer, (number, part) in enumerate(model.layers):  # control: a layer more or less of anything that keeps something would be noticed
        if part.kept_tokens != 0 or part.kind == "mamba":
            others = replace(model, layers=(*model.layers[:layer], (number - 1, part), *model.layers[layer + 1 :]))
            assert counted_bytes(others, prompt + decoded) != truth


def test_zamba2_keeps_a_cache_for_every_use_of_a_block_and_its_parameters_once():
    uses = TINY["zamba2"]["layers_block_type"].count("hybrid")
    one, two, four = (read({**TINY["zamba2"], "num_mem_blocks": blocks}) for blocks in (1, 2, 4))
    assert uses == 4 and one.count_of("attention") == four.count_of("attention") == uses
    assert counted_bytes(one, 8) == counted_bytes(two, 8) == counted_bytes(four, 8)
    assert (count_total_parameters(four) - count_total_parameters(two)) == 2 * (count_total_parameters(two) - count_total_parameters(one)) > 0


def test_blocks_that_transformers_does_not_share_are_said():
    tied, untied = TINY["zamba2"], {**TINY["zamba2"], "tie_word_embeddings": False}
    assert not read(tied).notes and "ties none of them" in read(untied).notes[0]
    assert not read({**untied, "num_mem_blocks": 4}).notes


def test_convolutions_alone_have_no_recurrent_state():
    assert counted_bytes(read(TINY["lfm2"]), 8)["ssm_state"] == 0 < counted_bytes(read(TINY["lfm2"]), 8)["conv_state"]


@pytest.mark.parametrize("name", TINY)
def test_config_that_transformers_saves_reads_like_the_one_it_was_given(name, tmp_path):
    hf_config(TINY[name]).save_pretrained(tmp_path)
    saved, given = read(json.loads((tmp_path / "config.json").read_text())), read(TINY[name])
    assert replace(saved, positions=None) == replace(given, positions=None)  # which is said only of the config
    assert saved.positions == hf_config(TINY[name]).max_position_embeddings


@pytest.mark.parametrize("name", ["granite-experts", "zamba2"])
def test_old_and_new_names_of_layers_and_of_their_key_read_alike(name):
    config = dict(TINY[name])
    old = config.pop("layer_types", None) or config.pop("layers_block_type")
    new = [{"mamba": "linear_attention", "attention": "full_attention"}.get(one, one) for one in old]
    assert "mamba" in old and "mamba" not in new
    assert all(read({**config, key: types}) == read(TINY[name]) for key in ("layer_types", "layers_block_type") for types in (old, new))
    assert read({**config, "layer_types": new[:1] * len(new)}) != read(TINY[name])


@pytest.mark.parametrize(("name", "outer"), [("qwen3.5", "qwen3_5"), ("qwen3.5-moe", "qwen3_5_moe")])
def test_sizes_in_a_text_config_read_like_the_text_config(name, outer):
    nested = {"model_type": outer, "text_config": TINY[name], "vision_config": {"hidden_size": 8}}
    assert replace(read(nested), model_type="") == replace(read(TINY[name]), model_type="")
    assert read({**nested, "tie_word_embeddings": not TINY[name].get("tie_word_embeddings", False)}).tied_embeddings != read(nested).tied_embeddings


def test_multi_token_prediction_is_said_not_to_count():
    assert not read(TINY["qwen3.5"]).notes
    model = read({**TINY["qwen3.5"], "mtp_num_hidden_layers": 1})
    assert "multi-token" in model.notes[0] and replace(model, notes=()) == read(TINY["qwen3.5"])


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("granite-experts", {"layer_types": ["mamba"]}, ["layer_types (1 entries)", "4 layers"]),
        ("granite-experts", {"layer_types": "mamba"}, ['layer_types ("mamba")', "4 layers"]),
        ("granite-experts", {"layer_types": ["mamba", "conv", [], "mamba"]}, ['layer_types holds "conv"', "linear_attention, full_attention"]),
        ("granite-experts", {"layers_block_type": ["mamba"] * 4}, ["layer_types and layers_block_type must agree"]),
        ("granite-experts", {"num_hidden_layers": 2**40}, ["num_hidden_layers (1099511627776)", "at most 16,384"]),
        ("granite-experts", {"mamba_n_heads": 7}, ["mamba_expand times hidden_size (96)", "multiple of mamba_n_heads (7)"]),
        ("granite-experts", {"mamba_d_head": 8}, ["mamba_n_heads (6) times mamba_d_head (8)", "mamba_expand times hidden_size (96)"]),
        ("granite-experts", {"mamba_n_groups": 4}, ["mamba_n_heads (6)", "multiple of mamba_n_groups (4)"]),
        ("granite-experts", {"num_experts_per_tok": 7}, ["num_experts_per_tok (7)", "number of experts (6)"]),
        ("granite-experts", {"num_key_value_heads": 3}, ["num_attention_heads (4)", "multiple of num_key_value_heads (3)"]),
        ("falcon-h1", {"mamba_d_ssm": 95}, ["mamba_d_ssm (95)", "mamba_n_heads (6)"]),
        ("falcon-h1", {"mamba_rms_norm": 1}, ["mamba_rms_norm (1)", "true or false"]),
        ("bamba", {"attn_layer_indices": "9"}, ['attn_layer_indices ("9")', "indices of layers, 0 to 3"]),
        ("jamba", {"attn_layer_offset": 4}, ["attn_layer_offset (4)", "below attn_layer_period (4)"]),
        ("jamba", {"expert_layer_period": 0}, ["expert_layer_period (0)", "at least 1"]),
        ("jamba", {"mamba_dt_rank": "big"}, ['mamba_dt_rank ("big")', "whole number"]),
        ("zamba2", {"layers_block_type": None}, ["num_hidden_layers (7) must be 54"]),
        ("zamba2", {"mamba_headdim": 8}, ["n_mamba_heads (6) times mamba_headdim (8)", "(96)"]),
        ("zamba2", {"hybrid_layer_ids": [1]}, ["hybrid_layer_ids must be the layers"]),
        ("zamba2", {"attention_hidden_size": 48}, ["attention_hidden_size (48)", "twice hidden_size (48)"]),
        ("lfm2", {"block_ffn_dim_multiplier": float("inf")}, ["block_ffn_dim_multiplier (Infinity)"]),
        ("lfm2", {"conv_L_cache": 1}, ["conv_L_cache (1)", "at least 2"]),
        ("lfm2", {"head_dim": 0}, ["head_dim (0)", "at least 1"]),
        ("lfm2-moe", {"layer_types": None}, ["layer_types is missing"]),
        ("qwen3-next", {"linear_num_value_heads": 5}, ["linear_num_value_heads (5)", "multiple of linear_num_key_heads (2)"]),
        ("qwen3-next", {"full_attention_interval": 0}, ["full_attention_interval (0)", "at least 1"]),
        ("qwen3-next", {"mlp_only_layers": [True]}, ["mlp_only_layers ([true])", "indices of layers"]),
        ("qwen3.5", {"num_key_value_heads": None}, ["num_key_value_heads (null)", "whole number"]),
        ("qwen3.5-moe", {"num_experts": {}}, ["num_experts ({})", "whole number"]),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_by_name_value_and_rule(name, change, says):
    read(TINY[name])
    with pytest.raises(ValueError) as caught:
        read({**TINY[name], **change})
    assert "\n" not in str(caught.value) and all(part in str(caught.value) for part in says)
