"""Reading config.json: spellings, and what is refused."""

import json

import pytest

from memory_budget.hf_config import architecture_from_config, read_config, unmodelled_settings
from memory_budget.parameters import count_total_parameters


def test_pattern_string_and_block_types_old_and_new_read_alike(config_of):
    config = config_of("nemotron-nano-9b-v2")
    pattern = config.pop("hybrid_override_pattern")
    expected = architecture_from_config({**config, "hybrid_override_pattern": pattern})
    for names in ({"M": "mamba", "*": "attention", "-": "mlp"}, {"M": "linear_attention", "*": "full_attention", "-": "mlp"}):
        assert architecture_from_config({**config, "layers_block_type": [names[letter] for letter in pattern]}) == expected
    assert architecture_from_config({**config, "hybrid_override_pattern": pattern.replace("*", "-", 1)}) != expected


def test_config_that_transformers_saves_reads_like_the_one_it_was_given(config_of, architecture_of, tmp_path):
    from transformers import AutoConfig

    for name in ("nemotron-nano-9b-v2", "nemotron-3-nano-30b-a3b", "tiny-nemotron-h", "qwen2-0.5b", "mamba2-2.7b", "mistral-7b-v0.1", "gemma-3-1b"):
        AutoConfig.for_model(**config_of(name)).save_pretrained(tmp_path)
        assert architecture_from_config(read_config(tmp_path)) == architecture_of(name)


def test_attention_head_dim_of_older_configs_is_read(config_of):
    config = config_of("nemotron-nano-9b-v2")
    older = {**config, "attention_head_dim": 64}
    del older["head_dim"]
    assert architecture_from_config(older).attention_head_dim == 64


def test_nemotron_h_is_never_tied_whatever_the_config_says(config_of):
    config = config_of("nemotron-nano-9b-v2")
    assert architecture_from_config({**config, "tie_word_embeddings": True}) == architecture_from_config(config)


def test_an_untied_and_a_tied_qwen_differ_by_the_head(config_of):
    config = config_of("qwen2-0.5b")
    tied, untied = (architecture_from_config({**config, "tie_word_embeddings": tied}) for tied in (True, False))
    assert count_total_parameters(untied) - count_total_parameters(tied) == 151936 * 896


HYBRID = "nemotron-nano-9b-v2"


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        (HYBRID, {"model_type": None}, ["model_type is missing", "nemotron_h"]),
        (HYBRID, {"model_type": "gpt2"}, ["model_type (gpt2)", "supported: nemotron_h, mamba2, llama, mistral, qwen2, qwen3, qwen3_moe, gemma3_text"]),
        (HYBRID, {"num_hidden_layers": 55}, ["num_hidden_layers (55)", "56 layers"]),
        (HYBRID, {"layers_block_type": ["mamba"] * 56}, ["hybrid_override_pattern and layers_block_type must agree"]),
        (HYBRID, {"hybrid_override_pattern": "M-X", "num_hidden_layers": 3}, ["'M-X'", "unknown: X"]),
        (HYBRID, {"hybrid_override_pattern": None, "layers_block_type": ["mamba", "conv"], "num_hidden_layers": 2}, ["layers_block_type", "'conv'"]),
        (HYBRID, {"hybrid_override_pattern": None, "layers_block_type": "M-", "num_hidden_layers": 2}, ["layers_block_type", "list"]),
        (HYBRID, {"attention_head_dim": 64}, ["head_dim (128) and attention_head_dim (64)"]),
        (HYBRID, {"hidden_size": "4480"}, ['hidden_size ("4480")', "whole number"]),
        (HYBRID, {"hidden_size": 0}, ["hidden is 0"]),
        (HYBRID, {"use_bias": 1}, ["use_bias (1)", "true or false"]),
        (HYBRID, {"mamba_num_heads": 100}, ["mamba heads (100)", "96, 104"]),
        (HYBRID, {"num_key_value_heads": 7}, ["attention heads (40)", "7 key-value heads"]),
        ("mistral-7b-v0.1", {"sliding_window": 0}, ["sliding_window (0)", "at least 2 tokens, or null"]),
        ("gemma-3-1b", {"sliding_window": 1}, ["sliding_window (1)", "at least 2 tokens, or null"]),
        ("gemma-3-1b", {"sliding_window": "all"}, ['sliding_window ("all")', "whole number"]),
        ("gemma-3-1b", {"sliding_window_pattern": 0}, ["sliding_window_pattern (0)", "at least 1"]),
        ("gemma-3-1b", {"layer_types": ["full_attention"] * 25}, ["layer_types (25 entries)", "26 layers"]),
        ("qwen3-8b", {"layer_types": "sliding_attention"}, ['layer_types ("sliding_attention")', "36 layers"]),
        ("qwen2-0.5b", {"layer_types": ["full_attention"] * 23 + ["chunked_attention"]}, ['"chunked_attention"', "full_attention and sliding_attention"]),
        ("qwen2-0.5b", {"layer_types": ["full_attention"] * 23 + ["sliding_attention"]}, ["sliding_attention", "no window", "use_sliding_window"]),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_by_name_value_and_rule(name, change, says, config_of):
    config = config_of(name)
    architecture_from_config(config)
    with pytest.raises(ValueError) as caught:
        architecture_from_config({key: value for key, value in {**config, **change}.items() if value is not None})
    for part in says:
        assert part in str(caught.value)


