"""Mutated configs, tensors and options through the whole command, in one process: `python tests/memory_budget/fuzz.py [COUNT] [SEED]`; behind make fuzz-memory.

Each must end in an answer, or in one line and exit code 2, within SECONDS and a GiB. The last line is a JSON object; the first failure of each
kind is shown with the config and the options that it takes to see it again. Exit code 1 if there was one.
"""

import contextlib
import copy
import io
import json
import random
import resource
import signal
import sys
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

from memory_budget.__main__ import text_of
from memory_budget.command.answer import answer_of
from memory_budget.command.options import build_parser, check_options
from memory_budget.configs.registry import model_types
from memory_budget.sources.safetensors import tensors_of
from memory_budget.sources.source import Source, _object

CONFIGS = Path(__file__).parent / "configs"
SECONDS, ROOM_BYTES = 5, 2**30
VALUES = [None, True, False, -1, 0, 1, 2, 3, 7, 8, 64, 127, 128, 1000, 4096, 2**31, 2**53 - 1, 2**53, 2**63, 2**64, -(2**63), 10**40, 10**400, 1e300, -1e300,
          0.5, float("nan"), float("inf"), "", "x", "full_attention", "sliding_attention", "mamba", "bfloat16", "\ud800", "\x1b[31m", "a" * 5000, [],
          {}, [None], [[]], [1] * 3, ["mamba", "attention"], ["full_attention"] * 40, {"model_type": "llama"},
          {"a": {"b": []}}, [2**63] * 5, "M" * 200, "M*-E" * 10]  # fmt: skip
QUANTISATIONS = [{"quant_method": "fp8", "weight_block_size": [128, 128]}, {"quant_method": "gptq", "bits": 4, "group_size": 128}, {"quant_method": "mxfp4"},
                 {"quant_method": "awq", "bits": 4, "group_size": -1}, {"quant_method": "bitsandbytes", "load_in_4bit": True}, {"quant_algo": "NVFP4"},
                 {"quant_method": "compressed-tensors", "config_groups": {"0": {"weights": {"num_bits": 4, "type": "int", "group_size": 64}}},
                  "ignore": ["lm_head"]}, {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}]  # fmt: skip
KEYS = ["model_type", "num_hidden_layers", "hidden_size", "head_dim", "num_attention_heads", "num_key_value_heads", "intermediate_size", "vocab_size",
        "layer_types", "sliding_window", "quantization_config", "text_config", "llm_config", "rope_scaling", "max_position_embeddings", "tie_word_embeddings",
        "num_experts", "num_local_experts", "num_experts_per_tok", "kv_lora_rank", "hybrid_override_pattern", "mlp_only_layers",
        "num_nextn_predict_layers", "mtp_num_hidden_layers", "mtp_hybrid_override_pattern"]  # fmt: skip
VLLM_OPTIONS = ("--pool-gib", "--device-gib", "--utilization", "--overhead-gib", "--block-size", "--max-num-seqs")
NUMBERS = ["1", "2", "64", "1000", "-1", "0", "1", "7", "131072", str(2**53), str(2**63), str(10**40), "1e300", "nan", "inf", "x", ""]


