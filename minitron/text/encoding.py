"""A piece of a source as token ids: what a process does that tokenises. Everything here follows from the piece and the settings alone, whoever does it."""

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from distill.batches import not_counted
from minitron.formats.blocks import records
from minitron.generation.answers import token_mask
from minitron.generation.conversations import ConversationWriter, Written
from minitron.generation.ends import end_ids
from minitron.generation.tokenizers import beginning, load_tokenizer
from minitron.settings.data import DataSettings
from minitron.sources.document import Document, source_of
from minitron.sources.pieces import Piece
from minitron.sources.turns import Conversation, Refused
from minitron.text.key_values import check_hiding, hide_lines, vocabulary_of
from minitron.text.traces import truncated

NO_TEXT, HELD_OUT_TOO, REFUSED = "without text", "equal to a held-out one", "refused"
MOST_NAMED = 5  # refused documents of a piece that are named


@dataclass(frozen=True, slots=True)
class Encoding:
    """How text becomes ids: plain values, which go to other processes. `hashes` is the file of what held-out documents hold, `vocabulary` the teacher's."""

    tokenizer: Path
    data: DataSettings
    vocabulary: int
    hashes: Path


@dataclass(slots=True)
class Encoded:
    """A piece's documents of one split: ids int32 [N], one document after the other, with `lengths`, and sources in runs (name, documents).

    `hashes` uint64 says what they hold; `seen` counts the split's documents, `left_out` those in no row by reason, `refused` names some: (document, why).
    """

    ids: np.ndarray
    lengths: np.ndarray
    sources: list[tuple[str, int]]
    hashes: np.ndarray
    seen: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    refused: list[tuple[str, str]] = field(default_factory=list)
    without_reasoning: int = 0

    def documents(self) -> Iterator[tuple[str, list[np.ndarray]]]:
        """Every run's source and documents."""
        parts, first = np.split(self.ids, np.cumsum(self.lengths)[:-1]) if len(self.lengths) else [], 0
        for source, number in self.sources:
            yield source, parts[first : first + number]
            first += number


@dataclass(frozen=True, slots=True)
class _Text:
    """A document's text and, where only answers count, the ranges of those; or its ids, where it came as such."""

    name: str
    text: str = ""
    answers: tuple[tuple[int, int], ...] | None = None
    ids: np.ndarray | None = None
    is_ended: bool = False  # by the template, if with space behind


