"""What is NemotronH's own: spellings of its pattern, biases, experts that a dense model does not have, and the clamp on time steps."""

import json
import math
from dataclasses import replace

import pytest
from transformers import AutoModelForCausalLM, NemotronHConfig

from memory_budget.hf_config import architecture_from_config, read_config
from minitron.families.config_json import transformers_config
from minitron.families.nemotron_h import FAMILY
from minitron.families.row_lengths import row_notes


# The published 9B; sizes that all take; 14 heads of 16 channels in 2 groups with a state of 32: 2·224 + 128 + 14 rows of in_proj.
@pytest.mark.parametrize(("sizes", "expected"), [
    ({"hidden": 4480, "ffn": 15680, "mamba_num_heads": 128, "mamba_head_dim": 80, "mamba_num_groups": 8, "mamba_state_size": 128, "num_attention_heads": 40,
      "num_key_value_heads": 8, "attention_head_dim": 128}, {"int4": "intermediate_size 15,680", "K-quants": "hidden_size 4,480, intermediate_size 15,680"}),
    ({"hidden": 512, "ffn": 768, "mamba_num_heads": 16, "mamba_head_dim": 16, "mamba_state_size": 32, "num_attention_heads": 16, "attention_head_dim": 16}, {}),
    ({"hidden": 512, "ffn": 768, "mamba_num_heads": 14, "mamba_head_dim": 16, "mamba_state_size": 32, "num_attention_heads": 16, "attention_head_dim": 16},
     {"int4": "head_dim 224", "K-quants": "head_dim 224", "causal_conv1d": "590"}),
], ids=["9B", "all take", "14 heads"])  # fmt: skip
def test_rows_that_quantisers_and_kernels_mind_are_told(sizes, expected, tiny):
    notes = row_notes(FAMILY, replace(tiny, **sizes))
    assert notes.keys() == expected.keys() and all(notes[use].endswith(said) for use, said in expected.items())
    assert "causal_conv1d" not in row_notes(FAMILY, replace(tiny, **sizes, pattern="*-"))


# Nemotron 3 Nano's experts are 1,856 neurons wide and read 2,688 channels; a shared one has 3,712. With a latent they read that.
@pytest.mark.parametrize(("sizes", "expected"), [
    ({}, {"int4": "moe_intermediate_size 1,856", "K-quants": "hidden_size 2,688, moe_intermediate_size 1,856, moe_shared_expert_intermediate_size 3,712"}),
    ({"moe_ffn": 1532, "moe_shared_ffn": 3840}, {"int4": "moe_intermediate_size 1,532", "K-quants": "hidden_size 2,688, moe_intermediate_size 1,532",
                                                 "experts in transformers": "moe_intermediate_size 1,532"}),
    ({"moe_ffn": 1536, "moe_shared_ffn": 3840, "hidden": 2816, "moe_latent": 516}, {
        "int4": "moe_latent_size 516", "K-quants": "moe_latent_size 516", "experts in transformers": "moe_latent_size 516"}),
], ids=["as published", "odd neurons", "odd latent"])  # fmt: skip
def test_rows_of_experts_that_quantisers_and_grouped_products_mind_are_told(sizes, expected, tiny):
    published = replace(tiny, pattern="E*", hidden=2688, num_attention_heads=32, attention_head_dim=128, moe_num_experts=128, moe_ffn=1856, moe_shared_ffn=3712)
    notes = row_notes(FAMILY, replace(published, **sizes))
    assert notes.keys() == expected.keys() and all(notes[use].split(": ")[1] == said for use, said in expected.items())


class PublishedConfig:
    """What matters of the configuration class beside NVIDIA's weights: the pattern is given, the layers' names follow from it and cannot be set."""

    def __init__(self, num_hidden_layers, hybrid_override_pattern, head_dim, mamba_num_heads, layer_norm_epsilon, **others):
        assert len(hybrid_override_pattern) == num_hidden_layers
        self.hybrid_override_pattern = hybrid_override_pattern
        for key, value in others.items():
            setattr(self, key, value)

    @property
    def layers_block_type(self) -> list[str]:
        return [{"M": "mamba", "*": "attention", "-": "mlp"}[letter] for letter in self.hybrid_override_pattern]


def mlx_lm_pattern(config: dict) -> list[str]:
    """As mlx-lm reads it: the pattern, else the older names of layers."""
    return list(config.get("hybrid_override_pattern") or [{"mamba": "M", "attention": "*", "mlp": "-"}[name] for name in config["layers_block_type"]])


