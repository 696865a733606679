"""Passes over a source: interrupted anywhere and gone on with by others, they end in the same rows; what a held-out document equals is in no train row."""

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from minitron.settings.data import DataSettings
from minitron.settings.training import Rows
from minitron.sources import hub
from minitron.sources.document import is_held_out
from minitron.text import passes as passes_module
from minitron.text import split_rows
from minitron.text.encoding import Encoding
from minitron.text.own_tokenizer import train_tokenizer
from minitron.text.passes import Place, Split, run_passes
from minitron.walk.console import Console

BOTH = {"heldout": "heldout", "train": "train"}
SCRIPT = """
import sys, time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from minitron.settings.data import DataSettings
from minitron.text.encoding import Encoding
from minitron.text.passes import Place, run_passes
from minitron.walk.console import Console

class Slow(Console):
    @contextmanager
    def track(self, description, *arguments):
        yield lambda *_: time.sleep(0.3 if description == "text" and sys.argv[3] != "1" else 0)

if __name__ == "__main__":
    folder, tokenizer, processes, *files = sys.argv[1:]
    data = DataSettings(files=files, sequence_length=32, processes=int(processes))
    place = Place(folder=Path(folder), scratch=Path(folder) / "source", console=Slow(), goes_on=print)
    try:
        run_passes(place, data, Encoding(Path(tokenizer), data, 10**6, Path(folder) / "heldout_hashes.npy"), {"heldout": "heldout", "train": "train"})
    except ValueError as error:
        sys.exit(f"error: {error}")
"""


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(iter(["some words of a few letters, and numbers 0 1 2 3 4 5 6 7 8 9"] * 9), 300, folder)
    return folder


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> list[str]:
    """Thirty files of forty documents."""
    folder, numbers = tmp_path_factory.mktemp("corpus"), random.Random(0)
    for name in range(30):
        texts = [" ".join(str(numbers.random()) for _ in range(numbers.randint(1, 12))) for _ in range(40)]
        (folder / f"{name:02}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return [str(folder / "*.jsonl")]


class Interrupting(Console):
    """A terminal that goes away after so many pieces of a pass."""

    def __init__(self, after: int):
        super().__init__(quiet=True)
        self.left = after

    @contextmanager
    def track(self, *_arguments) -> Iterator:
        def advance(*_amount) -> None:
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt

        yield advance


def passes(folder: Path, tokenizer: Path, data: DataSettings, console: Console | None = None, wanted: dict[str, str] = BOTH) -> dict[str, Split]:
    folder.mkdir(parents=True, exist_ok=True)
    place = Place(folder=folder, scratch=folder / "source", console=console or Console(quiet=True), goes_on=lambda _: None)
    return run_passes(place, data, Encoding(tokenizer, data, 10**6, folder / "heldout_hashes.npy"), wanted)


def rows_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.npy")}


@pytest.mark.parametrize("rows", list(Rows))
def test_a_pass_interrupted_anywhere_ends_in_the_same_rows_and_counts(rows, corpus, tokenizer, tmp_path):
    data = DataSettings(files=corpus, sequence_length=32, rows=rows, processes=1)
    whole = passes(tmp_path / "whole", tokenizer, data)
    for after in (3, 0, 7, 11, 25, 2):
        with pytest.raises(KeyboardInterrupt):
            passes(tmp_path / "interrupted", tokenizer, data, Interrupting(after))
    assert passes(tmp_path / "interrupted", tokenizer, data) == whole
    assert rows_in(tmp_path / "interrupted") == rows_in(tmp_path / "whole") and len(rows_in(tmp_path / "whole")) == 3
    assert whole["train"].tally.read == 1200 and 0.02 < whole["heldout"].num_rows / whole["train"].num_rows < 0.1


def test_a_dataset_of_the_hub_is_streamed_once_and_gone_on_with(corpus, tokenizer, tmp_path, monkeypatch):
    """The library takes a folder of that name for the Hub's. What was read is kept until the passes are over, so that an interrupted one asks for the rest."""
    (tmp_path / "owner" / "name").mkdir(parents=True)
    texts = [line for path in sorted(Path(corpus[0]).parent.glob("*.jsonl")) for line in path.read_text().splitlines(keepends=True)]
    (tmp_path / "owner" / "name" / "train.jsonl").write_text("".join(texts))
    monkeypatch.chdir(tmp_path)
    asked, own = [], hub._dataset
    monkeypatch.setattr(hub, "_dataset", lambda data: asked.append(1) or own(data))
    data = DataSettings(dataset="owner/name", sequence_length=32, processes=1)
    whole = passes(tmp_path / "whole", tokenizer, data)
    assert whole["train"].tally.read == 1200 and not (tmp_path / "whole" / "source").exists() and len(asked) == 1
    some = passes(tmp_path / "some", tokenizer, replace(data, max_documents=1100))
    assert some["train"].tally.read == 1100 and len(asked) == 2
    for after in (1, 0, 2):
        with pytest.raises(KeyboardInterrupt):
            passes(tmp_path / "interrupted", tokenizer, data, Interrupting(after))
    with (tmp_path / "interrupted" / "source" / "hub.jsonl").open("ab") as file:
        file.write(b'{"text": "half a li')  # as a process that is killed leaves it
    assert passes(tmp_path / "interrupted", tokenizer, data) == whole
    assert rows_in(tmp_path / "interrupted") == rows_in(tmp_path / "whole")


@pytest.mark.parametrize("place", ["SplitRows._append", "SplitRows.finish", "_Pass._save", "_Pass._keep", "GrowingRows.finish"])
def test_an_interrupt_in_the_middle_of_a_piece_or_of_the_end_loses_nothing(place, corpus, tokenizer, tmp_path, monkeypatch):
    """Right behind every third call of it (of an end, the first of each split), until nothing interrupts any more."""
    data = DataSettings(files=corpus, sequence_length=32, rows=Rows.windows, processes=1)
    whole = passes(tmp_path / "whole", tokenizer, data)
    holder = getattr(passes_module if place.startswith("_") else split_rows, place.split(".")[0])
    own, calls = getattr(holder, place.split(".")[1]), [1, 1] if "finish" in place else []

    def interrupted(*arguments, **named):
        result = own(*arguments, **named)
        calls.append(1)
        if len(calls) % 3 == 0 and len(calls) < 40:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(holder, place.split(".")[1], interrupted)
    monkeypatch.setattr(passes_module, "SAVE_SECONDS", 0.0)
    interrupts, split = 0, None
    while split is None:
        try:
            split = passes(tmp_path / "interrupted", tokenizer, data)
        except KeyboardInterrupt:
            interrupts += 1
        calls += [1] if "finish" in place else []  # which are few
    assert split == whole and rows_in(tmp_path / "interrupted") == rows_in(tmp_path / "whole") and interrupts > 0


def running(folder: Path, tokenizer: Path, processes: int, files: list[str], environment: dict[str, str], **more) -> subprocess.Popen:
    folder.mkdir(exist_ok=True)
    (folder / "script.py").write_text(SCRIPT)
    command = [sys.executable, str(folder / "script.py"), str(folder), str(tokenizer), str(processes), *files]
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True, **more)


