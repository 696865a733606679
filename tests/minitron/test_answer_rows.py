"""Rows of which only answers count, from records of every form; and corpora that come as token ids."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch

from distill.batches import NOT_COUNTED, counted_positions, document_numbers, plain_ids
from minitron.settings.data import DataSettings, Refused
from minitron.settings.training import Rows
from minitron.text.encoding import Encoding
from minitron.text.passes import Place, Split, run_passes
from minitron.walk.console import Console

QUESTIONS, ANSWERS = (("One?", "Two?"), ("First.", "Second."))
TURNS = [{"role": role, "content": text} for both in zip(QUESTIONS, ANSWERS, strict=True) for role, text in zip(("user", "assistant"), both, strict=True)]


@pytest.fixture(scope="module")
def folders(chat_tokenizer, tmp_path_factory) -> dict[str, Path]:
    """Tokenizers of single bytes by their templates."""
    root = tmp_path_factory.mktemp("tokenizers")
    for name in ("qwen3", "llama3"):
        chat_tokenizer(name).save_pretrained(root / name)
    return {name: root / name for name in ("qwen3", "llama3")}


def train_rows(folder: Path, tokenizer: Path, data: DataSettings, vocabulary: int = 10**6) -> tuple[np.ndarray, Split]:
    place = Place(folder=folder, scratch=folder / "source", console=Console(quiet=True), goes_on=lambda _: None)
    split = run_passes(place, data, Encoding(tokenizer, data, vocabulary, folder / "none.npy"), {"train": "train"})["train"]
    return np.load(folder / "train.npy"), split


def learned(rows: np.ndarray, tokenizer) -> str:
    """The text of all tokens that are learned: each that follows a position that counts in its document."""
    found = []
    for row in rows:
        follows = np.append(counted_positions(row)[:-1], False)
        starts = row[1:] < -1  # of another document
        found += plain_ids(row)[1:][follows[:-1] & ~starts & (row[1:] != -1)].tolist()
    return tokenizer.decode(found)


def chats(path: Path, records: list[dict], **settings) -> DataSettings:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return DataSettings(**{"files": [str(path)], "answers_only": True, "rows": Rows.documents, "sequence_length": 256, "processes": 1} | settings)


# What qwen3's template writes before a last answer that has no reasoning is the assistant's.
LEARNED = {"qwen3": "First.<|im_end|><think>\n\n</think>\n\nSecond.<|im_end|>", "llama3": "First.<|eot_id|>Second.<|eot_id|>"}


@pytest.mark.parametrize("template", LEARNED)
@pytest.mark.parametrize("rows", list(Rows))
def test_what_is_learned_of_rows_is_what_the_assistant_writes(rows, template, folders, chat_tokenizer, tmp_path):
    """Every kind of row, the end of each turn with it; the control: without answers_only all of the same ids are learned."""
    tokenizer, whole = chat_tokenizer(template), LEARNED[template]
    length = {Rows.windows: 16, Rows.documents: 300, Rows.packed: 400}[rows]
    data = chats(tmp_path / "chat.jsonl", [{"messages": TURNS}] * 3, rows=rows, sequence_length=length)
    made, split = train_rows(tmp_path, folders[template], data)
    text = learned(made, tokenizer)
    if rows is Rows.windows:  # of a token at a row's beginning nothing in the row is asked, and a row without any answer is left out
        assert len(text) > 0 and len(text) % 3 == 0 and set(text) <= set(whole) and "?" not in text
        assert len(made) < sum(len(tokenizer(tokenizer.apply_chat_template(TURNS, tokenize=False))["input_ids"]) // length for _ in range(3))
    else:
        assert text == whole * 3
    (tmp_path / "plain").mkdir()
    whole_rows = chats(tmp_path / "chat.jsonl", [{"messages": TURNS}] * 3, rows=rows, sequence_length=length, answers_only=False)
    plain, _ = train_rows(tmp_path / "plain", folders[template], whole_rows)
    assert plain.max() < NOT_COUNTED < made.max()
    if rows is not Rows.windows:
        assert np.array_equal(plain_ids(plain), plain_ids(made)) and learned(plain, tokenizer) != text


TWO = {"system": "Be brief.", "question": "One?", "answer": "First."}
FORMS = {
    "messages": {"messages": [{"role": "system", "content": "Be brief."}, *TURNS[:2]]},
    "sharegpt": {"conversations": [{"from": "human", "value": "One?"}, {"from": "gpt", "value": "First."}], "system": "Be brief."},
    "prompt_answer": TWO,
    "prompt_answer of turns": {"input": TURNS[:1], "output": "First.", "system_prompt": "Be brief."},
    "alpaca": {"instruction": "One?", "input": "", "output": "First.", "system": "Be brief."},
    "preference": {"system": "Be brief.", "prompt": "One?", "chosen": "First.", "rejected": "Never."},
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_rows(form, folders, chat_tokenizer, tmp_path):
    """Told by its fields alone. The control: another answer gives others."""
    made, split = train_rows(tmp_path, folders["llama3"], chats(tmp_path / "chat.jsonl", [FORMS[form]] * 2))
    tokenizer = chat_tokenizer("llama3")
    said = {"system": "Be brief.", "user": "One?", "assistant": "First."}
    text = "<s>" + "".join(f"<|start_header_id|>{role}<|end_header_id|>\n\n{words}<|eot_id|>" for role, words in said.items()) + "</s>"
    assert tokenizer.decode(plain_ids(made[0])[made[0] != -1]) == text
    assert learned(made, tokenizer) == "First.<|eot_id|>" * 2 and len(split.tally.forms) == 1
    assert len(set(map(bytes, made))) == 1


def test_what_a_template_refuses_is_counted_named_and_left_out(folders, chat_tokenizer, tmp_path):
    chat_tokenizer("mistral").save_pretrained(tmp_path / "mistral")
    bad = [[TURNS[0], TURNS[0]], [{"role": "user", "content": [{"type": "image"}]}, TURNS[1]], [TURNS[0]]]
    data = chats(tmp_path / "chat.jsonl", [{"messages": turns} for turns in [TURNS, *bad, TURNS]])
    made, split = train_rows(tmp_path, tmp_path / "mistral", data)
    assert len(made) == 2 and split.tally.left_out == {"refused": 3}
    assert [document for document, _ in split.tally.refused] == [f"document {number} of chat.jsonl" for number in (2, 3, 4)]
    (tmp_path / "stopping").mkdir()
    stopping = chats(tmp_path / "chat.jsonl", [{"messages": turns} for turns in [TURNS, *bad]], refused=Refused.stop)
    with pytest.raises(ValueError, match="data: document 2 of chat.jsonl cannot be taken: .*data.refused=leave_out leaves such out"):
        train_rows(tmp_path / "stopping", tmp_path / "mistral", stopping)


@pytest.mark.parametrize(("records", "settings", "says"), [
    ([{"text": "plain"}] * 30, {}, "data: document 1 of chat.jsonl: it is plain text, in which nobody answers; data.answers_only must be false"),
    ([{"messages": TURNS}] * 9 + [{"other": 1}], {}, "data: document 10 of chat.jsonl: data.messages_field is 'messages'; there is no such field"),
    ([{"text": "a"}] * 9 + [{"text": 7}], {"answers_only": False}, "data: document 10 of chat.jsonl: data.text_field is 'text'; it must hold text, .* int: 7"),
    ([{"messages": TURNS[:1], "x": 1}] * 9, {}, "none can be taken; document 1 of chat.jsonl: no turn is the assistant's"),
])  # fmt: skip
def test_what_is_not_as_the_settings_say_is_one_line_that_names_the_document(records, settings, says, folders, tmp_path):
    with pytest.raises(ValueError, match=says) as caught:
        train_rows(tmp_path, folders["qwen3"], chats(tmp_path / "chat.jsonl", records, **settings))
    assert "\n" not in str(caught.value)


def test_answers_alone_want_text_in_which_somebody_answers():
    with pytest.raises(ValueError, match="data.answers_only is true, but neither data.files nor data.dataset is given"):
        DataSettings(answers_only=True)
    DataSettings(answers_only=True, dataset="owner/name")


def test_token_ids_are_taken_as_they_are_and_must_be_the_teachers(folders, tmp_path):
    ids = [[5, 6, 7, 8, 9], [10, 11, 12, 2]]
    pyarrow.parquet.write_table(pyarrow.table({"input_ids": ids}), tmp_path / "ids.parquet")
    data = DataSettings(files=[str(tmp_path / "ids.parquet")], rows=Rows.documents, sequence_length=8, processes=1)
    made, _ = train_rows(tmp_path, folders["qwen3"], data, vocabulary=13)
    assert made.tolist() == [[5, 6, 7, 8, 9, 2, -1, -1], [10, 11, 12, 2, -1, -1, -1, -1]]  # the end of text where it is not there
    for path in tmp_path.glob("train.*"):
        path.unlink()
    with pytest.raises(ValueError, match="document 1 of ids.parquet: it comes as token ids, which do not say who answers; data.answers_only must be false"):
        train_rows(tmp_path, folders["qwen3"], replace(data, answers_only=True), vocabulary=13)
    with pytest.raises(ValueError, match="data: document 2 of ids.parquet has the token id 12; the teacher's vocabulary holds 12, ids must be from 0 to 11"):
        train_rows(tmp_path, folders["qwen3"], data, vocabulary=12)


def test_packed_rows_count_documents_apart(folders, tmp_path):
    made, _ = train_rows(tmp_path, folders["qwen3"], chats(tmp_path / "chat.jsonl", [{"messages": TURNS}] * 2, rows=Rows.packed, sequence_length=300))
    assert document_numbers(torch.from_numpy(made)).max() == 1
