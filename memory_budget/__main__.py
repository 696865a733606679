"""python -m memory_budget DIR_OR_CONFIG_JSON: what a model takes in memory, and what still fits.

Exit codes: 0 done, whether it fits or not · 2 the user's mistake, one line on stderr beginning "error: " · 130 interrupted.
"""

import argparse
import json
import os
import sys
from dataclasses import dataclass
from typing import Any, NoReturn

# Said before what an older Python cannot read is imported; this file itself it can.
if sys.version_info < (3, 11):  # noqa: UP036
    sys.stderr.write("error: Python is %d.%d; minitron needs 3.11 or later\n" % sys.version_info[:2])  # noqa: UP031
    sys.exit(2)

from memory_budget.architecture import WINDOWED, Architecture, describe_layers
from memory_budget.budget import PRESETS, Budget, fits, parse_budget
from memory_budget.calculator import MemoryReport, max_batch, max_context_tokens, memory_report
from memory_budget.hf_config import FAMILIES, architecture_from_config, read_config, unmodelled_settings
from memory_budget.parameters import count_active_parameters, count_parameters, count_total_parameters
from memory_budget.units import GIB, format_count, format_gib
from memory_budget.vllm.allotment import BLOCK_SIZE_TOKENS, VllmAllotment, vllm_allotment, vllm_pool_bytes
from memory_budget.workload import KV_DTYPES, QUANTISED_DTYPES, SSM_DTYPES, WEIGHTS_DTYPES, Workload

VLLM_OPTIONS = ("pool_gib", "device_gib", "utilization", "overhead_gib", "prefix_caching", "block_size")
DEFAULT_UTILIZATION = 0.92
WINDOWS_NOTE = "vLLM's blocks are counted as if layers within a window kept the whole context; vLLM takes fewer for a long one, and some more for a short one"


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """All that is printed, in either form."""

    architecture: Architecture
    workload: Workload
    report: MemoryReport
    budget: Budget
    allotment: VllmAllotment | None
    pool_bytes: int | None
    notes: list[str]


class OneLineParser(argparse.ArgumentParser):
    """A parser whose errors are one line without the usage."""

    def error(self, message: str) -> NoReturn:
        fail(message)


def fail(message: str) -> NoReturn:
    """Print one line beginning `error: ` on stderr and exit with 2."""
    print("error: " + " ".join(message.split()), file=sys.stderr)
    raise SystemExit(2)


def main(arguments: list[str] | None = None) -> int:
    """The command; gives the exit code."""
    try:
        try:
            return run(arguments)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # the reader, `head` say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130


def run(arguments: list[str] | None) -> int:
    options = build_parser().parse_args(arguments)
    try:
        answer = work_out(options)
    except ValueError as error:
        fail(str(error))
    print(json.dumps(as_json(answer), indent=2) if options.json else as_table(answer))
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="python -m memory_budget",
        description="What a model takes in memory to serve a workload, and what still fits a budget. No weights are read, only config.json.",
        epilog=f"GiB is 2**30 bytes. Model types: {', '.join(FAMILIES)}.",
        allow_abbrev=False,
    )
    parser.add_argument("config", metavar="DIR_OR_CONFIG_JSON", help="a model's directory (only its config.json is read), or a config.json")
    parser.add_argument("--json", action="store_true", help="print one JSON object (sizes in bytes; null: no limit)")
    parser.add_argument("--budget", default="a10g", metavar="NAME|GIB", help=(
        f"what there is: a card ({', '.join(PRESETS)}) less a cushion of 5 %% and, for a10g, 1.3 GiB of other models; "
        "or a number of GiB as it is (default a10g)"))
    add_workload_options(parser)
    add_vllm_options(parser)
    return parser


def add_workload_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("workload")
    group.add_argument("--context", type=int, default=131072, metavar="N", help="tokens per sequence, prompt and answer (default 131072)")
    group.add_argument("--batch", type=int, default=1, metavar="N", help="sequences at once (default 1)")
    group.add_argument("--weights", default="bf16", metavar="D", help=(
        f"number format of the weights: {', '.join(WEIGHTS_DTYPES)} (default bf16). fp8 and int4 hold for the matrices of the "
        "layers; int4 has a 2-byte scale per group of 128; the rest stays bf16"))
    group.add_argument("--kv", default="bf16", metavar="D", help=(
        f"number format of the attention cache: {', '.join(KV_DTYPES)} (default bf16)"))
    group.add_argument("--ssm", default="float32", metavar="D", help=(
        f"number format of Mamba's SSM state: {', '.join(SSM_DTYPES)} (default float32)"))
    group.add_argument("--activations", type=int, default=0, metavar="N", help=(
        "also count the activations of a prefill chunk of N tokens, an estimate (default 0: left out)"))


