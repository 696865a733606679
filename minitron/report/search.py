"""How the report tells of the search: why this architecture, what every candidate measured, which layers went."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from memory_budget.architecture import BLOCK, MAMBA_BLOCK, MAMBA_MOE_BLOCK, MOE_BLOCK, WINDOWED_BLOCK, WINDOWED_MOE_BLOCK, Architecture
from memory_budget.parameters import count_active_parameters
from memory_budget.units import format_gib
from minitron.report.summary import KIND_NAMES, best_first, chosen_candidate, cut_kinds, highest_rung, removed_layers
from minitron.report.text import LONG, Summary, change, code, duration, nats, quoted, speed, table

Candidate = Mapping[str, Any]

# Of the picture of layers, where a block is one character, and what it stands for.
BLOCK_LETTERS = {BLOCK: "B", WINDOWED_BLOCK: "W", MOE_BLOCK: "E", WINDOWED_MOE_BLOCK: "X", MAMBA_BLOCK: "M", MAMBA_MOE_BLOCK: "M"}
LEGENDS = {BLOCK: "B is a block of attention and FFN", WINDOWED_BLOCK: "W is a block of attention within a window and FFN",
           MOE_BLOCK: "E is a block of attention and experts", WINDOWED_MOE_BLOCK: "X is a block of attention within a window and experts",
           MAMBA_BLOCK: "M is a block of Mamba-2 and FFN", MAMBA_MOE_BLOCK: "M is a block of Mamba-2 and experts"}  # fmt: skip
SIZES = (
    ("hidden", "hidden width", "M*-E"),
    ("ffn", "FFN neurons", "-"),
    ("mamba_num_heads", "Mamba-2 heads", "M"),
    ("mamba_head_dim", "Mamba-2 head dim", "M"),
    ("mamba_num_groups", "Mamba-2 groups", "M"),
    ("mamba_state_size", "Mamba-2 state", "M"),
    ("num_attention_heads", "query heads", "*"),
    ("num_key_value_heads", "KV heads", "*"),
    ("attention_head_dim", "attention head dim", "*"),
    ("window", "window of attention (tokens)", "W"),
    ("moe_num_experts", "routed experts", "E"),
    ("moe_experts_per_token", "experts of a token", "E"),
    ("moe_ffn", "neurons of an expert", "E"),
    ("moe_shared_ffn", "neurons of the shared expert", "E"),
    ("vocab", "vocabulary", "M*-E"),
)
RUNG_NAMES = {"short_distill_loss": "after a short distillation", "zero_shot_loss": "zero-shot"}
MEASURES: Sequence[tuple[str, str, Callable[[Any], str]]] = (
    ("short_distill_loss", "loss after short distillation (nats/token)", nats),
    ("zero_shot_loss", "zero-shot loss (nats/token)", nats),
    ("zero_shot_kl", "zero-shot KL (nats/token)", nats),
    ("modelled_tokens_per_second", "modelled speed (tokens/s)", speed),
    ("tokens_per_second", "decode here (tokens/s)", speed),
)


def choice_sentences(lap: Summary) -> list[str]:
    """What was chosen from how many, by which rule, and how near the others came; nothing before the search."""
    chosen, candidates, search = chosen_candidate(lap), lap["candidates"], lap["search"]
    if chosen is None:
        return []
    name = f"**{quoted(chosen['id'])}**"
    if len(candidates) == 1:
        return [f"{name} is {quoted(search['reason'], LONG)}{'' if search['num_fitting'] else ', and does not fit'}."]
    briefly = sum(candidate["short_distill_loss"] is not None for candidate in candidates)
    fit = "leave room for widths that fit" if search["later_widths"] else "fit"
    steps = [f"{search['num_fitting']:,} {fit}", f"{len(candidates)} came on the shortlist", f"{briefly} of them were distilled briefly" if briefly else ""]
    what = "depths" if search["later_widths"] else "architectures"
    opening = f"{name} was chosen of {search['num_candidates']:,} {what} ({', '.join(step for step in steps if step)}): {quoted(search['reason'], LONG)}."
    return [opening, *_rivals(chosen, candidates)]


def _rivals(chosen: Candidate, candidates: Sequence[Candidate]) -> list[str]:
    """How far the best other is, by the losses that decided; and what the rung below would have taken."""
    rung, sentences = highest_rung(candidates), []
    others = [one for one in best_first(candidates) if not one["chosen"] and rung is not None and one[rung] is not None]
    if others:
        other, behind = others[0]["id"], others[0][rung] - chosen[rung]
        side = "higher" if behind >= 0 else "lower"
        sentences.append(f"Of the others the best by loss {RUNG_NAMES[rung]}, {quoted(other)}, is {nats(abs(behind))} nats/token {side}.")
    measured = [candidate for candidate in candidates if candidate["zero_shot_loss"] is not None]
    if rung == "short_distill_loss" and measured:
        first = min(measured, key=lambda candidate: candidate["zero_shot_loss"])
        sentences.append("It was first by zero-shot loss too." if first["chosen"] else f"By zero-shot loss alone {quoted(first['id'])} was first.")
    return sentences


def candidates_table(candidates: Sequence[Candidate]) -> str:
    """The shortlist, those that got furthest first and of them the lowest loss; a column for every rung that was measured."""
    known = [measure for measure in MEASURES if any(candidate[measure[0]] is not None for candidate in candidates)]
    has_experts, rows = any("active_parameters" in candidate for candidate in candidates), []
    for place, candidate in enumerate(best_first(candidates), start=1):
        cells = ["–" if candidate[name] is None else text(candidate[name]) for name, _, text in known]
        name = f"{place}. **{quoted(candidate['id'])}**" if candidate["chosen"] else f"{place}. {quoted(candidate['id'])}"
        active = [f"{candidate['active_parameters']:,}"] if has_experts else []
        sizes = (f"{candidate['parameters']:,}", *active, format_gib(candidate["memory_bytes"]["total"]).removesuffix(" GiB"))
        rows.append((name, *cells, *sizes, _note(candidate)))
    return table(("candidate", *(title for _, title, _ in known), "parameters", *(["active per token"] if has_experts else []), "memory (GiB)", "note"), rows)


def _note(candidate: Candidate) -> str:
    """That a candidate is the chosen one, or on the Pareto front, or why it was not to be chosen; that its speed does not compare with the others';
    and that its rows are of odd lengths."""
    beside = "decoded beside other work" if candidate.get("speed_alone") is False else ""
    odd = f"odd rows ({quoted(', '.join(candidate['row_notes']))})" if candidate.get("row_notes") else ""
    note = quoted(candidate.get("note", ""), LONG)
    remarks = ["**chosen**" if candidate["chosen"] else "", "front" if candidate["on_pareto_front"] else "", note, beside, odd]
    return ", ".join(remark for remark in remarks if remark)


def table_notes(summary: Summary, lap: Summary) -> str:
    """How to read the candidates' table: what each measure is of, and what a dash means."""
    candidates = lap["candidates"]

    def measured(name: str) -> bool:
        return any(candidate[name] is not None for candidate in candidates)

    notes = []
    if measured("zero_shot_loss"):
        notes.append("Zero-shot: cut, not trained; KL is to the teacher. Losses here are on held-out rows of their own: compare them within this table only.")
    if measured("modelled_tokens_per_second"):
        load = summary["throughput"]
        batch = f"{load['batch']:,} at once" if load["batch"] else "as many at once as fit the budget"
        notes.append(f"Modelled speed: the most that {quoted(load['device'] or summary['budget']['name'])} could reach (a roofline), "
                     f"{load['input_tokens']:,} tokens in and {load['output_tokens']:,} out, {batch}.")  # fmt: skip
    if any(candidate["on_pareto_front"] for candidate in candidates):
        notes.append("Front: on the Pareto front, so no other is as good in loss, memory and modelled speed and better in one of them.")
    if any(candidate.get("speed_alone") is False for candidate in candidates):
        notes.append("Decoded beside other work: other processes kept this machine's cores busy meanwhile, so that speed is too low to compare.")
    if any(candidate.get("row_notes") for candidate in candidates):
        chosen = chosen_candidate(lap)
        of_chosen = f" The chosen one's: {quoted('; '.join(chosen['row_notes'].values()), LONG)}." if chosen and chosen.get("row_notes") else ""
        notes.append(f"Odd rows: of a length that packing into 4 bits, or a fast kernel, does not take; the model runs all the same.{of_chosen}")
    if lap["search"].get("later_widths"):
        notes.append("Memory is at full width; the widths that are cut next bring it under the budget.")
    return " ".join(notes)