def mutated(value: Any, chance: random.Random) -> Any:
    """A value that is nearly the one given, or not at all."""
    if chance.random() < 0.4:
        return copy.deepcopy(chance.choice(VALUES))
    if isinstance(value, bool) or value is None:
        return not value
    if isinstance(value, int):
        return chance.choice([value + 1, value - 1, value * 2, value // 2, -value, value * 10**12, float(min(value, 10**300)), str(value)[:4000], [value]])
    if isinstance(value, float):
        return chance.choice([int(min(max(value, -1e18), 1e18)) if value == value else 0, -value, value * 1e300, str(value)])
    if isinstance(value, str):
        return chance.choice([value[1:], value * 2, value + "x", [value], value.upper(), list(value)])
    if isinstance(value, list) and value:
        changed = copy.deepcopy(value)
        changed[chance.randrange(len(changed))] = mutated(chance.choice(changed), chance)
        return chance.choice([changed, changed[:-1], changed * 2, dict.fromkeys(map(str, changed), 1)])
    if isinstance(value, dict) and value:
        return mutated_config(value, chance)
    return chance.choice(VALUES)


def mutated_config(config: dict[str, Any], chance: random.Random) -> dict[str, Any]:
    config = copy.deepcopy(config)
    for _ in range(chance.choice([1, 1, 1, 1, 1, 2, 4])):
        key = chance.choice([*config, *KEYS]) if chance.random() < 0.3 else chance.choice(list(config) or KEYS)
        match chance.randrange(12):
            case 0:
                config.pop(key, None)
            case 1:
                config["quantization_config"] = mutated(chance.choice(QUANTISATIONS), chance)
            case 2:
                config = {"model_type": chance.choice(["llava"] * 8 + ["x", 3, None]), chance.choice(["text_config", "llm_config", "language_config"]): config,
                          "vision_config": {"hidden_size": 3}}  # fmt: skip
            case 3:
                config["model_type"] = chance.choice([*model_types(), "gpt9"])
            case 4:
                config["quantization_config"] = chance.choice(QUANTISATIONS)
            case _:
                config[key] = mutated(config.get(key), chance)
    return config


def some_tensors(chance: random.Random):
    """What gives shapes: none, some, or out of a header that is none."""
    sizes = [0, 1, 7, 64, 128, 4096, 2**31, 2**53 - 1]
    names = ("q.weight", "q.qweight", "q.scales", "experts.up_blocks", "experts.up_scales", "embed_tokens.weight")
    dtypes = ["BF16", "F8_E4M3", "I32", "U8", "I8", "BOOL"]
    entries = {
        f"model.layers.{layer}.{name}": (chance.choice(dtypes), tuple(chance.choices(sizes, k=chance.randrange(5))))
        for layer in range(chance.randrange(4))
        for name in names
    }
    header = chance.choice([b"{}", b"[]", b"{", json.dumps({"a": {"dtype": "BF16", "shape": chance.choice(VALUES)}}).encode(), chance.randbytes(40)])
    content = len(header).to_bytes(8, "little") + header

    def tensors():
        if chance.random() < 0.3:
            return tensors_of(["x.safetensors"], lambda name, start, length: content[start : start + length])
        return entries

    return tensors


def some_options(chance: random.Random) -> list[str]:
    pairs = {"--context": NUMBERS, "--batch": NUMBERS, "--activations": NUMBERS, "--tp": ["1", "2", "3", "8", "0", "2000"], "--budget": ["l4", "24", *NUMBERS],
             "--weights": ["bf16", "fp8", "int8", "int4", "int4-g64", "int4-g0", "mxfp4", "nvfp4-moe", "fp8-g128", "x", "-", "int4-"], "--group": NUMBERS,
             "--kv": ["fp8", "bf16", "x"], "--ssm": ["bf16", "x"], "--engine": ["vllm", "plain"], "--pool-gib": NUMBERS, "--device-gib": NUMBERS,
             "--utilization": NUMBERS, "--overhead-gib": NUMBERS, "--block-size": NUMBERS, "--max-num-seqs": NUMBERS,
             "--lora": ["1", "8", *NUMBERS], "--lora-rank": ["16", "24", *NUMBERS],
             "--draft": [str(CONFIGS / "qwen2-0.5b.json"), str(CONFIGS / "mamba2-2.7b.json"), "x"]}  # fmt: skip
    engine = ["--engine=vllm"] if chance.random() < 0.4 else []
    if not engine and chance.random() < 0.3:
        engine = ["--engine=llamacpp"]
        pairs |= {"--weights": ["Q4_K_M", "q8_0", "F16", "bf17", "IQ2_XS", "Q4_0", ""], "--kv": ["q8_0", "f16", "q4_0", "x"], "--tp": ["1", "2"]}
    names = list(pairs) if engine == ["--engine=vllm"] or chance.random() < 0.1 else [name for name in pairs if name not in VLLM_OPTIONS]
    chosen = chance.sample(names, k=chance.choice([0, 0, 0, 0, 1, 1, 2, 3]))
    flags = ["--json", "--cards", "--formats", "--mtp", *(["--prefix-caching"] if engine == ["--engine=vllm"] else [])]
    flags = [flag for flag in flags if chance.random() < 0.2]
    return [*engine, *(f"{name}={chance.choice(pairs[name])}" for name in chosen), *flags]


def one(seed: str, configs: list[dict[str, Any]]) -> str:
    """How one ends: answered or refused; what it raises else is a failure."""
    chance = random.Random(seed)
    config, arguments = mutated_config(chance.choice(configs), chance), some_options(chance)
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        try:
            options = build_parser().parse_args(["x", *arguments])
            check_options(options)
            text = json.dumps(config)
            if chance.random() < 0.05:
                place = chance.randrange(len(text))
                text = text[:place] + chance.choice(["[" * 100_000, "9" * 5000, "\0", "{", "\\ud800"]) + text[place + 1 :]
            answer = answer_of(options, Source("x", _object(text.encode(errors="surrogatepass"), "x"), some_tensors(chance)))
            text_of(options, answer, None).encode()
        except ValueError as error:
            if "\n" in str(error) or isinstance(error, UnicodeError):
                raise
            return "refused"
        except SystemExit as end:
            if end.code != 2 or said.getvalue().count("\n") != 1:
                raise
            return "refused"
    return "answered"


def main(count: int = 100_000, seed: int = 0) -> int:
    configs = [json.loads(path.read_text()) for path in sorted(CONFIGS.glob("*.json"))]
    configs += [{"model_type": name} for name in model_types()]
    for path in sorted(CONFIGS.parent.glob("*.json")):  # sets of configs by names
        entries = [entry for group in json.loads(path.read_text()).values() for entry in group.values()]
        configs += [entry for entry in entries if isinstance(entry, dict) and "model_type" in entry]
    resource.setrlimit(resource.RLIMIT_AS, (_address_space() + ROOM_BYTES, resource.RLIM_INFINITY))
    signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(TimeoutError(f"more than {SECONDS} s")))
    ends: Counter[str] = Counter()
    begun, slowest = time.monotonic(), 0.0
    for number in range(count):
        at = time.monotonic()
        signal.alarm(SECONDS)
        try:
            ends[one(f"{seed}-{number}", configs)] += 1
        except BaseException as error:  # all that is no answer is a failure
            if isinstance(error, KeyboardInterrupt):
                raise
            where = traceback.extract_tb(error.__traceback__)[-1]
            kind = f"{type(error).__name__} at {Path(where.filename).name}:{where.lineno}"
            if not ends[kind]:
                chance = random.Random(f"{seed}-{number}")
                config = mutated_config(chance.choice(configs), chance)
                print(f"{seed}-{number}: {kind}: {str(error)[:200]}\n  {some_options(chance)} {json.dumps(config)[:1500]}", flush=True)
            ends[kind] += 1
        finally:
            signal.alarm(0)
        slowest = max(slowest, time.monotonic() - at)
    failures = {kind: number for kind, number in ends.items() if kind not in ("answered", "refused")}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"configs": count, "seed": seed, "answered": ends["answered"], "refused": ends["refused"], "failures": failures,
                      "seconds": round(time.monotonic() - begun, 1), "slowest_seconds": round(slowest, 3), "peak_rss_bytes": peak}))  # fmt: skip
    return 1 if failures else 0


def _address_space() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
