"""The report's section on the evaluation: by source, speed and memory, the long-context probe, what they write, tasks; models side by side."""

from collections.abc import Callable, Mapping
from typing import Any

from memory_budget.units import format_gib
from minitron.report.text import Summary, nats, quoted, speed, table
from minitron.report.verdict import evaluations

WRITTEN = "What they write"
UNASKED = ("Nobody asked. `evaluate.held_out_prompts=2` beside the same command has teacher, pruned and student go on from two held-out texts, "
           "`evaluate.prompts='[\"It was a dark night\"]'` from texts of your own; nothing else is measured anew.")  # fmt: skip


def evaluation_blocks(summary: Summary, image: Callable[[str, str], str]) -> list[str]:
    """What the section shows under its headline; `image(name, caption)` shows a plot."""
    return [
        image("positions.png", "held-out loss, and KL to the teacher, by the number of tokens that stand before the predicted one"),
        source_table(summary),
        speed_table(summary),
        speed_note(summary),
        needle_note(summary),
        needle_table(summary),
        image("needle.png", "how often the fact was found, by the context's length and by where in it the fact stands"),
        tasks_table(summary),
    ]


def source_table(summary: Summary) -> str:
    """Loss by where the held-out rows come from, and the student's distance to the teacher there."""
    found = {name: {part["source"]: part for part in result["by_source"]} for name, result in _with(summary, "by_source").items()}
    if not found:
        return ""
    first, last = (list(found.values())[place] for place in (0, -1))
    head = ("source", "held-out tokens", *(f"{name}: loss (nats/token)" for name in found), f"{list(found)[-1]}: KL (nats/token)")
    return table(head, [(quoted(source), f"{part['tokens']:,}", *(nats(parts[source]["loss_nats_per_token"]) for parts in found.values()),
                         nats(last[source]["kl_to_teacher_nats_per_token"])) for source, part in first.items()])  # fmt: skip


def speed_table(summary: Summary) -> str:
    """Prefill, decoding and peak memory at each of the lengths."""
    rows = []
    for name, result in _with(summary, "speed").items():
        for at in result["speed"]:
            decode = at["decode_tokens_per_second"]
            rows.append((f"{at['batch']} × {at['input_tokens']:,} in, {at['output_tokens']:,} out", name + _beside(at),
                         f"{1000 * at['prefill_seconds']:,.0f} ms", speed(at["prefill_tokens_per_second"]),
                         "–" if decode is None else speed(decode), format_gib(at["peak_bytes"])))  # fmt: skip
    lengths = [row[0] for row in rows]
    rows.sort(key=lambda row: lengths.index(row[0]))  # by lengths, then models in their order
    head = ("sequences × tokens", "model", "first token after", "prefill (tokens/s)", "decode (tokens/s)", "peak memory")
    return table(head, rows) if rows else ""


def speed_note(summary: Summary) -> str:
    """What the figures of speed and memory are of."""
    measured = [at for result in _with(summary, "speed").values() for at in result["speed"]]
    if not measured:
        return ""
    beside = " † other processes kept this machine's cores busy meanwhile: too slow to compare." if any(map(_beside, measured)) else ""
    machines = ", ".join(sorted(set(map(_machine, measured))))
    return (f"Measured on {machines}, greedy, the best of three; speeds are of all sequences together. Peak memory is of tensors, weights included, without "
            f"the framework's own.{beside}")  # fmt: skip


def _beside(at: Mapping[str, Any]) -> str:
    """The mark of a speed that was measured beside other work."""
    return " †" if at.get("alone") is False else ""


def _machine(at: Mapping[str, Any]) -> str:
    threads = at.get("threads")
    return quoted(at["device"]) + (f" ({threads} thread{'s' if threads > 1 else ''})" if threads else "")


def needle_table(summary: Summary) -> str:
    """Accuracy of the long-context probe by length, with standard errors."""
    found = {name: result["needle"] for name, result in _with(summary, "needle").items()}
    if not found:
        return ""
    lengths = [at["length"] for at in next(iter(found.values()))["by_length"]]
    rows = [(f"{length:,}", *(_share(probe["by_length"][row]) for probe in found.values())) for row, length in enumerate(lengths)]
    return table(("context (tokens)", *found), rows)


def needle_note(summary: Summary) -> str:
    probe = next((result["needle"] for result in _with(summary, "needle").values()), None)
    if probe is None:
        return ""
    facts = "a fact stands" if probe["needles"] == 1 else f"{probe['needles']} facts stand"
    return (f"Long context: {facts} somewhere in held-out text and one is asked for at its end; the table has how often the right answer was the "
            f"likeliest, ± its standard error, of {probe['samples']} samples a length. Chance is {100 * probe['chance']:.1f} %.")  # fmt: skip


def continuations_text(summary: Summary) -> str:
    """A section: what every model writes after each of evaluate.prompts; without prompts, how to have some. Nothing before they are evaluated."""
    found = {name: result["continuations"] for name, result in _with(summary, "continuations").items()}
    if not evaluations(summary):
        return ""
    if not found:
        return f"## {WRITTEN}\n\n{UNASKED}"
    blocks = [f"## {WRITTEN}", "Greedily, the likeliest token each time; ⏎ is the end of a line."]
    for number, one in enumerate(next(iter(found.values()))):
        lines = [f"- **{name}**: {_continuation(written[number])}" for name, written in found.items()]
        blocks.append("\n".join([f"After {_quoted(one['prompt'])}", "", *lines]))
    return "\n\n".join(blocks)


def _continuation(one: Mapping[str, Any]) -> str:
    if one["text"] is None:
        return "cannot decode in transformers, having no attention layer"
    return _quoted(one["text"]) + (" (ended)" if one.get("ended") else "")


def _quoted(text: str) -> str:
    """Text as it is, in one line, whatever Markdown or HTML it would be."""
    return f"“{quoted(text, 2000)}”"


def tasks_table(summary: Summary) -> str:
    """Every metric of every task of lm-eval, ± its standard error."""
    found = {name: {task: one for group in result["tasks"].values() for task, one in group.items()} for name, result in _with(summary, "tasks").items()}
    if not found:
        return ""
    rows = []
    for task, one in next(iter(found.values())).items():
        for metric, value in one["metrics"].items():
            arrow = {True: " ↑", False: " ↓"}.get(value["higher_is_better"], "")
            cells = [_metric(tasks[task]["metrics"][metric]) for tasks in found.values()]
            rows.append((quoted(task), f"{'–' if one['samples'] is None else format(one['samples'], ',')}", f"{quoted(metric)}{arrow}", *cells))
    return table(("task (lm-eval)", "documents", "metric", *found), rows)


def _metric(value: Mapping[str, Any]) -> str:
    error = value["standard_error"]
    shown = f"{value['value']:.4g}" if isinstance(value["value"], float | int) else quoted(str(value["value"]))
    return shown if error is None else f"{shown} ± {error:.2g}"


def _share(at: Mapping[str, Any]) -> str:
    return f"{100 * at['accuracy']:.0f} ± {100 * at['standard_error']:.0f} %"


def _with(summary: Summary, name: str) -> dict[str, Mapping[str, Any]]:
    """The evaluations that have something under `name`, by model."""
    return {model: result for model, result in evaluations(summary).items() if result.get(name)}
