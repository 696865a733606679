"""Types with attention alone, dense, mixed and latent: parameters and caches against transformers' own, and published sums."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from memory_budget.calculator import kv_cache_bytes, max_context_tokens, memory_report
from memory_budget.configs import dense, latent, mixtures
from memory_budget.hf_config import architecture_from_config
from memory_budget.model import as_model
from memory_budget.parameters import count_active_parameters, count_total_parameters
from memory_budget.parts.attention import Attention
from memory_budget.parts.latent import LatentAttention
from memory_budget.workload import Workload

CUT = {"qwen3_moe": lambda config: as_model(architecture_from_config(config))}  # of those that can be cut, one with attention and experts
READERS = {**dense.MODELS, **mixtures.MODELS, **latent.MODELS, **CUT}
PUBLISHED = {one["name"]: one for one in json.loads((Path(__file__).parent / "published" / "attention.json").read_text())}
SMALL = {"vocab_size": 101, "hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 40,
         "max_position_embeddings": 64, "pad_token_id": None}  # fmt: skip
BIASED = {"attention_bias": True, "mlp_bias": True}
MIXED = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
ROUTED = {"n_routed_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "n_shared_experts": 3, "first_k_dense_replace": 1}
LATENT = {**ROUTED, "num_key_value_heads": 4, "kv_lora_rank": 20, "qk_nope_head_dim": 10, "qk_rope_head_dim": 6, "v_head_dim": 14}
WINDOW = {"sliding_window": 8}
MIXED_TYPES = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]
VISION = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "image_size": 16, "patch_size": 8,
          "model_type": "siglip_vision_model"}  # fmt: skip
TINY = {
    "gemma2": {"model_type": "gemma2", "head_dim": 20, **WINDOW},
    "gemma2-biased": {"model_type": "gemma2", "head_dim": 20, "attention_bias": True, "layer_types": MIXED_TYPES, **WINDOW},
    "gemma2-untied": {"model_type": "gemma2", "tie_word_embeddings": False, "num_hidden_layers": 3, **WINDOW},
    "granite": {"model_type": "granite"},
    "granite-biased": {"model_type": "granite", **BIASED, "num_key_value_heads": None, "tie_word_embeddings": True},
    "granite-head-dim": {"model_type": "granite", "head_dim": 6},
    "phi3": {"model_type": "phi3"},
    "phi3-windows": {"model_type": "phi3", **WINDOW, "attention_bias": True},
    "olmo2": {"model_type": "olmo2", "attention_bias": True},
    "olmo2-head-dim": {"model_type": "olmo2", "head_dim": 8, "num_key_value_heads": None},
    "smollm3": {"model_type": "smollm3", **BIASED, **WINDOW},
    "smollm3-windows": {"model_type": "smollm3", "use_sliding_window": True, "no_rope_layer_interval": 2, **WINDOW},
    "smollm3-listed": {"model_type": "smollm3", "use_sliding_window": True, "no_rope_layers": [0, 1, 1, 0], "tie_word_embeddings": False, **WINDOW},
    "nemotron": {"model_type": "nemotron"},
    "nemotron-biased": {"model_type": "nemotron", "head_dim": 8, **BIASED},
    "cohere2": {"model_type": "cohere2", **WINDOW},
    "cohere2-pattern": {"model_type": "cohere2", "sliding_window_pattern": 2, "attention_bias": True, "head_dim": 8, **WINDOW},
    "gemma3": {"model_type": "gemma3", "vision_config": VISION, "text_config": {**SMALL, "head_dim": 20, "sliding_window_pattern": 2, **WINDOW}},
    "gemma3-untied": {"model_type": "gemma3", "vision_config": VISION, "tie_word_embeddings": False, "text_config": {**SMALL, "head_dim": 20, **WINDOW}},
    "mixtral": {"model_type": "mixtral", "num_local_experts": 5, "head_dim": None},
    "mixtral-windows": {"model_type": "mixtral", "num_local_experts": 3, "num_experts_per_tok": 1, "head_dim": 6, **WINDOW},
    "qwen2_moe": {"model_type": "qwen2_moe", **MIXED, "shared_expert_intermediate_size": 28},
    "qwen2_moe-windows": {"model_type": "qwen2_moe", **MIXED, "shared_expert_intermediate_size": 0, "qkv_bias": False, "use_sliding_window": True,
                          "max_window_layers": 2, "decoder_sparse_step": 2, **WINDOW},
    "qwen3_moe": {"model_type": "qwen3_moe", **MIXED, "head_dim": 8, "mlp_only_layers": [0, 2]},
    "qwen3_moe-windows": {"model_type": "qwen3_moe", **MIXED, "attention_bias": True, "decoder_sparse_step": 3, "use_sliding_window": True, **WINDOW},
    "qwen3_moe-renamed": {"model_type": "qwen3_moe", "num_experts_per_tok": 2, "moe_intermediate_size": 24, "num_local_experts": 3},
    "olmoe": {"model_type": "olmoe", "num_experts": 5, "num_experts_per_tok": 2, "attention_bias": True},
    "gpt_oss": {"model_type": "gpt_oss", "num_local_experts": 5, "num_experts_per_tok": 2, "head_dim": 8, **WINDOW},
    "gpt_oss-bare": {"model_type": "gpt_oss", "num_local_experts": 5, "num_experts_per_tok": 2, "head_dim": 8, "attention_bias": False,
                     "layer_types": MIXED_TYPES, **WINDOW},
    "glm4_moe": {"model_type": "glm4_moe", **ROUTED, "head_dim": 8, "attention_bias": True},
    "glm4_moe-norms": {"model_type": "glm4_moe", **ROUTED, "use_qk_norm": True, "first_k_dense_replace": 2, "n_shared_experts": 1},
    "deepseek_v2": {"model_type": "deepseek_v2", **LATENT, "q_lora_rank": None},
    "deepseek_v2-biased": {"model_type": "deepseek_v2", **LATENT, "q_lora_rank": 12, **BIASED},
    "deepseek_v3": {"model_type": "deepseek_v3", **LATENT, "q_lora_rank": 12, "n_group": 2, "topk_group": 1},
    "deepseek_v3-biased": {"model_type": "deepseek_v3", **LATENT, "q_lora_rank": None, "attention_bias": True, "n_group": 1, "topk_group": 1},
}  # fmt: skip
pytestmark = pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")  # a shared expert of no width
NO_DEFAULT = {"nemotron": {"num_key_value_heads": 8}, "deepseek_v2": {"num_experts_per_tok": 6}}  # transformers' own default is none that runs


def tiny(name: str) -> dict:
    config = TINY[name]
    return config if "text_config" in config else {**SMALL, **config}


def ours(config: dict):
    return READERS[config["model_type"]](config)


def theirs(config: dict, device: str):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=torch.float32).eval()


def theirs_counted(config: dict) -> tuple[int, int]:
    """Total and active parameters of the language model, from the shapes of transformers' tensors; experts are stacked along their first dim."""
    model = theirs(config, "meta")
    total = active = 0
    for name, parameter in model.named_parameters():  # a tied tensor comes once
        if "vision" in name or "multi_modal_projector" in name:
            continue
        total += parameter.numel()
        is_expert = ".mlp.experts." in name
        active += parameter.numel() // parameter.shape[0] * model.config.num_experts_per_tok if is_expert else parameter.numel()
    return total, active


