"""What the command answers beyond one table: cards, formats, curves, comparisons, and models that it knows in part."""

import json
import sys

import pytest

from memory_budget.__main__ import main
from memory_budget.budget import PRESETS
from memory_budget.calculator import kv_cache_bytes, weight_bytes
from memory_budget.configs.registry import model_from_config


@pytest.fixture
def ask(capsys):
    """Runs the command here and gives what it prints."""

    def run(*arguments: object) -> str:
        assert main([str(argument) for argument in arguments]) == 0
        return capsys.readouterr().out

    return run


@pytest.fixture
def written(tmp_path):
    """Path of a config that is written for the test."""

    def write(config: object, name: str = "config.json"):
        (tmp_path / name).write_text(json.dumps(config))
        return tmp_path / name

    return write


def row(table: str, name: str) -> str:
    return next(line for line in table.splitlines() if line.startswith(name))


def test_the_smallest_card_is_the_smallest_that_fits(ask, config_path):
    result = json.loads(ask(config_path("nemotron-nano-12b-v2"), "--cards", "--json"))
    total, name = result["bytes"]["total"], result["smallest_card"]
    assert total <= PRESETS[name].bytes
    assert not any(total <= card.bytes < PRESETS[name].bytes for card in PRESETS.values())
    assert {name for name, card in result["cards"].items() if card["fits"]} == {card.name for card in PRESETS.values() if total <= card.bytes}
    table = ask(config_path("nemotron-nano-12b-v2"), "--cards")
    assert f"{name}, of the presets that it fits" in row(table, "smallest card") and all(row(table, card) for card in PRESETS)


def test_no_card_is_said_where_none_fits(ask, config_path):
    assert "none" in row(ask(config_path("llama-3-8b"), "--batch", 4096), "smallest card").split()


def test_one_table_has_every_format(ask, config_path):
    result = json.loads(ask(config_path("llama-3-8b"), "--formats", "--json"))
    for name, one in result["formats"].items():
        alone = json.loads(ask(config_path("llama-3-8b"), "--weights", name, "--json"))
        assert (one["weights"], one["total"], one["fits"]) == (alone["bytes"]["weights"], alone["bytes"]["total"], alone["fits"])
    assert list(result["formats"]) == ["bf16", "fp8", "int8", "int4", "mxfp4", "nvfp4"]
    assert row(ask(config_path("llama-3-8b"), "--formats", "--weights", "int4", "--group", 32), "int4-g32")


def test_the_curve_passes_through_the_answers(ask, config_path, tmp_path):
    file = tmp_path / "curve.txt"
    result = json.loads(ask(config_path("gemma-3-1b"), "--plot", file, "--context", 5000, "--json"))
    points = {point["context_tokens"]: point["total"] for point in result["curve"]}
    assert points[5000] == result["bytes"]["total"] and points[result["max_context_tokens"]] <= result["budget_bytes"]
    assert max(points) > result["max_context_tokens"] and sorted(points.values()) == list(points.values())
    assert "5,000 tokens" in file.read_text() and "| the budget (19.66 GiB)" in file.read_text()


