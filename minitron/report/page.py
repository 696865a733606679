"""The report as a page of Markdown, from summary.json alone: what came of the run first, then every stage, then how to repeat it."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from memory_budget.architecture import BLOCKS
from memory_budget.units import format_gib
from minitron.report.data import data_blocks, more_rows_blocks
from minitron.report.evaluation import continuations_text, evaluation_blocks
from minitron.report.plan import plan_blocks
from minitron.report.search import architecture_table, candidates_table, choice_sentences, pattern_lines, screens_table, table_notes
from minitron.report.summary import REASONERS, chosen_candidate, kinds_of
from minitron.report.text import LONG, Summary, code, duration, fenced, image, nats, quoted, seen, sentence, table
from minitron.report.verdict import evaluations, how_to_read, models_table, verdict

BEFORE_THE_LAPS = ("data", "teacher")


class Which(Enum):
    """Which lap a section tells of; how its plots' captions begin."""

    only = ""
    depth = "First lap: "
    widths = "Second lap: "


@dataclass(frozen=True, slots=True)
class Part:
    """One lap as it is told of: its part of the summary, the PNG files there are, and its headings' level."""

    summary: Summary
    lap: Summary
    plots: Sequence[str]
    which: Which
    level: str

    def plot(self, name: str, caption: str) -> str:
        text = self.which.value + caption
        return image(self.plots, name, text[:1].upper() + text[1:])


def page_markdown(summary: Summary, plots: Sequence[str]) -> str:
    """report.md; `plots` names the PNG files beside it."""
    blocks = [f"# Run {quoted(summary['run_name'])}", verdict(summary), models_table(summary), how_to_read(summary)]
    blocks += [image(plots, "memory.png", "Memory of teacher and student, by what it is for"), continuations_text(summary), *_laps(summary, plots)]
    versions = table(("package", "version"), [(quoted(name), quoted(version)) for name, version in summary["versions"].items()])
    folders = [f"{name} {code(model['path'])}" for name, model in summary["models"].items() if model["path"]]
    blocks += plan_blocks(summary)
    blocks += ["## Where and how", "Folders, the command, versions; every figure of this page is in [summary.json](summary.json)."]
    blocks += [f"Checkpoints: {', '.join(folders)}."] if folders else []
    blocks += [f"Seed {summary['seed']}; the command:", fenced(seen(summary["command"]).split("\n"), ""), versions]
    return "\n\n".join(block for block in blocks if block) + "\n"


def _laps(summary: Summary, plots: Sequence[str]) -> Iterator[str]:
    """The stages of the one lap; or what comes before two laps, and each with what it alone did."""
    first, second = summary["depth_lap"], summary["stages"]
    if not first:
        yield from _stage_sections(Part(summary, summary, plots, Which.only, "##"), second)
        return
    yield from _stage_sections(Part(summary, first, plots, Which.only, "##"), [name for name in first["stages"] if name in BEFORE_THE_LAPS])
    yield "## First lap: depth"
    yield "Layers go first, at full width, and what is left is distilled; the second lap cuts widths from that checkpoint. Its teacher stays the same."
    depth = Part(summary, first, plots, Which.depth, "###")
    yield depth.plot("depth_lap.png", "every depth's loss, and the distillation of the one chosen")
    yield from _stage_sections(depth, [name for name in first["stages"] if name not in BEFORE_THE_LAPS])
    yield "## Second lap: widths"
    shared = [name for name in second if name in first["stages"] and first["stages"][name]["key"] == second[name]["key"]]
    begun = "Widths are cut from the first lap's student: channels, neurons, heads. What comes of it is distilled and measured."
    yield begun if len(second) > len(shared) else "Nothing of it is done yet."
    yield from _stage_sections(Part(summary, summary, plots, Which.widths, "###"), [name for name in second if name not in shared])


def _stage_sections(part: Part, names: Iterable[str]) -> Iterator[str]:
    """A section a stage; the screened candidates share one."""
    names = list(names)
    screens = [name for name in names if name.startswith("screen ")]
    for name in names:
        stage = part.lap["stages"][name]
        if name not in screens:
            yield from (f"{part.level} {name}", _headline(part, name), _stage_facts(stage))
            yield from STAGE_BLOCKS[name](part) if name in STAGE_BLOCKS else ()
        elif name == screens[0]:
            yield f"{part.level} screen"
            yield "Every finalist distilled briefly, on the same rows in the same order, from one cache of the teacher's outputs."
            yield screens_table(part.lap)


