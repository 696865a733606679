"""The embedded text as prose: docstrings in the order of the source, the split of the code, keys of its own."""

import json

import pytest

from minitron.settings.data import DataSettings, Embedded
from minitron.settings.reasoning import ArithmeticSettings
from minitron.sources.document import Document
from minitron.sources.embedded import embedded_documents
from minitron.sources.prose import LEAST_CHARACTERS, docstrings, prose_documents
from minitron.sources.source import source_identity, source_title
from minitron.text.blends import rows_identity

MODULE = b'''"""First of all."""

if True:
    class Thing:
        """Second."""

        async def act(self):
            """Third,

            without its indentation."""
            return lambda: "no docstring"

x = "nor is this"

def late(): "Fourth."
'''


@pytest.fixture(scope="module")
def documents() -> list[Document]:
    return list(prose_documents())


def test_docstrings_come_in_the_order_of_the_source_without_code():
    assert docstrings(MODULE) == "First of all.\n\nSecond.\n\nThird,\n\nwithout its indentation.\n\nFourth."


@pytest.mark.parametrize("source", [b"def broken(:", b"\xff\xfe", b"x = 1", b'"""  """', b"null \x00 byte"])
def test_what_has_no_docstring_or_is_no_python_gives_no_text(source):
    assert docstrings(source) == ""


def test_a_document_is_a_module_with_text_enough_or_a_topic(documents):
    modules = [document for document in documents if not document.name.startswith("topics/")]
    assert min(len(document.text) for document in modules) >= LEAST_CHARACTERS and "functools.py" in {document.name for document in modules}
    assert len(documents) - len(modules) > 70 and sum(len(document.text) for document in documents) > 1_500_000


def test_prose_is_no_code(documents):
    """The control: the same module as code has its imports."""
    code = {document.name: document.text for document in embedded_documents()}["functools.py"]
    prose = {document.name: document.text for document in documents}["functools.py"]
    assert "from collections import namedtuple" in code and "from collections import namedtuple" not in prose and len(prose) < len(code) / 2


def test_prose_holds_out_the_modules_that_the_code_holds_out(documents):
    code = {document.name: document.is_held_out for document in embedded_documents()}
    assert all(document.is_held_out == code[document.name] for document in documents)
    assert 0.02 < sum(document.is_held_out for document in documents) / len(documents) < 0.1


def test_a_key_of_the_code_is_what_it_was_before_there_was_prose(monkeypatch):
    """Golden value: what the rows' key said of data.embedded=code when there was no such setting."""
    monkeypatch.setattr("minitron.sources.source.text_fingerprint", lambda: "9a08a2d2b8df")
    before = {"messages_field": None, "truncated_share": 0.0, "max_documents": None, "rows": "windows", "sequence_length": 256, "vocab": 2048,
              "max_train_tokens": None, "max_heldout_tokens": None, "source": {"text": "9a08a2d2b8df"}}  # fmt: skip
    assert json.dumps(rows_identity(DataSettings())) == json.dumps(before)


def test_prose_has_a_key_and_a_title_of_its_own(monkeypatch):
    code, prose = DataSettings(), DataSettings(embedded=Embedded.prose)
    assert source_identity(code) != source_identity(prose) and source_title(prose) == "the Python standard library's docstrings and topics"
    before = source_identity(prose)
    monkeypatch.setattr("minitron.sources.source.text_fingerprint", lambda: "another")
    assert source_identity(prose) != before


@pytest.mark.parametrize("given", [{"files": ["a.txt"]}, {"dataset": "owner/name"}, {"arithmetic": ArithmeticSettings(problems=5)}])
def test_prose_beside_another_source_is_refused(given):
    with pytest.raises(ValueError, match="data.embedded is prose, but .* is given, which takes its place; it must then be code"):
        DataSettings(embedded=Embedded.prose, **given)
    DataSettings(**given)
