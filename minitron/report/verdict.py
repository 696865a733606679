"""What came of a run, in words and in one table: what fits, what was chosen, what it cost and how fast it is."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from memory_budget.units import format_gib
from minitron.report.search import choice_sentences
from minitron.report.summary import chosen_candidate, sequences_text
from minitron.report.text import TWO_SIDED, Summary, change, change_of_perplexity, duration, error_text, is_noise, nats, quoted, signed, speed, table

NEGLIGIBLE_NATS = 0.01  # per token: 1 % of perplexity; below it a share won back says nothing
NOISY_SPEED_SHARE = 0.05
MOST_NAMED = 3  # stages


def verdict(summary: Summary) -> str:
    """What came of the run: the answer in two or three sentences, then a point each on memory, quality, the plain slice, speed, what it took and the choice."""
    points = {"Memory": _fit_sentences(summary), "Quality": _quality_sentences(summary), "Against the plain slice": _against_slice(summary),
              "Long context": _long_context_sentences(summary), "Speed": _speed_sentences(summary), "What it took": taken_sentences(summary),
              "Choice": _choices(summary)}  # fmt: skip
    listed = "\n".join(f"- **{name}.** {' '.join(sentences)}" for name, sentences in points.items() if sentences)
    return "\n\n".join(filter(None, [" ".join(_answer(summary)), listed]))


def _answer(summary: Summary) -> list[str]:
    """The run in a breath: does it fit, how much worse is it, was the care worth it. Nothing before there is a student's architecture."""
    name, small = smallest_model(summary)
    if small is None or widths_come_later(summary):
        return []
    budget, needed = summary["budget"]["bytes"], small["memory_bytes"]["total"]
    said = [f"**{name} {'fits' if needed <= budget else 'does not fit'}**: {format_gib(needed)} of {format_gib(budget)}."]
    results, apart = evaluations(summary), summary["recovery"].get("differences", {})
    if {"teacher", "student"} <= set(results):
        left = results["student"]["loss_nats_per_token"] - results["teacher"]["loss_nats_per_token"]
        than = "as good as the teacher, as far as these rows can tell" if is_noise(left, apart.get("left")) else f"{_side(left)} than the teacher"
        said.append(f"On held-out text it is {than}: {signed(left)}{error_text(apart.get('left'))} nats per token, perplexity {change_of_perplexity(left)}.")
    if sliced := summary.get("against_slice"):
        higher = sliced["models"]["student"]["loss_nats_per_token"] - results["student"]["loss_nats_per_token"]
        as_good = "as good, as far as these rows can tell" if is_noise(higher, sliced.get("difference")) else f"{nats(abs(higher))} nats {_side(higher)}"
        said.append(f"A plain slice of the same sizes, trained on the same tokens, is {as_good}.")
    return said


def _side(nats_per_token: float) -> str:
    return "worse" if nats_per_token > 0 else "better"


def _choices(summary: Summary) -> list[str]:
    """What each lap chose of how many; the search's own section says more."""
    if not summary["depth_lap"]:
        return choice_sentences(summary)[:1]
    return [f"{name} lap: {sentence}" for name, lap in (("First", summary["depth_lap"]), ("Second", summary)) for sentence in choice_sentences(lap)[:1]]


