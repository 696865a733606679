"""The tiny teacher that comes with the package: unpacked as it was packed, refused where it is another, and made of text in which looking back pays."""

import importlib
import inspect
import json
import shutil
import signal
import time
import tomllib

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from memory_budget.hf_config import architecture_from_config, read_config
from minitron.checkpoints import tiny
from minitron.checkpoints.files import Checkpoint
from minitron.settings import teachers
from minitron.settings.data import DataSettings
from minitron.settings.run import Settings, TeacherSettings, TinyTeacherSettings
from minitron.sources.embedded import text_fingerprint
from minitron.text.blends import rows_identity
from minitron.text.key_values import MOST_LINES, MOST_MENTIONS, Vocabulary, check_hiding, hide_lines, vocabulary_of

STORED = teachers.STORED_FOLDER
TRAINING = json.loads((STORED / teachers.TRAINING_FILE).read_text())


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unpacked")
    return folder / "checkpoint", tiny.unpack_tiny_teacher(folder)


def test_it_is_unpacked_in_float32_to_the_bit(unpacked):
    one, other = Checkpoint(STORED), Checkpoint(unpacked[0])
    assert {entry.dtype for entry in one.entries.values()} == {"BF16"} and {entry.dtype for entry in other.entries.values()} == {"F32"}
    assert all(torch.equal(one.read(name).float(), other.read(name)) for name in one.entries)


def test_it_does_on_text_what_its_papers_say(unpacked):
    """A sentence of the text it was trained on is likelier to it than to chance by far, and its recorded loss lies between."""
    from minitron.families.nemotron_h import FAMILY

    model, tokenizer = FAMILY.load(unpacked[0], device="cpu"), AutoTokenizer.from_pretrained(unpacked[0])
    text = 'import os\n\n\ndef join(self, path):\n    """Return the path as a string."""\n    return os.path.join(self.path, path)\n'
    ids = tokenizer(text, return_tensors="pt")
    with torch.no_grad():
        loss = model(ids["input_ids"], labels=ids["input_ids"]).loss.item()
    assert loss < 3.5 and TRAINING["held_out"]["loss_nats_per_token"] < 0.5 * np.log(len(tokenizer))


def test_other_files_than_were_packed_are_refused(tmp_path, monkeypatch):
    folder = tmp_path / "stored"
    shutil.copytree(STORED, folder)
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    for module in (teachers, tiny):
        monkeypatch.setattr(module, "STORED_FOLDER", folder)
    with pytest.raises(ValueError, match="holds other files than its training.json says"):
        tiny.unpack_tiny_teacher(tmp_path)
    weights.unlink()
    with pytest.raises(ValueError, match="comes with the package cannot be read"):
        tiny.unpack_tiny_teacher(tmp_path)


def sizes(**changed) -> TinyTeacherSettings:
    own = architecture_from_config(read_config(STORED))
    return TinyTeacherSettings(**{name: getattr(own, name) for name in TinyTeacherSettings.__slots__} | changed)


def test_another_size_than_the_stored_ones_wants_training():
    with pytest.raises(ValueError, match="teacher.tiny.hidden is 64; the tiny teacher that comes with the package has 128: teacher.train_anew=true"):
        teachers.teacher_architecture(Settings(teacher=TeacherSettings(tiny=sizes(hidden=64))))
    assert teachers.teacher_architecture(Settings(teacher=TeacherSettings(tiny=sizes(hidden=64), train_anew=True))).hidden == 64
    assert teachers.teacher_architecture(Settings(teacher=TeacherSettings(tiny=sizes()))).hidden == 128


@pytest.mark.slow
@pytest.mark.skipif(TRAINING.get("text", {}).get("fingerprint") != text_fingerprint(), reason="another release of Python has another text")
def test_the_recipe_begins_as_its_curve_does(start, tmp_path):
    """26 steps of `make tiny-teacher`: other processors round otherwise, another recipe is off from the second step on."""
    process, lines = start(tmp_path, "experiment=tiny_teacher", "stage=teacher", "device=cpu"), []
    deadline = time.monotonic() + 900
    while len(lines) < 26 and time.monotonic() < deadline:
        time.sleep(2)
        files = list((tmp_path / "runs" / "store" / "teacher").glob("*/metrics.jsonl"))
        lines = [line for path in files for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=120)
    losses = {point["step"]: point["loss"] for point in TRAINING["curve"]}
    found = [json.loads(line) for line in lines]
    assert found[0]["loss"] == pytest.approx(losses[0], rel=1e-4) and found[25]["loss"] == pytest.approx(losses[25], rel=0.01)


