"""The command line, as a process of its own: output, exit codes, one-line errors."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import memory_budget

ROOT = Path(memory_budget.__file__).parent.parent


def command(*arguments: str | Path, **settings) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **settings}
    return subprocess.run([sys.executable, "-m", "memory_budget", *map(str, arguments)], capture_output=True, text=True, env=environment)


def test_json_has_the_contracts_keys_and_the_published_numbers(config_path):
    done = command(config_path("nemotron-nano-9b-v2"), "--budget", "a10g", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    result = json.loads(done.stdout)
    assert list(result) == [
        "model_type",
        "parameters",
        "active_parameters",
        "parameters_by_kind",
        "bytes",
        "budget_bytes",
        "fits",
        "headroom_bytes",
        "max_context_tokens",
        "max_batch",
    ]
    assert list(result["parameters_by_kind"]) == ["embedding", "head", "mamba", "attention", "ffn", "moe", "norm"]
    assert list(result["bytes"]) == ["weights", "kv_cache", "ssm_state", "conv_state", "activations", "total"]
    assert result["parameters"] == result["active_parameters"] == sum(result["parameters_by_kind"].values()) == 8_888_227_328
    assert result["fits"] is True
    assert result["headroom_bytes"] == result["budget_bytes"] - result["bytes"]["total"] > 0


def test_json_has_the_contracts_keys_for_vllm(config_path):
    done = command(config_path("nemotron-nano-9b-v2"), "--engine", "vllm", "--pool-gib", "3", "--prefix-caching", "--json")
    result = json.loads(done.stdout)
    first = ["block_tokens", "page_bytes", "bytes_per_block", "blocks_per_request", "num_blocks", "kv_cache_tokens", "max_concurrency"]
    assert list(result["vllm"])[:7] == first
    assert result["vllm"]["blocks_per_request"] == 121


def test_the_budget_is_the_a10g_when_none_is_named(config_path):
    named, unnamed = (command(config_path("nemotron-nano-9b-v2"), "--json", *options).stdout for options in (("--budget", "a10g"), ()))
    assert named == unnamed
    assert command(config_path("nemotron-nano-9b-v2"), "--json", "--budget", "l4").stdout != unnamed


def test_vllms_device_is_the_budgets_when_none_is_given(config_path):
    config = config_path("nemotron-nano-9b-v2")
    given, from_budget = (command(config, "--engine", "vllm", "--json", *options).stdout for options in (("--device-gib", "22.06"), ()))
    assert given == from_budget


def test_a_pool_from_the_device_is_the_pool_given_outright(config_path):
    config = config_path("nemotron-nano-9b-v2")
    from_device = command(config, "--engine", "vllm", "--device-gib", "22.06", "--utilization", "0.95", "--overhead-gib", "0", "--json")
    pool_gib = 22.06 * 0.95 - 2 * 8_888_227_328 / 2**30
    outright = command(config, "--engine", "vllm", "--pool-gib", str(pool_gib), "--json")
    assert json.loads(from_device.stdout) == json.loads(outright.stdout)


def test_a_model_that_does_not_fit_is_an_answer_not_an_error(config_path):
    done = command(config_path("nemotron-nano-12b-v2"), "--budget", "a10g")
    assert (done.returncode, done.stderr) == (0, "")
    fits_line = next(line for line in done.stdout.splitlines() if line.startswith("fits"))
    assert fits_line.split() == ["fits", "no", "6.41", "GiB", "too", "much"]


def test_every_number_of_the_table_carries_its_unit(config_path):
    engine = ("--engine", "vllm", "--pool-gib", "10")
    done = command(config_path("nemotron-3-nano-30b-a3b"), *engine, "--budget", "80", "--weights", "int4", "--activations", "2048")
    assert done.returncode == 0
    units = ("parameters", "GiB", "tokens", "sequences", "blocks", "yes")
    for line in filter(None, done.stdout.splitlines()):
        assert any(unit in line.split() for unit in units), line


def test_a_quantised_report_says_what_stays_bf16(config_path):
    assert "int4 with a 2-byte scale per 128, the rest bf16" in command(config_path("llama-3-8b"), "--weights", "int4").stdout
    assert "the rest bf16" not in command(config_path("llama-3-8b")).stdout


def test_layers_of_blocks_are_counted_as_config_json_counts_them(config_path):
    """Llama-3-8B: num_hidden_layers is 32. A hybrid's are said kind by kind."""
    first = command(config_path("llama-3-8b")).stdout.splitlines()[0]
    assert first.endswith("llama, 32 blocks of attention and FFN")
    assert command(config_path("nemotron-nano-9b-v2")).stdout.splitlines()[0].endswith("nemotron_h, 56 layers: 27 Mamba-2, 4 attention, 25 FFN")


def test_tied_embeddings_are_said(config_path):
    said = "embeddings tied to the head"
    assert command(config_path("qwen3-0.6b")).stdout.splitlines()[0].endswith(f"28 blocks of attention and FFN, {said}")
    assert said not in command(config_path("qwen3-8b")).stdout


def test_states_are_shown_where_a_layer_has_one(config_path):
    assert "SSM state" not in command(config_path("llama-3-8b")).stdout and "SSM state" in command(config_path("nemotron-nano-9b-v2")).stdout
    assert json.loads(command(config_path("llama-3-8b"), "--json").stdout)["bytes"]["ssm_state"] == 0


