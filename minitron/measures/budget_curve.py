"""Accuracy against the thinking budget: problems answered by greedy text whose reasoning is closed after so many tokens."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedTokenizerBase

from minitron.generation.ends import end_ids, without_end
from minitron.generation.generate import Tags, generate
from minitron.generation.thinking import count_reasoning
from minitron.sources.arithmetic import Problem


@dataclass(frozen=True, slots=True)
class BudgetPoint:
    """What a budget of reasoning tokens comes to. accuracy is the share of right answers, standard_error its binomial one."""

    budget: int
    accuracy: float
    standard_error: float
    mean_reasoning_tokens: float
    most_reasoning_tokens: int


def budget_curve(model: nn.Module, tokenizer: PreTrainedTokenizerBase, problems: Sequence[Problem], budgets: Sequence[int], *, batch: int,
                 new_tokens: int, on_problems: Callable[[int], None] = lambda _: None) -> list[BudgetPoint]:  # fmt: skip
    """A point for each budget. `new_tokens` are the most of an answer, its reasoning included; `on_problems` hears how many were answered."""
    return [_point(model, tokenizer, problems, budget, batch, new_tokens, on_problems) for budget in budgets]


def _point(model: nn.Module, tokenizer: PreTrainedTokenizerBase, problems: Sequence[Problem], budget: int, batch: int, new_tokens: int,
           on_problems: Callable[[int], None]) -> BudgetPoint:  # fmt: skip
    tags, right, reasoning = Tags(), 0, []
    (open_ids, close_ids), ends = tags.ids(tokenizer), end_ids(model, tokenizer)
    for start in range(0, len(problems), batch):
        part = problems[start : start + batch]
        made = generate(model, tokenizer, [problem.question + tags.opening for problem in part], new_tokens=new_tokens, thinking_budget=budget, tags=tags)
        for problem, ids in zip(part, made, strict=True):
            reasoning.append(count_reasoning([*open_ids, *ids], open_ids, close_ids))
            answer = answer_of(tokenizer.decode(without_end(ids, ends)), tags) if ids[-1] in ends else None
            right += answer == problem.answer
        on_problems(len(part))
    assert max(reasoning) <= budget, f"{max(reasoning)} reasoning tokens under a budget of {budget}"
    accuracy = right / len(problems)
    error = (accuracy * (1 - accuracy) / len(problems)) ** 0.5
    return BudgetPoint(budget, accuracy, error, sum(reasoning) / len(reasoning), max(reasoning))


def answer_of(text: str, tags: Tags) -> str | None:
    """What follows the first closing tag of a text that has ended, without the spaces around it; None where there is no such tag."""
    _, closed, answer = text.partition(tags.closing)
    return answer.strip() if closed else None
