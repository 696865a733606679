"""What every family says of its tensors and their names, of the keys that compute, and of where activations are read, against transformers' own models."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from memory_budget.hf_config import architecture_from_config, read_config
from memory_budget.parameters import count_total_parameters
from minitron.checkpoints.files import Checkpoint
from minitron.families.base import HIDDEN, TensorAxes
from minitron.families.config_json import transformers_config
from minitron.families.known import FAMILIES, family_of
from minitron.families.state import model_tensors
from minitron.families.table import BUFFER, check_tensors, expected_shape, required_names, row_of
from minitron.pruning.plan import AXIS_OF_KIND
from minitron.settings.teachers import CONF_FOLDER


def shapes_of(family, model) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model_tensors(family, model).items()}


def built_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Of a model of a config, without its weights."""
    family = family_of(config)
    with torch.device("meta"):
        return shapes_of(family, family.build(config))


# The table of tensors.


def test_every_tensor_is_in_the_table_with_its_shape_and_counted(one):
    shapes, names = shapes_of(one.family, one.model), set(required_names(one.family, one.architecture))
    check_tensors(one.family, one.architecture, shapes)
    rows = [row_of(one.family, one.architecture, name) for name in names]
    expected = sum(math.prod(expected_shape(one.family, one.architecture, row)) for row in rows if not row.buffer)
    assert shapes.keys() == names and expected == count_total_parameters(one.architecture) == one.model.num_parameters()
    assert any(row.buffer for row in rows) == ("nemotron_h" in one.config["model_type"] and "E" in one.architecture.pattern)


