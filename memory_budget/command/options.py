"""The command's options, and which go together."""

import argparse
import sys
from typing import NoReturn

from memory_budget.budget import MOST_GIB, PRESETS
from memory_budget.configs.registry import model_types
from memory_budget.vllm.allotment import BLOCK_SIZE_TOKENS
from memory_budget.vllm.lora import DEFAULT_RANK
from memory_budget.workload import KV_DTYPES, SSM_DTYPES, WEIGHTS_DTYPES

VLLM_OPTIONS = ("pool_gib", "device_gib", "utilization", "overhead_gib", "prefix_caching", "block_size", "max_num_seqs")
DEFAULT_UTILIZATION = 0.92


class OneLineParser(argparse.ArgumentParser):
    """A parser whose errors are one line without the usage."""

    def error(self, message: str) -> NoReturn:
        fail(message)


def fail(message: str) -> NoReturn:
    """Print one line beginning `error: ` on stderr and exit with 2."""
    line = " ".join(message.split())
    print("error: " + (line if len(line) <= 2000 else line[:1997] + "..."), file=sys.stderr)
    raise SystemExit(2)


def build_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="python -m memory_budget",
        description="What a model takes in memory to serve a workload, and what still fits a budget. No weights are read, only config.json; of a model whose "
        "type is not known also the headers of its safetensors files.",
        epilog=f"GiB is 2**30 bytes. Model types: {', '.join(model_types())}. Of others the parameters are counted from the headers of safetensors files.",
        allow_abbrev=False,
    )
    parser.add_argument("config", metavar="DIR_OR_CONFIG_JSON", help=(
        "a model's directory, a config.json, or a model on the Hub: OWNER/NAME or OWNER/NAME@REVISION (HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE are heeded)"))
    parser.add_argument("--json", action="store_true", help="print one JSON object (sizes in bytes; null: no limit, or not known)")
    parser.add_argument("--budget", default="a10g", metavar="NAME|GIB", help=(
        f"what there is: a card ({', '.join(PRESETS)}) less a cushion of 5 %% and, for a10g, 1.3 GiB of other models; "
        "or a number of GiB as it is (default a10g)"))
    add_workload_options(parser)
    add_beside_options(parser)
    add_question_options(parser)
    add_vllm_options(parser)
    return parser


def add_workload_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("workload")
    group.add_argument("--context", type=int, default=131072, metavar="N", help="tokens per sequence, prompt and answer (default 131072)")
    group.add_argument("--batch", type=int, default=1, metavar="N", help="sequences at once (default 1)")
    group.add_argument("--weights", metavar="D", help=(
        f"number format of the weights: {', '.join(WEIGHTS_DTYPES)} (default: what the config's quantization_config says, else bf16). The packed ones hold "
        "for the matrices of the layers, the rest stays bf16; int4-g64 packs in groups of 64, mxfp4-moe the experts alone"))
    group.add_argument("--group", type=int, metavar="N", help="numbers that share a scale in int4 (default 128)")
    group.add_argument("--kv", metavar="D", help=(
        f"number format of the attention cache: {', '.join(KV_DTYPES)} (default bf16)"))
    group.add_argument("--ssm", metavar="D", help=(
        f"number format of recurrent states: {', '.join(SSM_DTYPES)} (default float32; with --engine vllm what vLLM takes for the model)"))
    group.add_argument("--tp", type=int, default=1, metavar="N", help=(
        "tensor parallel over N GPUs, split as vLLM does: bytes and budget are those of one of them (default 1)"))
    group.add_argument("--activations", type=int, default=0, metavar="N", help=(
        "also count the activations of a prefill chunk of N tokens, an estimate (default 0: left out)"))


def add_beside_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("served beside the model")
    group.add_argument("--lora", type=int, metavar="N", help="slots for N LoRA adapters, as vLLM allots them (its --max-loras)")
    group.add_argument("--lora-rank", type=int, metavar="R", help=f"the largest rank of an adapter, vLLM's --max-lora-rank (default {DEFAULT_RANK})")
    group.add_argument("--draft", metavar="OTHER", help="a draft model, named as the first is: its weights and, for the same contexts and batch, its caches")
    group.add_argument("--mtp", action="store_true", help="also the multi-token prediction layers that the config names, weights and caches")


