"""make vllm-check: real vLLM serves exported students of every family unchanged; VLLM_PYTHON names the interpreter that has it. Prints what it measures."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import openai
import pytest
import torch
from transformers import AutoTokenizer

from memory_budget.hf_config import read_config
from minitron.families.known import family_of
from minitron.generation.generate import generate
from minitron.generation.prompts import Tags, write_prompt
from minitron.serving.client import ThinkingBudgetClient

VLLM_PYTHON = os.environ.get("VLLM_PYTHON")
pytestmark = [pytest.mark.vllm, pytest.mark.skipif(VLLM_PYTHON is None, reason="no vLLM: make vllm-check")]

CONTEXT, POOL_GIB, BLOCK_SIZE = 2048, 1, 128  # of vLLM: --max-model-len, VLLM_CPU_KVCACHE_SPACE, its own block size on a CPU
TOLERANCE_NATS = 1e-5  # float32 on both sides; measured: 1.2e-6
PROMPT = "def read(self, size=-1):"
# vLLM's attention on a CPU takes heads of 32, 64, 80, … channels only.
STUDENT = ("teacher.tiny.attention_head_dim=32", "teacher.tiny.num_attention_heads=2", "teacher.tiny.num_key_value_heads=1",
           "budget.device_gib=0.0004", "search.finalists=0", "search.shortlist_size=1")  # fmt: skip


BLOCKS = {"llama": True, "qwen3": False}  # and whether embeddings and head are one matrix


@dataclass(frozen=True, slots=True)
class Served:
    url: str
    log: str


def is_ready(port: int) -> bool:
    try:
        return urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).status == 200
    except OSError:
        return False


@pytest.fixture(scope="module")
def folder(door, small_settings, tmp_path_factory) -> Path:
    """What stage=export left of a student that was cut and distilled."""
    place = tmp_path_factory.mktemp("student")
    for stage in ("distill", "export"):
        finished = door(place, *small_settings, *STUDENT, f"stage={stage}")
        assert finished.returncode == 0, finished.stderr
    assert "vLLM takes all" in finished.stdout
    return place / "runs" / "tiny" / "export"


@pytest.fixture(scope="module", params=BLOCKS)
def block_folder(request, write_block_teacher, small_block_settings, door, tmp_path_factory) -> Path:
    """What stage=export left of a tiny Llama's or Qwen3's student: fewer blocks, hidden channels, FFN neurons, query and KV heads."""
    family, place = request.param, tmp_path_factory.mktemp(request.param)
    teacher = write_block_teacher(place / "teacher", family, tied=BLOCKS[family])
    for stage in ("distill", "export"):
        finished = door(place, f"teacher.path={teacher}", "run_name=blocks", *small_block_settings, f"stage={stage}")
        assert finished.returncode == 0, finished.stderr
    assert "vLLM takes all" in finished.stdout
    return place / "runs" / "blocks" / "export"


@pytest.fixture(scope="module")
def serve(tmp_path_factory):
    """Starts vLLM's server of a model with further options and waits until it answers; one at a time."""
    running: list[subprocess.Popen] = []

    def stop() -> None:
        for process in running:  # with its engine and worker, which are processes of their own
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        running.clear()

    def start(model: Path, port: int, *options: str) -> Served:
        stop()
        log = tmp_path_factory.mktemp("vllm") / "server.log"
        own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        environment = own | {"VLLM_CPU_KVCACHE_SPACE": str(POOL_GIB), "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        # The `vllm` command itself ends at once in vllm-cpu: it asks for the version of a package named vllm.
        command = [VLLM_PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--served-model-name", "student", "--host", "127.0.0.1",
                   "--port", str(port), "--max-model-len", str(CONTEXT), "--enforce-eager", *options]  # fmt: skip
        with log.open("w") as output:
            running.append(subprocess.Popen(command, cwd=log.parent, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True))
        began = time.monotonic()
        until = began + 400
        while not is_ready(port):
            assert running[0].poll() is None and time.monotonic() < until, log.read_text()[-4000:]
            time.sleep(0.5)
        print(f"\nvLLM answers after {time.monotonic() - began:.0f} s")
        return Served(f"http://127.0.0.1:{port}/v1", log.read_text())

    yield start
    stop()


@pytest.fixture(scope="module")
def served(serve, folder) -> Served:
    """Without prefix caching: with it vLLM 0.32.0 fails on a CPU at a prompt longer than a block, as its scan there keeps no states on the way."""
    return serve(folder, 8642, "--mamba_ssm_cache_dtype", "float32", "--dtype", "float32", "--no-enable-prefix-caching")


@pytest.fixture(scope="module")
def model(folder):
    return family_of(read_config(folder)).load(folder)


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def client(served, folder) -> ThinkingBudgetClient:
    return ThinkingBudgetClient(served.url, "student", tokenizer=folder, context_tokens=CONTEXT)


@torch.no_grad()
def prompt_differences(served: Served, model, ids: list[int]) -> torch.Tensor:
    """|log p of every prompt token by vLLM − by transformers|, nats."""
    server = openai.OpenAI(base_url=served.url, api_key="none")
    got = server.completions.create(model="student", prompt=ids, max_tokens=1, temperature=0, extra_body={"prompt_logprobs": 0})
    theirs = [row[str(token)]["logprob"] for row, token in zip(got.choices[0].model_extra["prompt_logprobs"][1:], ids[1:], strict=True)]
    ours = model(torch.tensor([ids]), use_cache=False).logits[0, :-1].log_softmax(-1)
    return (torch.tensor(theirs) - ours[torch.arange(len(ids) - 1), ids[1:]]).abs()


def test_prompt_log_probabilities_are_transformers(served, model, tokenizer, folder):
    ids = tokenizer((Path(json.__file__).read_text())[:3000])["input_ids"][:700]
    difference = prompt_differences(served, model, ids)
    print(f"\nprompt log-probabilities of {len(ids) - 1} tokens: largest difference {difference.max():.1e} nats, mean {difference.mean():.1e}")
    assert difference.max() <= TOLERANCE_NATS
    other = family_of(read_config(folder)).load(folder)
    other.model.layers[0].mixer.D.data += 0.01
    assert prompt_differences(served, other, ids).max() > TOLERANCE_NATS  # the control: one vector of one layer a hundredth off


@pytest.mark.parametrize("budget", [0, 1, 32])
def test_the_client_holds_its_budget(budget, client, model, tokenizer):
    arguments = {"thinking_budget": budget, "thinking": True, "max_tokens": 80}
    reply = client.ask(PROMPT, **arguments)
    pieces = list(client.stream(PROMPT, **arguments))
    (ids,) = generate(model, tokenizer, [write_prompt(tokenizer, PROMPT, thinking=True)], new_tokens=80, thinking_budget=budget, tags=Tags())
    same = tokenizer.decode(ids, skip_special_tokens=True) == reply.text
    print(f"\nbudget {budget}: {reply.reasoning_tokens} tokens of reasoning, {'the' if same else 'not the'} text of the logits processor")
    assert reply.reasoning_tokens == budget and reply.closed_here and reply.text == f"{reply.reasoning}</think>{reply.answer}"
    assert "".join(pieces) == reply.text and len(pieces) > 20


def test_without_a_budget_it_reasons_longer(client):
    assert client.ask(PROMPT, thinking=True, max_tokens=80).reasoning_tokens > 32


def test_what_vllm_refuses_is_one_line(served, folder):
    with pytest.raises(ValueError, match=r"^the server at .* refuses the request \(404\): The model `other` does not exist[^\n]*$"):
        ThinkingBudgetClient(served.url, "other", tokenizer=folder).ask(PROMPT)
    with pytest.raises(ValueError, match=r"^the server at .* refuses the request \(400\): [^\n]*maximum context length is 2048 tokens[^\n]*$"):
        ThinkingBudgetClient(served.url, "student", tokenizer=folder).ask("a b " * 2000)


def printed_sizes(served: Served) -> tuple[int, float]:
    """KV cache tokens and maximum concurrency in vLLM's log."""
    found = re.search(r"KV cache size: ([\d,]+) tokens, Maximum concurrency for [\d,]+ tokens per request: ([\d.]+)x", served.log)
    return int(found[1].replace(",", "")), float(found[2])


def predicted_sizes(folder: Path, environment: dict, *options: str) -> tuple[int, float]:
    command = [sys.executable, "-m", "memory_budget", str(folder), "--context", str(CONTEXT), "--engine", "vllm", "--pool-gib", str(POOL_GIB),
               "--block-size", str(BLOCK_SIZE), "--json", *options]  # fmt: skip
    allotment = json.loads(subprocess.run(command, env=environment, text=True, capture_output=True, check=True).stdout)["vllm"]
    return allotment["kv_cache_tokens"], round(allotment["max_concurrency"], 2)


def test_cache_size_and_concurrency_are_the_calculators(served, folder, environment):
    options = ("--weights", "float32", "--kv", "float32")
    printed, predicted = printed_sizes(served), predicted_sizes(folder, environment, *options)
    print(f"\nfloat32: vLLM {printed[0]:,} tokens, {printed[1]}x; calculator {predicted[0]:,} tokens, {predicted[1]}x")
    assert predicted == printed != predicted_sizes(folder, environment, *options, "--prefix-caching")


def test_cache_size_in_bf16_with_prefix_caching_is_the_calculators(serve, folder, environment):
    """The last of this student's: it takes the place of the other server."""
    server = serve(folder, 8643, "--mamba_ssm_cache_dtype", "float32", "--dtype", "bfloat16")
    printed, predicted = printed_sizes(server), predicted_sizes(folder, environment, "--prefix-caching")
    print(f"\nbf16, prefix caching: vLLM {printed[0]:,} tokens, {printed[1]}x; calculator {predicted[0]:,} tokens, {predicted[1]}x")
    assert predicted == printed != predicted_sizes(folder, environment)


@pytest.fixture(scope="module")
def block_served(serve, block_folder) -> Served:
    return serve(block_folder, 8644, "--dtype", "float32")


def test_prompt_log_probabilities_of_a_student_of_blocks_are_transformers(block_served, block_folder):
    """Over a prompt longer than the 256 positions that Llama's are scaled from. The controls: one
    matrix of one block a hundredth off, then the frequencies that positions turn by."""
    ids = AutoTokenizer.from_pretrained(block_folder)((Path(json.__file__).read_text())[:3000])["input_ids"][:700]
    model = family_of(read_config(block_folder)).load(block_folder)
    difference = prompt_differences(block_served, model, ids)
    name = model.config.model_type
    print(f"\n{name}: prompt log-probabilities of {len(ids) - 1} tokens: largest difference {difference.max():.1e} nats, mean {difference.mean():.1e}")
    assert difference.max() <= TOLERANCE_NATS
    for parameter in (model.model.layers[1].self_attn.v_proj.weight.data, model.model.rotary_emb.inv_freq):
        kept = parameter.clone()
        parameter.mul_(1.01)
        assert prompt_differences(block_served, model, ids).max() > TOLERANCE_NATS
        parameter.copy_(kept)


def test_cache_size_and_concurrency_of_a_student_of_blocks_are_the_calculators(block_served, block_folder, environment):
    """The control: with another KV head a token takes twice the bytes, so half the tokens fit."""
    options = ("--weights", "float32", "--kv", "float32")
    printed, predicted = printed_sizes(block_served), predicted_sizes(block_folder, environment, *options)
    print(f"\nfloat32: vLLM {printed[0]:,} tokens, {printed[1]}x; calculator {predicted[0]:,} tokens, {predicted[1]}x")
    assert predicted == printed
    teacher = predicted_sizes(block_folder.parents[2] / "teacher", environment, *options)
    assert teacher[0] < 0.5 * printed[0]
