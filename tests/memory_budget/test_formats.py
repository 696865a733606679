"""Number formats of weights, and the quantization_config that names them."""

import pytest

from memory_budget.calculator import weight_bytes
from memory_budget.configs.quantisation import stored_format
from memory_budget.configs.registry import model_from_config
from memory_budget.formats import parse_format

TINY = {"model_type": "llama", "hidden_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 200, "num_hidden_layers": 3,
        "vocab_size": 50, "tie_word_embeddings": True}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "each"),
    [
        ("fp8", lambda outputs, inputs: outputs * inputs),
        ("fp8-g64", lambda outputs, inputs: outputs * inputs + 4 * -(-outputs // 64) * -(-inputs // 64)),
        ("int8", lambda outputs, inputs: outputs * (inputs + 2)),
        ("int4", lambda outputs, inputs: outputs * (inputs // 2 + 2 * -(-inputs // 128))),
        ("int4-g32", lambda outputs, inputs: outputs * (inputs // 2 + 2 * -(-inputs // 32))),
        ("mxfp4", lambda outputs, inputs: outputs * (inputs // 2 + inputs // 32) if inputs % 32 == 0 else 2 * outputs * inputs),
        ("nvfp4", lambda outputs, inputs: outputs * (inputs // 2 + inputs // 16) + 4 if inputs % 16 == 0 else 2 * outputs * inputs),
    ],
)
def test_every_matrix_of_the_layers_is_packed_and_the_rest_is_bf16(name, each):
    """Rows of 96 and of 200: no multiple of 32 or 16, so that MXFP4 and NVFP4 leave the last matrix of a block as it is."""
    matrices = [(96, 96), (48, 96), (48, 96), (96, 96), (200, 96), (200, 96), (96, 200)]
    rest = 2 * (50 * 96 + (2 * 3 + 1) * 96)
    assert weight_bytes(model_from_config(TINY), name) == rest + 3 * sum(each(*matrix) for matrix in matrices)


def test_formats_of_old_are_as_they_were(architecture_of):
    """The published student: what 8,888,227,328 parameters took before there were more formats."""
    student = architecture_of("nemotron-nano-9b-v2")
    assert {name: weight_bytes(student, name) for name in ("bf16", "float32", "fp8", "int4")} == {
        "bf16": 2 * 8_888_227_328, "float32": 4 * 8_888_227_328, "fp8": 10_064_833_536, "int4": 6_329_629_056}  # fmt: skip


def test_a_kind_alone_is_packed_where_the_name_says_so():
    model = model_from_config(TINY)
    whole, ffn, attention = (weight_bytes(model, name) for name in ("mxfp4", "mxfp4-ffn", "mxfp4-attention"))
    assert weight_bytes(model, "bf16") - ffn + weight_bytes(model, "bf16") - attention == weight_bytes(model, "bf16") - whole > 0


@pytest.mark.parametrize("name", ["int3", "int4-g0", "int4-g", "bf16-g8", "mxfp4-g16", "fp8-hidden", "", "int4-g99999", ["int4"], None])
def test_what_is_no_format_is_refused(name):
    with pytest.raises(ValueError, match="weights_dtype"):
        parse_format(name)


COMPRESSED = {"quant_method": "compressed-tensors", "ignore": ["lm_head"]}


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"quant_method": "fp8"}, "fp8"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8-g128"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 64}, "int4-g64"),
        ({"quant_method": "gptq", "bits": 8, "group_size": 128}, "int8"),
        ({"quant_method": "awq", "bits": 4, "group_size": 128}, "int4-g128"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "int4-g64"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "int8"),
        ({"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "lm_head"]}, "mxfp4-mamba-ffn-moe"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "nvfp4"),
        ({**COMPRESSED, "config_groups": {"group_0": {"weights": {"num_bits": 4, "type": "int", "group_size": 128}}}}, "int4-g128"),
        ({**COMPRESSED, "config_groups": {"group_0": {"weights": {"num_bits": 8, "type": "float"}}}}, "fp8"),
        ({**COMPRESSED, "config_groups": {"group_0": {"weights": {"num_bits": 4, "type": "float", "group_size": 16}}}}, "nvfp4"),
    ],
)
def test_a_quantization_config_names_the_format_and_that_is_said(settings, name):
    found, notes = stored_format({"quantization_config": settings})
    assert found == name and f"weights are counted as {name}, which quantization_config says" in notes[0]
    parse_format(found)


UNREAD = [{"quant_method": "hqq"}, {"quant_method": "gptq", "bits": 3}, "fp8", {"quant_method": ["fp8"]}, {"quant_method": "compressed-tensors"}]


@pytest.mark.parametrize("settings", UNREAD)
def test_one_that_is_not_read_is_said_too(settings):
    found, notes = stored_format({"quantization_config": settings})
    assert found is None and "not read" in notes[0]


def test_gpt_oss_20b_in_mxfp4_is_as_large_as_its_files(config_of):
    """openai/gpt-oss-20b: model.safetensors.index.json says total_size 13,761,264,768 bytes (bf16 but for the experts' matrices)."""
    config = {"model_type": "gpt_oss", "hidden_size": 2880, "intermediate_size": 2880, "num_hidden_layers": 24, "num_attention_heads": 64, "head_dim": 64,
              "num_key_value_heads": 8, "num_local_experts": 32, "num_experts_per_tok": 4, "vocab_size": 201088,
              "sliding_window": 128, "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}}  # fmt: skip
    name, _ = stored_format(config)
    assert weight_bytes(model_from_config(config), name) == 13_761_264_768