def add_vllm_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("engine")
    group.add_argument("--engine", choices=("plain", "vllm"), default="plain", help=(
        "vllm: also how vLLM cuts its cache pool into blocks; all options below are for it (default plain)"))
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


def work_out(options: argparse.Namespace) -> Answer:
    """The answer to the options. Raises ValueError for what the user can fix."""
    check_vllm_options(options)
    budget = parse_budget(options.budget)
    config = read_config(options.config)
    architecture = architecture_from_config(config)
    workload = Workload(
        context_tokens=options.context,
        batch=options.batch,
        weights_dtype=options.weights,
        kv_dtype=options.kv,
        ssm_dtype=options.ssm,
        activation_tokens=options.activations,
    )
    allotment = pool_bytes = None
    if options.engine == "vllm":
        pool_bytes = vllm_pool(options, architecture, workload, budget)
        block_size = BLOCK_SIZE_TOKENS if options.block_size is None else options.block_size
        allotment = vllm_allotment(architecture, workload, pool_bytes=pool_bytes, prefix_caching=options.prefix_caching, block_size=block_size)
    return Answer(
        architecture=architecture,
        workload=workload,
        report=memory_report(architecture, workload),
        budget=budget,
        allotment=allotment,
        pool_bytes=pool_bytes,
        notes=unmodelled_settings(config) + ([WINDOWS_NOTE] if allotment and architecture.num_layers_of(WINDOWED) else []),
    )


def check_vllm_options(options: argparse.Namespace) -> None:
    """Refuse options that would be ignored, and two sizes of one pool."""
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


def vllm_pool(options: argparse.Namespace, architecture: Architecture, workload: Workload, budget: Budget) -> int:
    """Bytes of vLLM's cache pool; without --pool-gib and --device-gib the device is the budget's."""
    if options.pool_gib is not None:
        if not 0 <= options.pool_gib < float("inf"):
            raise ValueError(f"--pool-gib ({options.pool_gib}) must be at least 0 GiB")
        return int(options.pool_gib * GIB)
    return vllm_pool_bytes(
        architecture,
        workload,
        device_gib=budget.device_gib if options.device_gib is None else options.device_gib,
        utilization=DEFAULT_UTILIZATION if options.utilization is None else options.utilization,
        overhead_gib=options.overhead_gib or 0.0,
    )


def as_json(answer: Answer) -> dict[str, Any]:
    """The contract's keys; max_* are null where there is no limit."""
    budget_bytes = answer.budget.bytes
    result = {
        "model_type": answer.architecture.model_type,
        "parameters": count_total_parameters(answer.architecture),
        "active_parameters": count_active_parameters(answer.architecture),
        "parameters_by_kind": count_parameters(answer.architecture),
        "bytes": answer.report.as_dict(),
        "budget_bytes": budget_bytes,
        "fits": fits(answer.report, answer.budget),
        "headroom_bytes": budget_bytes - answer.report.total,
        "max_context_tokens": max_context_tokens(answer.architecture, answer.workload, budget_bytes),
        "max_batch": max_batch(answer.architecture, answer.workload, budget_bytes),
    }
    if answer.allotment is not None:
        result["vllm"] = answer.allotment.as_dict()
    return result


def as_table(answer: Answer) -> str:
    """The same for people: name, value with unit, remark."""
    sections = [model_rows(answer), memory_rows(answer), budget_rows(answer)]
    if answer.allotment is not None:
        sections.append(vllm_rows(answer, answer.allotment))
    rows = [row for section in sections for row in section]
    name_width = max(len(name) for name, _, _ in rows) + 2
    value_width = max(len(value) for _, value, _ in rows)
    lines = []
    for section in sections:
        lines += [f"{name:<{name_width}}{value:>{value_width}}  {remark}".rstrip() for name, value, remark in section] + [""]
    return "\n".join(lines + [f"note: {note}" for note in answer.notes]).rstrip()