def _headline(part: Part, name: str) -> str:
    """The stage's own line, but for two that can say more, or less: a share won back is only given where something was lost, by the verdict."""
    if name == "evaluate":
        losses = [f"{model} {nats(result['loss_nats_per_token'])}" for model, result in evaluations(part.summary).items()]
        return f"Held-out loss in nats per token: {', '.join(losses)}."
    if name == "search":
        return " ".join(choice_sentences(part.lap))
    return sentence(part.lap["stages"][name]["headline"])


def _stage_facts(stage: Mapping[str, Any]) -> str:
    when = "already done by an earlier run, which took" if stage["cached"] else "done in this run, in"
    taken = f"{duration(stage['seconds'])} · process memory up to {format_gib(stage['peak_rss_bytes'])}"
    return f"*{when[:1].upper()}{when[1:]} {taken} · key {code(stage['key'])}*"


def _data_blocks(part: Part) -> list[str]:
    return [] if part.which is Which.widths else data_blocks(part.summary, part.plot)


def _phase_rows_blocks(part: Part) -> list[str]:
    return more_rows_blocks(part.lap["more_rows"]["phase_rows"])


def _whole_rows_blocks(part: Part) -> list[str]:
    return more_rows_blocks(part.lap["more_rows"]["whole_rows"])


def _teacher_blocks(part: Part) -> list[str]:
    return [part.plot("teacher_training.png", "loss of the teacher while it was trained")]


def _score_blocks(part: Part) -> list[str]:
    """Layers were scored by the first lap, the widths that are cut by the last."""
    blocks, of_blocks = [], set(kinds_of(part.summary, part.summary["importance"]["pattern"])) <= set(BLOCKS)
    if part.which is not Which.widths:
        some_at_floor = None in part.summary["importance"]["first_round_scores"]
        reason = "must stay" if of_blocks else "are of a kind that may not lose more of them"
        note = f"Layers without a bar {reason}." if some_at_floor and "layer_importance.png" in part.plots else ""
        blocks += [part.plot("layer_importance.png", "importance of every layer before any was removed"), note]
    if part.which is not Which.depth:
        lines = "one line a layer, of hidden channels two: for what attention reads and for what the FFN reads" if of_blocks else "one line a layer"
        blocks += [part.plot("width_importance.png", f"importance of the units of every axis, sorted, {lines}"),
                   part.plot("experts.png", "how many tokens the router sent to each expert, and how far the scores of experts are apart")]  # fmt: skip
    return blocks


def _search_blocks(part: Part) -> list[str]:
    summary, candidates = part.summary, part.lap["candidates"]
    blocks = []
    if part.which is not Which.depth:
        student = summary["models"].get("student", chosen_candidate(summary))
        blocks += [architecture_table(summary, student)]
    if part.which is not Which.widths:
        blocks += [pattern_lines(summary)]
    blocks += [candidates_table(candidates), table_notes(summary, part.lap)]
    if part.which is not Which.depth:
        blocks += [part.plot("candidates.png", "memory and loss of the shortlist; numbers are those of the table")]
        blocks += [part.plot("pareto.png", "loss against modelled speed; numbers are those of the table")]
    return blocks


def _shortlist_blocks(part: Part) -> list[str]:
    """The table as far as it is measured, where the search has not chosen of it yet."""
    return [] if "search" in part.lap["stages"] else [candidates_table(part.lap["candidates"]), table_notes(part.summary, part.lap)]


def _distill_blocks(part: Part) -> list[str]:
    caption = "KL to the teacher while distilling, and held-out loss"
    load = part.lap["distillation"].get("expert_load")
    plot = [] if part.which is Which.depth else [part.plot("distillation.png", caption)]
    return [*plot, *([quoted(load["sentence"], LONG)] if load else [])]


def _evaluate_blocks(part: Part) -> list[str]:
    return evaluation_blocks(part.summary, part.plot)


def _reasoning_blocks(part: Part) -> list[str]:
    curves = part.summary["reasoning"]["curves"]
    rows = [[REASONERS[name], *(f"{100 * point['accuracy']:.1f} ± {100 * point['standard_error']:.1f}" for point in points)] for name, points in curves.items()]
    head = ("right answers (%) with a budget of", *(str(point["budget"]) for point in curves["teacher"]))
    return [part.plot("thinking_budget.png", "right answers by the tokens of reasoning allowed, then closed"), table(head, rows)]


STAGE_BLOCKS: Mapping[str, Callable[[Part], list[str]]] = {
    "data": _data_blocks,
    "phase_rows": _phase_rows_blocks,
    "whole_rows": _whole_rows_blocks,
    "teacher": _teacher_blocks,
    "score": _score_blocks,
    "shortlist": _shortlist_blocks,
    "search": _search_blocks,
    "distill": _distill_blocks,
    "evaluate": _evaluate_blocks,
    "reasoning": _reasoning_blocks,
}