def test_a_plot_is_a_png(ask, config_path, tmp_path):
    assert "is drawn in" in ask(config_path("nemotron-nano-9b-v2"), "--plot", tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_the_curve_is_text(ask, config_path, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    said = ask(config_path("nemotron-nano-9b-v2"), "--plot", tmp_path / "a.png")
    assert "matplotlib is not installed" in said and "131,072 tokens" in said and not (tmp_path / "a.png").exists()


@pytest.mark.parametrize(("name", "says"), [("a.jpg", "must end in .png or .txt"), ("no/such/a.txt", "cannot be"), ("no/such/a.png", "cannot be")])
def test_a_plot_that_cannot_be_is_refused(name, says, refused, config_path, tmp_path):
    assert says in refused(config_path("nemotron-nano-9b-v2"), "--plot", tmp_path / name)


def test_two_models_stand_side_by_side(ask, config_path):
    table = ask(config_path("nemotron-nano-12b-v2"), "--compare", config_path("nemotron-nano-9b-v2"))
    assert row(table, "parameters").split()[1:] == ["12,310,001,152", "8,888,227,328", "-3,421,773,824"]
    assert row(table, "fits").split() == ["fits", "no", "yes"]
    both = json.loads(ask(config_path("nemotron-nano-12b-v2"), "--compare", config_path("nemotron-nano-9b-v2"), "--json"))
    assert both["compare"] == json.loads(ask(config_path("nemotron-nano-9b-v2"), "--json"))


def test_llama_cpps_buffers_are_the_parts_of_the_report(ask, config_path):
    """Its longest context is a multiple of 256 cells, and the next does not fit."""
    options = ("--engine", "llamacpp", "--weights", "q4_k_m", "--kv", "q8_0", "--json")
    result = json.loads(ask(config_path("nemotron-nano-9b-v2"), *options))
    assert list(result["llamacpp"]) == ["model", "kv", "recurrent", "compute_estimate"]
    assert result["bytes"]["total"] == sum(result["llamacpp"][name] for name in ("model", "kv", "recurrent"))
    longest = result["max_context_tokens"]
    fits = [json.loads(ask(config_path("nemotron-nano-9b-v2"), *options, "--context", context))["fits"] for context in (longest, longest + 1)]
    assert fits == [True, False] and longest % 256 == 0
    assert json.loads(ask(config_path("nemotron-nano-9b-v2"), *options, "--activations", 512))["bytes"]["activations"] == result["llamacpp"]["compute_estimate"]


LANGUAGE = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 100, "num_hidden_layers": 2, "vocab_size": 90}


@pytest.mark.parametrize("key", ["text_config", "llm_config", "language_config"])
def test_the_language_part_is_counted_and_the_rest_said(key, ask, written):
    nested = {"model_type": "llava", key: LANGUAGE, "vision_config": {"hidden_size": 3}, "audio_config": {"hidden_size": 3}}
    result = json.loads(ask(written(nested), "--json"))
    assert result["parameters"] == json.loads(ask(written(LANGUAGE, "alone.json"), "--json"))["parameters"]
    assert f"{key} of model_type llava is counted, the language model alone" in result["notes"][0]
    assert "the vision tower (vision_config)" in result["notes"][0] and "the audio encoder (audio_config)" in result["notes"][0]


def test_what_stands_outside_the_language_part_counts_for_it(ask, written):
    nested = {"model_type": "llava", "text_config": LANGUAGE, "tie_word_embeddings": True, "quantization_config": {"quant_method": "fp8"}}
    result = json.loads(ask(written(nested), "--json"))
    tied = model_from_config(LANGUAGE | {"tie_word_embeddings": True})
    assert result["parameters_by_kind"]["head"] == 0 and result["bytes"]["weights"] == weight_bytes(tied, "fp8")


STRANGE = {"model_type": "strange", "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 3}


def with_weights(folder, config, shapes):
    header = json.dumps({name: {"dtype": "BF16", "shape": shape} for name, shape in shapes.items()}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


SHAPES = {"model.embed_tokens.weight": [90, 64], "lm_head.weight": [90, 64], "a.weight": [100, 64], "e.weight": [3, 10, 64], "norm.weight": [64]}


def test_an_unknown_types_parameters_come_from_its_files(ask, tmp_path):
    result = json.loads(ask(with_weights(tmp_path, STRANGE, SHAPES), "--json"))
    assert result["parameters"] == 2 * 90 * 64 + 100 * 64 + 30 * 64 + 64
    assert result["parameters_by_kind"] | {"embedding": 5760, "head": 5760, "other": 8384} == result["parameters_by_kind"]
    assert result["bytes"]["kv_cache"] == 3 * 2 * 2 * 16 * 131072 * 2
    assert "is not known: parameters are counted from the headers" in result["notes"][0]
    assert "the cache is an assumption: 3 layers, all of them attention that keeps every token, 2 key and value heads of 16" in result["notes"][1]
    packed = json.loads(ask(tmp_path, "--weights", "int8", "--json"))["bytes"]["weights"]
    assert packed == 2 * (2 * 90 * 64 + 64) + 130 * 66


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"num_hidden_layers": None}, "the config does not say num_hidden_layers"),
        ({"hidden_size": None}, "the config does not say hidden_size"),
        ({"kv_lora_rank": 512}, "kv_lora_rank (512) says of it what is not read"),
        ({"layer_types": ["conv", "attention", "conv"]}, "layer_types"),
        ({"sliding_window": 512}, "sliding_window (512)"),
    ],
)
def test_a_cache_that_the_config_does_not_give_is_not_guessed(settings, why, ask, refused, tmp_path):
    folder = with_weights(tmp_path, STRANGE | settings, SHAPES)
    result = json.loads(ask(folder, "--json"))
    assert {result["bytes"]["kv_cache"], result["bytes"]["total"]} == {None} and all(
        result[name] is None for name in ("fits", "headroom_bytes", "max_context_tokens", "max_batch"))  # fmt: skip
    assert "the cache is not known: " + why in result["notes"][1]
    table = ask(folder, "--formats", "--cards")
    assert "not known" in row(table, "KV cache") and "not known" in row(table, "fits") and "longest context  " not in table.split("card ")[0]
    assert "is not known" in refused(folder, "--engine", "vllm")
    assert "is not known" in refused(folder, "--plot", tmp_path / "a.txt")