# Sizes of published config.json files, and the parameters that their safetensors hold.
GRANITES = json.loads((Path(__file__).parents[1] / "memory_budget/recurrent.json").read_text())["published"]
LLAMA3 = {"model_type": "llama", "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "rms_norm_eps": 1e-5, "rope_theta": 500000.0}
PUBLISHED = {
    "NVIDIA-Nemotron-Nano-12B-v2-Base": (12_310_001_152, CONF_FOLDER / "architectures/nemotron-nano-12b-v2-base.json"),
    "Llama-3.2-1B": (1_235_814_400, LLAMA3 | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "head_dim": 64,
                                              "tie_word_embeddings": True}),
    "Llama-3.1-8B": (8_030_261_248, LLAMA3 | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "tie_word_embeddings": False}),
    "Mistral-7B-v0.1": (7_241_732_096, {"model_type": "mistral", "vocab_size": 32000}),
    "Qwen2.5-0.5B": (494_032_768, {"model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
                                   "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True}),
    "Qwen3-0.6B": (596_049_920, "qwen3-0.6b"),
    "Qwen3-8B": (8_190_735_360, "qwen3-8b"),
    "gemma-3-1b": (999_885_952, {"model_type": "gemma3_text", "hidden_size": 1152, "intermediate_size": 6912, "num_hidden_layers": 26, "vocab_size": 262144,
                                 "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256, "sliding_window": 512}),
    "granite-4.0-h-350m": (340_332_224, GRANITES["granite-4.0-h-350m"]["config"]),
    "granite-4.0-h-micro": (3_191_396_096, GRANITES["granite-4.0-h-micro"]["config"]),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_the_tensors_of_the_table_and_their_published_number_of_parameters(name, repository):
    parameters, config = PUBLISHED[name]
    if not isinstance(config, dict):
        config = read_config(repository / f"tests/memory_budget/configs/{config}.json" if isinstance(config, str) else config)
    family, architecture, shapes = family_of(config), architecture_from_config(config), built_shapes(config)
    check_tensors(family, architecture, shapes)
    assert sum(map(math.prod, shapes.values())) == count_total_parameters(architecture) == parameters


PUBLISHED_WITH_EXPERTS = {
    "Qwen3-30B-A3B": (30_532_122_624, {"model_type": "qwen3_moe", "num_hidden_layers": 48, "head_dim": 128}),
    "Nemotron-3-Nano-30B-A3B": (31_577_937_344, "nemotron-3-nano-30b-a3b"),
    "granite-4.0-h-tiny": (6_939_037_248, GRANITES["granite-4.0-h-tiny"]["config"]),
    "granite-4.0-h-small": (32_207_337_984, GRANITES["granite-4.0-h-small"]["config"]),
}


@pytest.mark.parametrize("name", PUBLISHED_WITH_EXPERTS)
def test_published_models_with_experts_have_their_published_number_of_parameters(name, repository):
    """Built whole on the meta device, a tensor for each of thousands of experts takes seconds; of two sublayers they have the table's."""
    parameters, config = PUBLISHED_WITH_EXPERTS[name]
    config = read_config(repository / f"tests/memory_budget/configs/{config}.json") if isinstance(config, str) else config
    family, architecture = family_of(config), architecture_from_config(config)
    assert count_total_parameters(architecture) == parameters
    short = replace(architecture, pattern=architecture.pattern[:2])
    shapes = built_shapes(family.hf_config(config, short))
    check_tensors(family, short, shapes)
    assert sum(math.prod(shape) for shape_name, shape in shapes.items() if not BUFFER.search(shape_name)) == count_total_parameters(short)


def rows_used(configs: list[dict]) -> set[TensorAxes]:
    """Every row of the families' tables that a model of one of these configs has a tensor for."""
    found = set()
    for config in configs:
        family, architecture = family_of(config), architecture_from_config(config)
        found |= {row_of(family, architecture, name) for name in built_shapes(config)}
    return found


def test_the_tables_are_used_up_by_what_configs_can_ask_for(configs):
    """Every family's row has a tensor in some model of the families that share its table; of all biases a config can ask for, one with them."""
    configs = [*configs.values(), configs["nemotron_h"] | {"use_bias": True, "mlp_bias": True}]
    for table in {family.table for family in FAMILIES.values()}:
        sharing = [config for config in configs if family_of(config).table == table]
        assert rows_used(sharing) == set(table)
        assert any(rows_used([config for config in sharing if config is not without]) < set(table) for without in sharing), "the control: one model less"


SIZES = ("hidden", "vocab", "ffn", "num_attention_heads", "num_key_value_heads", "attention_head_dim", "mamba_num_heads", "mamba_head_dim",
         "mamba_num_groups", "mamba_state_size", "mamba_conv_kernel", "moe_num_experts", "moe_ffn", "moe_shared_ffn")  # fmt: skip


def test_a_model_of_another_size_is_refused(one):
    shapes = shapes_of(one.family, one.model)
    for name in SIZES:
        if size := getattr(one.architecture, name):
            with pytest.raises(ValueError, match=r"tensor .* has shape .*; config.json says "):
                check_tensors(one.family, replace(one.architecture, **{name: size + 1}), shapes)


FIELD_OF = {"has_own_head": "tied_embeddings", "experts_read_stream": "moe_latent", "moe_latent_bias": "ffn_bias"}  # that a flag follows from


def test_a_tensor_that_config_json_denies_or_lacks_is_named(one):
    shapes, kinds = shapes_of(one.family, one.model), ("", "any", *one.architecture.mixers)
    for field in {FIELD_OF.get(row.only_if, row.only_if) for row in one.family.table if row.kind in kinds} - {""}:
        has = getattr(one.architecture, field) == (field != "tied_embeddings")
        said = r"is in the checkpoint, but config.json describes a model without it \(\w+ is false\)" if has else "is missing from the checkpoint"
        said = r"has shape .*; config.json says .*, 1\]" if field == "moe_latent" else said  # experts would read and write that many
        with pytest.raises(ValueError, match=f"tensor .* {said}"):
            check_tensors(one.family, replace(one.architecture, **{field: int(not getattr(one.architecture, field))}), shapes)


def test_experts_that_are_too_many_or_too_few_are_named(one):
    shapes, experts = shapes_of(one.family, one.model), one.architecture.moe_num_experts
    if not experts:
        return
    of_experts = [name for name in shapes if ".experts." in name]
    last, first = of_experts[-1], of_experts[0]
    assert first.split(".experts.")[1].startswith("0.") and last.split(".experts.")[1].startswith(f"{experts - 1}.")
    with pytest.raises(ValueError, match=rf"tensor {re.escape(first)} is missing from the checkpoint"):
        check_tensors(one.family, one.architecture, {name: shape for name, shape in shapes.items() if name != first})
    beyond = last.replace(f".experts.{experts - 1}.", f".experts.{experts}.")
    with pytest.raises(ValueError, match=rf"tensor {re.escape(beyond)} belongs to expert {experts}; config.json says {experts} experts"):
        check_tensors(one.family, one.architecture, shapes | {beyond: shapes[last]})


# Names.


def test_file_names_are_those_that_transformers_saves_and_come_back(one, tmp_path):
    """Of the class as transformers has it, which stacks experts."""
    type(one.model)._from_config(transformers_config(one.config)).save_pretrained(tmp_path)
    names = set(Checkpoint(tmp_path).entries)
    canonical = model_tensors(one.family, one.model)
    assert {one.family.file_name(name) for name in canonical} == names
    assert {one.family.canonical_name(name) for name in names} == canonical.keys()


# Sublayers.


@torch.no_grad()
def walked(family, model, ids_BT: torch.Tensor, without: int | None = None) -> torch.Tensor:
    parts = family.parts(model)
    hidden_BTD = parts.embed(ids_BT)
    for number, sublayer in enumerate(parts.layers):
        hidden_BTD = hidden_BTD if number == without else sublayer(hidden_BTD)
    return parts.head(parts.norm(hidden_BTD))


def test_walking_the_sublayers_gives_the_models_own_logits(one, token_ids, logits_of):
    logits = logits_of(one.model)
    assert torch.equal(walked(one.family, one.model, token_ids()), logits)
    for number in range(one.architecture.num_sublayers):  # the control, and so many they are
        assert not torch.allclose(walked(one.family, one.model, token_ids(), without=number), logits, atol=1e-2)
    assert len(one.family.parts(one.model).layers) == one.architecture.num_sublayers


def test_the_rows_are_longer_than_the_window(one, token_ids, logits_of):
    """What makes the walk a test of windows: with a longer one, tokens behind the window's end have other logits, and only those."""
    window = one.architecture.window
    if not window:
        assert "W" not in one.architecture.pattern
        return
    wider = one.family.build(one.config | {"sliding_window": 64}).eval()
    wider.load_state_dict(one.model.state_dict())
    other, own = logits_of(wider), logits_of(one.model)
    assert torch.allclose(other[:, :window], own[:, :window], atol=1e-4) and not torch.allclose(other[:, window], own[:, window], atol=1e-2)


def test_taps_read_every_sublayers_norm_and_one_activation_of_its_mixer(one):
    """What experts do is not tapped but watched; only a shared one is."""
    sizes = one.family.axis_sizes(one.architecture)
    for layer, (kind, sublayer) in enumerate(zip(one.architecture.mixers, one.family.parts(one.model).layers, strict=True)):
        of_stream, *of_mixer = one.family.layer_taps(one.architecture, layer, sublayer)
        assert (of_stream.axis, of_stream.module, of_stream.side, of_stream.width) == (HIDDEN, sublayer.norm, "output", one.architecture.hidden)
        assert len(of_mixer) == (kind != "E" or one.architecture.moe_shared_ffn > 0) and of_stream.layer == layer
        for tap in of_mixer:
            assert tap.axis in AXIS_OF_KIND[kind] and tap.shape[0] == sizes[tap.axis] and tap.layer == layer
            features = tap.module.in_features if tap.side == "input" else tap.module.out_features
            assert tap.start + tap.width <= features and tap.module in set(sublayer.mixer.modules())


# What computes.

# What modules read of a configuration that is not of what they compute: how a model is initialised, stored, regularised while it trains, or told to answer.
IDLE = {
    "initializer_range", "rescale_prenorm_residual", "time_step_max", "time_step_floor", "dtype", "attention_dropout", "pad_token_id", "_name_or_path",
    "is_encoder_decoder", "output_attentions", "output_hidden_states", "output_router_logits", "return_dict", "max_position_embeddings", "use_cache",
    "time_step_min",  # transformers clamps by it; a stage's model, and one that is handed over, does not
    "chunk_size", "mamba_chunk_size", "use_mamba_kernels",  # the same sums in another order
    "time_step_rank",  # Mamba2 reads it, and uses it for nothing
    "router_aux_loss_coef",  # of a loss
}  # fmt: skip


def test_every_key_that_the_modules_read_is_one_that_computes_or_is_known_not_to(one, token_ids, monkeypatch):
    """Every read of a key of the configuration, from construction to logits, is recorded."""
    configuration, read = type(one.model.config), set()
    sizes, plain = configuration(**one.config), configuration.__getattribute__
    monkeypatch.setattr(configuration, "__getattribute__", lambda self, key: read.add(key) or plain(self, key))
    type(one.model)._from_config(sizes).eval()(token_ids())
    monkeypatch.undo()
    read |= {configuration.attribute_map.get(key, key) for key in read}  # a key that is read by another's name
    full = sizes.to_dict()
    computing, never_tied = one.family.computing(full), {"tie_word_embeddings"} if one.config["model_type"] == "nemotron_h" else set()
    assert (read & set(full)) - computing - IDLE - never_tied == set() and not computing & IDLE
    assert {"hidden_size", "vocab_size"} <= read & computing


@pytest.mark.parametrize(("rope", "computes"), [("default", False), ("llama3", False), ("yarn", True), ("dynamic", True)])
def test_the_longest_text_computes_where_frequencies_follow_from_it(rope, computes):
    assert ("max_position_embeddings" in FAMILIES["llama"].computing({"rope_parameters": {"rope_type": rope}})) == computes


# What of a config.json is kept, and what is refused.


def test_a_students_config_names_no_code_no_place_and_no_other_form_of_the_weights(one):
    foreign = {
        "auto_map": {"AutoConfig": "configuration_x.X", "AutoModelForCausalLM": "modeling_x.X"}, "custom_pipelines": {"text-generation": {"impl": "x.X"}},
        "_name_or_path": "/home/me/own", "transformers_weights": "other.safetensors", "quantization_config": None, "num_nextn_predict_layers": 1,
    }  # fmt: skip
    kept = {"torch_dtype": "bfloat16", "eos_token_id": [2, 11], "pad_token_id": 0, "of_their_own": 3}
    config = one.family.hf_config(one.config | foreign | kept | {"dtype": None}, one.architecture)
    assert not set(foreign) & set(config) and kept.items() <= config.items() and config["dtype"] == "bfloat16"


GEMMA = {"model_type": "gemma3_text"}


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"model_type": "gpt2"}, r"'gpt2' cannot be pruned; supported: nemotron_h, llama, mistral, qwen2, qwen3, qwen3_moe, gemma3_text, mamba2, "
                                    r"granitemoehybrid"),
        ({}, r"None cannot be pruned; supported: nemotron_h, llama, "),
        ({"model_type": "llama", "quantization_config": {"quant_method": "gptq"}}, r"quantization_config is there \(gptq\)"),
        ({"model_type": "llama", "quantization_config": None}, None),
        ({"model_type": "nemotron_h", "hybrid_override_pattern": "ME*"}, None),
        ({"model_type": "qwen3_moe"}, None),
        (GEMMA | {"final_logit_softcapping": 30.0}, r"final_logit_softcapping is 30\.0; logits that are capped cannot be distilled or cut here yet"),
        (GEMMA | {"attn_logit_softcapping": 50.0}, r"attn_logit_softcapping is 50\.0"),
        (GEMMA | {"use_bidirectional_attention": True}, "use_bidirectional_attention is true"),
        (GEMMA | {"final_logit_softcapping": None, "use_bidirectional_attention": False}, None),
    ],
)
def test_a_config_that_a_cut_could_not_honour_is_refused(config, said):
    if said is None:
        assert family_of(config).model_type == config["model_type"]
        return
    with pytest.raises(ValueError, match=said):
        family_of(config)
