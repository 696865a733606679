"""What the NemotronH family says about itself, held against transformers' own models and the published sizes."""

import json
import math
import re
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, NemotronHConfig

from memory_budget.architecture import Architecture
from memory_budget.hf_config import architecture_from_config, read_config
from memory_budget.parameters import count_total_parameters
from minitron.families.config_json import transformers_config
from minitron.families.known import FAMILIES, family_of
from minitron.families.nemotron_h import FAMILY, TABLE
from minitron.families.row_lengths import row_notes
from minitron.families.table import check_tensors, expected_shape, required_names, row_of
from minitron.settings.teachers import CONF_FOLDER

NANO_12B = "architectures/nemotron-nano-12b-v2-base.json"


def without_experts(architecture: Architecture) -> Architecture:
    """A dense config read back carries transformers' defaults for experts that no layer of it has."""
    return replace(architecture, moe_num_experts=0, moe_experts_per_token=0, moe_ffn=0, moe_shared_ffn=0)


def canonical_shapes(model) -> dict[str, tuple[int, ...]]:
    return {FAMILY.canonical_name(name): tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def test_every_tensor_of_a_tiny_model_is_in_the_axis_table_with_its_shape(teacher, tiny):
    check_tensors(FAMILY, tiny, canonical_shapes(teacher))


def test_every_tensor_of_the_12b_model_is_in_the_axis_table_with_its_shape():
    config = read_config(CONF_FOLDER / NANO_12B)
    with torch.device("meta"):
        model = FAMILY.build(config)
    shapes = canonical_shapes(model)
    check_tensors(FAMILY, architecture_from_config(config), shapes)
    assert sum(math.prod(shape) for shape in shapes.values()) == 12_310_001_152


def test_the_axis_table_covers_every_bias_that_a_config_can_ask_for(config_of, tiny):
    config = config_of(tiny) | {"use_bias": True, "mlp_bias": True}
    architecture = replace(tiny, mamba_projection_bias=True, ffn_bias=True)
    assert without_experts(architecture_from_config(config)) == architecture
    shapes = canonical_shapes(FAMILY.build(config))
    check_tensors(FAMILY, architecture, shapes)
    assert {row.suffix for row in TABLE if row.suffix.endswith("bias")} <= {re.sub(r"^layers\.\d+\.", "", name) for name in shapes}


@pytest.mark.parametrize(
    "sizes", [{"hidden": 40}, {"ffn": 56}, {"mamba_num_heads": 6}, {"mamba_head_dim": 5}, {"num_attention_heads": 4}, {"mamba_state_size": 7}]
)
def test_a_model_of_another_size_is_refused(sizes, teacher, tiny):
    with pytest.raises(ValueError, match=r"tensor .* has shape"):
        check_tensors(FAMILY, replace(tiny, **sizes), canonical_shapes(teacher))


def test_expected_shapes_add_up_to_the_counted_parameters(tiny):
    total = sum(math.prod(expected_shape(FAMILY, tiny, row_of(FAMILY, tiny, name))) for name in required_names(FAMILY, tiny))
    assert total == count_total_parameters(tiny)


# What modules read of a configuration that is not of what they compute: how a model is initialised, stored, regularised while it trains, or told to answer.
IDLE = {
    "initializer_range", "rescale_prenorm_residual", "time_step_max", "time_step_floor", "dtype", "attention_dropout", "pad_token_id", "_name_or_path",
    "is_encoder_decoder", "output_attentions", "output_hidden_states", "output_router_logits", "return_dict", "max_position_embeddings",
    "time_step_min",  # transformers clamps by it; a stage's model, and one that is handed over, does not
    "chunk_size", "use_mamba_kernels",  # the same sums in another order
}  # fmt: skip


@pytest.mark.parametrize("name", ["nemotron_h", "llama untied", "qwen3 tied"])
def test_every_key_that_the_modules_read_is_one_that_computes_or_is_known_not_to(name, tiny, config_of, build_blocks, token_ids, monkeypatch):
    """Every read of a key of the configuration, from construction to logits, is recorded."""
    config = config_of(tiny) if name == "nemotron_h" else build_blocks(name, num_hidden_layers=1).config
    family, configuration, read = family_of(config), type(FAMILIES[config["model_type"]].build(config).config), set()
    of_model, sizes, plain = type(family.build(config)), configuration(**config), configuration.__getattribute__
    monkeypatch.setattr(configuration, "__getattribute__", lambda self, key: read.add(key) or plain(self, key))
    of_model._from_config(sizes).eval()(token_ids(), use_cache=False)
    monkeypatch.undo()
    full = sizes.to_dict()
    computing, never_tied = family.computing(full), {"tie_word_embeddings"} if name == "nemotron_h" else set()
    assert (read & set(full)) - computing - IDLE - never_tied == set() and not computing & IDLE
    assert {"hidden_size", "num_key_value_heads", "vocab_size"} <= read & computing


@pytest.mark.parametrize(("rope", "computes"), [("default", False), ("llama3", False), ("yarn", True), ("dynamic", True)])
def test_the_longest_text_computes_where_frequencies_follow_from_it(rope, computes):
    assert ("max_position_embeddings" in FAMILIES["llama"].computing({"rope_parameters": {"rope_type": rope}})) == computes


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


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_a_students_config_names_no_code_no_place_and_no_other_form_of_the_weights(family, tiny, build_blocks):
    architecture = tiny if family is FAMILY else build_blocks(f"{family.model_type} tied", num_hidden_layers=1).architecture
    foreign = {
        "auto_map": {"AutoConfig": "configuration_x.X", "AutoModelForCausalLM": "modeling_x.X"}, "custom_pipelines": {"text-generation": {"impl": "x.X"}},
        "_name_or_path": "/home/me/own", "transformers_weights": "other.safetensors", "quantization_config": None, "num_nextn_predict_layers": 1,
    }  # fmt: skip
    kept = {"torch_dtype": "bfloat16", "eos_token_id": [2, 11], "pad_token_id": 0, "of_their_own": 3}
    config = family.hf_config(foreign | kept, architecture)
    assert not set(foreign) & set(config) and kept.items() <= config.items() and config["dtype"] == "bfloat16"


def test_hf_config_says_depth_head_dim_and_class(config_of, tiny):
    config = config_of(replace(tiny, pattern="M*-"))
    assert (config["num_hidden_layers"], config["head_dim"], config["architectures"]) == (3, 8, ["NemotronHForCausalLM"])


def test_hf_config_is_read_back_as_the_same_architecture(config_of, tiny):
    for architecture in (tiny, replace(tiny, pattern="-M*", hidden=24, ffn=17, mamba_num_heads=2, num_attention_heads=2, attention_head_dim=5)):
        assert without_experts(architecture_from_config(config_of(architecture))) == architecture


def test_hf_config_of_a_dense_model_drops_what_looks_like_experts(tiny):
    saved = NemotronHConfig(hybrid_override_pattern="M-*").to_dict()
    assert "num_experts_per_tok" in saved and "n_routed_experts" in saved  # what transformers writes
    config = FAMILY.hf_config(saved, tiny)
    assert not [key for key in config if "expert" in key or "moe" in key]


def test_hf_config_keeps_what_it_does_not_know(tiny):
    config = FAMILY.hf_config({"rope_theta": 1234, "eos_token_id": [2, 11]}, tiny)
    assert (config["rope_theta"], config["eos_token_id"]) == (1234, [2, 11])


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


def test_a_written_config_loads_with_auto_model(tmp_path, teacher, tiny, config_of, write_checkpoint):
    write_checkpoint(tmp_path, teacher, config_of(tiny))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, local_files_only=True).eval()
    assert type(loaded).__name__ == "NemotronHForCausalLM"
    assert loaded.config.hybrid_override_pattern == tiny.pattern
    loaded_shapes, shapes = ({name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} for model in (loaded, teacher))
    assert loaded_shapes == shapes


