"""Where text comes from: every format gives the same documents, the split goes by name, padding never counts."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch

from minitron.formats.files import matching_files
from minitron.measures.held_out import evaluate, held_out_loss
from minitron.settings.data import DataSettings
from minitron.sources.document import Document
from minitron.sources.source import check_source, source_identity, source_title
from minitron.text.rows import document_rows
from minitron.text.samples import batches_of, longest_prompt
from minitron.text.tokenise import read_documents

TEXTS = [f"Document {index} ends in {index * 7919 % 1000}, «ünï»\n\tand\r two lines. " + "word " * (index % 13) for index in range(90)]


def write_jsonl(path: Path, texts: list) -> Path:
    path.write_text("".join(json.dumps({"id": index, "text": text}) + "\n" for index, text in enumerate(texts)), encoding="utf-8")
    return path


def write_json(path: Path, texts: list) -> Path:
    path.write_text(json.dumps([{"text": text, "id": index} for index, text in enumerate(texts)], indent=1), encoding="utf-8")
    return path


def write_parquet(path: Path, texts: list) -> Path:
    pyarrow.parquet.write_table(pyarrow.table({"id": list(range(len(texts))), "text": texts}), path, row_group_size=20)
    return path


def write_txt(path: Path, texts: list) -> Path:
    assert len(texts) == 1
    path.write_text(texts[0], encoding="utf-8", newline="")
    return path


WRITERS = {".jsonl": write_jsonl, ".json": write_json, ".parquet": write_parquet, ".txt": write_txt}
PLAIN = [text.replace("\r", "") for text in TEXTS]  # a text file's line ends are read as \n


def settings_of(*files: Path, **more) -> DataSettings:
    return DataSettings(files=[str(file) for file in files], **more)


def documents_in(*files: Path, **more) -> list[Document]:
    return list(read_documents(settings_of(*files, **more), files[0].parent))


# Reading.


@pytest.mark.parametrize("extension", [".jsonl", ".json", ".parquet"])
def test_a_file_gives_its_rows_in_their_order(extension, tmp_path):
    documents = documents_in(WRITERS[extension](tmp_path / f"corpus{extension}", TEXTS))
    assert documents == [Document(f"corpus/{index}", text) for index, text in enumerate(TEXTS)]


def test_a_text_file_is_one_document(tmp_path):
    write_txt(tmp_path / "one.txt", PLAIN[:1])
    assert documents_in(tmp_path / "one.txt") == [Document("one/0", PLAIN[0])]


def test_text_may_be_in_another_field_and_null(tmp_path):
    (tmp_path / "corpus.jsonl").write_text('{"body": "one", "text": "no"}\n{"body": null, "text": "no"}\n{"body": "two"}\n')
    assert documents_in(tmp_path / "corpus.jsonl", text_field="body") == [Document("corpus/0", "one"), Document("corpus/2", "two")]


def test_no_more_documents_are_read_than_asked_for(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", TEXTS[:5]), write_parquet(tmp_path / "b.parquet", TEXTS[5:])
    files = tmp_path / "a.jsonl", tmp_path / "b.parquet"
    assert [document.text for document in documents_in(*files, max_documents=8)] == TEXTS[:8]
    assert len(documents_in(*files)) == 90
    assert len(list(read_documents(DataSettings(max_documents=3), tmp_path))) == 3


def test_names_that_look_like_patterns_are_files(tmp_path):
    path = write_jsonl(tmp_path / "corpus[1]*.jsonl", TEXTS[:2])
    assert [document.text for document in documents_in(path)] == TEXTS[:2]


def test_a_glob_gives_its_files_sorted_and_no_file_comes_twice(tmp_path):
    for name in ("b.txt", "a.txt", "c.jsonl"):
        (tmp_path / name).write_text("x")
    files = matching_files([str(tmp_path / "c.jsonl"), str(tmp_path / "*.txt"), str(tmp_path / "b.txt")])
    assert [file.name for file in files] == ["c.jsonl", "a.txt", "b.txt"]


def test_the_title_names_files_without_folders(tmp_path):
    files = [write_txt(tmp_path / f"{name}.txt", ["x"]) for name in "abc"]
    titles = [source_title(settings_of(*files[:number])) for number in (1, 2, 3)]
    assert titles == ["a.txt", "a.txt and 1 other file", "a.txt and 2 other files"]
    assert source_title(DataSettings(dataset="owner/name", dataset_revision="abc")) == "owner/name train at abc"


def test_a_dataset_is_read_by_name_split_and_field(tmp_path, monkeypatch):
    """The library takes a folder of that name for the Hub's; a user's would be refused, as no key tells what is in it."""
    (tmp_path / "owner" / "name").mkdir(parents=True)
    write_jsonl(tmp_path / "owner" / "name" / "train.jsonl", TEXTS[:9])
    write_jsonl(tmp_path / "owner" / "name" / "test.jsonl", TEXTS[9:12])
    monkeypatch.chdir(tmp_path)
    train = DataSettings(dataset="owner/name", max_documents=5)
    assert list(read_documents(train, tmp_path)) == [Document(f"owner/name/{index}", text) for index, text in enumerate(TEXTS[:5])]
    assert [document.text for document in read_documents(DataSettings(dataset="owner/name", dataset_split="test"), tmp_path / "other")] == TEXTS[9:12]
    with pytest.raises(ValueError, match="there is such a folder here"):
        check_source(train)


# Names, split and key.


def test_the_split_and_the_key_stay_when_the_files_move(tmp_path):
    (tmp_path / "here").mkdir()
    write_jsonl(tmp_path / "here" / "a.jsonl", TEXTS), write_txt(tmp_path / "here" / "b.txt", PLAIN[:1])
    shutil.copytree(tmp_path / "here", tmp_path / "far" / "away")
    here, away = (settings_of(folder / "*.*") for folder in (tmp_path / "here", tmp_path / "far" / "away"))
    assert list(read_documents(here, tmp_path)) == list(read_documents(away, tmp_path))
    assert source_identity(here) == source_identity(away)


def test_the_key_changes_with_a_letter_the_order_and_the_field(tmp_path):
    a, b = write_jsonl(tmp_path / "a.jsonl", TEXTS[:3]), write_jsonl(tmp_path / "b.jsonl", TEXTS[3:])
    before = source_identity(settings_of(a, b))
    assert source_identity(settings_of(b, a)) != before != source_identity(settings_of(a, b, text_field="id"))
    a.write_bytes(a.read_bytes().replace(b"Document 0", b"document 0"))
    assert source_identity(settings_of(a, b)) != before


@pytest.mark.parametrize("change", [{"dataset": "owner/other"}, {"dataset_config": "en"}, {"dataset_revision": "abc"}, {"dataset_split": "test"}])
def test_the_key_changes_with_what_names_a_dataset(change):
    assert source_identity(DataSettings(**{"dataset": "owner/name"} | change)) != source_identity(DataSettings(dataset="owner/name"))


def test_files_of_one_name_in_many_folders_split_apart(tmp_path):
    for folder in range(60):
        (tmp_path / f"{folder:02}").mkdir()
        write_txt(tmp_path / f"{folder:02}" / "README.txt", PLAIN[folder : folder + 1])
    documents = documents_in(tmp_path / "*" / "README.txt")
    assert [document.name for document in documents] == [f"README/{index}" for index in range(60)]
    assert 0 < sum(document.is_held_out for document in documents) < 12


# The stage.


@pytest.fixture(scope="module")
def stage(door, small_settings, tmp_path_factory):
    """Runs a stage by the command on some texts, each in a file of its own; returns its folder and how it ended."""

    def run(extension: str, texts: list[str], *arguments: str, name: str = "data") -> tuple[Path, object]:
        folder = tmp_path_factory.mktemp("stage")
        for index, text in enumerate(texts):
            WRITERS[extension](folder / f"text{index:03}{extension}", [text])
        finished = door(folder, "runs_folder=runs", *small_settings, "data.sequence_length=16", f"stage={name}", f"data.files=['*{extension}']", *arguments)
        assert (finished.returncode, finished.stderr) == (0, ""), finished.stdout + finished.stderr
        return next((folder / "runs" / "store" / name).glob("*/")), finished

    return run


@pytest.fixture(scope="module")
def jsonl_stage(stage):
    return stage(".jsonl", PLAIN)


def numbers_in(folder: Path, split: str) -> set[int]:
    """Which of TEXTS begin a row of a split."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    rows = [tokenizer.decode(row[row >= 0]) for row in np.load(folder / f"{split}.npy")]
    return {int(row.split()[1]) for row in rows if row.startswith("Document ")}


