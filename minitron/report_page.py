"""The report as a page, from summary.json alone: what came of the run first, then every stage, then how to repeat it."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from memory_budget.architecture import LAYER_KINDS
from memory_budget.units import format_gib
from minitron.plots import chosen_candidate, removed_layers, sequences_text

Summary = Mapping[str, Any]

NEGLIGIBLE_NATS = 0.01  # per token: 1 % of perplexity; below it a share won back says nothing
NOISY_SPEED_SHARE = 0.05
KIND_NAMES = {"M": "Mamba-2", "*": "attention", "-": "FFN", "E": "MoE"}
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
    ("moe_num_experts", "experts", "E"),
    ("moe_ffn", "expert neurons", "E"),
    ("vocab", "vocabulary", "M*-E"),
)
STYLE = """
body { font: 16px/1.55 system-ui, sans-serif; color: #1c1c1c; background: #fff; max-width: 60rem; margin: 2rem auto; padding: 0 1.2rem; }
h1, h2, h3 { line-height: 1.25; } h2 { margin-top: 2.4rem; border-bottom: 1px solid #ddd; padding-bottom: .2rem; }
table { border-collapse: collapse; margin: 1rem 0; display: block; overflow-x: auto; font-variant-numeric: tabular-nums; font-size: .92rem; }
th, td { border: 1px solid #d5d5d5; padding: .35rem .6rem; } td { white-space: nowrap; } th { background: #f4f4f4; text-align: left; vertical-align: bottom; }
img { max-width: 100%; } code, pre { font: .88em/1.45 ui-monospace, Menlo, Consolas, monospace; background: #f6f6f6; }
code { padding: .1em .25em; overflow-wrap: anywhere; } pre { padding: .8rem; overflow-x: auto; } pre code { padding: 0; font-size: 1em; overflow-wrap: normal; }
"""


def page_markdown(summary: Summary, plots: Sequence[str]) -> str:
    """report.md; `plots` names the PNG files beside it."""
    blocks = [f"# Run {escaped(summary['run_name'])}", verdict(summary), models_table(summary), _how_to_read(summary), _image(plots, "memory.png", "Memory")]
    for name, stage in summary["stages"].items():
        blocks += [f"## {name}", _headline(name, stage, summary), _stage_facts(stage)]
        blocks += STAGE_BLOCKS[name](summary, plots) if name in STAGE_BLOCKS else []
    versions = table(("package", "version"), summary["versions"].items())
    folders = [f"{name} `{model['path']}`" for name, model in summary["models"].items() if model["path"]]
    blocks += ["## Where and how", f"Checkpoints: {', '.join(folders)}." if folders else "", "Every figure of this page is in [summary.json](summary.json)."]
    blocks += [f"Seed {summary['seed']}; the command:", f"```\n{summary['command']}\n```", versions]
    return "\n\n".join(block for block in blocks if block) + "\n"


def page_html(markdown: str, title: str) -> str:
    """report.html: the same page, with images by their relative paths."""
    from markdown_it import MarkdownIt

    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(markdown)
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{_html_text(title)}</title><style>{STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}</body></html>\n'


def verdict(summary: Summary) -> str:
    """What came of the run: a point each on memory, quality and speed."""
    points = (_fit_sentences(summary), _quality_sentences(summary), _speed_sentences(summary))
    return "\n".join("- " + " ".join(sentences) for sentences in points if sentences)


def _fit_sentences(summary: Summary) -> list[str]:
    budget, teacher = summary["budget"], summary["models"]["teacher"]
    served = f"To serve {sequences_text(budget['workload'])} the teacher needs {_gib(teacher)}"
    limit = f"the {format_gib(budget['bytes'])} of {escaped(budget['name'])}"
    sentences = [f"{served}; it **{'fits' if teacher['fits'] else 'does not fit'}** {limit}{_distance(teacher, budget['bytes'])}."]
    name, small = smallest_model(summary)
    if small is not None:
        before, after = teacher["memory_bytes"]["total"], small["memory_bytes"]["total"]
        verb = "fits" if after <= budget["bytes"] else "does not fit"
        change = f"{format_gib(abs(before - after))} {'less' if after <= before else 'more'} than the teacher ({_change(before, after)})"
        sentences.append(f"{name} needs {_gib(small)}, {change}; it **{verb}**{_distance(small, budget['bytes'])}.")
    return sentences


def smallest_model(summary: Summary) -> tuple[str, Mapping[str, Any] | None]:
    """How to call what the run made of the teacher, and its facts; None before the search."""
    models, chosen = summary["models"], chosen_candidate(summary)
    if "student" in models:
        return "The student", models["student"]
    if "pruned" in models:
        return "The pruned student, not distilled yet,", models["pruned"]
    return (f"The chosen architecture {chosen['id']}, not cut yet,", chosen) if chosen else ("", None)


def _gib(model: Mapping[str, Any]) -> str:
    return f"**{format_gib(model['memory_bytes']['total'])}**"


def _distance(model: Mapping[str, Any], budget_bytes: int) -> str:
    spare = budget_bytes - model["memory_bytes"]["total"]
    return f", with {format_gib(spare)} to spare" if spare >= 0 else f", {format_gib(-spare)} too much"


def _quality_sentences(summary: Summary) -> list[str]:
    """What pruning cost on held-out text and what distillation won back; shares only of what was lost."""
    results = evaluations(summary)
    if not {"teacher", "pruned", "student"} <= set(results):
        return ["Quality was not measured in this run (stage evaluate)."] if smallest_model(summary)[1] is not None else []
    teacher, pruned, student = (results[name]["loss_nats_per_token"] for name in ("teacher", "pruned", "student"))
    lost, won = pruned - teacher, pruned - student
    cost_much = f"Pruning cost {nats(lost)} nats per token on held-out text"
    moved = f"distillation {'lowered' if won > 0 else 'raised'} the held-out loss by {nats(abs(won))} nats per token"
    if lost <= NEGLIGIBLE_NATS:
        little, left = ("next to nothing", "hardly anything") if lost > 0 else ("nothing", "nothing")
        cost = f"Pruning cost {little} on held-out text ({_signed(lost)} nats per token), so there is {left} to win back"
        sentence = f"{cost}; {'distillation left it there' if abs(won) <= NEGLIGIBLE_NATS else moved}{_worse_than_no_distillation(won)}."
    elif abs(won) <= NEGLIGIBLE_NATS:
        sentence = f"{cost_much}; distillation hardly changed that ({_signed(-won)} nats per token)."
    elif won < 0:
        sentence = f"{cost_much}; {moved}, so none of it is won back{_worse_than_no_distillation(won)}."
    elif won > lost:
        sentence = f"{cost_much}; distillation won all of it back and {nats(won - lost)} more."
    else:
        sentence = f"{cost_much}; distillation won {100 * won / lost:.0f} % of it back, {nats(lost - won)} are left."
    before, now = (results[name]["kl_to_teacher_nats_per_token"] for name in ("pruned", "student"))
    return [sentence, f"KL to the teacher {'fell' if now < before else 'rose'} from {nats(before)} to {nats(now)} nats per token while distilling."]


def _worse_than_no_distillation(won: float) -> str:
    return " — the pruned model is the better one here" if won < -NEGLIGIBLE_NATS else ""


def _speed_sentences(summary: Summary) -> list[str]:
    speeds = {name: result["decode_tokens_per_second"] for name, result in evaluations(summary).items() if result.get("decode_tokens_per_second")}
    if not {"teacher", "student"} <= set(speeds):
        return []
    student, teacher = speeds["student"], speeds["teacher"]
    sentence = f"The student decodes {student / teacher:.2f} × as fast as the teacher ({student:.1f} against {teacher:.1f} tokens/s)"
    noise = abs(speeds["pruned"] / student - 1) if "pruned" in speeds else 0.0
    if noise <= NOISY_SPEED_SHARE:
        return [sentence + "."]
    return [f"{sentence}. The pruned model, same architecture, gave {speeds['pruned']:.1f} tokens/s: these speeds are good to {100 * noise:.0f} % only."]


def evaluations(summary: Summary) -> dict[str, Mapping[str, Any]]:
    """The evaluation of each model that has one."""
    return {name: model["evaluation"] for name, model in summary["models"].items() if model.get("evaluation")}


def models_table(summary: Summary) -> str:
    """Teacher, pruned and student, or the chosen candidate where nothing is cut yet; a column for everything known."""
    rows = dict(summary["models"])
    chosen = chosen_candidate(summary)
    if chosen and "pruned" not in rows:
        rows[f"{chosen['id']} (not cut)"] = {**chosen, "fits": chosen["memory_bytes"]["total"] <= summary["budget"]["bytes"]}
    columns: list[tuple[str, Callable[[Mapping], str | None]]] = [
        ("parameters", lambda model: f"{model['parameters']:,}"),
        ("memory", lambda model: format_gib(model["memory_bytes"]["total"])),
        ("fits", lambda model: "yes" if model["fits"] else "no"),
        ("loss (nats/token)", _measured("loss_nats_per_token", nats)),
        ("KL to teacher (nats/token)", _measured("kl_to_teacher_nats_per_token", nats)),
        ("top-1 as teacher", _measured("top1_agreement", lambda share: f"{100 * share:.1f} %")),
        ("decode (tokens/s)", _measured("decode_tokens_per_second", lambda speed: f"{speed:,.1f}")),
    ]
    known = [(title, cell) for title, cell in columns if any(cell(model) is not None for model in rows.values())]
    return table(("model", *(title for title, _ in known)), [(name, *(cell(model) or "–" for _, cell in known)) for name, model in rows.items()])


def _measured(name: str, text: Callable[[float], str]) -> Callable[[Mapping], str | None]:
    def cell(model: Mapping) -> str | None:
        value = (model.get("evaluation") or {}).get(name)
        return None if value is None else text(value)

    return cell


def _how_to_read(summary: Summary) -> str:
    workload = summary["budget"]["workload"]
    formats = f"weights {workload['weights_dtype']}, KV cache {workload['kv_dtype']}, SSM state {workload['ssm_dtype']}"
    chunk = workload["activation_tokens"]
    activations = f"activations of {chunk:,} tokens at once included" if chunk else "activations left out"
    text = f"Memory: {formats}, {activations}; 1 GiB = 2³⁰ bytes."
    tokens = [result["tokens"] for result in evaluations(summary).values()]
    return f"{text} Loss, KL and agreement: means over {tokens[0]:,} held-out tokens; lower loss and KL are better." if tokens else text


def _headline(name: str, stage: Mapping[str, Any], summary: Summary) -> str:
    # Not the stage's own: a share won back is only given where something was lost, by the verdict.
    if name == "evaluate":
        losses = [f"{model} {nats(result['loss_nats_per_token'])}" for model, result in evaluations(summary).items()]
        return f"Held-out loss in nats per token: {', '.join(losses)}."
    return escaped(stage["headline"][:1].upper() + stage["headline"][1:]) + "."


def _stage_facts(stage: Mapping[str, Any]) -> str:
    when = "already done by an earlier run, which took" if stage["cached"] else "done in this run, in"
    return f"*{when[:1].upper()}{when[1:]} {duration(stage['seconds'])} · process memory up to {format_gib(stage['peak_rss_bytes'])} · key `{stage['key']}`*"


def _teacher_blocks(summary: Summary, plots: Sequence[str]) -> list[str]:
    return [_image(plots, "teacher_training.png", "Loss of the teacher while it was trained")]


def _score_blocks(summary: Summary, plots: Sequence[str]) -> list[str]:
    some_at_floor = None in summary["importance"]["first_round_scores"]
    note = "Layers without a bar are of a kind that may not lose more of them." if some_at_floor and "layer_importance.png" in plots else ""
    layers = _image(plots, "layer_importance.png", "Importance of every layer before any was removed")
    return [layers, note, _image(plots, "width_importance.png", "Importance of the units of every axis, sorted, one line a layer")]


def _search_blocks(summary: Summary, plots: Sequence[str]) -> list[str]:
    teacher, chosen = summary["models"]["teacher"], chosen_candidate(summary)
    blocks = [f"### Chosen: {chosen['id']}", architecture_table(teacher, chosen), pattern_lines(summary)]
    measured = any(candidate["zero_shot_loss"] is not None for candidate in summary["candidates"])
    blocks += ["### Shortlist", candidates_table(summary["candidates"]), _image(plots, "candidates.png", "Candidates: memory and zero-shot loss")]
    note = "Zero-shot: cut, not trained, on a sample of held-out rows of its own; compare it within this table only." if measured else ""
    return [*blocks, note]


def _distill_blocks(summary: Summary, plots: Sequence[str]) -> list[str]:
    return [_image(plots, "distillation.png", "Distillation: KL to the teacher, and held-out loss")]


STAGE_BLOCKS = {"teacher": _teacher_blocks, "score": _score_blocks, "search": _search_blocks, "distill": _distill_blocks}


def architecture_table(teacher: Mapping[str, Any], student: Mapping[str, Any]) -> str:
    """Sizes side by side; only of the kinds of layers that the teacher has."""
    before, after = teacher["architecture"], student["architecture"]
    rows = [("layers", len(before["pattern"]), len(after["pattern"]))]
    rows += [(f"– {KIND_NAMES[kind]}", before["pattern"].count(kind), after["pattern"].count(kind)) for kind in LAYER_KINDS if kind in before["pattern"]]
    rows += [(label, before[name], after[name]) for name, label, kinds in SIZES if set(kinds) & set(before["pattern"])]
    rows += [("parameters", teacher["parameters"], student["parameters"])]
    return table(("", "teacher", "student", "change"), [(label, f"{old:,}", f"{new:,}", _change(old, new)) for label, old, new in rows])


def pattern_lines(summary: Summary) -> str:
    """The teacher's pattern with the removed layers marked underneath, as a code block."""
    pattern, removed = summary["models"]["teacher"]["architecture"]["pattern"], removed_layers(summary)
    if not removed:
        return "No layer is removed."
    ruler = "".join(f"{layer:<10}" for layer in range(0, len(pattern), 10))
    marks = "".join("^" if layer in removed else " " for layer in range(len(pattern))).rstrip()
    student = "".join(" " if layer in removed else letter for layer, letter in enumerate(pattern)).rstrip()
    lines = [f"layer    {ruler.rstrip()}", f"teacher  {pattern}", f"removed  {marks}", f"student  {student}"]
    listed = f"{len(removed)} of {len(pattern)} layers removed: {', '.join(map(str, removed))}. Letters: M Mamba-2, `*` attention, - FFN."
    return "```\n" + "\n".join(lines) + "\n```\n\n" + listed


def candidates_table(candidates: Sequence[Mapping[str, Any]]) -> str:
    """The shortlist, best zero-shot loss first; columns for what was measured."""
    number = {"zero_shot_loss": ("zero-shot loss (nats/token)", nats), "short_distill_loss": ("after a short distillation (nats/token)", nats),
              "tokens_per_second": ("decode (tokens/s)", lambda speed: f"{speed:,.1f}")}  # fmt: skip
    known = [name for name in number if any(candidate[name] is not None for candidate in candidates)]
    rows = []
    for candidate in sorted(candidates, key=lambda one: (one["zero_shot_loss"] is None, one["zero_shot_loss"] or 0.0)):
        cells = ["–" if candidate[name] is None else number[name][1](candidate[name]) for name in known]
        sizes = (f"{candidate['parameters']:,}", format_gib(candidate["memory_bytes"]["total"]))
        rows.append((candidate["id"], *sizes, *cells, "**chosen**" if candidate["chosen"] else ""))
    return table(("id", "parameters", "memory", *(number[name][0] for name in known), ""), rows)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; every column but the first is right-aligned."""
    lines = [head, ("---", *("---:" for _ in head[1:])), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def nats(value: float) -> str:
    """A loss or KL with three decimals, four or an exponent where it is small."""
    if value == 0 or abs(value) >= 0.01:
        return f"{value:.3f}"
    return f"{value:.4f}" if abs(value) >= 0.0001 else f"{value:.0e}"


def duration(seconds: float) -> str:
    """27 s, 3 min 5 s, 2 h 10 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def escaped(text: str) -> str:
    """Text whose characters are no Markdown."""
    return re.sub(r"([\\`*_\[\]<>|#~])", r"\\\1", text)


def _signed(value: float) -> str:
    return ("+" if value >= 0 else "−") + nats(abs(value))


def _change(before: int, after: int) -> str:
    return "same" if before == after else f"{'+' if after > before else '−'}{100 * abs(after - before) / before:.1f} %"


def _image(plots: Sequence[str], name: str, text: str) -> str:
    return f"![{text}]({name})" if name in plots else ""


def _html_text(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;")