def test_names_lose_the_prefix_of_disk_and_of_memory():
    assert FAMILY.canonical_name("backbone.layers.3.norm.weight") == FAMILY.canonical_name("model.layers.3.norm.weight") == "layers.3.norm.weight"
    assert FAMILY.canonical_name("lm_head.weight") == "lm_head.weight"


def test_file_names_are_the_published_ones(teacher):
    names = {FAMILY.file_name(FAMILY.canonical_name(name)) for name in teacher.state_dict()}
    assert {"lm_head.weight", "backbone.embeddings.weight", "backbone.norm_f.weight", "backbone.layers.0.mixer.A_log"} <= names
    assert all(name.startswith(("backbone.", "lm_head.")) for name in names)


def test_walking_the_parts_gives_the_models_own_logits(teacher, token_ids, logits_of):
    parts, ids = FAMILY.parts(teacher), token_ids()
    with torch.no_grad():
        hidden = parts.embed(ids)
        for layer in parts.layers:
            hidden = layer(hidden)
        assert torch.equal(parts.head(parts.norm(hidden)), logits_of(teacher))


def test_taps_read_every_layers_norm_and_one_activation_per_mixer(teacher, tiny):
    taps = [(tap.axis, tap.layer) for layer, block in enumerate(teacher.model.layers) for tap in FAMILY.layer_taps(tiny, layer, block)]
    mixers = {"M": "mamba_head", "-": "ffn", "*": "attention_head"}
    expected = {("hidden", layer) for layer in range(9)} | {(mixers[kind], layer) for layer, kind in enumerate(tiny.pattern)}
    assert len(taps) == len(set(taps)) and set(taps) == expected


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


def test_load_keeps_the_stored_dtype_unless_told_otherwise(tmp_path, teacher, tiny, config_of, write_checkpoint):
    write_checkpoint(tmp_path, teacher, config_of(tiny), dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in FAMILY.load(tmp_path).parameters()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in FAMILY.load(tmp_path, dtype=torch.float32).parameters()} == {torch.float32}


def test_family_of_finds_nemotron_h(config_of, tiny):
    assert family_of(config_of(tiny)) is FAMILY


def test_family_of_refuses_another_model_type_and_names_the_supported():
    with pytest.raises(ValueError, match=r"'gpt2' cannot be pruned; supported: nemotron_h"):
        family_of({"model_type": "gpt2"})


@pytest.mark.parametrize("spelling", [{"hybrid_override_pattern": "ME*"}, {"layers_block_type": ["linear_attention", "moe"]}])
def test_family_of_refuses_experts(spelling):
    with pytest.raises(ValueError, match="MoE"):
        family_of({"model_type": "nemotron_h"} | spelling)


def test_architecture_of_the_12b_teacher_is_the_published_one():
    architecture = architecture_from_config(read_config(CONF_FOLDER / NANO_12B))
    assert isinstance(architecture, Architecture)
    assert [architecture.num_layers_of(kind) for kind in "M-*"] == [28, 28, 6]