def ours_counted(config: dict) -> tuple[int, int]:
    return count_total_parameters(ours(config)), count_active_parameters(ours(config))


def larger(config: dict) -> dict:
    """The same with one key-value head, or head with its latent, more in each group of them."""
    sizes = config.get("text_config", config)
    changed = {**sizes, "kv_lora_rank": 21} if "kv_lora_rank" in sizes else {**sizes, "num_key_value_heads": {None: 2, 2: 4}[sizes["num_key_value_heads"]]}
    return {**config, "text_config": changed} if "text_config" in config else changed


@pytest.mark.parametrize("name", TINY)
def test_total_and_active_parameters_are_those_of_transformers(name):
    truth = theirs_counted(tiny(name))
    assert ours_counted(tiny(name)) == truth
    assert ours_counted(larger(tiny(name))) != truth


@pytest.mark.parametrize("name", READERS)
def test_a_missing_key_means_what_transformers_means_by_it(name):
    config = {"model_type": name, **NO_DEFAULT.get(name, {})}
    truth = theirs_counted(config)
    assert ours_counted(config) == truth
    changed = {"text_config": {"num_hidden_layers": 2}} if name == "gemma3" else {"num_hidden_layers": 2}
    assert ours_counted({**config, **changed}) != truth


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_sum_is_the_published_one(name):
    published = PUBLISHED[name]
    model = ours(published["config"])
    assert count_total_parameters(model) + published.get("beside", 0) == published["total"]
    assert count_active_parameters(model) == published.get("active", count_active_parameters(model))
    wider = [(number, replace(part, hidden=part.hidden + 8)) for number, part in model.layers]
    assert count_total_parameters(replace(model, layers=tuple(wider))) + published.get("beside", 0) != published["total"]


