"""The answer to the command's options: all that is printed, in either form."""

import argparse
import re
from dataclasses import dataclass, replace

from memory_budget.architecture import Architecture
from memory_budget.budget import Budget, parse_budget
from memory_budget.calculator import MemoryReport, max_batch, max_context_tokens, memory_report
from memory_budget.command.beside import Beside, beside_of
from memory_budget.command.llamacpp import Gguf, most
from memory_budget.command.options import DEFAULT_UTILIZATION, check_options
from memory_budget.configs.quantisation import stored_format
from memory_budget.configs.registry import language_config, model_from_config
from memory_budget.configs.values import Config
from memory_budget.formats import CHOOSABLE_GROUPS, parse_format
from memory_budget.hf_config import FAMILIES, architecture_from_config, unmodelled_settings
from memory_budget.model import Model
from memory_budget.sources.source import Source, open_source
from memory_budget.units import GIB, format_gib
from memory_budget.vllm.allotment import BLOCK_SIZE_TOKENS, VllmAllotment, vllm_allotment, vllm_pool_bytes
from memory_budget.vllm.settings import BatchLimits, batch_limits, reserve_bytes, vllm_ssm_dtype, why_vllm_refuses
from memory_budget.vllm.shards import shard
from memory_budget.workload import SSM_DTYPES, Workload

KEY_NAMES = ("intermediate_size", "hidden_size", "moe_intermediate_size")  # named first where a size stands under several keys


@dataclass(frozen=True, slots=True, kw_only=True)
class Vllm:
    """What vLLM makes of its pool of so many bytes on each device, and why it does not start, if so.

    reserve_bytes: an estimate of what its profiling run finds, where it is not given with --overhead-gib; it is not taken off the pool.
    """

    pool_bytes: int
    allotment: VllmAllotment
    limits: BatchLimits
    refusals: tuple[str, ...]
    reserve_bytes: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """model: the whole one · held: what one device holds of it · architecture: of a model that can be cut; None for others."""

    name: str
    model: Model
    held: Model
    tp: int
    architecture: Architecture | None
    workload: Workload
    report: MemoryReport
    budget: Budget
    vllm: Vllm | None
    gguf: Gguf | None
    beside: Beside
    notes: list[str]

    @property
    def counted(self) -> Architecture | Model:
        """What llama.cpp's rules, which mind the order of layers, are told: the architecture where there is one."""
        return self.architecture or self.held

    @property
    def is_plain(self) -> bool:
        """Whether the limits are those of the model alone, for which there are formulas; else they are found by halving."""
        return self.gguf is None and not self.beside.is_there

    @property
    def max_context(self) -> int | None:
        return self.context_within(self.budget.bytes)

    @property
    def max_batch(self) -> int | None:
        if self.is_plain:
            return max_batch(self.held, self.workload, self.budget.bytes)
        return most(lambda batch: self.report_with(batch=batch).total <= self.budget.bytes)

    def context_within(self, budget_bytes: int) -> int | None:
        """The longest context, in tokens, with which the workload fits into so many bytes; None: no limit."""
        if self.is_plain:
            return max_context_tokens(self.held, self.workload, budget_bytes)
        return most(lambda context: self.report_with(context_tokens=context).total <= budget_bytes)

    def report_with(self, **changes: int) -> MemoryReport:
        """The same of another workload."""
        workload = replace(self.workload, **changes)
        report = memory_report(self.held, workload) if self.gguf is None else self.gguf.report(self.counted, workload)
        return self.beside.added_to(report, workload, self.gguf)


def work_out(options: argparse.Namespace, argument: str) -> Answer:
    """The answer of one model to the options. Raises ValueError for what the user can fix."""
    check_options(options)
    return answer_of(options, open_source(argument))


def answer_of(options: argparse.Namespace, source: Source) -> Answer:
    """The same, of a config that is at hand."""
    budget, config = parse_budget(options.budget), language_config(source.config)
    model = model_from_config(source.config, source.tensors)
    stored, stored_notes = stored_format(config)
    architecture = architecture_from_config(config) if config.get("model_type") in FAMILIES else None
    gguf = _gguf(options, model)
    weights = "bf16" if gguf else options.weights or stored or "bf16"
    workload = Workload(
        context_tokens=options.context,
        batch=options.batch,
        weights_dtype=weights if options.group is None else re.sub(r"^int4(-g\d+)?", f"int4-g{options.group}", weights),
        kv_dtype="bf16" if gguf else options.kv or "bf16",
        ssm_dtype=options.ssm or _ssm_dtype(options, config),
        activation_tokens=options.activations,
    )
    held = model if options.tp == 1 else shard(model, options.tp)
    beside = beside_of(options, config, model, held)
    vllm = _vllm(options, model, workload, budget, beside) if options.engine == "vllm" else None
    notes = [
        *(note for note in (*model.notes, *unmodelled_settings(config)) if not (options.mtp and note.startswith("multi-token prediction"))),
        *(stored_notes if options.weights is None and gguf is None else ()),
        *(gguf.notes(architecture or model) if gguf else ()),
        *packing_notes(held, workload, config),
        *(vllm.refusals if vllm else position_notes(model, workload, config)),
        *beside.notes(workload, options.engine),
    ]
    report = gguf.report(architecture or held, workload) if gguf else memory_report(held, workload)
    return Answer(name=source.name, model=model, held=held, tp=options.tp, workload=workload, budget=budget, vllm=vllm, gguf=gguf, beside=beside,
                  report=beside.added_to(report, workload, gguf), architecture=architecture, notes=notes)  # fmt: skip


