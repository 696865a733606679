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

    for name in ("nemotron-nano-9b-v2", "nemotron-3-nano-30b-a3b", "tiny-nemotron-h", "qwen2-0.5b", "mamba2-2.7b"):
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


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model_type": None}, ["model_type is missing", "nemotron_h"]),
        ({"model_type": "gpt2"}, ["model_type (gpt2)", "supported: nemotron_h, mamba2, llama, mistral, qwen2, qwen3"]),
        ({"num_hidden_layers": 55}, ["num_hidden_layers (55)", "56 layers"]),
        ({"layers_block_type": ["mamba"] * 56}, ["hybrid_override_pattern and layers_block_type must agree"]),
        ({"hybrid_override_pattern": "M-X", "num_hidden_layers": 3}, ["'M-X'", "unknown: X"]),
        ({"hybrid_override_pattern": None, "layers_block_type": ["mamba", "conv"], "num_hidden_layers": 2}, ["layers_block_type", "'conv'"]),
        ({"hybrid_override_pattern": None, "layers_block_type": "M-", "num_hidden_layers": 2}, ["layers_block_type", "list"]),
        ({"attention_head_dim": 64}, ["head_dim (128) and attention_head_dim (64)"]),
        ({"hidden_size": "4480"}, ['hidden_size ("4480")', "whole number"]),
        ({"hidden_size": 0}, ["hidden is 0"]),
        ({"use_bias": 1}, ["use_bias (1)", "true or false"]),
        ({"mamba_num_heads": 100}, ["mamba heads (100)", "96, 104"]),
        ({"num_key_value_heads": 7}, ["attention heads (40)", "7 key-value heads"]),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_by_name_value_and_rule(change, says, config_of):
    config = config_of("nemotron-nano-9b-v2")
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


def test_a_sliding_window_is_named_as_left_out(config_of):
    config = config_of("mistral-7b-v0.3")
    assert unmodelled_settings(config) == []
    assert "4096 tokens" in unmodelled_settings({**config, "sliding_window": 4096})[0]
    assert unmodelled_settings({**config_of("qwen2-7b"), "sliding_window": 4096, "use_sliding_window": False}) == []


def test_a_window_that_no_layer_has_is_not_named(config_of):
    """Qwen's layers have one from max_window_layers on, or where layer_types says so; Llama has no such setting."""
    qwen = {**config_of("qwen3-8b"), "use_sliding_window": True, "sliding_window": 4096}
    layers = qwen["num_hidden_layers"]
    assert unmodelled_settings({**qwen, "max_window_layers": layers}) == []
    assert "4096 tokens" in unmodelled_settings({**qwen, "max_window_layers": layers - 1})[0]
    assert unmodelled_settings({**qwen, "max_window_layers": 0, "layer_types": ["full_attention"] * layers}) == []
    assert "4096 tokens" in unmodelled_settings({**qwen, "max_window_layers": layers, "layer_types": ["sliding_attention"] * layers})[0]
    assert unmodelled_settings({**config_of("llama-3-8b"), "sliding_window": 4096}) == []
