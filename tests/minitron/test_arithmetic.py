"""Generated problems: right answers, a seed, and held-out ones that are in no training row."""

import re

import pytest

from minitron.settings.data import DataSettings
from minitron.settings.reasoning import ArithmeticSettings, ReasoningSettings
from minitron.settings.training import DistillSettings, PhaseSettings, SourceSettings
from minitron.sources.arithmetic import Problem, held_out_problems, problem_documents, problems
from minitron.text.tokenise import read_documents

SOME = ArithmeticSettings(problems=3000, most_operands=4)


def test_answer_and_steps_are_those_of_the_question_worked_out():
    assert Problem((7, 5, 9, 3)).steps == [2, 7, 4]
    for problem in problems(SOME):
        value, *digits = map(int, re.findall(r"\d", problem.question))
        for digit in digits:
            value = max(value, digit) - min(value, digit)
        assert problem.document.text == f"{problem.question}<think>{''.join(f' {step}' for step in problem.steps)}</think> {value}"


def test_the_same_seed_gives_the_same_problems_and_another_others():
    assert list(problems(SOME)) == list(problems(SOME))
    assert list(problems(SOME)) != list(problems(ArithmeticSettings(problems=3000, most_operands=4, seed=1)))


def test_no_held_out_problem_is_among_those_for_training():
    trained = {document.text for document in problem_documents(SOME) if not document.is_held_out}
    held_out = [problem.document.text for problem in held_out_problems(SOME)]
    assert len(held_out) > 80 and not trained.intersection(held_out)
    assert len(set(held_out)) == len(held_out) and len(trained) < 2700  # some come twice, always in the same split


def test_a_cut_trace_is_closed_after_a_whole_step_and_keeps_its_answer(tmp_path):
    data = DataSettings(arithmetic=SOME, truncated_share=1.0)
    for problem, document in zip(problems(SOME), read_documents(data, tmp_path), strict=True):
        question, _, rest = document.text.partition("<think>")
        reasoning, closed, answer = rest.partition("</think>")
        steps = [int(step) for step in reasoning.split()]
        assert question == problem.question and closed and answer == f" {problem.answer}"
        assert steps == problem.steps[: len(steps)] and len(steps) < len(problem.steps)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ArithmeticSettings(most_operands=1), "data.arithmetic.most_operands is 1; it must be at least 2"),
        (lambda: ReasoningSettings(budgets=[0, 4, 2]), r"reasoning.budgets is \[0, 4, 2\]; it must be numbers of tokens, at least 0 and each above"),
        (lambda: ReasoningSettings(budgets=[-1]), r"reasoning.budgets is \[-1\]"),
        (lambda: DistillSettings(phases=[PhaseSettings(truncated_share=2.0)]), r"distill.phases\[0\].truncated_share is 2.0; it must be at least 0"),
        (lambda: DistillSettings(phases=[PhaseSettings(truncated_share=0.1, blend=[SourceSettings(files=["a.txt"])])]), "with a blend each source has its own"),
        (lambda: DataSettings(arithmetic=SOME, files=["a.txt"]), "data.arithmetic.problems is 3000, but data.files or data.dataset is given"),
    ],
)
def test_settings_that_cannot_be_met_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()
