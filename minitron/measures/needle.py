"""A needle in a haystack: does a model still know what stood far back, at growing lengths?

Somewhere in held-out text stands "The word of KEY is VALUE."; the text ends in "The word of KEY is", and the model ranks some words
by their likelihood there. Right is the one that was said. Ranking one next token among alternatives works for models that follow no
instructions, needs one forward pass a sample and has a known chance level, 1 / alternatives: to a model that saw nothing of the
context all alternatives are alike, as they are drawn alike. With several needles the other ones' values are among the alternatives,
so that it does not suffice to know what was said, but of which key (key-value retrieval).

Words and lines are those of minitron/text/key_values.py. B samples, T tokens.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from distill.batches import PADDING, plain_ids
from minitron.settings.evaluate import NeedleSettings
from minitron.text.key_values import Vocabulary


@dataclass(frozen=True, slots=True)
class Sample:
    """A prompt of exactly the length asked for, the alternatives' ids, and which of them is right."""

    prompt: list[int]
    alternatives: list[int]
    right: int


def check_vocabulary(vocabulary: Vocabulary, settings: NeedleSettings) -> None:
    """Raises ValueError where there are too few words of one token, or a length does not hold question and needles."""
    most = len(vocabulary.words) - settings.needles
    if settings.alternatives > most:
        raise ValueError(
            f"evaluate.needle.alternatives is {settings.alternatives}; it must be at most {max(most, 0)}: the tokenizer has {len(vocabulary.words)} words "
            f"of one token, {settings.needles} of them keys (evaluate.needle.lengths=[] leaves the probe out)"
        )
    least = len(vocabulary.question(0)) + settings.needles * len(vocabulary.line(0, 0))
    for length in settings.lengths:
        if length < least:
            raise ValueError(f"evaluate.needle.lengths has {length}; it must be at least {least}, the tokens of question and needles")


def make_sample(vocabulary: Vocabulary, text_T: np.ndarray, settings: NeedleSettings, *, length: int, depth: float, seed: list[int]) -> Sample:
    """One sample: the needle that is asked for at `depth` (0: the text's beginning, 1: right before the question), others anywhere."""
    random = np.random.default_rng(seed)
    chosen = random.choice(vocabulary.words, settings.needles + settings.alternatives, replace=False).tolist()
    keys, values = chosen[: settings.needles], chosen[settings.needles :]
    needles = [vocabulary.line(key, value) for key, value in zip(keys, values[: settings.needles], strict=True)]
    question = vocabulary.question(keys[0])
    room = length - len(vocabulary.beginning) - len(question) - sum(map(len, needles))
    haystack = text_T[(random.integers(len(text_T)) + np.arange(room)) % len(text_T)].tolist()
    places = [round(depth * room), *random.integers(room + 1, size=len(needles) - 1).tolist()]
    for place, needle in sorted(zip(places, needles, strict=True), reverse=True):  # from behind, so that places stay
        haystack[place:place] = needle
    right = int(random.integers(len(values)))
    values[0], values[right] = values[right], values[0]
    return Sample(vocabulary.beginning + haystack + question, values, right)


@torch.no_grad()
def measure_needle(model: nn.Module, vocabulary: Vocabulary, rows_RT: np.ndarray, settings: NeedleSettings, *, batch_tokens: int,
                   on_tokens: Callable[[int], None] = lambda _: None) -> dict[str, Any]:  # fmt: skip
    """Accuracy by length, with its standard error, and by depth within each; `batch_tokens` are run through the model at once."""
    device, within_RT = next(model.parameters()).device, plain_ids(rows_RT[:, len(vocabulary.beginning) :])
    text_T = within_RT[within_RT != PADDING]
    depths = [place / (settings.depths - 1) for place in range(settings.depths)] if settings.depths > 1 else [0.5]
    by_length = []
    for length in settings.lengths:
        samples = [make_sample(vocabulary, text_T, settings, length=length, depth=depth, seed=[length, place, number])
                   for place, depth in enumerate(depths) for number in range(settings.samples)]  # fmt: skip
        right = []
        for some in _parts(samples, max(1, batch_tokens // length)):
            prompts_BT = torch.tensor([sample.prompt for sample in some], device=device)
            logits_BV = model(prompts_BT, use_cache=False, logits_to_keep=1).logits[:, -1].float()
            offered = torch.tensor([sample.alternatives for sample in some], device=device)
            chosen = logits_BV.gather(1, offered).argmax(1).tolist()
            right += [choice == sample.right for choice, sample in zip(chosen, some, strict=True)]
            on_tokens(prompts_BT.numel())
        accuracy = sum(right) / len(right)
        by_depth = [sum(part) / len(part) for part in _parts(right, settings.samples)]
        by_length.append({"length": length, "accuracy": accuracy, "standard_error": math.sqrt(accuracy * (1 - accuracy) / len(right)), "by_depth": by_depth})
    return {"chance": 1 / settings.alternatives, "needles": settings.needles, "samples": settings.depths * settings.samples, "depths": depths,
            "by_length": by_length}  # fmt: skip


def _parts(items: list, size: int) -> list[list]:
    return [items[start : start + size] for start in range(0, len(items), size)]
