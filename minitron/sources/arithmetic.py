"""Problems in arithmetic with their reasoning written out step by step: what a tiny model can learn to think about in minutes.

`7-5-9-3=` asks for |||7 − 5| − 9| − 3|: the distance from the number so far to the next digit, from left to right. A step is easy and
one token long; all of them at once are beyond a small model, as each bends the line that the one before has given.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass

from minitron.settings.reasoning import ArithmeticSettings
from minitron.sources.document import Document

# The question alone, and reasoning begun: what a conversation with such a model is.
CHAT_TEMPLATE = (
    "{%- for message in messages %}{{ message['content'] }}{% endfor %}"
    "{%- if add_generation_prompt %}{{ '<think></think>' if enable_thinking is defined and not enable_thinking else '<think>' }}{% endif %}"
)
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
    """`settings.problems` of them, of 2 to `settings.most_operands` digits, every length equally often; short ones come again."""
    numbers = random.Random(settings.seed)
    for _ in range(settings.problems):
        yield Problem(tuple(numbers.choices(range(10), k=numbers.randint(2, settings.most_operands))))


def problem_documents(settings: ArithmeticSettings) -> Iterator[Document]:
    return (problem.document for problem in problems(settings))


def held_out_problems(settings: ArithmeticSettings) -> list[Problem]:
    """Those whose documents are held out, each once."""
    return list(dict.fromkeys(problem for problem in problems(settings) if problem.document.is_held_out))