# As transformers 5 saves it, as published in version 4's time, and with both at once.
@pytest.mark.parametrize("given", ["saved", "published", "both"])
def test_hf_config_spells_the_pattern_as_every_reader_takes_it(given, config_of, tiny):
    saved = NemotronHConfig(**config_of(tiny)).to_dict()
    published = {"hybrid_override_pattern": tiny.pattern, "num_hidden_layers": 9}
    config = FAMILY.hf_config({"saved": saved, "published": published, "both": saved | published}[given], tiny)
    assert PublishedConfig(**config).layers_block_type[:4] == ["mamba", "mlp", "mamba", "attention"]
    assert "".join(mlx_lm_pattern(config)) == NemotronHConfig(**config).hybrid_override_pattern == tiny.pattern
    assert {"linear_attention"} <= set(saved["layers_block_type"])
    with pytest.raises(AttributeError):  # the control: what transformers saves
        PublishedConfig(**config | {"layers_block_type": saved["layers_block_type"]})
    with pytest.raises(KeyError):
        mlx_lm_pattern({"layers_block_type": saved["layers_block_type"]})


def test_hf_config_of_a_dense_model_drops_what_looks_like_experts(tiny):
    saved = NemotronHConfig(hybrid_override_pattern="M-*").to_dict()
    assert "num_experts_per_tok" in saved and "n_routed_experts" in saved  # what transformers writes
    config = FAMILY.hf_config(saved, tiny)
    assert not [key for key in config if "expert" in key or "moe" in key]


def test_hf_config_of_experts_says_what_others_have_no_defaults_for(configs):
    """And the one shared expert that transformers makes, which others make as often as is said."""
    given = {key: value for key, value in configs["nemotron_h experts"].items() if key not in ("norm_topk_prob", "routed_scaling_factor")}
    config = FAMILY.hf_config(given | {"n_shared_experts": 2, "num_local_experts": 8}, architecture_from_config(given))
    assert (config["norm_topk_prob"], config["routed_scaling_factor"], config["n_shared_experts"]) == (True, 1.0, 1) and "num_local_experts" not in config
    sizes = NemotronHConfig(**given)
    assert (sizes.norm_topk_prob, sizes.routed_scaling_factor) == (True, 1.0)


def test_hf_config_replaces_the_older_spelling_of_head_dim(tiny):
    assert FAMILY.hf_config({"attention_head_dim": 64}, tiny)["attention_head_dim"] == 8
    assert "attention_head_dim" not in FAMILY.hf_config({}, tiny)


def test_hf_config_replaces_aliases_that_would_contradict_the_pattern(tiny):
    saved = {"layer_types": ["mlp"], "mtp_hybrid_override_pattern": "*E", "transformers_version": "4.0"}
    assert not set(saved) & set(FAMILY.hf_config(saved, tiny))


def test_hf_config_writes_infinity_as_a_number(tiny):
    config = FAMILY.hf_config({"time_step_limit": [0.0, {"__float__": "Infinity"}]}, tiny)
    assert config["time_step_limit"] == [0.0, math.inf]


def test_a_config_as_transformers_saves_it_is_normalised(tmp_path, tiny, config_of):
    NemotronHConfig(**config_of(tiny)).save_pretrained(tmp_path)
    saved = read_config(tmp_path)
    assert "__float__" in json.dumps(saved) and "hybrid_override_pattern" not in saved
    config = FAMILY.hf_config(saved, tiny)
    assert "__float__" not in json.dumps(config) and config["hybrid_override_pattern"] == tiny.pattern
    assert transformers_config(saved).time_step_limit == [0.0, math.inf] and transformers_config(saved).hybrid_override_pattern == tiny.pattern


def test_loading_and_building_lift_the_clamp_on_the_time_step(tmp_path, teacher, tiny, config_of, write_checkpoint):
    write_checkpoint(tmp_path, teacher, config_of(tiny))
    raw = AutoModelForCausalLM.from_pretrained(tmp_path, local_files_only=True)
    assert raw.model.layers[0].mixer.time_step_limit == (0.001, math.inf)  # transformers' own
    for model in (teacher, FAMILY.load(tmp_path)):
        assert [block.mixer.time_step_limit for block in model.model.layers if hasattr(block.mixer, "A_log")] == [(0.0, math.inf)] * 3


def test_what_is_handed_over_is_the_same_model_to_transformers_as_it_comes(tmp_path, build_model, tiny, config_of, write_checkpoint, logits_of):
    model = build_model()
    for block in model.model.layers:
        if hasattr(block.mixer, "dt_bias"):
            block.mixer.dt_bias.data -= 6.0  # time steps about the 0.001 that transformers would raise them to
    config = config_of(tiny)
    loaded = [AutoModelForCausalLM.from_pretrained(write_checkpoint(tmp_path / name, model, written), local_files_only=True)
              for name, written in (("kept", config), ("handed", FAMILY.handed_over(config)))]  # fmt: skip
    clamped, handed = ((logits_of(other) - logits_of(model)).abs().max().item() for other in loaded)
    assert handed < 1e-5 < 1e-3 < clamped
    built = FAMILY.build(FAMILY.handed_over(config))  # whoever starts from it afresh has numbers
    assert all(parameter.isfinite().all() for parameter in built.parameters())
