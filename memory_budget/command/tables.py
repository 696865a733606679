"""Answers for people: rows of a name, a value with its unit, and a remark."""

from memory_budget.architecture import describe_layers
from memory_budget.budget import PRESETS
from memory_budget.command.answer import Answer, Vllm
from memory_budget.command.llamacpp import Gguf
from memory_budget.command.questions import at_every_format, cards, smallest_card
from memory_budget.formats import parse_format
from memory_budget.parameters import count_active_parameters, count_parameters, count_total_parameters
from memory_budget.units import format_count, format_gib

Row = tuple[str, str, str]
KIND_NAMES = {"mamba": "recurrent", "attention": "attention", "ffn": "FFN", "moe": "MoE"}
UNKNOWN = "not known"


def as_table(answer: Answer) -> str:
    """The whole answer; notes stand below it."""
    sections = [model_rows(answer), memory_rows(answer), budget_rows(answer)]
    if answer.vllm is not None:
        sections.append(vllm_rows(answer, answer.vllm))
    if answer.gguf is not None:
        sections.append(llamacpp_rows(answer, answer.gguf))
    return "\n\n".join([_aligned(sections), *(["\n".join(f"note: {note}" for note in answer.notes)] if answer.notes else [])])


def _aligned(sections: list[list[Row]]) -> str:
    rows = [row for section in sections for row in section]
    name_width = max(len(name) for name, _, _ in rows) + 2
    value_width = max(len(value) for _, value, _ in rows)
    return "\n\n".join("\n".join(f"{name:<{name_width}}{value:>{value_width}}  {remark}".rstrip() for name, value, remark in section) for section in sections)


def model_rows(answer: Answer) -> list[Row]:
    model = answer.model
    total, active = count_total_parameters(model), count_active_parameters(model)
    tied = ", embeddings tied to the head" if model.tied_embeddings and model.cache_known and model.vocab else ""
    rows = [("parameters", format_count(total, "parameters"), f"{model.model_type}, {layers_text(answer)}{tied}")]
    if active != total:
        rows.append(("  active per token", format_count(active, "parameters"), ""))
    shares = count_parameters(model).items()
    return rows + [(f"  {kind}", format_count(count, "parameters"), f"{100 * count / total:.1f} %") for kind, count in shares if count]


def layers_text(answer: Answer) -> str:
    """What the layers are, in words."""
    architecture, model = answer.architecture, answer.model
    if architecture is not None and architecture.sublayers_per_layer > 1:
        return describe_layers(architecture)
    if architecture is not None:
        kinds = (("M", "Mamba-2"), ("*", "attention"), ("-", "FFN"), ("E", "MoE"))
        by_kind = ", ".join(f"{architecture.num_layers_of(letter)} {name}" for letter, name in kinds if letter in architecture.pattern)
    else:
        by_kind = ", ".join(f"{model.count_of(kind)} {name}" for kind, name in KIND_NAMES.items() if model.count_of(kind))
    return f"{model.num_layers:,} layers: {by_kind}" if by_kind else "by the shapes of its tensors"


def memory_rows(answer: Answer) -> list[Row]:
    report, workload, known = answer.report, answer.workload, answer.model.cache_known
    sequences = format_count(workload.batch, "sequences" if workload.batch > 1 else "sequence")
    served = f"{format_count(workload.context_tokens, 'tokens')} x {sequences}{kept_in_windows(answer)}"
    gguf = answer.gguf
    weights, kv = (parse_format(workload.weights_dtype).describe(), workload.kv_dtype) if gguf is None else (f"GGUF {gguf.quant.upper()}", gguf.kv.lower())
    ssm, conv = (workload.ssm_dtype, workload.compute_dtype) if gguf is None else ("float32", "float32")
    rows = [
        ("weights", format_gib(report.weights), weights),
        ("KV cache", format_gib(report.kv_cache) if known else UNKNOWN, f"{kv}, {served}"),
    ]
    if answer.model.count_of("mamba"):
        rows += [("SSM state", format_gib(report.ssm_state), ssm), ("conv state", format_gib(report.conv_state), conv)]
    if workload.activation_tokens:
        chunk = format_count(workload.activation_tokens, "tokens")
        rows.append(("activations", format_gib(report.activations), f"estimate, a prefill chunk of {chunk}"))
    rows += [(name, format_gib(size), remark) for name, size, remark in beside_rows(answer)]
    return [*rows, ("total", format_gib(report.total) if known else UNKNOWN, _of_what(answer))]