@pytest.mark.parametrize("experts", [96, 64])
def test_a_search_that_keeps_fewer_experts_has_the_architecture_whose_sum_is_published(experts):
    teacher, student = (architecture_from_config(PUBLISHED[f"qwen3-30b-a3b{which}"]["config"]) for which in ("", f"-{experts}-experts"))
    assert replace(teacher, moe_num_experts=experts) == student != teacher


@pytest.mark.parametrize("name", ["gemma-3-4b", "gemma-3-12b", "gemma-3-27b"])
def test_what_a_multimodal_checkpoint_holds_beside_its_language_model_is_named_and_known(name):
    """SigLIP-So400m has one size in all of them; the projector goes from its 1152 channels to the language model's."""
    hidden = ours(PUBLISHED[name]["config"]).hidden
    assert PUBLISHED[name]["beside"] == 419816304 + 1152 * (hidden - 2560)
    assert any("vision" in note for note in ours(PUBLISHED[name]["config"]).notes)


@pytest.mark.parametrize("name", ["glm-4.5-air", "glm-4.5"])
def test_a_prediction_layer_counted_by_hand_is_what_the_checkpoint_holds_more(name):
    """A block more, a matrix 2·D → D, three norms, embedding and head of its own; and a correction bias for each expert of every layer with experts."""
    model = ours(PUBLISHED[name]["config"])
    attention, experts = (next(part for _, part in model.layers if part.kind == kind) for kind in ("attention", "moe"))
    block = attention.parameters().total + experts.parameters().total + 2 * model.hidden
    more = block + 2 * model.hidden**2 + 3 * model.hidden + 2 * model.vocab * model.hidden
    assert PUBLISHED[name]["beside"] == more + (model.count_of("moe") + 1) * experts.experts
    assert any("multi-token prediction" in note for note in model.notes)


def test_active_parameters_of_gpt_oss_are_those_of_its_model_card():
    """5.13 and 3.61 thousand millions (arXiv 2508.10925, table 1), where the input embedding does not count."""
    for name, active in (("gpt-oss-120b", 5.13), ("gpt-oss-20b", 3.61)):
        model = ours(PUBLISHED[name]["config"])
        assert round((count_active_parameters(model) - model.vocab * model.hidden) / 1e9, 2) == active


def held_bytes(name: str) -> dict[tuple[int, int], int]:
    """Bytes of transformers' cache for two sequences, after a prompt and so many tokens more, one at a time."""
    import torch

    model, held = theirs(tiny(name), "cpu"), {}
    for prompt, decoded in ((5, 0), (7, 0), (8, 0), (20, 0), (5, 9), (20, 3)):
        state = None
        with torch.no_grad():
            for tokens in (prompt, *[1] * decoded):
                state = model(input_ids=torch.zeros(2, tokens, dtype=torch.long), past_key_values=state, use_cache=True).past_key_values
        held[prompt, decoded] = sum(layer.keys.nbytes + layer.values.nbytes for layer in state.layers)
    return held


@pytest.mark.parametrize("name", TINY)
def test_cache_bytes_are_those_of_transformers(name):
    """After prompts below, at and above the window, and after further tokens; with a window of a token more it is not so above the window."""
    model = ours(tiny(name))
    wider = replace(model, layers=tuple((number, replace(part, window=part.window + 1) if isinstance(part, Attention) and part.window else part)
                                        for number, part in model.layers))  # fmt: skip
    for (prompt, decoded), held in held_bytes(name).items():
        workload = Workload(context_tokens=prompt + decoded, batch=2, kv_dtype="float32")
        assert memory_report(model, workload).kv_cache == held
        assert memory_report(ours(larger(tiny(name))), workload).kv_cache != held
        assert (memory_report(wider, workload).kv_cache == held) == (prompt + decoded < 8 or wider == model)
    assert (wider == model) == (not has_windows(tiny(name)))