def test_an_unknown_type_without_files_is_refused(refused, written):
    said = refused(written(STRANGE))
    assert "model_type (strange) is not supported, and there are no safetensors files" in said and "qwen3" in said


@pytest.mark.parametrize(
    ("config", "options", "says"),
    [
        ({"model_type": {"a": 1}}, (), 'model_type ({"a": 1}) must be a string'),
        ({"model_type": ["llama"]}, (), 'model_type (["llama"]) must be a string'),
        ({"model_type": "\u001b[31m\ud800"}, (), r"\u001b[31m\ud800"),
        ({}, (), "model_type is missing from the config"),
        ({"model_type": "llama", "num_hidden_layers": 2**63}, (), "num_hidden_layers (9223372036854775808) must be at most 16,384"),
        ({"model_type": "mamba2", "num_hidden_layers": 10**9}, (), "num_hidden_layers (1000000000) must be at most 16,384"),
        ({"model_type": "llama", "hidden_size": 2**63}, (), "hidden_size (9223372036854775808) must be a whole number of at least 0, and below 2**53"),
        ({"model_type": "nemotron_h", "layers_block_type": [["mlp"]]}, (), "layers_block_type holds ['mlp']"),
        ({"model_type": "lfm2", "num_attention_heads": 2**31, "num_key_value_heads": 2, "layer_types": ["full_attention"], "num_hidden_layers": 1},
         (), "head_dim (0) must be a whole number"),
        ({"model_type": "llava", "text_config": []}, (), "text_config ([]) must be an object"),
        ({"model_type": "llama"}, ("--engine", "vllm", "--pool-gib", "1e300"), "--pool-gib (1e+300) must be at least 0 GiB, and at most 2**33"),
        ({"model_type": "llama"}, ("--budget", "1e300"), "budget (1e300) must be a number of GiB above 0"),
        ({"model_type": "llama"}, ("--context", str(10**40)), "must be at most 2**53"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_sizes_that_no_model_has_end_in_one_line(config, options, says, refused, written):
    assert says in refused(written(config), *options)


@pytest.mark.parametrize("text", ["[" * 100_000, "9" * 5000, "\0", "{", "3", "null"], ids=lambda text: text[:3])
def test_what_is_no_config_ends_in_one_line(text, refused, tmp_path):
    (tmp_path / "config.json").write_text(text)
    assert "must be" in refused(tmp_path)


def test_a_name_that_utf_8_cannot_write_is_shown_all_the_same(ask, written):
    assert "KV cache" in ask(written({**LANGUAGE, "quantization_config": {"quant_method": "\ud800"}}))


class TestReports:
    """REPORTS.md, by its numbers."""

    STUDENT = "nemotron-nano-9b-v2"

    def test_1_more_sequences_than_mamba_blocks(self, ask, config_path):
        options = ("--engine", "vllm", "--device-gib", "22.06", "--overhead-gib", "1", "--prefix-caching")
        said = ask(config_path(self.STUDENT), *options)
        assert "--max-num-seqs 256 is more than the 136 blocks for Mamba states; give --max-num-seqs 136 or less" in row(said, "note: vLLM refuses to start")
        assert "refuses" not in ask(config_path(self.STUDENT), *options, "--max-num-seqs", "136")

    @pytest.mark.parametrize("engine", [(), ("--engine", "vllm", "--device-gib", "80")], ids=str)
    def test_12_a_context_longer_than_the_positions(self, engine, ask, written, config_of):
        config = config_of(self.STUDENT) | {"max_position_embeddings": 8192}
        said = next(line for line in ask(written(config), *engine).splitlines() if line.startswith("note:") and "8,192" in line)
        assert "vLLM refuses" in said and "131,072" in said.replace("131072", "131,072")
        assert "8,192" not in ask(written(config), *engine, "--context", 8192).partition("note:")[2]
        assert "more than the config's 8,192 positions" in row(ask(written(config), *engine, "--context", 8192), "longest context")

    def test_15_rows_that_int4_cannot_pack(self, ask, config_path):
        said = row(ask(config_path(self.STUDENT), "--weights", "int4"), "note:")
        assert "intermediate_size 15,680 (25 matrices) are no multiple of 128" in said and "--group 64 packs them" in said
        assert "note:" not in ask(config_path(self.STUDENT), "--weights", "int4", "--group", "64")

    def test_16_rows_that_k_quants_cannot_pack(self, ask, config_path):
        said = ask(config_path(self.STUDENT), "--engine", "llamacpp", "--weights", "Q4_K_M")
        assert "ffn_up tensors in Q5_0: rows of 4,480 are no multiple of 256, Q4_K's block" in said and "note:" not in ask(
            config_path(self.STUDENT), "--engine", "llamacpp", "--weights", "Q8_0")  # fmt: skip

    def test_17_what_older_versions_log(self, ask, config_path):
        options = ("--engine", "vllm", "--device-gib", "22.06", "--overhead-gib", "1", "--prefix-caching")
        said = row(ask(config_path(self.STUDENT), *options), "GPU KV cache size")
        assert "147,320 tokens" in said and "versions from about 0.10 to 0.20 log 22,304 tokens" in said

    def test_28_minitron_4b(self, ask, written):
        config = {"model_type": "nemotron", "hidden_size": 3072, "intermediate_size": 9216, "num_hidden_layers": 32, "num_attention_heads": 24,
                  "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 256000, "tie_word_embeddings": False}  # fmt: skip
        assert json.loads(ask(written(config), "--json"))["parameters"] == 4_190_509_056

    def test_29_sizes_in_llm_config(self, ask, written, config_of):
        config = {"model_type": "NemotronH_Nano_VL_V2", "llm_config": config_of(self.STUDENT), "vision_config": {"hidden_size": 1280}}
        result = json.loads(ask(written(config), "--json"))
        assert (result["model_type"], result["parameters"]) == ("nemotron_h", 8_888_227_328) and "the vision tower (vision_config)" in result["notes"][0]

    def test_30_two_gpus(self, ask, refused, config_path):
        one, two = (json.loads(ask(config_path(self.STUDENT), "--tp", tp, "--json"))["bytes"] for tp in (1, 2))
        assert two["kv_cache"] == one["kv_cache"] / 2 and two["ssm_state"] == one["ssm_state"] / 2 and 0.5 < two["weights"] / one["weights"] < 0.501
        assert "tp (3) must divide the 128 heads" in refused(config_path(self.STUDENT), "--tp", 3)


def test_an_assumed_cache_is_what_a_known_type_of_that_kind_keeps():
    known = model_from_config(STRANGE | {"model_type": "llama"})
    assumed = model_from_config(STRANGE, lambda: {"a.weight": ("BF16", (2, 2))})
    assert kv_cache_bytes(known, 1000, "bf16") == kv_cache_bytes(assumed, 1000, "bf16")


def test_mutated_configs_end_in_an_answer_or_one_line():
    """A few of what make fuzz-memory tries."""
    from tests.memory_budget import fuzz

    configs = [json.loads(path.read_text()) for path in sorted(fuzz.CONFIGS.glob("*.json"))]
    assert {fuzz.one(f"test-{number}", configs) for number in range(400)} == {"answered", "refused"}