def _fit_sentences(summary: Summary) -> list[str]:
    budget, teacher = summary["budget"], summary["models"]["teacher"]
    served = f"To serve {sequences_text(budget['workload'])} the teacher needs {_gib(teacher)}"
    named = "of the budget" if budget["name"].endswith(" GiB") else f"of {quoted(budget['name'])}"  # a name that says no more than the number
    limit = f"the {format_gib(budget['bytes'])} {named}"
    sentences = [f"{served}; it **{'fits' if teacher['fits'] else 'does not fit'}** {limit}{_distance(teacher, budget['bytes'])}."]
    name, small = smallest_model(summary)
    if widths_come_later(summary):
        sentences.append("Only the first lap, depth, is under way; widths are cut after it.")
    elif small is not None:
        before, after = teacher["memory_bytes"]["total"], small["memory_bytes"]["total"]
        verb = "fits" if after <= budget["bytes"] else "does not fit"
        difference = f"{format_gib(abs(before - after))} {'less' if after <= before else 'more'} than the teacher ({change(before, after)})"
        sentences.append(f"{name} needs {_gib(small)}, {difference}; it **{verb}**{_distance(small, budget['bytes'])}.")
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
    lost, won, apart = pruned - teacher, pruned - student, summary["recovery"].get("differences", {})
    what = "Pruning, with the first lap's distillation in between," if summary["depth_lap"] else "Pruning"
    cost_much = f"{what} cost {nats(lost)}{error_text(apart.get('cut'))} nats per token on held-out text"
    moved = f"distillation {'lowered' if won > 0 else 'raised'} the held-out loss by {nats(abs(won))}{error_text(apart.get('won'))} nats per token"
    if lost <= NEGLIGIBLE_NATS:
        little, left = ("next to nothing", "hardly anything") if lost > 0 else ("nothing", "nothing")
        cost = f"{what} cost {little} on held-out text ({signed(lost)} nats per token), so there is {left} to win back"
        sentence = f"{cost}; {'distillation left it there' if abs(won) <= NEGLIGIBLE_NATS else moved}{_worse_than_no_distillation(won)}."
    elif abs(won) <= NEGLIGIBLE_NATS or is_noise(won, apart.get("won")):
        sentence = f"{cost_much}; distillation hardly changed that ({signed(-won)} nats per token)."
    elif won < 0:
        sentence = f"{cost_much}; {moved}, so none of it is won back{_worse_than_no_distillation(won)}."
    elif won > lost:
        sentence = f"{cost_much}; distillation won all of it back and {nats(won - lost)} more."
    else:
        sentence = f"{cost_much}; distillation won {100 * won / lost:.0f} % of it back, {nats(lost - won)} are left."
    before, now = (results[name]["kl_to_teacher_nats_per_token"] for name in ("pruned", "student"))
    distance = f"KL to the teacher {'fell' if now < before else 'rose'} from {nats(before)} to {nats(now)} nats per token while distilling."
    return [sentence, distance]


def _against_slice(summary: Summary) -> list[str]:
    """What the plain slice of the same architecture does, where it was distilled too."""
    if not (against := summary.get("against_slice")):
        return []
    pruned, student = (evaluations(summary)[name]["loss_nats_per_token"] for name in ("pruned", "student"))
    found = {name: one["loss_nats_per_token"] for name, one in against["models"].items()}
    apart, below = found["student"] - student, "lower" if student <= found["student"] else "higher"
    noise = " These rows cannot tell that from nothing." if is_noise(apart, against.get("difference")) else ""
    return [
        f"The plain slice of the same architecture starts at {nats(found['pruned'])}, this one at {nats(pruned)}; after the same "
        f"{against['tokens']:,} tokens it is at {nats(found['student'])}, the student {nats(abs(apart))}{error_text(against.get('difference'))} {below}.{noise}"
    ]


def taken_sentences(summary: Summary) -> list[str]:
    """Time of all stages that are done, and of what took most of it; memory and training tokens."""
    stages = {(stage["key"], label): stage for lap in (summary["depth_lap"], summary) for label, stage in lap.get("stages", {}).items() if label != "base"}
    if not stages:
        return []
    seconds: dict[str, float] = {}
    for (_, label), stage in stages.items():
        name = label.split(" ")[0]
        seconds[name] = seconds.get(name, 0.0) + stage["seconds"]
    most = sorted(seconds, key=lambda name: -seconds[name])[:MOST_NAMED]
    named = ", ".join(f"{name} {duration(seconds[name])}" for name in most)
    cached = sum(stage["cached"] for stage in stages.values())
    earlier = "all of it in earlier runs" if cached == len(stages) else "part of it in earlier runs" if cached else ""
    memory = max(stage["peak_rss_bytes"] for stage in stages.values())
    said = [f"{duration(sum(seconds.values()))}{f', {earlier}' if earlier else ''}; most of it {named}. A process had at most {format_gib(memory)} of memory."]
    tokens = [lap["distillation"]["tokens"] for lap in (summary["depth_lap"], summary) if lap and lap["distillation"]]
    return [*said, *([f"Distillation learnt from {' and '.join(f'{one:,}' for one in tokens)} tokens."] if tokens else [])]


def _worse_than_no_distillation(won: float) -> str:
    return " — the pruned model is the better one here" if won < -NEGLIGIBLE_NATS else ""


def _long_context_sentences(summary: Summary) -> list[str]:
    """How often teacher and student find a fact in the longest of the texts that were tried."""
    found = {name: result["needle"] for name, result in evaluations(summary).items() if result.get("needle")}
    if not {"teacher", "student"} <= set(found):
        return []
    teacher, student = (found[name]["by_length"][-1] for name in ("teacher", "student"))
    shares = [f"{100 * at['accuracy']:.0f} ± {100 * at['standard_error']:.0f} %" for at in (teacher, student)]
    apart = math.hypot(teacher["standard_error"], student["standard_error"])
    noise = abs(teacher["accuracy"] - student["accuracy"]) <= TWO_SIDED * apart
    tries, chance = found["teacher"]["samples"], 100 * found["teacher"]["chance"]
    said = (f"A fact in a text of {teacher['length']:,} tokens is found by the teacher in {shares[0]} of {tries} tries, by the student in {shares[1]}; "
            f"± is the standard error, chance {chance:.3g} %.")  # fmt: skip
    return [said, "So few tries cannot tell the two apart."] if noise else [said]