# The tiny mixture of experts, which is no part of the package.


@pytest.fixture(scope="module")
def mixture(repository):
    return repository / "benchmarks" / "tiny_moe"


def test_the_mixtures_files_are_those_of_its_papers_and_stay_out_of_the_wheel(mixture, repository, tmp_path):
    papers = json.loads((mixture / teachers.TRAINING_FILE).read_text())
    packages = tomllib.loads((repository / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert teachers.digest_of(mixture) == papers["digest"] != teachers.digest_of(STORED)
    assert sum(path.stat().st_size for path in mixture.iterdir()) < 10e6
    assert all(0 < layer["least"] < layer["most"] / 1.5 for layer in papers["routing"]["layers"])  # by chance they would be within a few hundredths
    assert "minitron.tiny_teacher" in packages and not any(package.startswith("benchmarks") for package in packages)


def test_the_mixtures_experts_are_each_for_something(mixture):
    """On a page of Python: the token alone says much of where it is sent, which it does not where experts are drawn; and the loss is then higher."""
    made = importlib.import_module("benchmarks.make_tiny_moe")
    model, tokenizer = made.FAMILY.load(mixture, dtype=torch.float32, device="cpu"), AutoTokenizer.from_pretrained(mixture)
    ids = tokenizer(inspect.getsource(json.decoder), return_tensors="pt")["input_ids"][:, :1024]

    def entropies_and_loss() -> tuple[list[float], float]:
        heard = made.Heard(model)
        with torch.no_grad():
            loss = model(ids, labels=ids).loss.item()
        return [made.entropy_within_tokens(counts_VE, often=1) for counts_VE in heard.counts.values()], loss

    entropies, loss = entropies_and_loss()
    with made.random_routing(model):
        drawn, drawn_loss = entropies_and_loss()
    assert len(entropies) == 4 and max(entropies) < 0.7 and min(drawn) > 0.85
    assert drawn_loss > loss + 0.1


# Lines that are hidden in text.


def say(vocabulary: Vocabulary, ids: list[int]) -> list[tuple[int, int]]:
    """(key, value) of every line."""
    length, opening = len(vocabulary.line(0, 0)), vocabulary.opening
    found = [ids[at : at + length] for at in range(len(ids)) if ids[at : at + len(opening)] == opening]
    return [(line[len(opening)], line[len(opening) + 1 + len(vocabulary.says)]) for line in found]


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return vocabulary_of(AutoTokenizer.from_pretrained(STORED))


def test_every_hidden_key_is_said_again_with_its_value(vocabulary):
    text = [5] * 5000
    hidden = hide_lines(text, "a/document", vocabulary, share=1.0, stretch=512)
    lines = say(vocabulary, hidden)
    values = {key: {value for one, value in lines if one == key} for key, _ in lines}
    counts = [sum(one == key for one, _ in lines) for key in values]
    assert len(lines) > 10 and min(counts) >= 2 and max(counts) <= MOST_MENTIONS and all(len(some) == 1 for some in values.values())
    assert hidden.count(5) == len(text)  # nothing of the document is lost


def test_what_is_hidden_follows_from_the_name_and_the_share(vocabulary):
    hide = lambda name, share: hide_lines(list(range(5000)), name, vocabulary, share=share, stretch=512)  # noqa: E731
    assert hide("one", 0.5) == hide("one", 0.5) != hide("other", 0.5)
    assert hide("one", 0.0) == list(range(5000))


def test_a_row_too_short_for_lines_is_refused(vocabulary):
    longest = MOST_LINES * MOST_MENTIONS * len(vocabulary.line(0, 0))
    with pytest.raises(ValueError, match=f"data.sequence_length 128; it must then be at least {2 * longest}"):
        check_hiding(vocabulary, stretch=128)
    check_hiding(vocabulary, stretch=2 * longest)


def test_a_share_of_none_leaves_rows_keys_as_they_were():
    assert "key_value_share" not in rows_identity(DataSettings()) and rows_identity(DataSettings(key_value_share=0.1))["key_value_share"] == 0.1