def test_expand_that_is_not_heads_times_head_dim_is_refused(config_of):
    with pytest.raises(ValueError, match="expand"):
        architecture_from_config({**config_of("mamba2-2.7b"), "expand": 3})


def test_a_directory_and_its_file_read_alike(config_of, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config_of("llama-3-8b")))
    assert read_config(tmp_path) == read_config(tmp_path / "config.json") == config_of("llama-3-8b")


@pytest.mark.parametrize(("content", "says"), [(None, "not found"), ("{", "must be JSON"), ("[1]", "JSON object"), (b"\xff\xfe{", "must be JSON")])
def test_a_file_that_is_no_config_is_refused(content, says, tmp_path):
    if content is not None:
        (tmp_path / "config.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=says):
        read_config(tmp_path)


FULL, SLIDING = "full_attention", "sliding_attention"
QWEN_WINDOWS = {"use_sliding_window": True, "sliding_window": 4096}


@pytest.mark.parametrize(
    ("name", "settings", "windowed", "window"),
    [
        ("defaults-mistral", {}, range(32), 4096),
        ("mistral-7b-v0.1", {"sliding_window": 1024}, range(32), 1024),
        ("mistral-7b-v0.1", {"sliding_window": None}, (), 0),
        ("qwen2-0.5b", QWEN_WINDOWS | {"max_window_layers": 21}, (21, 22, 23), 4096),
        ("qwen2-0.5b", QWEN_WINDOWS | {"max_window_layers": 21, "use_sliding_window": False}, (), 0),
        ("qwen2-0.5b", QWEN_WINDOWS | {"max_window_layers": 21, "sliding_window": None}, (), 0),
        ("qwen2-0.5b", {"use_sliding_window": True, "num_hidden_layers": 30}, (28, 29), 4096),
        ("qwen2-0.5b", QWEN_WINDOWS | {"max_window_layers": 0, "layer_types": [FULL, SLIDING] * 12}, range(1, 24, 2), 4096),
        ("qwen3-0.6b", QWEN_WINDOWS, (), 0),
        ("qwen3-0.6b", QWEN_WINDOWS | {"max_window_layers": 27}, (27,), 4096),
        ("qwen3-0.6b", QWEN_WINDOWS | {"layer_types": [FULL] * 27 + [SLIDING]}, (27,), 4096),
        ("defaults-gemma3_text", {}, set(range(26)) - {5, 11, 17, 23}, 4096),
        ("gemma-3-1b", {"sliding_window_pattern": 2}, range(0, 26, 2), 512),
        ("gemma-3-1b", {"sliding_window_pattern": 1}, (), 0),
        ("gemma-3-1b", {"num_hidden_layers": 3, "layer_types": [FULL, SLIDING, FULL]}, (1,), 512),
    ],
    ids=str,
)
def test_the_layers_within_a_window_are_those_of_transformers(name, settings, windowed, window, config_of):
    """Said here, and by the cache that transformers makes for the config."""
    from transformers import AutoConfig, DynamicCache

    config = config_of(name) | settings
    architecture = architecture_from_config(config)
    assert architecture.layer_kinds == tuple("W-" if layer in windowed else "*-" for layer in range(architecture.num_layers))
    assert architecture.window == window
    layers = DynamicCache(config=AutoConfig.for_model(**config)).layers
    assert {layer.sliding_window for layer in layers if layer.is_sliding} == ({window} if window else set())
    assert tuple("W-" if layer.is_sliding else "*-" for layer in layers) == architecture.layer_kinds


def test_a_llama_has_no_windows_whatever_its_config_says(config_of):
    assert architecture_from_config(config_of("llama-3-8b") | {"sliding_window": 4096}) == architecture_from_config(config_of("llama-3-8b"))


def test_a_window_is_modelled_and_named_by_no_note(config_of):
    assert unmodelled_settings(config_of("mistral-7b-v0.1")) == unmodelled_settings(config_of("gemma-3-1b")) == []
    assert unmodelled_settings({**config_of("nemotron-nano-9b-v2"), "num_nextn_predict_layers": 1}) != []