def _speed_sentences(summary: Summary) -> list[str]:
    speeds = {name: result["decode_tokens_per_second"] for name, result in evaluations(summary).items() if result.get("decode_tokens_per_second")}
    if not {"teacher", "student"} <= set(speeds):
        return []
    student, teacher = speeds["student"], speeds["teacher"]
    noise = abs(speeds["pruned"] / student - 1) if "pruned" in speeds else 0.0
    if noise > abs(student / teacher - 1):
        return [f"Decoding speeds are too rough to tell student and teacher apart: {teacher:.1f} tokens/s of the teacher, {student:.1f} of the student, and "
                f"{speeds['pruned']:.1f} of the pruned model, whose architecture is the student's."]  # fmt: skip
    sentence = f"The student decodes {student / teacher:.2f} × as fast as the teacher ({student:.1f} against {teacher:.1f} tokens/s)"
    if noise <= NOISY_SPEED_SHARE:
        return [sentence + "."]
    return [f"{sentence}. The pruned model, same architecture, gave {speeds['pruned']:.1f} tokens/s: these speeds are good to {100 * noise:.0f} % only."]


def widths_come_later(summary: Summary) -> bool:
    """Whether the search that is shown is the first of two laps, the second not begun."""
    return bool(summary["search"].get("later_widths"))


def evaluations(summary: Summary) -> dict[str, Mapping[str, Any]]:
    """The evaluation of each model that has one."""
    return {name: model["evaluation"] for name, model in summary["models"].items() if model.get("evaluation")}


def models_table(summary: Summary) -> str:
    """Teacher, pruned and student, or the chosen candidate where nothing is cut yet; a column for everything known."""
    rows = dict(summary["models"])
    chosen = chosen_candidate(summary)
    if chosen and "pruned" not in rows and not widths_come_later(summary):
        rows[f"{chosen['id']} (not cut)"] = {**chosen, "fits": chosen["memory_bytes"]["total"] <= summary["budget"]["bytes"]}
    columns: list[tuple[str, Callable[[Mapping], str | None]]] = [
        ("parameters", lambda model: f"{model['parameters']:,}"),
        ("active per token", lambda model: f"{model['active_parameters']:,}" if "active_parameters" in model else None),
        ("memory", lambda model: format_gib(model["memory_bytes"]["total"])),
        ("fits", lambda model: "yes" if model["fits"] else "no"),
        ("loss (nats/token)", _measured("loss_nats_per_token", nats)),
        ("KL to teacher (nats/token)", _measured("kl_to_teacher_nats_per_token", nats)),
        ("top-1 as teacher", _measured("top1_agreement", lambda share: f"{100 * share:.1f} %")),
        ("decode (tokens/s)", _measured("decode_tokens_per_second", speed)),
    ]
    known = [(title, cell) for title, cell in columns if any(cell(model) is not None for model in rows.values())]
    return table(("model", *(title for title, _ in known)), [(name, *(cell(model) or "–" for _, cell in known)) for name, model in rows.items()])


def _measured(name: str, text: Callable[[float], str]) -> Callable[[Mapping], str | None]:
    def cell(model: Mapping) -> str | None:
        value = (model.get("evaluation") or {}).get(name)
        return None if value is None else text(value)

    return cell


def how_to_read(summary: Summary) -> str:
    """What the figures of memory and quality are of."""
    tokens = [result["tokens"] for result in evaluations(summary).values()]
    text = how_to_read_memory(summary)
    errors = " ± holds 95 %, models paired on the same rows." if any(summary["recovery"].get("differences", {}).values()) else ""
    return f"{text} Loss, KL and agreement: means over {tokens[0]:,} held-out tokens; lower loss and KL are better.{errors}" if tokens else text


def how_to_read_memory(summary: Summary) -> str:
    """What the figures of memory are of; of an SSM state nothing is said where no layer has one."""
    workload = summary["budget"]["workload"]
    state = f", SSM state {quoted(workload['ssm_dtype'])}" if "M" in summary["models"]["teacher"]["architecture"]["pattern"] else ""
    formats = f"weights {quoted(workload['weights_dtype'])}, KV cache {quoted(workload['kv_dtype'])}{state}"
    chunk = workload["activation_tokens"]
    activations = f"activations of {chunk:,} tokens at once included" if chunk else "activations left out"
    return f"Memory: {formats}, {activations}; 1 GiB = 2³⁰ bytes."