@pytest.mark.parametrize(
    ("name", "blocks", "kept"),
    [
        ("gemma-3-1b", "26 blocks of attention and FFN, 22 of them within a window of 512 tokens", "the last 511 tokens alone in 22 of 26 attention layers"),
        ("mistral-7b-v0.1", "32 blocks of attention and FFN, all of them within a window of 4,096 tokens", "the last 4,095 tokens alone in all 32 attention"),
    ],
)
def test_layers_within_a_window_and_what_they_keep_are_said(name, blocks, kept, config_path):
    table = command(config_path(name)).stdout
    assert blocks in table.splitlines()[0] and kept in next(line for line in table.splitlines() if line.startswith("KV cache"))
    assert "note:" not in table and "window" not in command(config_path("mistral-7b-v0.3")).stdout


def test_a_model_whose_windows_fit_has_no_longest_context(config_path):
    assert json.loads(command(config_path("mistral-7b-v0.1"), "--json").stdout)["max_context_tokens"] is None
    left = int(13.9 * 2**30) - 2 * 7_241_732_096
    assert json.loads(command(config_path("mistral-7b-v0.1"), "--json", "--budget", "13.9").stdout)["max_context_tokens"] == left // (32 * 2 * 8 * 128 * 2)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--context", "0"], "context_tokens (0) must be"),
        (["--context", "many"], "argument --context: invalid int value: 'many'"),
        (["--weights", "bf17"], "weights_dtype (bf17) must be one of bf16"),
        (["--budget", "a11g"], "budget (a11g) must be a number of GiB above 0 or one of a10g"),
        (["--engine", "tgi"], "argument --engine: invalid choice: 'tgi'"),
        (["--engine", "vllm", "--pool-gib", "1", "--device-gib", "2"], "both are given"),
        (["--engine", "vllm", "--pool-gib", "1", "--overhead-gib", "0"], "--overhead-gib (0.0) must come with --device-gib"),
        (["--engine", "vllm", "--pool-gib", "-1"], "--pool-gib (-1.0) must be at least 0 GiB"),
        (["--engine", "vllm", "--device-gib", "10"], "weights and overhead leave no room"),
        (["--engine", "vllm", "--pool-gib", "1e300"], "--pool-gib (1e+300) must be at least 0 GiB, and at most 2**33"),
        (["--group", "64"], "--group (64) must come with --weights int4"),
        (["--tp", "3"], "tp (3) must divide the 128 heads"),
        (["--pool-gib", "0"], "--pool-gib must come with --engine vllm"),
        (["--prefix-caching"], "--prefix-caching must come with --engine vllm"),
        (["--colour"], "unrecognized arguments: --colour"),
    ],
    ids=" ".join,
)
def test_a_users_mistake_is_one_line_and_exit_code_2(options, says, config_path):
    done = command(config_path("nemotron-nano-9b-v2"), *options)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert says in done.stderr


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "not found"),
        ("{\n\n", "must be JSON"),
        ('{"model_type": "gpt2"}', "model_type (gpt2) is not supported"),
    ],
)
def test_a_config_that_cannot_be_read_is_one_line_and_exit_code_2(content, says, tmp_path):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    done = command(tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert says in done.stderr


def test_no_argument_is_an_error_of_one_line():
    done = command()
    assert (done.returncode, done.stderr) == (2, "error: the following arguments are required: DIR_OR_CONFIG_JSON\n")


def test_help_lists_the_model_types_that_are_read():
    assert "Model types: nemotron_h, mamba2, llama, mistral, qwen2, qwen3, qwen3_moe, gemma3_text," in command("--help", COLUMNS="200").stdout


def test_help_explains_each_option():
    done = command("--help", COLUMNS="200")
    assert done.returncode == 0
    for option in (
        "--context",
        "--batch",
        "--weights",
        "--kv",
        "--ssm",
        "--budget",
        "--engine",
        "--pool-gib",
        "--device-gib",
        "--utilization",
        "--overhead-gib",
        "--prefix-caching",
        "--activations",
        "--group",
        "--tp",
        "--cards",
        "--formats",
        "--plot",
        "--compare",
        "--max-num-seqs",
        "--json",
    ):
        explained = [line for line in done.stdout.splitlines() if line.startswith(f"  {option}")]
        assert len(explained) == 1, option


@pytest.mark.parametrize("arguments", [["--help"], []], ids=str)
def test_a_reader_that_leaves_early_sees_no_traceback(arguments, config_path):
    process = subprocess.Popen(
        [sys.executable, "-m", "memory_budget", str(config_path("llama-3-8b")), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    process.stdout.close()
    assert process.wait(timeout=30) == 0
    assert process.stderr.read() == ""


def test_no_module_imports_more_than_the_standard_library():
    paths = [path.relative_to(ROOT).with_suffix("") for path in (ROOT / "memory_budget").rglob("*.py") if path.stem != "__init__"]
    modules = [".".join(path.parts) for path in paths]
    script = f"import sys, importlib; [importlib.import_module(name) for name in {modules}]; print(*sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=True)
    loaded = {name.split(".")[0] for name in done.stdout.split()}
    assert "memory_budget" in loaded
    assert not loaded & {"numpy", "torch", "transformers", "yaml", "safetensors", "matplotlib", "huggingface_hub"}
    sees_numpy = subprocess.run([sys.executable, "-c", "import sys, numpy; print(*sys.modules)"], capture_output=True, text=True, check=True)
    assert "numpy" in sees_numpy.stdout.split()
