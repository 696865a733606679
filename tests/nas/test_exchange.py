"""Architectures to and from export_config files."""

import json
from dataclasses import replace

import pytest

from memory_budget.architecture import Architecture
from nas.exchange import from_export_config, read_export_config, to_export_config, write_export_config

TEACHER = Architecture(
    model_type="nemotron_h", pattern="M-M*-M-*-", hidden=32, vocab=97, ffn=48, num_attention_heads=4, num_key_value_heads=2, attention_head_dim=8,
    mamba_num_heads=8, mamba_head_dim=4, mamba_num_groups=4, mamba_state_size=6, mamba_conv_kernel=4,
)  # fmt: skip
STUDENT = replace(TEACHER, pattern="M-M*-", hidden=24, ffn=32, mamba_num_heads=4, mamba_head_dim=3, num_attention_heads=2)


def built(imported) -> Architecture:
    return replace(TEACHER, pattern=imported.pattern, **imported.sizes)


def test_an_object_has_the_names_of_megatron():
    assert to_export_config(STUDENT) == {
        "num_layers": 5, "hidden_size": 24, "ffn_hidden_size": 32, "mamba_num_heads": 4, "mamba_head_dim": 3, "num_attention_heads": 2,
        "num_query_groups": 2, "hybrid_override_pattern": "M-M*-",
    }  # fmt: skip


def test_there_and_back_is_the_same_architecture(tmp_path):
    path = tmp_path / "export_config.json"
    write_export_config(path, STUDENT)
    assert built(read_export_config(path, TEACHER)) == STUDENT != TEACHER


def test_what_is_left_out_is_the_teachers():
    imported = from_export_config({"ffn_hidden_size": 32}, TEACHER)
    assert built(imported) == replace(TEACHER, ffn=32) and imported.num_layers == 9
    assert built(from_export_config({}, TEACHER)) == TEACHER


def test_a_depth_without_a_pattern_leaves_the_pattern_open():
    imported = from_export_config({"num_layers": 7, "hidden_size": 24}, TEACHER)
    assert (imported.num_layers, imported.pattern, imported.sizes["hidden"]) == (7, None, 24)


def test_the_teachers_depth_is_the_teachers_pattern():
    assert from_export_config({"num_layers": 9}, TEACHER).pattern == TEACHER.pattern


def test_the_newer_name_of_the_pattern_is_read_and_its_pipeline_marks_dropped():
    imported = from_export_config({"hybrid_layer_pattern": "M-|M*-", "num_layers": 5}, TEACHER)
    assert (imported.pattern, imported.num_layers) == ("M-M*-", 5)


def test_of_windows_a_file_says_the_depth_alone():
    """Megatron's letter of attention is one: it does not say which blocks stay. A pattern that is none of the teacher's is left for others to refuse."""
    teacher = replace(TEACHER, model_type="gemma3_text", pattern="W-W-*-", window=8)
    imported = from_export_config({"hybrid_layer_pattern": "*-*-"}, teacher)
    assert (imported.num_layers, imported.pattern) == (2, None)
    assert from_export_config({"hybrid_layer_pattern": "*-*-*-"}, teacher).pattern == teacher.pattern == from_export_config({}, teacher).pattern
    assert from_export_config({"hybrid_layer_pattern": "M-"}, teacher).pattern == "M-"
    with pytest.raises(ValueError, match=r"num_layers \(1\) contradicts the pattern \*-\*-, which has 2 layers"):
        from_export_config({"hybrid_layer_pattern": "*-*-", "num_layers": 1}, teacher)


@pytest.mark.parametrize("pattern", ["M-|M*-/*-", "M-M*-/*-/*-", "M-M|*-|/M-|", "M-M*-/"])
def test_layers_of_heads_that_foretell_further_tokens_are_left_out(pattern):
    for name in ("hybrid_layer_pattern", "hybrid_override_pattern"):
        imported = from_export_config({name: pattern, "num_layers": 5, "mtp_num_layers": 1}, TEACHER)
        assert (imported.pattern, imported.num_layers) == ("M-M*-", 5)
    assert from_export_config({"hybrid_layer_pattern": pattern, "hybrid_override_pattern": "M-M*-"}, TEACHER).pattern == "M-M*-"
    with pytest.raises(ValueError, match="contradicts the pattern"):
        from_export_config({"hybrid_layer_pattern": pattern, "num_layers": 7}, TEACHER)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"hybrid_layer_pattern": "/*-"}, r"hybrid_layer_pattern \(/\*-\) must be a string of the layer letters .*, before any /"),
        ({"moe_ffn_hidden_size": 8, "hiden_size": 8}, "export_config has hiden_size, moe_ffn_hidden_size; it may have num_layers, hidden_size"),
        ({"num_layers": 6, "hybrid_override_pattern": "M-M*-"}, r"num_layers \(6\) contradicts the pattern M-M\*-, which has 5 layers"),
        ({"hybrid_override_pattern": "M-", "hybrid_layer_pattern": "M*"}, "are both given and differ"),
        ({"hybrid_override_pattern": "M-X"}, r"hybrid_override_pattern \(M-X\) must be a string of the layer letters"),
        ({"hybrid_layer_pattern": ""}, r"hybrid_layer_pattern \(\) must be a string"),
        ({"hidden_size": 33}, r"hidden_size \(33\) must be a whole number of at least 1 and at most the teacher's 32"),
        ({"hidden_size": 24.0}, r"hidden_size \(24.0\) must be a whole number"),
        ({"num_layers": 0}, r"num_layers \(0\) must be a whole number"),
        ({"mamba_num_heads": True}, r"mamba_num_heads \(True\) must be a whole number"),
        ({"num_query_groups": 3}, r"num_query_groups \(3\) must be a whole number of at least 1 and at most the teacher's 2"),
    ],
)
def test_what_is_no_cut_of_the_teacher_is_refused(config, said):
    with pytest.raises(ValueError, match=said):
        from_export_config(config, TEACHER)


@pytest.mark.parametrize("text", ["[1]", "{", None])
def test_a_file_that_is_no_object_is_refused_by_its_name(tmp_path, text):
    path = tmp_path / "export_config.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match="export_config .*export_config.json") as caught:
        read_export_config(path, TEACHER)
    assert "\n" not in str(caught.value)


def test_a_kind_of_layer_that_the_teacher_lacks_stays_without_size():
    teacher = replace(TEACHER, pattern="M-M-", num_attention_heads=0, num_key_value_heads=0, attention_head_dim=0)
    config = json.loads(json.dumps(to_export_config(teacher)))
    assert replace(teacher, pattern="M-M-", **from_export_config(config, teacher).sizes) == teacher