def screens_table(lap: Summary) -> str:
    """The short distillations: what each gave, from how many tokens, in which time."""
    measured, rows = {candidate["id"]: candidate for candidate in lap["candidates"]}, []
    for label, stage in lap["stages"].items():
        if label.startswith("screen "):
            candidate = measured[label.removeprefix("screen ")]
            loss = "diverged" if candidate["short_distill_loss"] is None else nats(candidate["short_distill_loss"])
            tokens = candidate.get("short_distill_tokens")
            when = "earlier run" if stage["cached"] else "this run"
            key = code(stage["key"]).replace("|", "¦")  # a | ends a cell, in code too
            rows.append((quoted(candidate["id"]), loss, "–" if tokens is None else f"{tokens:,}", duration(stage["seconds"]), when, key))
    return table(("id", "held-out loss (nats/token)", "tokens", "time", "done in", "key"), rows)


def architecture_table(summary: Summary, student: Mapping[str, Any]) -> str:
    """Sizes of teacher and student side by side; only of the kinds of layers that the teacher has."""
    teacher = summary["models"]["teacher"]
    before, after = (Architecture(**model["architecture"]) for model in (teacher, student))
    kinds, left = before.layer_kinds, after.layer_kinds
    rows = [("layers", len(kinds), len(left))]
    if set(kinds) <= set(BLOCK_LETTERS) and len(set(kinds)) == 1:
        rows = [(f"layers ({KIND_NAMES[kinds[0]]})", len(kinds), len(left))]
    else:
        rows += [(f"– {name}", kinds.count(kind), left.count(kind)) for kind, name in KIND_NAMES.items() if kind in kinds]
    there = set(before.pattern + before.mixers)
    rows += [(label, getattr(before, name), getattr(after, name)) for name, label, letters in SIZES if set(letters) & there and getattr(before, name)]
    rows += [("parameters", teacher["parameters"], student["parameters"])]
    if "E" in there:
        rows += [("– active per token", count_active_parameters(before), count_active_parameters(after))]
    return table(("", "teacher", "student", "change"), [(label, f"{old:,}", f"{new:,}", change(old, new)) for label, old, new in rows])