def has_windows(config: dict) -> bool:
    """Whether the cache of transformers has layers that slide."""
    from transformers import AutoConfig, DynamicCache

    return any(layer.is_sliding for layer in DynamicCache(config=AutoConfig.for_model(**config)).layers)


def test_a_latent_cache_is_far_smaller_than_keys_and_values_of_every_head():
    """DeepSeek-V3 keeps 512 + 64 numbers of a token in each of 61 layers (70,272 bytes in bf16), spread out 128·(192 + 128)."""
    model = ours({"model_type": "deepseek_v3"})
    part = next(part for _, part in model.layers if isinstance(part, LatentAttention))
    assert kv_cache_bytes(model, 1, "bf16") == 61 * (512 + 64) * 2 == 70272
    assert part.spread_numbers_per_token == 40960


def test_the_longest_context_of_windows_and_latents_fits_and_one_token_more_does_not():
    for name in ("gemma-2-27b", "gpt-oss-20b", "deepseek-v2-lite"):
        model, workload, budget = ours(PUBLISHED[name]["config"]), Workload(batch=3), 90 * 10**9
        longest = max_context_tokens(model, workload, budget)
        assert memory_report(model, replace(workload, context_tokens=longest)).total <= budget
        assert memory_report(model, replace(workload, context_tokens=longest + 1)).total > budget


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("gemma2", {"sliding_window": None}, "sliding_window (null) must say a window"),
        ("gemma2", {"sliding_window": 1}, "sliding_window (1) must be at least 2"),
        ("gemma2", {"layer_types": ["sliding_attention"]}, "layer_types (1 entries) must have an entry for each of the 4 layers"),
        ("gemma2", {"layer_types": ["mamba"] * 4}, 'layer_types holds "mamba"'),
        ("gemma2", {"layer_types": [{}] * 4}, "layer_types holds {}"),
        ("granite", {"num_hidden_layers": 2**40}, "num_hidden_layers (1099511627776) must be at most"),
        ("granite", {"num_hidden_layers": 2**63}, "num_hidden_layers (9223372036854775808) must be a whole number"),
        ("granite", {"num_attention_heads": 0}, "num_attention_heads (0) must be a whole number of at least 1"),
        ("granite", {"num_key_value_heads": 3}, "num_attention_heads (4) must be a multiple of num_key_value_heads (3)"),
        ("granite", {"hidden_size": "48"}, 'hidden_size ("48") must be a whole number'),
        ("granite", {"hidden_size": 3}, "head_dim (0; without the key hidden_size / num_attention_heads)"),
        ("granite", {"mlp_bias": 1}, "mlp_bias (1) must be true or false"),
        ("cohere2", {"sliding_window_pattern": 0}, "sliding_window_pattern (0) must be a whole number of at least 1"),
        ("smollm3-listed", {"no_rope_layers": [1]}, "no_rope_layers ([1]) must be a list with an entry for each of the 4 layers"),
        ("gemma3", {"text_config": []}, "text_config ([]) must be an object"),
        ("qwen2_moe", {"layer_types": MIXED_TYPES, **WINDOW}, "sliding_window (8, use_sliding_window is not true) must say a window"),
        ("qwen3_moe", {"num_experts_per_tok": 6}, "experts per token (6) must be at most the number of experts (5)"),
        ("qwen3_moe", {"mlp_only_layers": 3}, "mlp_only_layers (3) must be a list of indices of layers, 0 to 3"),
        ("qwen3_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step (0) must be a whole number of at least 1"),
        ("deepseek_v2", {"num_experts_per_tok": None}, "num_experts_per_tok (null) must be a whole number"),
        ("deepseek_v2", {"q_lora_rank": 0}, "q_lora_rank (0) must be a whole number of at least 1"),
        ("deepseek_v3", {"kv_lora_rank": None}, "kv_lora_rank (null) must be a whole number"),
        ("deepseek_v3", {"first_k_dense_replace": -1}, "first_k_dense_replace (-1) must be a whole number"),
    ],
    ids=str,
)
def test_a_bad_value_is_named_in_one_line(name, change, said):
    ours(tiny(name))
    with pytest.raises(ValueError) as refused:
        ours({**tiny(name), **change})
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_layers_of_one_kind_are_counted_together():
    """So that what is counted does not grow with the number of layers."""
    model = ours({**SMALL, "model_type": "gemma2", "num_hidden_layers": 1001, **WINDOW})
    assert [number for number, _ in model.layers] == [501, 500, 1001]
