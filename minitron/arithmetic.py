"""Problems in arithmetic with their reasoning written out step by step: what a tiny model can learn to think about in minutes.

`7-5-9-3=` asks for |||7 − 5| − 9| − 3|: the distance from the number so far to the next digit, from left to right. A step is easy and
one token long; all of them at once are beyond a small model, as each bends the line that the one before has given.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass

from minitron.reasoning_settings import ArithmeticSettings
from minitron.text import Document

ARITHMETIC_VERSION = 1  # rises when the same settings give other problems


@dataclass(frozen=True, slots=True)
class Problem:
    """Digits to take one after another."""

    digits: tuple[int, ...]

    @property
    def question(self) -> str:
        return "-".join(map(str, self.digits)) + "="

    @property
    def steps(self) -> list[int]:
        """The number after each digit but the first."""
        steps = [self.digits[0]]
        for digit in self.digits[1:]:
            steps.append(abs(steps[-1] - digit))
        return steps[1:]

    @property
    def answer(self) -> str:
        return str(self.steps[-1])

    @property
    def document(self) -> Document:
        """Question, reasoning and answer. Named by the question, so that whether it is held out follows from that alone."""
        reasoning = "".join(f" {step}" for step in self.steps)
        return Document(name=f"arithmetic/{self.question}", text=f"{self.question}<think>{reasoning}</think> {self.answer}")


def problems(settings: ArithmeticSettings) -> Iterator[Problem]:
    """`settings.problems` of them, of 2 to `settings.most_operands` digits, each once as long as there are others."""
    numbers, seen = random.Random(settings.seed), set()
    for _ in range(settings.problems):
        for _attempt in range(100):
            problem = Problem(tuple(numbers.choices(range(10), k=numbers.randint(2, settings.most_operands))))
            if problem not in seen:
                break
        seen.add(problem)
        yield problem


def problem_documents(settings: ArithmeticSettings) -> Iterator[Document]:
    return (problem.document for problem in problems(settings))


def held_out_problems(settings: ArithmeticSettings) -> Iterator[Problem]:
    """Those whose documents are held out."""
    return (problem for problem in problems(settings) if problem.document.is_held_out)
