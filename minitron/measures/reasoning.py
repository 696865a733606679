"""Accuracy against the thinking budget, of the teacher, the student, and the student that learned from whole traces alone."""

import json
from dataclasses import asdict

from memory_budget.hf_config import read_config
from minitron.families.known import family_of
from minitron.generation.tokenizers import load_tokenizer
from minitron.machine.device import pick_device
from minitron.measures.budget_curve import budget_curve
from minitron.sources.arithmetic import held_out_problems
from minitron.walk.stage import StageContext
from minitron.walk.store import write_json

MODELS = {"teacher": "teacher", "student": "distill", "student_whole": "distill_whole"}


def measure_reasoning(context: StageContext) -> dict:
    """Writes <model>.json per model, each kept if the stage is interrupted."""
    settings, wanted = context.settings, context.settings.reasoning
    problems = held_out_problems(settings.data.arithmetic)[: wanted.problems]
    measured = {}
    if there := [name for name in MODELS if (context.folder / f"{name}.json").exists()]:
        context.goes_on(f"the answers of {', '.join(there)}, which are there")
    with context.console.track("answering", len(MODELS) * len(wanted.budgets) * len(problems), "problems") as advance:
        for name, stage in MODELS.items():
            path, folder = context.folder / f"{name}.json", context.inputs[stage].model_folder
            if path.exists():
                advance(len(wanted.budgets) * len(problems))
            else:
                model = family_of(read_config(folder)).load(folder, device=str(pick_device(settings)))
                points = budget_curve(model, load_tokenizer(folder), problems, wanted.budgets, batch=wanted.batch,
                                      new_tokens=settings.data.sequence_length, on_problems=advance)  # fmt: skip
                write_json(path, [asdict(point) for point in points])
            measured[name] = json.loads(path.read_text())
    full = {name: points[-1]["accuracy"] for name, points in measured.items()}
    half = {name: points[len(points) // 2]["accuracy"] for name, points in measured.items()}
    middle, largest = wanted.budgets[len(wanted.budgets) // 2], wanted.budgets[-1]
    headline = f"right answers with {largest} tokens of reasoning: teacher {full['teacher']:.1%}, student {full['student']:.1%}; with {middle}: "
    headline += f"student {half['student']:.1%}, from whole traces alone {half['student_whole']:.1%}"
    return {"headline": headline, "problems": len(problems), "curves": measured}