def beside_rows(answer: Answer) -> list[tuple[str, int, str]]:
    """What is served beside the model: its name, bytes, and what they are."""
    report, beside, rows = answer.report, answer.beside, []
    if report.lora is not None:
        slots = f"{format_count(beside.slots or 0, 'slots' if (beside.slots or 0) > 1 else 'slot')} of rank {beside.rank}"
        rows.append(("LoRA slots", report.lora, f"{answer.workload.compute_dtype}, {slots}"))
    if report.draft is not None and beside.draft is not None:
        weights = parse_format(beside.draft.weights).dtype if answer.gguf is None else answer.gguf.quant.upper()
        rows.append(("draft model", report.draft, f"{beside.draft.model.model_type}, weights in {weights}, and caches"))
    if report.mtp is not None and beside.mtp is not None:
        number = format_count(beside.mtp.num_layers, "layers" if beside.mtp.num_layers > 1 else "layer")
        rows.append(("token prediction", report.mtp, f"{number}, weights and caches"))
    return rows


def _of_what(answer: Answer) -> str:
    parts = ([f"on each of {answer.tp} GPUs"] if answer.tp > 1 else []) + ([] if answer.workload.activation_tokens else ["without activations"])
    return ", ".join(parts)


def kept_in_windows(answer: Answer) -> str:
    """Which layers keep fewer tokens than there are, and how many; nothing where none does."""
    kept: dict[int, int] = {}
    for number, part in answer.held.layers:
        if part.kept_tokens:
            kept[part.kept_tokens] = kept.get(part.kept_tokens, 0) + number
    attention, windowed = sum(number for number, part in answer.model.layers if part.kept_tokens != 0), sum(kept.values())
    if not windowed:
        return ""
    which = f"all {attention}" if windowed == attention else f"{windowed} of {attention}"
    tokens = " or ".join(format_count(number, "tokens") for number in sorted(kept))
    return f"; the last {tokens} alone in {which} attention layers"


def budget_rows(answer: Answer) -> list[Row]:
    budget, known = answer.budget, answer.model.cache_known
    headroom = budget.bytes - answer.report.total
    less = f"{100 * budget.cushion_fraction:g} % cushion, {budget.set_aside_gib:g} GiB set aside"
    rows = [("budget", format_gib(budget.bytes), f"{budget.name}: {budget.device_gib:.2f} GiB less {less}" if budget.name in PRESETS else "as given")]
    if not known:
        alone = f"weights alone leave {format_gib(headroom)}" if headroom >= 0 else f"weights alone are {format_gib(-headroom)} too much"
        return [*rows, ("fits", UNKNOWN if headroom >= 0 else "no", alone)]
    context, batch, positions = answer.max_context, answer.max_batch, answer.model.positions
    beyond = f", more than the config's {positions:,} positions" if positions and (context is None or context > positions) else ""
    card = smallest_card(answer)
    return [
        *rows,
        ("fits", "yes" if headroom >= 0 else "no", f"{format_gib(abs(headroom))} {'to spare' if headroom >= 0 else 'too much'}"),
        ("longest context", "no limit" if context is None else format_count(context, "tokens"), f"at batch {answer.workload.batch}{beyond}"),
        ("largest batch", "no limit" if batch is None else format_count(batch, "sequences"),
         f"at {format_count(answer.workload.context_tokens, 'tokens')} each"),
        ("smallest card", format_gib(card.bytes) if card else "none", f"{card.name}, of the presets that it fits" if card else "of the presets has the memory"),
    ]


def vllm_rows(answer: Answer, vllm: Vllm) -> list[Row]:
    allotment, context = vllm.allotment, f"at {format_count(answer.workload.context_tokens, 'tokens')}"
    blocks = f"{format_count(allotment.num_blocks, 'blocks')} of {format_gib(allotment.bytes_per_block)}"
    older = f"as vLLM logs it; versions from about 0.10 to 0.20 log {format_count(allotment.older_kv_cache_tokens, 'tokens')}"
    rows = [
        ("vLLM cache pool", format_gib(vllm.pool_bytes), f"{blocks}{', on each GPU' if answer.tp > 1 else ''}"),
        ("tokens per block", format_count(allotment.block_tokens, "tokens"), f"page {format_count(allotment.page_bytes, 'bytes')} per layer"),
        ("blocks per request", format_count(allotment.blocks_per_request, "blocks"), context),
        ("GPU KV cache size", format_count(allotment.kv_cache_tokens, "tokens"),
         older if allotment.older_kv_cache_tokens != allotment.kv_cache_tokens else "as vLLM logs it"),
        ("maximum concurrency", f"{allotment.max_concurrency:.2f} sequences", "" if allotment.starts else "vLLM refuses to start"),
    ]
    if allotment.most_sequences is not None:
        rows.append(("most sequences", format_count(allotment.most_sequences, "sequences"), f"for --max-num-seqs, which is {vllm.limits.sequences:,}"))
    if vllm.reserve_bytes is not None:
        rows.append(("reserve", format_gib(vllm.reserve_bytes), "estimate of activations and CUDA graphs, not taken off the pool: --overhead-gib does"))
    return rows