def test_no_document_has_rows_in_both_splits(jsonl_stage):
    train, held_out = (numbers_in(jsonl_stage[0], split) for split in ("train", "heldout"))
    assert len(train) + len(held_out) == 90 and not train & held_out
    assert held_out == {index for index in range(90) if Document(f"text{index:03}/0", "").is_held_out} != set()


@pytest.fixture(scope="module")
def padded_teacher(stage):
    """A teacher trained on rows of whole documents, most of them shorter than a row, and one document without text."""
    return stage(".jsonl", [*PLAIN, " \n"], "data.rows=documents", "data.sequence_length=48", "teacher.train.tokens=4000", name="teacher")


def test_rows_of_documents_begin_with_the_document_and_end_in_padding(padded_teacher):
    folder = next(padded_teacher[0].parent.parent.glob("data/*/"))
    rows, facts = np.load(folder / "train.npy"), json.loads((folder / "done.json").read_text())["facts"]
    assert rows.dtype == np.int32 and len(rows) == facts["train_documents"] == len(numbers_in(folder, "train"))
    padding = rows == -1
    assert padding.any() and (np.diff(padding.astype(int), axis=1) >= 0).all() and not padding[:, :2].any()
    assert facts["train_tokens"] == np.count_nonzero(rows != -1) and facts["empty_documents"] == 1


