"""The embedded text: its split and its tokenizer."""

import json

import pytest
from transformers import AutoTokenizer

from minitron.sources import embedded as text
from minitron.sources.document import Document
from minitron.sources.embedded import embedded_documents
from minitron.text.own_tokenizer import SPECIAL_TOKENS, train_tokenizer


@pytest.fixture(scope="module")
def documents() -> list[Document]:
    return list(embedded_documents())


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    texts = [document.text for document in embedded_documents() if document.name in ("abc.py", "dis.py")]
    train_tokenizer(iter(texts), 320, folder)
    return folder


def test_the_split_goes_by_the_name_alone():
    """Golden value: the same files are held out on every machine and in every release."""
    names = [f"module{i}.py" for i in range(100)]
    held_out = [name for name in names if Document(name, "one text").is_held_out]
    assert held_out == [name for name in names if Document(name, "another").is_held_out] == ["module74.py", "module83.py"]


def test_no_document_is_in_both_splits_and_each_split_has_its_share(documents):
    held_out = {document.name for document in documents if document.is_held_out}
    train = {document.name for document in documents if not document.is_held_out}
    assert len(held_out) + len(train) == len(documents) and not held_out & train
    assert 0.03 < len(held_out) / len(documents) < 0.08


def test_documents_come_sorted_and_without_tests(documents):
    names = [document.name for document in documents]
    assert not [name for name in names if {"test", "tests", "site-packages"} & set(name.split("/")[:-1])]
    sources = [name for name in names if not name.startswith("topics/")]
    assert sources == sorted(sources) and "abc.py" in sources and "topics/while" in names


def test_another_file_changes_the_texts_fingerprint(monkeypatch, tmp_path):
    before = text.text_fingerprint()
    (tmp_path / "extra.py").write_text("x = 1\n")
    files = text.source_files()
    monkeypatch.setattr(text, "source_files", lambda: [*files, ("extra.py", tmp_path / "extra.py")])
    assert text.text_fingerprint() != before


@pytest.mark.parametrize("sentence", ["def f(x):\n\treturn x\n", "  two  spaces ", "Grüße, 世界 🎉", "\x00\x7f", "<think>no</think>"])
def test_the_tokenizer_gives_back_the_text(tokenizer_folder, sentence):
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    assert tokenizer.decode(tokenizer.encode(sentence, add_special_tokens=False)) == sentence


def test_the_tokenizer_has_the_asked_size_and_short_codes_for_its_text(tokenizer_folder):
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    assert len(tokenizer) == 320
    assert len(tokenizer.encode("    return self")) < len("    return self")


def test_the_special_tokens_come_first(tokenizer_folder):
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    assert tokenizer.convert_tokens_to_ids(SPECIAL_TOKENS) == [0, 1, 2, 3]
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|endoftext|>", "<|pad|>")


def test_decoding_shows_the_thinking_tags_and_no_other_special_token(tokenizer_folder):
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    assert tokenizer.decode([0, 1, *tokenizer("<think>a</think>")["input_ids"], 0], skip_special_tokens=True) == "<think>a</think>"


def test_the_tokenizer_names_a_class_that_every_version_has(tokenizer_folder):
    config = json.loads((tokenizer_folder / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_the_chat_template_writes_a_conversation(tokenizer_folder):
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    messages = [{"role": "user", "content": "Hello"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == "user: Hello\nassistant: "
