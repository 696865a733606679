"""make vllm-check: real vLLM reads exported students of every family unchanged; VLLM_PYTHON names the interpreter that has it. Prints what it measures.

Its server answers for a NemotronH; starting one takes 40 s, so the other families' students are read one after another by a single process of vLLM
(vllm_engine.py), seconds each; and after them tiny models of kinds that memory_budget counts and nothing here cuts.
"""

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
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from memory_budget.configs.registry import READERS, model_from_config
from memory_budget.hf_config import FAMILIES, read_config
from memory_budget.units import GIB
from memory_budget.vllm.allotment import vllm_allotment, vllm_longest_context
from memory_budget.vllm.settings import batch_limits
from memory_budget.workload import Workload
from minitron.families.known import family_of
from minitron.generation.generate import generate
from minitron.generation.prompts import Tags, write_prompt
from minitron.serving.client import ThinkingBudgetClient

VLLM_PYTHON = os.environ.get("VLLM_PYTHON")
pytestmark = [pytest.mark.vllm, pytest.mark.skipif(VLLM_PYTHON is None, reason="no vLLM: make vllm-check")]

CONTEXT, POOL_GIB, BLOCK_SIZE = 2048, 1, 128  # of vLLM: --max-model-len, VLLM_CPU_KVCACHE_SPACE, its own block size on a CPU
PORT = 8642
TOLERANCE_NATS = 1e-5  # float32 on both sides; measured: 1.2e-6
PROMPT = "def read(self, size=-1):"
# vLLM's attention on a CPU takes heads of 32, 64, 80, … channels only.
STUDENT = ("teacher.tiny.attention_head_dim=32", "teacher.tiny.num_attention_heads=2", "teacher.tiny.num_key_value_heads=1",
           "budget.device_gib=0.0004", "search.finalists=0", "search.shortlist_size=1")  # fmt: skip

CUT_BLOCKS = "layers: 3, hidden: 96, ffn: 128, key_value_heads: 1"
VALUES, TURNS = "model.layers.1.self_attn.v_proj.weight", "model.rotary_emb.inv_freq"
# Whether embeddings and head are one matrix, what is cut, and which tensors the control changes by a hundredth, by how their names end: of one layer, and what
# turns positions or makes a state fade. vLLM knows no Qwen2 but with hidden size = heads × head_dim.
STUDENTS = {
    "llama": (True, CUT_BLOCKS, (VALUES, TURNS)),
    "qwen3": (False, CUT_BLOCKS, (VALUES, TURNS)),
    "mistral": (False, CUT_BLOCKS, (VALUES, TURNS)),
    "qwen2": (True, "layers: 3, hidden: 64, ffn: 128, key_value_heads: 1", ("model.layers.1.self_attn.v_proj.bias", TURNS)),
    "gemma3_text": (True, CUT_BLOCKS, ("model.layers.1.post_feedforward_layernorm.weight", "model.rotary_emb.full_attention_inv_freq",
                                       "model.rotary_emb.sliding_attention_inv_freq")),
    "qwen3_moe": (False, f"{CUT_BLOCKS}, experts: 6, expert_ffn: 48", ("mlp.gate.weight", "mlp.experts.3.down_proj.weight", TURNS)),
    "nemotron_h": (False, "hidden: 96, key_value_heads: 1, mamba_heads: 8, experts: 6, expert_ffn: 48, shared_ffn: 64",
                   ("mixer.gate.weight", "mixer.gate.e_score_correction_bias", "mixer.experts.3.up_proj.weight", "mixer.shared_experts.down_proj.weight")),
    "mamba2": (True, "layers: 3, hidden: 96", ("backbone.layers.1.mixer.out_proj.weight", "backbone.layers.1.mixer.A_log")),
    "granitemoehybrid": (True, "layers: 3, key_value_heads: 1, experts: 6, expert_ffn: 48, shared_ffn: 64",
                         ("layers.0.mamba.A_log", "layers.1.self_attn.v_proj.weight", "block_sparse_moe.gate.weight", "experts.3.down_proj.weight",
                          "layers.1.shared_mlp.output_linear.weight")),
}  # fmt: skip

UNGATED = {"nemotron_h": {"plain_experts": True, "mamba_ssm_cache_dtype": "float32"}}  # what vLLM lacks on a CPU, and vllm_engine.py stands in for