def test_a_teacher_trained_on_padded_rows_learns_and_its_card_names_the_text(padded_teacher):
    folder, finished = padded_teacher
    losses = [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert np.isfinite(losses).all() and losses[-1] < losses[0] - 1
    assert "tokens of text000.jsonl and 90 other files." in (folder / "checkpoint" / "README.md").read_text()
    assert "; documents left out: 1 without text" in finished.stdout


# Padding.


@pytest.fixture(scope="module")
def documents_ids(token_ids) -> list[list[int]]:
    return [ids[:length] for ids, length in zip(token_ids(rows=5, tokens=24, seed=3).tolist(), (24, 2, 11, 17, 5), strict=True)]


@pytest.fixture(scope="module")
def other(build_model):
    return build_model(seed=5)


def alone(documents: list[list[int]]) -> list[torch.Tensor]:
    """Every document as a batch of its own, without padding."""
    return [torch.tensor([ids]) for ids in documents]


def test_padding_never_changes_an_evaluation(documents_ids, teacher, other):
    padded = evaluate(other, teacher, batches_of(document_rows(documents_ids, 24), 2, "cpu"))
    expected = evaluate(other, teacher, alone(documents_ids))
    assert padded.tokens == expected.tokens == 23 + 1 + 10 + 16 + 4 and padded.top1_agreement == expected.top1_agreement
    assert padded.loss_nats_per_token == pytest.approx(expected.loss_nats_per_token, rel=1e-6)
    assert padded.kl_to_teacher_nats_per_token == pytest.approx(expected.kl_to_teacher_nats_per_token, rel=1e-6)


def test_padding_never_changes_the_held_out_loss(documents_ids, teacher):
    batches = batches_of(document_rows(documents_ids, 24), 2, "cpu")
    assert held_out_loss(teacher, batches) == pytest.approx(held_out_loss(teacher, alone(documents_ids)), rel=1e-6)


def test_padding_that_counts_moves_both(documents_ids, teacher, other):
    """The control: ids in place of padding are tokens like any other."""
    padded = batches_of(document_rows(documents_ids, 24), 2, "cpu")
    counted = [rows.clamp(min=0) for rows in padded]
    assert abs(held_out_loss(teacher, counted) - held_out_loss(teacher, padded)) > 1e-2
    difference = evaluate(other, teacher, counted).kl_to_teacher_nats_per_token - evaluate(other, teacher, padded).kl_to_teacher_nats_per_token
    assert abs(difference) > 1e-3


def test_a_batchs_progress_is_in_real_tokens(documents_ids, teacher):
    heard = []
    evaluate(teacher, teacher, batches_of(document_rows(documents_ids, 24), 2, "cpu"), heard.append)
    assert heard == [26, 28, 5]


def test_the_prompt_is_of_the_longest_row_and_without_padding(documents_ids):
    rows = document_rows(documents_ids[1:], 24)
    assert longest_prompt(rows, 8).tolist() == documents_ids[3][:8]
    assert longest_prompt(rows, 20).tolist() == documents_ids[3]
