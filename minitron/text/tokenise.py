"""Documents as rows of tokens, with the teacher's tokenizer or one trained on them.

Everything keeps the order of the source, and the split goes by the documents' names: there is no seed.
"""

from collections.abc import Iterator
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from minitron.generation.tokenizers import load_tokenizer
from minitron.settings.data import DataSettings
from minitron.settings.teachers import is_trained, teacher_architecture
from minitron.sources import arithmetic
from minitron.sources.document import Document
from minitron.sources.source import open_source, source_title
from minitron.text import own_tokenizer
from minitron.text.card import data_card
from minitron.text.encoding import Encoder, Encoding
from minitron.text.passes import Place, Split, forget_passes, run_passes
from minitron.walk.stage import StageContext
from minitron.walk.store import write_json

HASHES_FILE = "heldout_hashes.npy"
SPLITS = {"heldout": "heldout", "train": "train"}


def make_rows(context: StageContext) -> dict:
    """Writes train.npy, heldout.npy, int32 [rows, T] with -1 as padding, heldout_sources.json (runs of rows: source, number), heldout_hashes.npy of what
    held-out documents hold, and for a trained teacher tokenizer/."""
    settings, data = context.settings, context.settings.data
    folder, place = tokenizer_folder(context), place_of(context, "source")
    if data.dataset:
        context.console.say(f"     data  reading {source_title(data)} from the Hub")
    if is_trained(settings):
        _train_tokenizer(data, folder, place.scratch)
    vocabulary = teacher_architecture(settings).vocab
    encoding = Encoding(folder, data, vocabulary, context.folder / HASHES_FILE)
    check_vocabulary(encoding)
    splits = run_passes(place, data, encoding, SPLITS)
    write_json(context.folder / "heldout_sources.json", splits["heldout"].counts.runs)
    card = data_card(context.folder, encoding, splits)
    forget_passes(context.folder)
    return {"headline": _headline(data, vocabulary, splits), **_facts(data, vocabulary, splits), "card": card}


def place_of(context: StageContext, scratch: str) -> Place:
    return Place(folder=context.folder, scratch=context.folder / scratch, console=context.console, goes_on=context.goes_on)


def check_vocabulary(encoding: Encoding) -> None:
    """Raises ValueError where the tokenizer has ids that the teacher does not know."""
    if (number := len(load_tokenizer(encoding.tokenizer))) > encoding.vocabulary:
        raise ValueError(f"tokenizer of {encoding.tokenizer} has {number} tokens; the teacher's vocabulary holds {encoding.vocabulary}")


def _facts(data: DataSettings, vocabulary: int, splits: dict[str, Split]) -> dict:
    facts = {"vocab": vocabulary, "source": source_title(data), "empty_documents": left_out(splits).get("without text", 0)}
    if lost := sum(split.tally.without_reasoning for split in splits.values()):
        facts["documents_without_reasoning"] = lost
    for name in ("train", "heldout"):
        split = splits[name]
        facts |= {f"{name}_tokens": split.counts.kept_tokens, f"{name}_rows": split.num_rows, f"{name}_documents": split.counts.documents}
    return facts


def _headline(data: DataSettings, vocabulary: int, splits: dict[str, Split]) -> str:
    source = f" from {source_title(data)}" if data.files or data.dataset else ""
    train, held_out = (splits[name].counts.kept_tokens for name in ("train", "heldout"))
    counts = f"{train:,} train and {held_out:,} held-out tokens{source}"
    return f"{counts} in rows of {data.sequence_length}, vocabulary {vocabulary:,}{said_of(splits)}"


def left_out(splits: dict[str, Split]) -> dict[str, int]:
    """Documents that are in no row, by reason."""
    found: dict[str, int] = {}
    for split in splits.values():
        for why, number in split.tally.left_out.items():
            found[why] = found.get(why, 0) + number
    return found


def said_of(splits: dict[str, Split]) -> str:
    """What of a source is in no row, in words behind a headline; "" for nothing."""
    reasons = ", ".join(f"{number:,} {why}" for why, number in left_out(splits).items())
    lost = sum(split.tally.without_reasoning for split in splits.values())
    said = f"; documents left out: {reasons}" if reasons else ""
    return said + (f"; documents that lost their reasoning to the chat template: {lost:,}" if lost else "")


def tokenizer_folder(context: StageContext) -> Path:
    """Where the teacher's tokenizer is: in its checkpoint, or, for a teacher that is trained on the data, where stage data leaves it."""
    if not is_trained(context.settings):
        return context.inputs["teacher"].model_folder
    return (context.inputs["data"].folder if "data" in context.inputs else context.folder) / "tokenizer"


def _train_tokenizer(data: DataSettings, folder: Path, scratch: Path) -> None:
    """The tokenizer of the train documents, written to `folder`."""
    template = arithmetic.CHAT_TEMPLATE if data.arithmetic.problems else own_tokenizer.CHAT_TEMPLATE
    texts = (document.text for document in read_documents(data, scratch) if not document.is_held_out)
    own_tokenizer.train_tokenizer(texts, data.vocab, folder, chat_template=template)


def read_documents(data: DataSettings, scratch: Path, tokenizer: PreTrainedTokenizerBase | None = None) -> Iterator[Document]:
    """Every document of the source that is not left out, of both splits, as it would be tokenised: conversations in the tokenizer's template, or, without one,
    in that of own_tokenizer. Raises ValueError as an Encoder does."""
    encoder = Encoder(Encoding(scratch, data, 0, scratch / HASHES_FILE), tokenizer or own_tokenizer.chat_tokenizer())
    for piece in open_source(data, scratch).pieces():
        yield from encoder.texts(piece)