def test_killed_with_two_processes_and_gone_on_with_by_one(corpus, tokenizer, environment, tmp_path):
    """The processes that tokenise end with the one that is killed; what it left is gone on with."""
    killed = running(tmp_path / "killed", tokenizer, 2, corpus, environment)
    deadline = time.monotonic() + 60
    begun = tmp_path / "killed" / "train.partial.npy"
    while (len(_of_session(killed.pid)) < 5 or not begun.exists()) and time.monotonic() < deadline:  # 5: with what starts the two and minds their semaphores
        time.sleep(0.05)
    assert begun.exists()
    os.kill(killed.pid, signal.SIGKILL)
    killed.communicate()
    while _of_session(killed.pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not _of_session(killed.pid) and not (tmp_path / "killed" / "train.npy").exists()
    data = DataSettings(files=corpus, sequence_length=32, processes=1)
    passes(tmp_path / "killed", tokenizer, data), passes(tmp_path / "whole", tokenizer, data)
    assert {name: rows_in(tmp_path / "killed")[name] for name in rows_in(tmp_path / "whole")} == rows_in(tmp_path / "whole")


def _of_session(number: int) -> list[str]:
    """Processes of a session that have not ended."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, session, *_ = path.read_text().rpartition(")")[2].split()
        except OSError:  # it has just ended
            continue
        found += [path.parent.name] if int(session) == number and state not in "ZX" else []
    return found


def test_a_full_disk_is_one_line_and_what_is_done_survives(corpus, tokenizer, environment, tmp_path):
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))  # noqa: E731
    full = running(tmp_path / "full", tokenizer, 1, corpus, environment, preexec_fn=limit)
    _, said = full.communicate()
    assert full.returncode == 1 and said.startswith("error: data: there is no room left on the disk of ") and len(said.splitlines()) == 1, said
    assert (tmp_path / "full" / "heldout.npy").exists() and json.loads((tmp_path / "full" / "train.state.json").read_text())["tally"]["read"] > 0
    data = DataSettings(files=corpus, sequence_length=32, processes=1)
    passes(tmp_path / "full", tokenizer, data), passes(tmp_path / "whole", tokenizer, data)
    assert rows_in(tmp_path / "full") == rows_in(tmp_path / "whole")


def texts_file(path: Path, texts: list[str]) -> DataSettings:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return DataSettings(files=[str(path)], sequence_length=16, rows=Rows.documents, processes=1)


def test_train_documents_that_equal_a_held_out_one_are_left_out(tokenizer, tmp_path):
    """Wherever they stand, and with other space around them; the control: those that differ stay."""
    held_out = [number for number in range(200) if is_held_out(f"text/{number}")]
    texts = [f"document {number}" for number in range(200)]
    copies = [number for number in range(200) if number not in held_out][:: 200 // len(held_out)][: len(held_out)]
    for number, copied in zip(copies, held_out, strict=True):
        texts[number] = f" {texts[copied]}\n"
    splits = passes(tmp_path / "leaking", tokenizer, texts_file(tmp_path / "text.jsonl", texts))
    assert splits["train"].tally.left_out == {"equal to a held-out one": len(held_out)} and splits["train"].num_rows == 200 - 2 * len(held_out)
    assert splits["heldout"].num_rows == len(held_out) > 3
    clean = passes(tmp_path / "clean", tokenizer, texts_file(tmp_path / "text.jsonl", [f"document {number}" for number in range(200)]))
    assert clean["train"].tally.left_out == {} and clean["train"].num_rows == 200 - len(held_out)


def test_rows_of_a_phase_leave_out_what_the_data_stage_holds_out(tokenizer, tmp_path):
    """Its own documents of those names, and those of any other name that equal one."""
    data = texts_file(tmp_path / "text.jsonl", [f"document {number}" for number in range(200)])
    held_out = passes(tmp_path / "rows", tokenizer, data)["heldout"].num_rows
    other = texts_file(tmp_path / "other.jsonl", [f"document {number}" for number in range(200)])
    split = passes(tmp_path / "rows", tokenizer, other, wanted={"train": "abc"})["train"]
    leaking = [number for number in range(200) if is_held_out(f"text/{number}") and not is_held_out(f"other/{number}")]
    assert split.tally.left_out == {"equal to a held-out one": len(leaking)} and 0 < len(leaking) <= held_out
    assert len(np.load(tmp_path / "rows" / "abc.npy")) == split.num_rows == sum(not is_held_out(f"other/{number}") for number in range(200)) - len(leaking)


@pytest.mark.parametrize(("texts", "says"), [
    (["one", "two", "three"], "data: text.jsonl has 3 documents and none to hold out; about 1 in 20 is held out, by a hash of its name: 100 documents are"),
    ([" "] * 100, r"data: text.jsonl has 100 documents and none with text for held-out text \(left out: \d+ without text\)"),
])  # fmt: skip
def test_a_split_without_a_document_is_refused(texts, says, tokenizer, tmp_path):
    with pytest.raises(ValueError, match=says):
        passes(tmp_path / "rows", tokenizer, texts_file(tmp_path / "text.jsonl", texts))
