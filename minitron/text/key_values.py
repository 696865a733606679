"""Key-value lines, "The word of KEY is VALUE.": hidden in text, they ask whether a model still knows what stood far back.

The needle probe (minitron/measures/needle.py) ends a text in a key that was said before; a tiny teacher learns to look back from text in which such
lines return. Keys and values are words of one token in the tokenizer at hand, so that lengths are exact.
"""

import hashlib
import re
from dataclasses import dataclass, field

import numpy as np
from transformers import PreTrainedTokenizerBase

from minitron.generation.tokenizers import beginning

WORD = re.compile(r"[Ġ▁][a-z]{3,}")  # with the space before it, as byte-level and SentencePiece tokenizers write it
MOST_WORDS = 1024
MOST_LINES = 4  # keys hidden in one stretch of text
MOST_MENTIONS = 3  # of each, at least 2


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Ids: of single-token words, of the fixed parts of what is said, and of what a text begins with."""

    words: list[int]
    opening: list[int]
    says: list[int]
    end: list[int]
    beginning: list[int] = field(default_factory=list)

    def question(self, key: int) -> list[int]:
        return [*self.opening, key, *self.says]

    def line(self, key: int, value: int) -> list[int]:
        return [*self.question(key), value, *self.end]


def vocabulary_of(tokenizer: PreTrainedTokenizerBase) -> Vocabulary:
    """What the tokenizer offers; it may have few words of one token, or none."""
    parts = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("\nThe word of", " is", ".\n")]
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    words = [number for number, token in enumerate(tokens) if token and WORD.fullmatch(token) and number not in sum(parts, [])][:MOST_WORDS]
    return Vocabulary(words, *parts, beginning(tokenizer))


def hide_lines(tokens: list[int], name: str, vocabulary: Vocabulary, *, share: float, stretch: int) -> list[int]:
    """A document's ids with lines in `share` of its stretches, each of `stretch` ids with its lines: of 1 to 4 keys, each said twice or three times.

    Which, where and of what follows from the document's name.
    """
    random = np.random.default_rng(list(hashlib.sha256(name.encode()).digest()[:8]))
    found, place = [], 0
    while place < len(tokens):
        lines = _lines(vocabulary, random) if random.random() < share else []
        piece = tokens[place : place + stretch - sum(map(len, lines))]
        place += len(piece)
        places = sorted(random.integers(len(piece) + 1, size=len(lines)).tolist(), reverse=True)  # from behind, so that places stay
        for at, line in zip(places, lines, strict=True):
            piece[at:at] = line
        found += piece
    return found


def _lines(vocabulary: Vocabulary, random: np.random.Generator) -> list[list[int]]:
    number = 1 + int(random.integers(MOST_LINES))
    chosen = random.choice(vocabulary.words, 2 * number, replace=False).tolist()
    lines = [vocabulary.line(key, value) for key, value in zip(chosen[:number], chosen[number:], strict=True)]
    mentions = [line for line in lines for _ in range(2 + int(random.integers(MOST_MENTIONS - 1)))]
    return [mentions[place] for place in random.permutation(len(mentions))]


def check_hiding(vocabulary: Vocabulary, *, stretch: int) -> None:
    """Raises ValueError where a stretch has no room for lines and as much text again, or the tokenizer too few words."""
    longest = MOST_LINES * MOST_MENTIONS * len(vocabulary.line(0, 0))
    if stretch < 2 * longest:
        raise ValueError(f"data.key_value_share is above 0 and data.sequence_length {stretch}; it must then be at least {2 * longest}, room for lines and text")
    if len(vocabulary.words) < 2 * MOST_LINES:
        raise ValueError(f"data.key_value_share is above 0; the tokenizer has {len(vocabulary.words)} words of one token, {2 * MOST_LINES} are needed")
