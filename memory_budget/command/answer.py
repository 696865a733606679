"""The answer to the command's options: all that is printed, in either form."""

import argparse
import re
from dataclasses import dataclass, replace

from memory_budget.architecture import WINDOWED, Architecture
from memory_budget.budget import Budget, parse_budget
from memory_budget.calculator import MemoryReport, max_batch, max_context_tokens, memory_report, weight_bytes
from memory_budget.command.options import DEFAULT_UTILIZATION, check_options
from memory_budget.configs.quantisation import stored_format
from memory_budget.configs.registry import language_config, model_from_config
from memory_budget.configs.values import Config, shown
from memory_budget.formats import CHOOSABLE_GROUPS, parse_format
from memory_budget.hf_config import FAMILIES, architecture_from_config, unmodelled_settings
from memory_budget.model import Model
from memory_budget.sources.source import Source, open_source
from memory_budget.units import GIB, format_gib
from memory_budget.vllm import BLOCK_SIZE_TOKENS, VllmAllotment, vllm_allotment, vllm_pool_bytes
from memory_budget.workload import Workload

WINDOWS_NOTE = "vLLM's blocks are counted as if layers within a window kept the whole context; vLLM takes fewer for a long one, and some more for a short one"
KEY_NAMES = ("intermediate_size", "hidden_size", "moe_intermediate_size")  # named first where a size stands under several keys


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """architecture: of a model that can be cut; None for others."""

    name: str
    model: Model
    architecture: Architecture | None
    workload: Workload
    report: MemoryReport
    budget: Budget
    allotment: VllmAllotment | None
    pool_bytes: int | None
    notes: list[str]

    @property
    def max_context(self) -> int | None:
        return max_context_tokens(self.model, self.workload, self.budget.bytes)

    @property
    def max_batch(self) -> int | None:
        return max_batch(self.model, self.workload, self.budget.bytes)


def work_out(options: argparse.Namespace, argument: str) -> Answer:
    """The answer of one model to the options. Raises ValueError for what the user can fix."""
    check_options(options)
    return answer_of(options, open_source(argument))


def answer_of(options: argparse.Namespace, source: Source) -> Answer:
    """The same, of a config that is at hand."""
    budget, config = parse_budget(options.budget), language_config(source.config)
    model = model_from_config(source.config, source.tensors)
    stored, stored_notes = stored_format(config)
    weights = options.weights or stored or "bf16"
    workload = Workload(
        context_tokens=options.context,
        batch=options.batch,
        weights_dtype=weights if options.group is None else re.sub(r"^int4(-g\d+)?", f"int4-g{options.group}", weights),
        kv_dtype=options.kv,
        ssm_dtype=options.ssm,
        activation_tokens=options.activations,
    )
    architecture = architecture_from_config(config) if config.get("model_type") in FAMILIES else None
    pool_bytes, allotment = _vllm(options, architecture, model, workload, budget)
    windows = allotment is not None and architecture is not None and architecture.num_layers_of(WINDOWED)
    notes = [*model.notes, *unmodelled_settings(config), *(stored_notes if options.weights is None else ()), *packing_notes(model, workload, config),
             *position_notes(model, workload, config, engine=options.engine), *([WINDOWS_NOTE] if windows else ())]  # fmt: skip
    return Answer(name=source.name, model=model, architecture=architecture, workload=workload, report=memory_report(model, workload), budget=budget,
                  allotment=allotment, pool_bytes=pool_bytes, notes=notes)  # fmt: skip


def position_notes(model: Model, workload: Workload, config: Config, *, engine: str) -> list[str]:
    """That the context is longer than the config's positions."""
    if model.positions is None or workload.context_tokens <= model.positions:
        return []
    says = config.get("max_position_embeddings")
    key = f"max_position_embeddings ({says:,})" if says == model.positions else f"positions ({model.positions:,})"
    refuses = "vLLM refuses a --max-model-len above them" if engine == "vllm" else "it was not made for it, and vLLM refuses to serve it"
    return [f"context ({workload.context_tokens:,} tokens) is more than the config's {key}: {refuses}; --context {model.positions} is the longest"]


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


def _vllm(
    options: argparse.Namespace, architecture: Architecture | None, model: Model, workload: Workload, budget: Budget
) -> tuple[int | None, VllmAllotment | None]:
    """Bytes of vLLM's pool and how it is cut; nothing for another engine."""
    if options.engine != "vllm":
        return None, None
    if architecture is None:
        raise ValueError(f"--engine vllm is not counted for model_type {shown(model.model_type)} yet; leave it out for the caches alone")
    pool_bytes = vllm_pool(options, model, workload, budget)
    block_size = BLOCK_SIZE_TOKENS if options.block_size is None else options.block_size
    return pool_bytes, vllm_allotment(architecture, workload, pool_bytes=pool_bytes, prefix_caching=options.prefix_caching, block_size=block_size)


def vllm_pool(options: argparse.Namespace, model: Model, workload: Workload, budget: Budget) -> int:
    """Bytes of vLLM's cache pool; without --pool-gib and --device-gib the device is the budget's."""
    if options.pool_gib is not None:
        return int(options.pool_gib * GIB)
    return vllm_pool_bytes(
        model,
        workload,
        device_gib=budget.device_gib if options.device_gib is None else options.device_gib,
        utilization=DEFAULT_UTILIZATION if options.utilization is None else options.utilization,
        overhead_gib=options.overhead_gib or 0.0,
    )


def with_weights(answer: Answer, dtype: str) -> Answer:
    """The same workload with weights in another format."""
    workload = replace(answer.workload, weights_dtype=dtype)
    return replace(answer, workload=workload, report=replace(answer.report, weights=weight_bytes(answer.model, dtype)))