def pattern_lines(summary: Summary) -> str:
    """The layers of the model that is cut, a character each, with the removed ones marked underneath, as a code block."""
    kinds, removed, cut = cut_kinds(summary), removed_layers(summary), "base" if summary["base"] else "teacher"
    if not removed:
        return "No layer is removed."
    pattern = "".join(BLOCK_LETTERS.get(kind, kind) for kind in kinds)
    ruler = "".join(f"{layer:<10}" for layer in range(0, len(pattern), 10))
    marks = "".join("^" if layer in removed else " " for layer in range(len(pattern))).rstrip()
    student = "".join(" " if layer in removed else letter for layer, letter in enumerate(pattern)).rstrip()
    lines = [f"layer    {ruler.rstrip()}", f"{cut:<7}  {pattern}", f"removed  {marks}", f"student  {student}"]
    of = "the given base's " if summary["base"] else ""
    single = "Letters: M Mamba-2, `*` attention, - FFN" + ", E experts" * ("E" in kinds)
    letters = ", ".join(legend for kind, legend in LEGENDS.items() if kind in kinds) or single
    listed = f"{len(removed)} of {of}{len(pattern)} layers removed: {', '.join(map(str, removed))}. {letters}."
    return "```\n" + "\n".join(lines) + "\n```\n\n" + listed