def _gguf(options: argparse.Namespace, model: Model) -> Gguf | None:
    """The file and the caches of llama.cpp, where it is asked for."""
    if options.engine != "llamacpp":
        return None
    if not model.cache_known:
        raise ValueError(f"--engine llamacpp: what llama.cpp makes of model_type {model.model_type} is not known")
    return Gguf(options.weights or "F16", options.kv or "f16")


def _ssm_dtype(options: argparse.Namespace, config: Config) -> str:
    """float32, or what vLLM takes for the model."""
    if options.engine != "vllm":
        return "float32"
    said = next((config[key] for key in ("mamba_ssm_cache_dtype", "mamba_ssm_dtype") if isinstance(config.get(key), str)), None)
    said = {"bfloat16": "bf16", "float16": "fp16"}.get(said, said)
    return vllm_ssm_dtype(config["model_type"], said if said in SSM_DTYPES else None, "bf16")


def position_notes(model: Model, workload: Workload, config: Config) -> list[str]:
    """That the context is longer than the config's positions."""
    if model.positions is None or workload.context_tokens <= model.positions:
        return []
    key = "max_position_embeddings" if config.get("max_position_embeddings") == model.positions else "positions"
    return [f"context ({workload.context_tokens:,} tokens) is more than the config's {key} ({model.positions:,}): the model is not made for it, and vLLM "
            f"refuses to serve it; --context {model.positions} is the longest"]  # fmt: skip


def packing_notes(model: Model, workload: Workload, config: Config) -> list[str]:
    """Which matrices a format with groups cannot pack, by the config's name of their rows' length, and what packs them."""
    packing = parse_format(workload.weights_dtype)
    if packing.dtype not in ("int4", "mxfp4", "nvfp4"):
        return []
    odd: dict[int, int] = {}
    for number, part in model.layers:
        for copies, outputs, inputs in part.parameters().matrices if packing.packs(part.kind) else ():
            if copies * outputs and inputs % packing.group:
                odd[inputs] = odd.get(inputs, 0) + number * copies
    if not odd:
        return []
    rows = ", ".join(f"{_row_name(inputs, config)} ({number:,} matrices)" for inputs, number in sorted(odd.items()))
    start = f"rows of {rows} are no multiple of {packing.group}: these matrices cannot be packed in groups of {packing.group}"
    if packing.dtype not in CHOOSABLE_GROUPS:
        return [f"{start} and stay bf16"]
    better = next((group for group in (64, 32, 16) if group < packing.group and not any(inputs % group for inputs in odd)), None)
    stay = sum(number * copies * outputs * (2 * inputs) - number * packing.matrix_bytes(copies, outputs, inputs) for number, part in model.layers
               for copies, outputs, inputs in part.parameters().matrices if packing.packs(part.kind) and inputs % packing.group)  # fmt: skip
    way = f"--group {better} packs them, or " if better else ""
    return [f"{start}; they are counted with a short last group: {way}left bf16 they take {format_gib(stay)} more"]


def _row_name(inputs: int, config: Config) -> str:
    keys = [key for key, value in config.items() if value == inputs and not isinstance(value, bool)]
    named = next((key for key in (*KEY_NAMES, *keys) if key in keys), None)
    return f"{named} {inputs:,}" if named else f"{inputs:,} numbers"


def _vllm(options: argparse.Namespace, model: Model, workload: Workload, budget: Budget, beside: Beside) -> Vllm:
    """vLLM on the device that is given, else the budget's; its limits are its own defaults unless given. What is beside the model takes from the pool, and its
    layers join those of the model."""
    if not model.cache_known:
        raise ValueError(f"--engine vllm: the cache of model_type {model.model_type} is not known")
    device_gib = budget.device_gib if options.device_gib is None else options.device_gib
    limits = batch_limits(device_gib=device_gib, context_tokens=workload.context_tokens, a100=budget.name.startswith("a100"))
    limits = limits if options.max_num_seqs is None else replace(limits, sequences=options.max_num_seqs)
    if options.pool_gib is not None:
        pool_bytes = int(options.pool_gib * GIB)
    else:
        utilization = DEFAULT_UTILIZATION if options.utilization is None else options.utilization
        pool_bytes = vllm_pool_bytes(model, workload, device_gib=device_gib, utilization=utilization, overhead_gib=options.overhead_gib or 0.0, tp=options.tp)
        pool_bytes -= beside.fixed_bytes(workload)
    block_size = BLOCK_SIZE_TOKENS if options.block_size is None else options.block_size
    keeping = replace(model, layers=(*model.layers, *beside.layers))
    allotment = vllm_allotment(keeping, workload, pool_bytes=pool_bytes, prefix_caching=options.prefix_caching, block_size=block_size,
                               max_num_batched_tokens=limits.tokens, tp=options.tp)  # fmt: skip
    given = options.pool_gib is not None or options.overhead_gib is not None
    return Vllm(pool_bytes=pool_bytes, allotment=allotment, limits=limits, refusals=why_vllm_refuses(model, workload, allotment, max_num_seqs=limits.sequences),
                reserve_bytes=None if given else reserve_bytes(model, workload, limits=limits, tp=options.tp))  # fmt: skip


def with_weights(answer: Answer, dtype: str) -> Answer:
    """The same workload with weights in another format, a GGUF's where the engine is llama.cpp."""
    if answer.gguf is not None:
        other = replace(answer, gguf=replace(answer.gguf, quant=dtype))
    else:
        other = replace(answer, workload=replace(answer.workload, weights_dtype=dtype))
    return replace(other, report=other.report_with())