def add_question_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("questions")
    group.add_argument("--cards", action="store_true", help="every preset card, and whether the workload fits it")
    group.add_argument("--formats", action="store_true", help="one table of what the model takes at every number format of the weights")
    group.add_argument("--plot", metavar="FILE.png", help="draw memory against context into a PNG (needs matplotlib; with FILE.txt, or without it, as text)")
    group.add_argument("--compare", metavar="OTHER", help="another model, named as the first is, side by side with it")


def add_vllm_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("engine")
    group.add_argument("--engine", choices=("plain", "vllm", "llamacpp"), default="plain", help=(
        "llamacpp: llama.cpp's buffers, --weights being a GGUF's type (Q4_K_M, Q8_0, ...; default F16) and --kv its caches' (f16, q8_0, ...); "
        "vllm: also how vLLM cuts its cache pool into blocks, and what it refuses; all options below are for it (default plain)"))
    group.add_argument("--pool-gib", type=float, metavar="X", help="size of the cache pool in GiB (vLLM's log: Available KV cache memory)")
    group.add_argument("--device-gib", type=float, metavar="X", help=(
        "instead of --pool-gib: the device's memory in GiB; the pool is X * utilization - overhead - weights (default: the budget's device)"))
    group.add_argument("--utilization", type=float, metavar="U", help=(
        f"vLLM's --gpu-memory-utilization, with --device-gib (default {DEFAULT_UTILIZATION})"))
    group.add_argument("--overhead-gib", type=float, metavar="O", help=(
        "peak activations, CUDA graphs and the like in GiB, with --device-gib (default 0)"))
    group.add_argument("--prefix-caching", action="store_true", help="prefix caching, which keeps 3 Mamba states per sequence instead of 1")
    group.add_argument("--block-size", type=int, metavar="N", help=(
        f"vLLM's --block-size, of which its blocks are multiples (default {BLOCK_SIZE_TOKENS}; vLLM on a CPU takes 128)"))
    group.add_argument("--max-num-seqs", type=int, metavar="N", help=(
        "vLLM's --max-num-seqs, each of which needs a block for its Mamba state (default: vLLM's own for the device, 256 or 1024)"))


def check_options(options: argparse.Namespace) -> None:
    """Refuse options that would be ignored, and two sizes of one pool. Raises ValueError naming the option."""
    if options.group is not None and (options.weights or "").partition("-")[0] != "int4":
        raise ValueError(f"--group ({options.group}) must come with --weights int4")
    if options.group is not None and not 1 <= options.group <= 2**16:
        raise ValueError(f"--group ({options.group}) must be at least 1, and at most 65,536")
    if options.engine == "llamacpp":
        if options.tp != 1 or options.ssm is not None:
            raise ValueError(f"--{'ssm' if options.ssm is not None else 'tp'} must not come with --engine llamacpp, which has one place and float32 states")
        if not isinstance(options.activations, int) or options.activations > 2**20:
            raise ValueError(f"--activations ({options.activations}) must be at most 2**20 tokens with --engine llamacpp, whose -ub it is")
    if not 1 <= options.tp <= 1024:
        raise ValueError(f"--tp ({options.tp}) must be at least 1 GPU, and at most 1,024")
    given = {name for name in VLLM_OPTIONS if getattr(options, name) is not None and getattr(options, name) is not False}
    if options.engine != "vllm":
        if given:
            raise ValueError(f"--{min(given).replace('_', '-')} must come with --engine vllm; the engine is {options.engine}")
        return
    if {"pool_gib", "device_gib"} <= given:
        raise ValueError("--engine vllm takes one of --pool-gib X and --device-gib X; both are given")
    for name in ("utilization", "overhead_gib"):
        if name in given and "pool_gib" in given:
            raise ValueError(f"--{name.replace('_', '-')} ({getattr(options, name)}) must come with --device-gib, not with --pool-gib")
    for name in ("pool_gib", "device_gib", "overhead_gib"):
        value = getattr(options, name)
        if value is not None and not 0 <= value <= MOST_GIB:
            raise ValueError(f"--{name.replace('_', '-')} ({value}) must be at least 0 GiB, and at most 2**33")
    if options.max_num_seqs is not None and not 1 <= options.max_num_seqs <= 2**31:
        raise ValueError(f"--max-num-seqs ({options.max_num_seqs}) must be at least 1 sequence, and at most 2**31")
    if options.block_size is not None and not 1 <= options.block_size <= 2**20:
        raise ValueError(f"--block-size ({options.block_size}) must be at least 1 token, and at most 2**20")