def llamacpp_rows(answer: Answer, gguf: Gguf) -> list[Row]:
    """Its buffers by the words of its log."""
    buffers = gguf.buffers(answer.counted, answer.workload)
    return [
        ("llama.cpp model", format_gib(buffers["model"]), "model buffer size"),
        ("llama.cpp KV", format_gib(buffers["kv"]), "KV buffer size, of contexts made multiples of 256"),
        ("llama.cpp recurrent", format_gib(buffers["recurrent"]), "RS buffer size"),
        ("llama.cpp compute", format_gib(buffers["compute_estimate"]), "estimate of the compute buffer; in the total with --activations N, its -ub"),
    ]


def columns(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A table with a head: the first column to the left, the others to the right."""
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    lines = ("  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]) for row in (head, *rows))
    return "\n".join(line.rstrip() for line in lines)


def cards_table(answer: Answer) -> str:
    rows = [(name, format_gib(card["budget_bytes"]), _yes(card["fits"]), _spare(card["headroom_bytes"]), _context(answer, card["max_context_tokens"]))
            for name, card in cards(answer).items()]  # fmt: skip
    return columns(("card", "for a model", "fits", "to spare", "longest context"), rows)


def formats_table(answer: Answer) -> str:
    known, rows = answer.model.cache_known, []
    for name, one in at_every_format(answer).items():
        headroom = one.budget.bytes - one.report.total if known else None
        total = format_gib(one.report.total) if known else UNKNOWN
        rows.append((name, format_gib(one.report.weights), total, _yes(headroom >= 0 if headroom is not None else None), _spare(headroom),
                     _context(one, one.max_context if known else None)))  # fmt: skip
    return columns(("weights in", "weights", "total", "fits", "to spare", "longest context"), rows)


def _yes(fits: bool | None) -> str:
    return UNKNOWN if fits is None else "yes" if fits else "no"


def _spare(headroom: int | None) -> str:
    return UNKNOWN if headroom is None else format_gib(headroom)


def _context(answer: Answer, context: int | None) -> str:
    if not answer.model.cache_known:
        return UNKNOWN
    return "no limit" if context is None else format_count(context, "tokens")


def compare_table(first: Answer, second: Answer) -> str:
    """Two answers side by side: a row wherever either has a number, and the second less the first."""
    pairs: list[tuple[str, ...]] = [("model type", first.model.model_type, second.model.model_type, "")]
    kinds = [count_parameters(one.model) for one in (first, second)]
    counts = [("parameters", *(count_total_parameters(one.model) for one in (first, second)))]
    counts += [("  active per token", *(count_active_parameters(one.model) for one in (first, second)))]
    counts += [(f"  {kind}", *(found.get(kind, 0) for found in kinds)) for kind in dict.fromkeys((*kinds[0], *kinds[1]))]
    pairs += [(name, f"{one:,}", f"{other:,}", f"{other - one:+,}") for name, one, other in counts if one or other]
    reports = [one.report.as_dict() for one in (first, second)]
    for part in reports[0]:
        known = [one.model.cache_known or part == "weights" for one in (first, second)]
        sizes = [report[part] for report in reports]
        if any(sizes):
            less = f"{(sizes[1] - sizes[0]) / 2**30:+,.2f} GiB" if all(known) else UNKNOWN
            pairs.append((part.replace("_", " "), *(format_gib(size) if is_known else UNKNOWN for size, is_known in zip(sizes, known, strict=True)), less))
    pairs.append(("fits", *(_yes(one.report.total <= one.budget.bytes if one.model.cache_known else None) for one in (first, second)), ""))
    pairs.append(("longest context", *(_context(one, one.max_context if one.model.cache_known else None) for one in (first, second)), ""))
    return columns(("", first.name[-40:], second.name[-40:], "difference"), pairs)