# Of random weights: sizes that differ from the common ones, what vLLM is asked for, and keys that it reads and transformers does not write.
COMMON = {"vocab_size": 512, "hidden_size": 128, "num_hidden_layers": 4, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2,
          "head_dim": 32, "max_position_embeddings": 4096, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}  # fmt: skip
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 64}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 32, "mamba_d_state": 16, "mamba_n_groups": 2, "mamba_expand": 2}
LATENT = {"kv_lora_rank": 64, "qk_rope_head_dim": 32, "qk_nope_head_dim": 32, "v_head_dim": 32, "num_key_value_heads": 4, "n_routed_experts": 4}
CACHED, BLOCKS_OF_16 = {"enable_prefix_caching": True}, {"block_size": 16}
GRANITE = {"layer_types": ["mamba", "mamba", "attention", "mamba", "mamba", "mamba"]}  # transformers 5.23 writes other words, which vLLM does not know
GRANITE_SIZES = {**MAMBA, **GRANITE, "num_hidden_layers": 6, "shared_intermediate_size": 256, "num_local_experts": 0}
KINDS = {
    "qwen3_moe": ({**EXPERTS, "num_experts": 4}, {}, {}),
    "mixtral": ({"num_local_experts": 4}, {}, {}),
    "mistral": ({"sliding_window": 64}, {"max_num_batched_tokens": 512, "max_model_len": 4096}, {}),
    "gemma2": ({"sliding_window": 64, "num_hidden_layers": 5}, {}, {}),
    "gpt_oss": ({"sliding_window": 64, "num_local_experts": 4}, {}, {}),
    "granitemoehybrid": (GRANITE_SIZES, {}, GRANITE),
    "granitemoehybrid, prefix caching": (GRANITE_SIZES, CACHED, GRANITE),
    "falcon_h1": ({**MAMBA, "mamba_d_ssm": 256}, {}, {}),
    "jamba, prefix caching": ({"attn_layer_offset": 2, "attn_layer_period": 4, "num_experts": 2, "mamba_d_state": 16}, CACHED, {}),
    "qwen3_next": ({**EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 64, "linear_num_value_heads": 4, "linear_num_key_heads": 2,
                    "linear_key_head_dim": 32, "linear_value_head_dim": 32}, {"dtype": "bfloat16"}, {}),
    "lfm2": ({"layer_types": ["conv", "conv", "full_attention", "conv"], "block_ff_dim": 256}, {}, {"conv_dim": 128, "block_dim": 128}),
    "zamba2": ({"num_hidden_layers": 6, "n_mamba_heads": 8, "mamba_d_state": 16, "mamba_ngroups": 2, "num_mem_blocks": 1, "adapter_rank": 8,
                "num_key_value_heads": 4, "head_dim": 64, "layers_block_type": ["mamba", "mamba", "hybrid"] * 2}, {}, {}),
    "deepseek_v2": ({**LATENT, **EXPERTS, "q_lora_rank": None, "n_shared_experts": 1, "first_k_dense_replace": 1, "topk_method": "greedy"}, BLOCKS_OF_16, {}),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Served:
    url: str
    log: str


@dataclass(frozen=True, slots=True)
class Read:
    """A student, a prompt, and what vLLM said of them."""

    family: str
    folder: Path
    ids: list[int]
    log_probabilities: torch.Tensor
    sizes: tuple[int, float]


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


@dataclass(frozen=True, slots=True)
class Engine:
    """A process of vLLM that reads a folder when it is asked."""

    process: subprocess.Popen
    log: Path

    def read(self, folder: Path, ids: list[int], **options) -> tuple[torch.Tensor, tuple[int, float]]:
        """log p of every id but the first, nats; and cache tokens with the maximum concurrency."""
        answer = self.ask(folder, ids, **options)
        assert "error" not in answer, answer["error"]
        return torch.tensor(answer["log_probabilities"]), (answer["cache_tokens"], round(answer["concurrency"], 2))

    def ask(self, folder: Path, ids: list[int], **options) -> dict:
        """What the process says of a new engine, or of why there is none."""
        asked = {"folder": str(folder), "ids": ids, "options": {"max_model_len": CONTEXT, **options}}
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        return json.loads(line) if line else {"error": self.log.read_text()[-4000:]}


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    log = tmp_path_factory.mktemp("engine") / "engine.log"
    command = [VLLM_PYTHON, str(Path(__file__).with_name("vllm_engine.py"))]
    with log.open("w") as output:
        environment = vllm_environment() | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
        process = subprocess.Popen(command, cwd=log.parent, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=output, text=True)
    yield Engine(process, log)
    process.kill()
    process.wait()


def vllm_environment() -> dict[str, str]:
    own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return own | {"VLLM_CPU_KVCACHE_SPACE": str(POOL_GIB), "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def served(folder, tmp_path_factory):
    """vLLM's server of the NemotronH, once it answers. Without prefix caching: with it vLLM 0.32.0 fails on a CPU at a prompt longer than a block, as its scan
    there keeps no states on the way."""
    log = tmp_path_factory.mktemp("vllm") / "server.log"
    # The `vllm` command itself ends at once in vllm-cpu: it asks for the version of a package named vllm.
    command = [VLLM_PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--served-model-name", "student", "--host", "127.0.0.1",
               "--port", str(PORT), "--max-model-len", str(CONTEXT), "--enforce-eager", "--mamba_ssm_cache_dtype", "float32", "--dtype", "float32",
               "--no-enable-prefix-caching"]  # fmt: skip
    with log.open("w") as output:
        process = subprocess.Popen(command, cwd=log.parent, env=vllm_environment(), stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
    began = time.monotonic()
    try:
        while not is_ready(PORT):
            assert process.poll() is None and time.monotonic() < began + 400, log.read_text()[-4000:]
            time.sleep(0.5)
        print(f"\nvLLM answers after {time.monotonic() - began:.0f} s")
        yield Served(f"http://127.0.0.1:{PORT}/v1", log.read_text())
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # with its engine and worker, which are processes of their own
        process.wait()


@pytest.fixture(scope="module")
def model(folder):
    return family_of(read_config(folder)).load(folder)


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def client(served, folder) -> ThinkingBudgetClient:
    return ThinkingBudgetClient(served.url, "student", tokenizer=folder, context_tokens=CONTEXT)


def asked_log_probabilities(served: Served, ids: list[int]) -> torch.Tensor:
    """log p of every prompt token but the first by the server, nats."""
    server = openai.OpenAI(base_url=served.url, api_key="none")
    got = server.completions.create(model="student", prompt=ids, max_tokens=1, temperature=0, extra_body={"prompt_logprobs": 0})
    return torch.tensor([row[str(token)]["logprob"] for row, token in zip(got.choices[0].model_extra["prompt_logprobs"][1:], ids[1:], strict=True)])


@torch.no_grad()
def differences(theirs: torch.Tensor, model, ids: list[int]) -> torch.Tensor:
    """|log p of every prompt token but the first by vLLM − by transformers|, nats."""
    ours = model(torch.tensor([ids]), use_cache=False).logits[0, :-1].log_softmax(-1)
    return (theirs - ours[torch.arange(len(ids) - 1), ids[1:]]).abs()


def prompt(tokenizer) -> list[int]:
    return tokenizer((Path(json.__file__).read_text())[:3000])["input_ids"][:700]


def test_prompt_log_probabilities_are_transformers(served, model, tokenizer, folder):
    ids = prompt(tokenizer)
    theirs = asked_log_probabilities(served, ids)
    difference = differences(theirs, model, ids)
    print(f"\nprompt log-probabilities of {len(ids) - 1} tokens: largest difference {difference.max():.1e} nats, mean {difference.mean():.1e}")
    assert difference.max() <= TOLERANCE_NATS
    other = family_of(read_config(folder)).load(folder)
    other.model.layers[0].mixer.D.data += 0.01
    assert differences(theirs, other, ids).max() > TOLERANCE_NATS  # the control: one vector of one layer a hundredth off


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


def predicted_sizes(folder: Path, environment: dict, *options: str) -> tuple[int, float]:
    command = [sys.executable, "-m", "memory_budget", str(folder), "--context", str(CONTEXT), "--engine", "vllm", "--pool-gib", str(POOL_GIB),
               "--block-size", str(BLOCK_SIZE), "--json", *options]  # fmt: skip
    allotment = json.loads(subprocess.run(command, env=environment, text=True, capture_output=True, check=True).stdout)["vllm"]
    return allotment["kv_cache_tokens"], round(allotment["max_concurrency"], 2)


def test_cache_size_and_concurrency_are_the_calculators(served, folder, environment):
    options = ("--weights", "float32", "--kv", "float32")
    found = re.search(r"KV cache size: ([\d,]+) tokens, Maximum concurrency for [\d,]+ tokens per request: ([\d.]+)x", served.log)
    printed, predicted = (int(found[1].replace(",", "")), float(found[2])), predicted_sizes(folder, environment, *options)
    print(f"\nfloat32: vLLM {printed[0]:,} tokens, {printed[1]}x; calculator {predicted[0]:,} tokens, {predicted[1]}x")
    assert predicted == printed != predicted_sizes(folder, environment, *options, "--prefix-caching")


def test_cache_size_in_bf16_with_prefix_caching_is_the_calculators(engine, folder, environment):
    _, sizes = engine.read(folder, [1, 2, 3], dtype="bfloat16", mamba_ssm_cache_dtype="float32", enable_prefix_caching=True)
    predicted = predicted_sizes(folder, environment, "--prefix-caching")
    print(f"\nbf16, prefix caching: vLLM {sizes[0]:,} tokens, {sizes[1]}x; calculator {predicted[0]:,} tokens, {predicted[1]}x")
    assert predicted == sizes != predicted_sizes(folder, environment)


@pytest.fixture(scope="module", params=STUDENTS)
def read(request, engine, write_teacher, small_block_settings, door, tmp_path_factory) -> Read:
    """What stage=export left of a tiny model's student, with fewer layers and units of every kind, as vLLM reads it."""
    family, place = request.param, tmp_path_factory.mktemp(request.param)
    tied, cut, _ = STUDENTS[family]
    teacher, folder = write_teacher(place / "teacher", family, tied=tied), place / "runs" / "blocks" / "export"
    settings = [one for one in small_block_settings if not one.startswith("search.fixed=")] + [f"search.fixed={{{cut}}}"]
    for stage in ("distill", "export"):
        finished = door(place, f"teacher.path={teacher}", "run_name=blocks", *settings, f"stage={stage}")
        assert finished.returncode == 0, finished.stderr
    assert "vLLM takes all" in finished.stdout
    ids = prompt(AutoTokenizer.from_pretrained(folder))
    return Read(family, folder, ids, *engine.read(folder, ids, dtype="float32", enable_prefix_caching=False, **UNGATED.get(family, {})))


def test_prompt_log_probabilities_of_every_other_family_are_transformers(read):
    """Over a prompt longer than the 256 positions that Llama's are scaled from, and than ten windows. The controls: each of the parameters of STUDENTS a
    hundredth off, then a window of one token more."""
    model = family_of(read_config(read.folder)).load(read.folder)
    difference = differences(read.log_probabilities, model, read.ids)
    print(f"\n{read.family}: {len(read.ids) - 1} tokens, largest difference {difference.max():.1e} nats, mean {difference.mean():.1e}")
    assert difference.max() <= TOLERANCE_NATS
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    for ending in STUDENTS[read.family][2]:
        name = next(name for name in tensors if name.endswith(ending))
        kept = tensors[name].data.clone()
        tensors[name].data.mul_(1.01)
        assert differences(read.log_probabilities, model, read.ids).max() > TOLERANCE_NATS, name
        tensors[name].data.copy_(kept)
    if getattr(model.config, "sliding_window", None):
        model.config.sliding_window += 1
        assert differences(read.log_probabilities, model, read.ids).max() > TOLERANCE_NATS


def allotted(folder: Path, **options) -> tuple[int, float]:
    """The calculator's two numbers for vLLM's class on a CPU, of the options that vLLM is given."""
    workload, rest = asked_of_the_calculator(options)
    allotment = vllm_allotment(model_from_config(read_config(folder)), workload, pool_bytes=POOL_GIB * GIB, **rest)
    return allotment.kv_cache_tokens, round(allotment.max_concurrency, 2)


def asked_of_the_calculator(options: dict) -> tuple[Workload, dict]:
    context = options.get("max_model_len", CONTEXT)
    dtype = {"float32": "float32", "bfloat16": "bf16"}[options.get("dtype", "float32")]
    tokens = options.get("max_num_batched_tokens", batch_limits(cpu_devices=1, server=False, context_tokens=context).tokens)
    return Workload(context, weights_dtype=dtype, kv_dtype=dtype), {
        "block_size": options.get("block_size", BLOCK_SIZE), "max_num_batched_tokens": tokens, "async_scheduling": False,
        "prefix_caching": options.get("enable_prefix_caching", False)}  # fmt: skip


def test_cache_size_and_concurrency_of_every_other_family_are_the_calculators(read):
    """The controls: the teacher's caches take more, so fewer tokens fit; and within a window it matters what is in flight."""
    predicted = allotted(read.folder)
    print(f"\n{read.family}: vLLM {read.sizes[0]:,} tokens, {read.sizes[1]}x; calculator {predicted[0]:,} tokens, {predicted[1]}x")
    assert predicted == read.sizes
    assert allotted(read.folder.parents[2] / "teacher")[0] < 0.8 * predicted[0]
    is_within_a_window = bool(getattr(AutoConfig.from_pretrained(read.folder), "sliding_window", None))
    assert (allotted(read.folder, max_num_batched_tokens=128) != predicted) == is_within_a_window


def test_vllm_has_no_kernel_on_a_cpu_for_experts_that_are_not_gated(read, engine):
    """What the rules say of it (rules_experts.py). The other families' students, gated experts among them, it reads as it comes."""
    if read.family in UNGATED:
        answer = engine.ask(read.folder, read.ids, dtype="float32", enable_prefix_caching=False)
        assert "is_act_and_mul=False is supported only for CUDA, XPU and ROCm" in answer["error"]


@pytest.mark.parametrize("kind", KINDS)
def test_cache_size_and_concurrency_of_other_kinds_are_the_calculators(kind, engine, tmp_path):
    """The control: a context of 1,000 tokens more gives other numbers."""
    sizes, options, keys = KINDS[kind]
    model_type = kind.partition(",")[0]
    if model_type not in (*FAMILIES, *READERS):
        pytest.skip(f"memory_budget does not read {model_type}")
    write_random(model_type, sizes, keys, tmp_path)
    _, printed = engine.read(tmp_path, [], **{"dtype": "float32", "enable_prefix_caching": False, **options}, skip_tokenizer_init=True)
    predicted = allotted(tmp_path, **options)
    print(f"\n{kind}: vLLM {printed[0]:,} tokens, {printed[1]}x; calculator {predicted[0]:,} tokens, {predicted[1]}x")
    assert predicted == printed != allotted(tmp_path, **{**options, "max_model_len": options.get("max_model_len", CONTEXT) + 1000})


def write_random(model_type: str, sizes: dict, keys: dict, folder: Path) -> None:
    """A model of random weights as transformers writes it, and keys beside it."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**COMMON, **sizes}), dtype=torch.float32)
    model.save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))


@pytest.mark.parametrize("model_type", ["llama", "mistral"])
def test_where_vllm_stops_is_where_the_calculator_says(model_type, engine, tmp_path):
    """A pool of 16 blocks of 4 layers: vLLM's own longest context is the calculator's, and it refuses one token more."""
    write_random(model_type, KINDS["mistral"][0] if model_type == "mistral" else {}, {}, tmp_path)
    pool = {"kv_cache_memory_bytes": 16 * 262_144}
    options = {"max_num_batched_tokens": 4096, "dtype": "float32", "skip_tokenizer_init": True, "enable_prefix_caching": False}
    workload, rest = asked_of_the_calculator(options)
    longest = vllm_longest_context(model_from_config(read_config(tmp_path)), workload, pool_bytes=pool["kv_cache_memory_bytes"], **rest)
    answer = engine.ask(tmp_path, [], **options, **pool, max_model_len=-1)
    print(f"\n{model_type}: vLLM {answer.get('context')} tokens; calculator {longest} tokens")
    assert answer.get("context") == longest, answer
    assert "is larger than the available KV cache memory" in engine.ask(tmp_path, [], **options, **pool, max_model_len=longest + 1)["error"]


def test_the_limits_are_vllms_own(engine, folder):
    limits = batch_limits(cpu_devices=1, server=False, context_tokens=CONTEXT)
    assert engine.ask(folder, [], dtype="float32", mamba_ssm_cache_dtype="float32")["limits"] == [limits.tokens, limits.sequences]
