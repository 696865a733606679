"""What came of a run, in words and in one table: what fits, what was chosen, what it cost and how fast it is."""

from collections.abc import Callable, Mapping
from typing import Any

from memory_budget.units import format_gib
from minitron.report.search import choice_sentences
from minitron.report.summary import chosen_candidate, sequences_text
from minitron.report.text import Summary, change, nats, quoted, signed, speed, table

NEGLIGIBLE_NATS = 0.01  # per token: 1 % of perplexity; below it a share won back says nothing
NOISY_SPEED_SHARE = 0.05


def verdict(summary: Summary) -> str:
    """What came of the run: a point each on memory, the choice (of either lap), quality and speed."""
    points = (_fit_sentences(summary), *_choices(summary), _quality_sentences(summary), _speed_sentences(summary))
    return "\n".join("- " + " ".join(sentences) for sentences in points if sentences)


def _choices(summary: Summary) -> list[list[str]]:
    """What each lap chose of how many; the search's own section says more."""
    if not summary["depth_lap"]:
        return [choice_sentences(summary)[:1]]
    laps = (("First lap", summary["depth_lap"]), ("Second lap", summary))
    return [[f"{name}: {sentences[0]}"] if (sentences := choice_sentences(lap)) else [] for name, lap in laps]


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
    lost, won = pruned - teacher, pruned - student
    what = "Pruning, with the first lap's distillation in between," if summary["depth_lap"] else "Pruning"
    cost_much = f"{what} cost {nats(lost)} nats per token on held-out text"
    moved = f"distillation {'lowered' if won > 0 else 'raised'} the held-out loss by {nats(abs(won))} nats per token"
    if lost <= NEGLIGIBLE_NATS:
        little, left = ("next to nothing", "hardly anything") if lost > 0 else ("nothing", "nothing")
        cost = f"{what} cost {little} on held-out text ({signed(lost)} nats per token), so there is {left} to win back"
        sentence = f"{cost}; {'distillation left it there' if abs(won) <= NEGLIGIBLE_NATS else moved}{_worse_than_no_distillation(won)}."
    elif abs(won) <= NEGLIGIBLE_NATS:
        sentence = f"{cost_much}; distillation hardly changed that ({signed(-won)} nats per token)."
    elif won < 0:
        sentence = f"{cost_much}; {moved}, so none of it is won back{_worse_than_no_distillation(won)}."
    elif won > lost:
        sentence = f"{cost_much}; distillation won all of it back and {nats(won - lost)} more."
    else:
        sentence = f"{cost_much}; distillation won {100 * won / lost:.0f} % of it back, {nats(lost - won)} are left."
    before, now = (results[name]["kl_to_teacher_nats_per_token"] for name in ("pruned", "student"))
    distance = f"KL to the teacher {'fell' if now < before else 'rose'} from {nats(before)} to {nats(now)} nats per token while distilling."
    return [sentence, *_against_slice(summary, pruned, student), distance]


def _against_slice(summary: Summary, pruned: float, student: float) -> list[str]:
    """What the plain slice of the same architecture does, where it was distilled too."""
    if not summary.get("against_slice"):
        return []
    found = {name: one["loss_nats_per_token"] for name, one in summary["against_slice"]["models"].items()}
    below = "lower" if student <= found["student"] else "higher"
    return [
        f"The plain slice of the same architecture starts at {nats(found['pruned'])}, this one at {nats(pruned)}; after the same "
        f"{summary['against_slice']['tokens']:,} tokens it is at {nats(found['student'])}, the student {nats(abs(found['student'] - student))} {below}."
    ]


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
    return f"{text} Loss, KL and agreement: means over {tokens[0]:,} held-out tokens; lower loss and KL are better." if tokens else text


def how_to_read_memory(summary: Summary) -> str:
    """What the figures of memory are of; of an SSM state nothing is said where no layer has one."""
    workload = summary["budget"]["workload"]
    state = f", SSM state {quoted(workload['ssm_dtype'])}" if "M" in summary["models"]["teacher"]["architecture"]["pattern"] else ""
    formats = f"weights {quoted(workload['weights_dtype'])}, KV cache {quoted(workload['kv_dtype'])}{state}"
    chunk = workload["activation_tokens"]
    activations = f"activations of {chunk:,} tokens at once included" if chunk else "activations left out"
    return f"Memory: {formats}, {activations}; 1 GiB = 2³⁰ bytes."
