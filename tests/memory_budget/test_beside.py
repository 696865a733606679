"""What is served beside a model: slots for adapters, a draft model, layers of multi-token prediction."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from memory_budget.__main__ import main
from memory_budget.budget import PRESETS
from memory_budget.configs.prediction import prediction_model
from memory_budget.configs.registry import model_from_config
from memory_budget.parameters import count_total_parameters
from memory_budget.units import GIB
from memory_budget.vllm.allotment import vllm_allotment
from memory_budget.vllm.lora import TABLES, lora_bytes
from memory_budget.vllm.shards import shard
from memory_budget.workload import Workload

HERE = Path(__file__).parent
MEASURED = json.loads((HERE / "vllm_lora.json").read_text())
ATTENTION = {one["name"]: one for one in json.loads((HERE / "published" / "attention.json").read_text())}
RECURRENT = json.loads((HERE / "recurrent.json").read_text())["published"]
# Tensors of a checkpoint with its prediction layer, by the Hub: without scales and correction biases, which are neither's parameters.
WITH_PREDICTION = {
    "deepseek-v3": 3_918_786_560 + 680_571_043_840,  # BF16 and F8_E4M3 of deepseek-ai/DeepSeek-V3
    "glm-4.5-air": 110_468_824_832 - 46 * 128,  # safetensors.total of zai-org/GLM-4.5-Air
    "glm-4.5": 358_337_791_296 - 90 * 160,
    "qwen3-next-80b-a3b": 81_324_862_720,  # safetensors.total of Qwen/Qwen3-Next-80B-A3B-Instruct
}


def config_with_prediction(name: str) -> dict:
    return ATTENTION[name]["config"] | {"num_nextn_predict_layers": 1} if name in ATTENTION else RECURRENT[name]["config"]


@pytest.fixture
def ask(capsys):
    """Runs the command here and gives its JSON."""

    def run(*arguments: object) -> dict:
        assert main([*map(str, arguments), "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    return run


@pytest.fixture
def written(tmp_path):
    """Path of a config that is written for the test."""

    def write(config: dict) -> Path:
        (tmp_path / "config.json").write_text(json.dumps(config))
        return tmp_path / "config.json"

    return write


@pytest.mark.parametrize("name", MEASURED)
def test_slots_are_what_vllm_allotted(name):
    """The bytes of all lora_a_stacked and lora_b_stacked in a process of vLLM 0.32.0 on a CPU: float32, 3 slots of rank 8."""
    model = model_from_config(MEASURED[name]["config"])
    assert lora_bytes(model, model, slots=3, rank=8, dtype="float32") == MEASURED[name]["bytes"]
    assert lora_bytes(model, model, slots=3, rank=16, dtype="float32") == 2 * MEASURED[name]["bytes"]
    assert lora_bytes(model, model, slots=4, rank=8, dtype="float32") != MEASURED[name]["bytes"]


def test_every_type_that_is_known_was_measured():
    assert {one["config"]["model_type"] for one in MEASURED.values()} == set(TABLES)


def test_two_devices_split_one_side_of_every_projection():
    """Of q, k, v, gate and up the B, of o and down the A; embedding and head not. A tiny Llama: 64 numbers wide, 4 and 2 heads of 16, 160 neurons."""
    model = model_from_config(MEASURED["llama"]["config"])
    layer = (3 * 64 + 128 / 2) + (64 / 2 + 64) + 2 * (64 + 160 / 2) + (160 / 2 + 64)
    assert lora_bytes(model, shard(model, 2), slots=1, rank=1, dtype="bf16") == 2 * (2 * layer + 2 * (500 + 64))


def test_slots_are_a_part_of_the_total_and_taken_off_the_pool(ask, config_path):
    path = config_path("llama-3-8b")
    plain, lora = (ask(path, "--engine", "vllm", "--budget", "h100-80", *more) for more in ((), ("--lora", 4, "--lora-rank", 32)))
    more = lora["bytes"]["lora"]
    assert "lora" not in plain["bytes"] and lora["bytes"]["total"] == plain["bytes"]["total"] + more
    assert more == lora_bytes(model := model_from_config(json.loads(path.read_text())), model, slots=4, rank=32, dtype="bf16")
    block = plain["vllm"]["bytes_per_block"]
    assert abs((plain["vllm"]["num_blocks"] - lora["vllm"]["num_blocks"]) * block - more) < block


def test_the_limits_heed_what_is_beside(ask, config_path):
    """The longest context and the most sequences fit, one more does not; with weights packed the slots stay bf16."""
    arguments = (config_path("llama-3-8b"), "--lora", 2, "--draft", config_path("qwen2-0.5b"), "--context", 4096)
    result = ask(*arguments, "--cards", "--formats")
    for option, limit in (("--context", result["max_context_tokens"]), ("--batch", result["max_batch"])):
        assert [ask(*arguments, option, number)["fits"] for number in (limit, limit + 1)] == [True, False]
    assert result["formats"]["bf16"]["total"] - result["formats"]["int4"]["total"] == result["bytes"]["weights"] - result["formats"]["int4"]["weights"]
    assert all(card["fits"] == (result["bytes"]["total"] <= PRESETS[name].bytes) for name, card in result["cards"].items())
    assert result["max_context_tokens"] < ask(config_path("llama-3-8b"), "--context", 4096)["max_context_tokens"]


def test_a_draft_model_is_its_own_weights_and_caches(ask, config_path):
    arguments = ("--context", 4096, "--batch", 3, "--kv", "fp8")
    alone = [ask(config_path(name), *arguments)["bytes"]["total"] for name in ("qwen3-8b", "qwen3-0.6b")]
    both = ask(config_path("qwen3-8b"), "--draft", config_path("qwen3-0.6b"), *arguments, "--activations", 512)
    assert both["bytes"]["draft"] == alone[1]
    assert both["bytes"]["total"] - both["bytes"]["activations"] == sum(alone)
    longer = ask(config_path("qwen3-8b"), "--draft", config_path("qwen3-0.6b"), "--context", 4097, "--batch", 3, "--kv", "fp8")
    assert longer["bytes"]["draft"] > alone[1]


@pytest.mark.parametrize(("head_dim", "windows", "tokens"), [(32, False, 419_328), (16, False, 524_288), (32, True, 174_752)])
def test_a_draft_shares_the_pool_as_vllm_printed(head_dim, windows, tokens):
    """vLLM 0.32.0 on a CPU, 1 GiB, 256 tokens in float32: two layers of a draft beside three of a Llama, or six of a Gemma 3 of which five have windows."""
    llama = MEASURED["llama"]["config"] | {"num_hidden_layers": 3, "head_dim": 32}
    draft = model_from_config(llama | {"num_hidden_layers": 2, "head_dim": head_dim})
    gemma = {"model_type": "gemma3_text", "tie_word_embeddings": True, "sliding_window": 128, "num_hidden_layers": 6}
    model = model_from_config(llama | gemma if windows else llama)
    workload = Workload(context_tokens=256, weights_dtype="float32", kv_dtype="float32")
    found = [vllm_allotment(one, workload, pool_bytes=GIB, block_size=128, max_num_batched_tokens=256, async_scheduling=False).kv_cache_tokens
             for one in (replace(model, layers=(*model.layers, *draft.layers)), model)]  # fmt: skip
    assert found[0] == tokens != found[1]


def test_in_llamacpp_a_draft_has_buffers_of_its_own(ask, config_path):
    arguments = ("--engine", "llamacpp", "--weights", "Q8_0", "--context", 4096)
    alone = [ask(config_path(name), *arguments)["bytes"]["total"] for name in ("qwen3-8b", "qwen3-0.6b")]
    assert ask(config_path("qwen3-8b"), "--draft", config_path("qwen3-0.6b"), *arguments)["bytes"]["total"] == sum(alone)


def test_notes_say_what_vllm_refuses_of_a_draft(ask, config_path):
    notes = ask(config_path("llama-3-8b"), "--draft", config_path("qwen2-0.5b"), "--context", 4096)["notes"]
    assert any("vocabulary (151,936) is not the model's (128,256)" in note for note in notes)
    assert not any("vocabulary" in note for note in ask(config_path("qwen3-8b"), "--draft", config_path("qwen3-0.6b"), "--context", 64).get("notes", []))


@pytest.mark.parametrize("name", WITH_PREDICTION)
def test_a_model_and_its_prediction_layer_are_what_the_checkpoint_holds(name):
    config = config_with_prediction(name)
    model = model_from_config(config)
    assert count_total_parameters(model) + count_total_parameters(prediction_model(config, model, shared_tables=False)) == WITH_PREDICTION[name]
    two = prediction_model(config | {"num_nextn_predict_layers": 2}, model, shared_tables=False)
    assert count_total_parameters(model) + count_total_parameters(two) != WITH_PREDICTION[name]


def test_vllm_takes_embedding_and_head_of_the_model(ask, written):
    """GLM-4.5-Air at 1 token: two tables less in bf16; a token of its cache is in both."""
    path = written(config_with_prediction("glm-4.5-air"))
    plain, vllm = (ask(path, "--mtp", "--context", 1, "--engine", *engine)["bytes"]["mtp"] for engine in (("plain",), ("vllm", "--pool-gib", 1)))
    assert plain - vllm == 2 * 2 * 151552 * 4096
    assert ask(path, "--mtp", "--context", 3)["bytes"]["mtp"] - plain == 2 * (2 * 8 * 128) * 2


def test_a_prediction_layer_joins_the_groups_and_its_note_goes(ask, written):
    path = written(config_with_prediction("glm-4.5-air"))
    plain, more = (ask(path, "--engine", "vllm", "--pool-gib", 10, "--context", 64, *asked) for asked in ((), ("--mtp",)))
    assert more["vllm"]["bytes_per_block"] * 46 == plain["vllm"]["bytes_per_block"] * 47
    assert any("multi-token prediction" in note for note in plain["notes"])
    assert not any("multi-token prediction" in note for note in more.get("notes", []))


@pytest.mark.parametrize(("name", "block_size", "tokens", "parameters"), [("glm4_moe", 128, 1_398_016, 57_920), ("deepseek_v3", 16, 1_864_128, 61_560)])
def test_prediction_layers_are_as_vllm_made_them(name, block_size, tokens, parameters):
    """vLLM 0.32.0 on a CPU, method mtp: the tensors that the drafter has and the model not (without correction biases), and 1 GiB of 256 tokens in float32."""
    config = MEASURED[name]["config"] | {"num_nextn_predict_layers": 1}
    model = model_from_config(config)
    mtp, own = (prediction_model(config, model, shared_tables=is_shared) for is_shared in (True, False))
    workload = Workload(context_tokens=256, weights_dtype="float32", kv_dtype="float32")
    found = [vllm_allotment(one, workload, pool_bytes=GIB, block_size=block_size, max_num_batched_tokens=256, async_scheduling=False).kv_cache_tokens
             for one in (replace(model, layers=(*model.layers, *mtp.layers)), model)]  # fmt: skip
    assert count_total_parameters(mtp) == parameters != count_total_parameters(own)
    assert found[0] == tokens != found[1]


def test_nemotron_h_says_what_its_prediction_layers_are(ask, config_path, written):
    """nemotron_h_mtp.py of vLLM: attention and experts, a norm before each, three more and a matrix 2·D → D."""
    config = json.loads(config_path("nemotron-3-nano-30b-a3b").read_text()) | {"num_nextn_predict_layers": 1, "mtp_hybrid_override_pattern": "*E"}
    model = model_from_config(config)
    parts = {part.kind: part.parameters().total for _, part in model.layers}
    by_hand = parts["attention"] + parts["moe"] + 5 * model.hidden + 2 * model.hidden**2
    assert count_total_parameters(prediction_model(config, model, shared_tables=True)) == by_hand
    assert ask(written(config), "--mtp", "--context", 1)["bytes"]["mtp"] == 2 * by_hand + 2 * next(
        part.cache_numbers_per_token for _, part in model.layers if part.kind == "attention")  # fmt: skip


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--lora", 0), "must be at least 1 adapter slot"),
        (("--lora", 1, "--lora-rank", 24), "--lora-rank (24) must be one of 1, 8, 16, 32, 64, 128, 256, 320, 512"),
        (("--lora-rank", 8), "must come with --lora N"),
        (("--lora", 1, "--engine", "llamacpp"), "--lora must not come with --engine llamacpp"),
        (("--mtp",), "the config names none"),
        (("--draft", "nowhere/at/all"), "nowhere"),
    ],
)
def test_what_cannot_be_is_refused(options, said, refused, config_path):
    assert said in refused(config_path("llama-3-8b"), *options)


@pytest.mark.parametrize(
    ("change", "said"), [({"model_type": "olmoe"}, "of model_type olmoe hold is not known"), ({"num_nextn_predict_layers": 10**4}, "must be 1 to 64")]
)
def test_prediction_layers_that_are_not_known_are_refused(change, said, refused, written):
    assert said in refused(written({"model_type": "deepseek_v3", "num_nextn_predict_layers": 1} | change), "--mtp")


def test_adapters_of_a_type_that_was_not_measured_are_refused(refused, config_path):
    assert "adapters of model_type mamba2 is not known" in refused(config_path("mamba2-2.7b"), "--lora", 1)


def test_text_table_curve_and_comparison_show_them(capsys, config_path, tmp_path):
    arguments = [str(config_path("qwen3-8b")), "--lora", "2", "--draft", str(config_path("qwen3-0.6b")), "--context", "4096"]
    assert main([*arguments, "--plot", str(tmp_path / "curve.txt")]) == 0
    table = capsys.readouterr().out
    assert "LoRA slots" in table and "bf16, 2 slots of rank 16" in table and "draft model" in table
    assert "beside the model" in (tmp_path / "curve.txt").read_text()
    assert main([*arguments, "--compare", str(config_path("llama-3-8b"))]) == 0
    compared = capsys.readouterr().out.splitlines()
    assert {"lora", "draft", "total"} <= {line.split()[0] for line in compared if line}
