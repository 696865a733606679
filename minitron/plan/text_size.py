"""How much text there is, before any of it is read: bytes of files, and tokens by a rule of thumb."""

import functools
import math
from dataclasses import dataclass

from minitron.formats.files import matching_files, text_bytes
from minitron.formats.kinds import TEXT, extension
from minitron.settings.data import DataSettings, Embedded
from minitron.settings.training import Form, Rows
from minitron.sources.document import HELD_OUT_SHARE
from minitron.sources.embedded import source_files

TOPIC_BYTES = 465_000  # of pydoc's topics
PROSE_SHARE = 0.188  # of the library's sources, that docstrings and topics are
# UTF-8 bytes of a token: 3.14 with 2,048 tokens of vocabulary on code, 4.79 with 49,152 on prose (the embedded text of Python 3.11).
BYTES_AT_2048, BYTES_PER_DOUBLING, MOST_BYTES = 3.14, 0.36, 4.8
WRITTEN_OUT = 4.0  # times a file's bytes, where its records may be conversations, which a template adds to
ALL_BYTES = 1.5  # times a file's bytes there are surely no more tokens: normalised letters, and what is put before and after a document


@dataclass(frozen=True, slots=True)
class TextSize:
    """Of a source: bytes to read, and about how many tokens of rows each split has; None where nobody knows before reading.

    `most_rows` is a bound on the train rows that no tokenizer exceeds; None where there is none.
    """

    read_bytes: int
    train_tokens: int | None
    held_out_tokens: int | None
    most_rows: int | None = None


def text_size(data: DataSettings, vocab: int) -> TextSize:
    """What the data stage, or a phase's rows, will read. Raises ValueError for files that are not there."""
    if data.dataset:
        return TextSize(0, data.max_train_tokens, data.max_heldout_tokens)
    if data.arithmetic.problems and not data.files:
        rows, held_out = data.arithmetic.problems, data.arithmetic.problems // HELD_OUT_SHARE
        return _limited(data, TextSize(rows * data.sequence_length, (rows - held_out) * data.sequence_length, held_out * data.sequence_length, rows))
    read, num_bytes, at_most = _source_bytes(data)
    tokens = num_bytes / bytes_per_token(vocab)
    if data.rows is Rows.windows and data.form in (Form.auto, Form.text) and not data.messages_field and not data.key_value_share:  # which add to the text
        may_be_written_out = data.files and data.form is Form.auto and not all(extension(path) in TEXT for path in matching_files(data.files))
        times = WRITTEN_OUT if may_be_written_out else ALL_BYTES
        most = math.ceil(at_most * times / data.sequence_length) if at_most is not None else None  # a token is a byte at least
    else:
        most = None
    return _limited(data, TextSize(read, int(tokens * (1 - 1 / HELD_OUT_SHARE)), int(tokens / HELD_OUT_SHARE), most))


def bytes_per_token(vocab: int) -> float:
    """About how many bytes of text a token of a vocabulary so large stands for."""
    return max(1.0, min(MOST_BYTES, BYTES_AT_2048 + BYTES_PER_DOUBLING * math.log2(vocab / 2048)))


def _source_bytes(data: DataSettings) -> tuple[int, int, int | None]:
    """Bytes to read, of text, and of text at most, None where nobody knows."""
    if data.files:
        sizes = [text_bytes(path) for path in matching_files(data.files)]
        stored, total = sum(size for size, _ in sizes), sum(size for _, size in sizes)
        return max(stored, total), total, total if stored == total else None
    code = _code_bytes()
    return code, int(PROSE_SHARE * code) if data.embedded is Embedded.prose else code, code


@functools.cache
def _code_bytes() -> int:
    """Of the embedded text as code."""
    return TOPIC_BYTES + sum(path.stat().st_size for _, path in source_files())


def _limited(data: DataSettings, size: TextSize) -> TextSize:
    train, held_out = (min(limit or tokens, tokens) for limit, tokens in
                       ((data.max_train_tokens, size.train_tokens), (data.max_heldout_tokens, size.held_out_tokens)))  # fmt: skip
    limited = None if data.max_train_tokens is None else data.max_train_tokens // data.sequence_length
    most = min((rows for rows in (size.most_rows, limited) if rows is not None), default=None)
    return TextSize(size.read_bytes, train, held_out, most)