class Encoder:
    """Encodes pieces. Raises ValueError, when called, naming file and document, for what cannot be read or be of the teacher's vocabulary."""

    def __init__(self, encoding: Encoding, tokenizer: PreTrainedTokenizerBase | None = None):
        """`tokenizer` takes the place of the one that `encoding` names."""
        self.encoding, self.data = encoding, encoding.data
        self.tokenizer = tokenizer or load_tokenizer(encoding.tokenizer)
        self.beginning = beginning(self.tokenizer)
        self._start = self.tokenizer.decode(self.beginning)  # rows begin with it whatever a template writes
        self._end = [] if self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id]
        self._turn_ends = set(end_ids(None, self.tokenizer))
        self._writer = ConversationWriter(self.tokenizer)
        if self.data.answers_only and not self.tokenizer.is_fast:
            raise ValueError("data.answers_only is true, but the teacher's tokenizer has no tokenizer.json, and no other says which characters a token is of")
        self._words = None
        if self.data.key_value_share and tokenizer is None:
            self._words = vocabulary_of(self.tokenizer)
            check_hiding(self._words, stretch=self.data.sequence_length)

    def __call__(self, piece: Piece, held_out: bool) -> Encoded:
        """The piece's documents of that split."""
        found = Encoded(np.empty(0, np.int32), np.empty(0, np.int32), [], np.empty(0, np.uint64))
        texts, hashes = [], []
        for place, record in records(piece.block, piece.of_split(held_out)):
            found.seen += 1
            text = self._read(piece, place, record, found, held_out, hashes)
            if text is not None:
                texts.append(text)
        ids = self._ids(texts, piece)
        if not held_out and self._words:
            ids = [np.array(hide_lines(one.tolist(), text.name, self._words, share=self.data.key_value_share, stretch=self.data.sequence_length), np.int32)
                   for one, text in zip(ids, texts, strict=True)]  # fmt: skip
        ids = [self._ended(one, text) for one, text in zip(ids, texts, strict=True)]
        found.ids = np.concatenate(ids) if ids else found.ids
        found.lengths, found.hashes = np.array([len(one) for one in ids], np.int32), np.array(hashes, np.uint64)
        for text in texts:
            source = source_of(text.name)
            if found.sources and found.sources[-1][0] == source:
                found.sources[-1] = (source, found.sources[-1][1] + 1)
            else:
                found.sources.append((source, 1))
        return found

    def texts(self, piece: Piece) -> Iterator[Document]:
        """The piece's documents that are not left out, as they would be tokenised; of both splits, whatever equals what."""
        found = Encoded(np.empty(0, np.int32), np.empty(0, np.int32), [], np.empty(0, np.uint64))
        for place, record in records(piece.block, range(len(piece.names))):
            text = self._read(piece, place, record, found, True, [])
            if text is not None:
                yield Document(name=text.name, text=text.text)

    def _read(self, piece: Piece, place: int, record: Any, found: Encoded, held_out: bool, hashes: list[int]) -> _Text | None:
        """One record as text; None where it is left out, which `found` counts. `hashes` gets what it holds."""
        name, document = piece.names[place], f"document {piece.block.first + place + 1} of {piece.block.file}"
        if isinstance(record, np.ndarray):
            if self.data.answers_only:
                raise ValueError(f"data: {document}: it comes as token ids, which do not say who answers; data.answers_only must be false")
            return self._checked(found, held_out, hashes, record.tobytes(), _Text(name, ids=record)) if len(record) else self._leave_out(found, NO_TEXT)
        try:
            content = record if piece.reading is None else piece.reading.content(record)
            if isinstance(content, Conversation):
                held, before = repr((content.messages, content.tools)).encode(), self._writer.without_reasoning
                if not held_out and self._is_held_out(held):  # before the work of writing it out
                    return self._leave_out(found, HELD_OUT_TOO)
                text = self._written(name, content)
                found.without_reasoning += self._writer.without_reasoning - before
            else:
                content = _mended(content)
                held, text = content.strip().encode(), self._plain(name, content)
        except Refused as error:
            found.refused += [(document, str(error))] if len(found.refused) < MOST_NAMED else []
            return self._leave_out(found, REFUSED)
        except ValueError as error:
            raise ValueError(f"data: {document}: {error}") from None
        if not text.text.strip():
            return self._leave_out(found, NO_TEXT)
        return self._checked(found, held_out, hashes, held, text)

    def _checked(self, found: Encoded, held_out: bool, hashes: list[int], held: bytes, text: _Text) -> _Text | None:
        if held_out:
            hashes.append(_hash(held))
        elif self._is_held_out(held):
            return self._leave_out(found, HELD_OUT_TOO)
        return text

    def _is_held_out(self, held: bytes) -> bool:
        place = np.searchsorted(self._held_out, value := np.uint64(_hash(held)))
        return place < len(self._held_out) and self._held_out[place] == value

    @cached_property
    def _held_out(self) -> np.ndarray:
        """Hashes of all held-out documents, sorted."""
        return np.load(self.encoding.hashes, mmap_mode="r") if self.encoding.hashes.exists() else np.empty(0, np.uint64)

    @staticmethod
    def _leave_out(found: Encoded, why: str) -> None:
        found.left_out[why] += 1

    def _plain(self, name: str, text: str) -> _Text:
        if self.data.answers_only and text.strip():
            raise ValueError("it is plain text, in which nobody answers; data.answers_only must be false")
        return _Text(name, truncated(text, (), name, self.data.truncated_share)[0])

    def _written(self, name: str, conversation: Conversation) -> _Text:
        """A conversation in the tokenizer's template. Raises Refused with the template's own sentence."""
        if not conversation.messages:
            return _Text(name, "", ())
        if not self.tokenizer.chat_template:
            raise ValueError("the tokenizer has no chat template to write a conversation in; data.form=text takes plain text")
        try:
            written: Written = self._writer.write(conversation.messages, conversation.tools, mark_answers=self.data.answers_only)
        except ValueError as error:
            raise Refused(str(error)) from None
        if not written.text.isascii() and _mended(written.text) != written.text:
            raise Refused("it holds half of a character (a lone surrogate)")
        text, shift = written.text.removeprefix(self._start), len(written.text) - len(written.text.removeprefix(self._start))
        answers = tuple((max(0, start - shift), end - shift) for start, end in written.answers or ())
        text, answers = truncated(text, answers, name, self.data.truncated_share)
        is_ended = bool(self._end) and text.rstrip().endswith(self.tokenizer.eos_token)
        return _Text(name, text, answers if self.data.answers_only else None, is_ended=is_ended)

    def _ids(self, texts: list[_Text], piece: Piece) -> list[np.ndarray]:
        """Every document's ids, marked where only its answers count."""
        if not texts or texts[0].ids is not None:
            return [self._within_vocabulary(text, piece) for text in texts]
        written = [text.text for text in texts]
        if not self.tokenizer.is_fast:
            return [np.array(ids, np.int32) for ids in self.tokenizer(written, add_special_tokens=False, verbose=False)["input_ids"]]
        backend = self.tokenizer.backend_tokenizer
        backend.no_truncation(), backend.no_padding()
        if not self.data.answers_only:
            return [np.array(one.ids, np.int32) for one in backend.encode_batch_fast(written, add_special_tokens=False)]
        return [_marked(np.array(one.ids, np.int32), token_mask(one.offsets, text.answers))
                for one, text in zip(backend.encode_batch(written, add_special_tokens=False), texts, strict=True)]  # fmt: skip

    def _within_vocabulary(self, text: _Text, piece: Piece) -> np.ndarray:
        ids, place = text.ids, list(piece.names).index(text.name)
        if ids.max() >= self.encoding.vocabulary or ids.min() < 0:
            wrong = ids.max() if ids.max() >= self.encoding.vocabulary else ids.min()
            raise ValueError(f"data: document {piece.block.first + place + 1} of {piece.block.file} has the token id {wrong:,}; the teacher's vocabulary holds "
                             f"{self.encoding.vocabulary:,}, ids must be from 0 to {self.encoding.vocabulary - 1:,}")  # fmt: skip
        return np.asarray(ids, np.int32)

    def _ended(self, ids: np.ndarray, text: _Text) -> np.ndarray:
        """Ids with the end of text after them, which a chat template, or who tokenised, may have written already. It counts where it is what ends an answer."""
        if not self._end or (len(ids) and ids[-1] in (self._end[0], not_counted(self._end[0]))) or text.is_ended:
            return ids
        if text.answers is None or not len(ids):
            return np.append(ids, np.int32(self._end[0]))
        ends_answer = text.answers and text.answers[-1][1] >= len(text.text) and int(ids[-1]) - not_counted(0) not in self._turn_ends
        last = ids[-1] - not_counted(0) if ends_answer else ids[-1]
        return np.append(ids[:-1], [last, not_counted(self._end[0])]).astype(np.int32)


def _marked(ids: np.ndarray, answered: np.ndarray) -> np.ndarray:
    """Ids marked at every position whose next token is not the assistant's."""
    following = np.append(answered[1:], False)
    return np.where(following, ids, not_counted(ids)).astype(np.int32)


def _mended(text: str) -> str:
    """A text with the replacement character for halves of characters, which JSON may hold and no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _hash(held: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(held, digest_size=8).digest())