def model_rows(answer: Answer) -> list[tuple[str, str, str]]:
    architecture = answer.architecture
    total, active = count_total_parameters(architecture), count_active_parameters(architecture)
    if architecture.sublayers_per_layer > 1:
        layers = describe_layers(architecture)
    else:
        by_kind = ", ".join(f"{architecture.num_layers_of(letter)} {name}" for letter, name in
                            (("M", "Mamba-2"), ("*", "attention"), ("-", "FFN"), ("E", "MoE")) if letter in architecture.pattern)
        layers = f"{architecture.num_layers} layers: {by_kind}"
    tied = ", embeddings tied to the head" if architecture.tied_embeddings else ""
    rows = [("parameters", format_count(total, "parameters"), f"{architecture.model_type}, {layers}{tied}")]
    if active != total:
        rows.append(("  active per token", format_count(active, "parameters"), ""))
    by_kind = count_parameters(architecture)
    shares = [(f"  {kind}", format_count(count, "parameters"), f"{100 * count / total:.1f} %") for kind, count in by_kind.items() if count]
    return rows + shares


def memory_rows(answer: Answer) -> list[tuple[str, str, str]]:
    report, workload = answer.report, answer.workload
    sequences = format_count(workload.batch, "sequences" if workload.batch > 1 else "sequence")
    served = f"{format_count(workload.context_tokens, 'tokens')} x {sequences}{kept_in_windows(answer.architecture)}"
    packed = {"fp8": "layers' matrices fp8, the rest bf16", "int4": "layers' matrices int4 with a 2-byte scale per 128, the rest bf16"}
    weights = packed[workload.weights_dtype] if workload.weights_dtype in QUANTISED_DTYPES else workload.weights_dtype
    rows = [
        ("weights", format_gib(report.weights), weights),
        ("KV cache", format_gib(report.kv_cache), f"{workload.kv_dtype}, {served}"),
    ]
    if "M" in answer.architecture.pattern:
        rows += [("SSM state", format_gib(report.ssm_state), workload.ssm_dtype), ("conv state", format_gib(report.conv_state), workload.compute_dtype)]
    if workload.activation_tokens:
        chunk = format_count(workload.activation_tokens, "tokens")
        rows.append(("activations", format_gib(report.activations), f"estimate, a prefill chunk of {chunk}"))
    return rows + [("total", format_gib(report.total), "" if workload.activation_tokens else "without activations")]


def kept_in_windows(architecture: Architecture) -> str:
    """Which layers keep fewer tokens than there are, and how many; nothing where none does."""
    windowed, attention = architecture.num_layers_of(WINDOWED), architecture.num_layers_of("*")
    if not windowed:
        return ""
    which = f"all {attention}" if windowed == attention else f"{windowed} of {attention}"
    return f"; the last {format_count(architecture.window - 1, 'tokens')} alone in {which} attention layers"


def budget_rows(answer: Answer) -> list[tuple[str, str, str]]:
    budget = answer.budget
    headroom = budget.bytes - answer.report.total
    context = max_context_tokens(answer.architecture, answer.workload, budget.bytes)
    batch = max_batch(answer.architecture, answer.workload, budget.bytes)
    less = f"{100 * budget.cushion_fraction:g} % cushion, {budget.set_aside_gib:g} GiB set aside"
    made_of = f"{budget.name}: {budget.device_gib:.2f} GiB less {less}"
    return [
        ("budget", format_gib(budget.bytes), made_of if budget.name in PRESETS else "as given"),
        ("fits", "yes" if headroom >= 0 else "no", f"{format_gib(abs(headroom))} {'to spare' if headroom >= 0 else 'too much'}"),
        ("longest context", "no limit" if context is None else format_count(context, "tokens"), f"at batch {answer.workload.batch}"),
        ("largest batch", "no limit" if batch is None else format_count(batch, "sequences"),
         f"at {format_count(answer.workload.context_tokens, 'tokens')} each"),
    ]


def vllm_rows(answer: Answer, allotment: VllmAllotment) -> list[tuple[str, str, str]]:
    starts = "" if allotment.max_concurrency >= 1 else "vLLM refuses to start: not one sequence of this context fits"
    blocks = f"{format_count(allotment.num_blocks, 'blocks')} of {format_gib(allotment.bytes_per_block)}"
    page = f"page {format_count(allotment.page_bytes, 'bytes')} per layer"
    context = f"at {format_count(answer.workload.context_tokens, 'tokens')}"
    return [
        ("vLLM cache pool", format_gib(answer.pool_bytes or 0), blocks),
        ("tokens per block", format_count(allotment.block_tokens, "tokens"), page),
        ("blocks per request", format_count(allotment.blocks_per_request, "blocks"), context),
        ("GPU KV cache size", format_count(allotment.kv_cache_tokens, "tokens"), "as vLLM logs it"),
        ("maximum concurrency", f"{allotment.max_concurrency:.2f} sequences", starts),
    ]


if __name__ == "__main__":
    sys.exit(main())
