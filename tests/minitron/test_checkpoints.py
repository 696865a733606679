"""Checkpoints on disk: what is written is read back, by us and by others, and a broken folder is named, not guessed at."""

import json
import mmap
import os
import shutil
import struct
import weakref
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from minitron.checkpoints.files import DTYPES, INDEX_FILE, SINGLE_FILE, Checkpoint, PlannedTensor, copy_companions, read_header
from minitron.checkpoints.folder import content_bytes, content_digest, fingerprint
from minitron.checkpoints.shards import save_model_weights, write_weights
from minitron.families.nemotron_h import FAMILY
from minitron.walk.store import write_json

KIB = 1024


def random_state(number: int = 6, dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, torch.Tensor]:
    """Tensors of one KiB each in float32."""
    random = torch.Generator().manual_seed(seed)
    return {f"tensor_{index}": torch.randn(16, 16, generator=random).to(dtype) for index in range(number)}


def planned(state: dict[str, torch.Tensor], rows: int = 16) -> list[PlannedTensor]:
    """Tensors to write, in pieces of so many rows."""
    codes = {dtype: code for code, dtype in DTYPES.items()}
    return [PlannedTensor(name, codes[value.dtype], tuple(value.shape), lambda value=value: value.split(rows)) for name, value in state.items()]


def read_all(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = Checkpoint(folder)
    return {name: checkpoint.read(name) for name in checkpoint.entries}


def assert_bit_equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype and tensor.shape == right[name].shape, name
        assert tensor.contiguous().reshape(-1).view(torch.uint8).equal(right[name].contiguous().reshape(-1).view(torch.uint8)), name


def with_config(folder: Path) -> Path:
    write_json(folder / "config.json", {"model_type": "nemotron_h"})
    return folder


# Round trips.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_what_is_written_is_read_back_bit_equal(dtype, tmp_path):
    state = random_state(dtype=dtype) | {"special": torch.tensor([float("nan"), float("inf"), -0.0, 1e-30]).to(dtype)}
    save_model_weights(state, tmp_path, max_shard_bytes=2**30)
    assert_bit_equal(read_all(tmp_path), state)


def test_tensors_of_every_supported_dtype_are_read_back_bit_equal(tmp_path):
    state = {code: torch.arange(10).to(dtype) for code, dtype in DTYPES.items()}
    save_model_weights(state, tmp_path, max_shard_bytes=2**30)
    assert_bit_equal(read_all(tmp_path), state)


def test_scalars_empty_and_strided_tensors_are_read_back_bit_equal(tmp_path):
    state = {"scalar": torch.tensor(3.5), "empty": torch.zeros(0, 4), "strided": torch.randn(6, 8).t()[::2]}
    save_model_weights(state, tmp_path, max_shard_bytes=2**30)
    assert_bit_equal(read_all(tmp_path), state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_safetensors_library_reads_what_we_write(dtype, tmp_path):
    state = random_state(dtype=dtype)
    save_model_weights(state, tmp_path, max_shard_bytes=2**30)
    with safe_open(tmp_path / SINGLE_FILE, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert_bit_equal({name: file.get_tensor(name) for name in file.keys()}, state)  # noqa: SIM118


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_we_read_what_the_safetensors_library_writes(dtype, tmp_path):
    state = random_state(dtype=dtype)
    save_file(state, tmp_path / SINGLE_FILE)
    assert_bit_equal(read_all(tmp_path), state)


@pytest.mark.parametrize("max_shard_bytes", [2**30, 20_000], ids=["one file", "shards"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_auto_model_reads_what_we_write(dtype, max_shard_bytes, tmp_path, teacher, tiny, config_of, write_checkpoint):
    write_checkpoint(tmp_path, teacher, config_of(tiny), dtype=dtype, max_shard_bytes=max_shard_bytes)
    assert (tmp_path / INDEX_FILE).exists() == (max_shard_bytes == 20_000)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto", local_files_only=True)
    assert_bit_equal(loaded.state_dict(), {name: tensor.to(dtype) for name, tensor in teacher.state_dict().items()})


def test_we_read_what_transformers_saves(tmp_path, teacher):
    teacher.save_pretrained(tmp_path, max_shard_size="40KB")
    assert (tmp_path / INDEX_FILE).exists()
    state = {FAMILY.canonical_name(name): tensor for name, tensor in teacher.state_dict().items()}
    assert_bit_equal({FAMILY.canonical_name(name): tensor for name, tensor in read_all(tmp_path).items()}, state)


# Shards.


def test_several_shards_hold_every_tensor_once_and_none_is_too_large(tmp_path):
    state = random_state(7)
    save_model_weights(state, tmp_path, max_shard_bytes=2 * KIB)
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert [path.name for path in shards] == [f"model-0000{number}-of-00004.safetensors" for number in (1, 2, 3, 4)]
    assert [entry.name for path in shards for entry in read_header(path)] == list(state)
    assert all(sum(entry.num_bytes for entry in read_header(path)) <= 2 * KIB for path in shards)
    assert_bit_equal(read_all(tmp_path), state)


def test_the_index_names_every_tensors_shard_and_the_total_size(tmp_path):
    state = random_state(5)
    save_model_weights(state, tmp_path, max_shard_bytes=2 * KIB)
    index = json.loads((tmp_path / INDEX_FILE).read_text())
    assert index["metadata"]["total_size"] == 5 * KIB
    assert all(name in [entry.name for entry in read_header(tmp_path / shard)] for name, shard in index["weight_map"].items())
    assert list(index["weight_map"]) == list(state)


def test_a_tensor_larger_than_a_shard_has_one_of_its_own(tmp_path):
    save_model_weights(random_state(3), tmp_path, max_shard_bytes=10)
    assert len(list(tmp_path.glob("*.safetensors"))) == 3


def test_one_shard_has_no_index(tmp_path):
    save_model_weights(random_state(3), tmp_path, max_shard_bytes=3 * KIB)
    assert [path.name for path in tmp_path.iterdir()] == [SINGLE_FILE]


# Interruption.


class Interrupted(Exception):
    pass


def interrupted_at(state: dict[str, torch.Tensor], name: str) -> list[PlannedTensor]:
    def stop() -> list[torch.Tensor]:
        raise Interrupted

    tensors = planned(state)
    return [PlannedTensor(tensor.name, tensor.dtype, tensor.shape, stop) if tensor.name == name else tensor for tensor in tensors]


def test_an_interrupted_write_leaves_no_file_that_looks_whole(tmp_path):
    with pytest.raises(Interrupted):
        write_weights(tmp_path, interrupted_at(random_state(), "tensor_3"), max_shard_bytes=2**30)
    assert not list(tmp_path.glob("*.safetensors"))
    with pytest.raises(ValueError, match="holds no weights"):
        Checkpoint(tmp_path)


def test_an_interrupted_write_of_several_shards_is_no_checkpoint_yet(tmp_path):
    with pytest.raises(Interrupted):
        write_weights(tmp_path, interrupted_at(random_state(), "tensor_3"), max_shard_bytes=2 * KIB)
    assert [path.name for path in tmp_path.glob("*.safetensors")] == ["model-00001-of-00003.safetensors"]
    with pytest.raises(ValueError, match="holds no weights"):
        Checkpoint(tmp_path)


def test_a_resumed_write_keeps_whole_shards_and_makes_the_rest(tmp_path):
    state = random_state()
    with pytest.raises(Interrupted):
        write_weights(tmp_path, interrupted_at(state, "tensor_3"), max_shard_bytes=2 * KIB)
    first = tmp_path / "model-00001-of-00003.safetensors"
    inode = first.stat().st_ino
    made = []

    def noted(tensor: PlannedTensor) -> PlannedTensor:
        return PlannedTensor(tensor.name, tensor.dtype, tensor.shape, lambda: made.append(tensor.name) or tensor.pieces())

    write_weights(tmp_path, [noted(tensor) for tensor in planned(state)], max_shard_bytes=2 * KIB)
    assert made == ["tensor_2", "tensor_3", "tensor_4", "tensor_5"]
    assert first.stat().st_ino == inode
    assert_bit_equal(read_all(tmp_path), state)
    assert not list(tmp_path.glob("*.partial"))


def test_a_shard_of_another_shard_size_is_not_kept(tmp_path):
    state = random_state(11)
    with pytest.raises(Interrupted):  # 4 + 4 + 3 tensors
        write_weights(tmp_path, interrupted_at(state, "tensor_5"), max_shard_bytes=4 * KIB)
    write_weights(tmp_path, planned(state), max_shard_bytes=5 * KIB)  # 5 + 5 + 1, in files of the same names
    assert_bit_equal(read_all(tmp_path), state)


def test_weights_in_memory_replace_those_of_an_earlier_attempt(tmp_path):
    save_model_weights(random_state(seed=0), tmp_path, max_shard_bytes=2 * KIB)
    save_model_weights(random_state(seed=1), tmp_path, max_shard_bytes=2 * KIB)
    assert_bit_equal(read_all(tmp_path), random_state(seed=1))
    save_model_weights(random_state(seed=2), tmp_path, max_shard_bytes=2**30)
    assert [path.name for path in tmp_path.iterdir()] == [SINGLE_FILE]


def test_every_byte_kept_or_written_is_announced_once(tmp_path):
    state, heard = random_state(), []
    with pytest.raises(Interrupted):
        write_weights(tmp_path, interrupted_at(state, "tensor_3"), max_shard_bytes=2 * KIB)
    write_weights(tmp_path, planned(state), max_shard_bytes=2 * KIB, on_bytes=heard.append)
    assert heard == [2 * KIB] + [KIB] * 4  # the shard kept, then tensor by tensor


def test_json_is_replaced_whole_or_not_at_all(tmp_path):
    write_json(tmp_path / "config.json", {"a": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "config.json", {"a": object()})
    assert json.loads((tmp_path / "config.json").read_text()) == {"a": 1}


# Broken folders.


def test_a_folder_that_is_none_is_named(tmp_path):
    with pytest.raises(ValueError, match="nowhere is not a folder"):
        Checkpoint(tmp_path / "nowhere")


def test_a_folder_without_weights_says_what_was_expected(tmp_path):
    with pytest.raises(ValueError, match=rf"{tmp_path.name} holds no weights; expected {SINGLE_FILE}"):
        Checkpoint(tmp_path)


def test_a_missing_shard_is_named(tmp_path):
    save_model_weights(random_state(), tmp_path, max_shard_bytes=2 * KIB)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ValueError, match=r"shard model-00002-of-00003\.safetensors is listed .* but missing"):
        Checkpoint(tmp_path)


def test_a_tensor_listed_in_the_index_but_in_no_shard_is_named(tmp_path):
    save_model_weights(random_state(), tmp_path, max_shard_bytes=2 * KIB)
    index = json.loads((tmp_path / INDEX_FILE).read_text())
    index["weight_map"]["phantom"] = "model-00001-of-00003.safetensors"
    write_json(tmp_path / INDEX_FILE, index)
    with pytest.raises(ValueError, match="tensor phantom is listed"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("text", ["{", "{}", "[]", '{"weight_map": []}', "null"])
def test_an_index_that_is_none_is_named(text, tmp_path):
    save_model_weights(random_state(), tmp_path, max_shard_bytes=2 * KIB)
    (tmp_path / INDEX_FILE).write_text(text)
    with pytest.raises(ValueError, match="is not a safetensors index"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("size", [0, 7, 100, -1, -2000], ids=["empty", "in the length", "in the header", "one byte short", "in the weights"])
def test_a_truncated_shard_is_named(size, tmp_path):
    save_model_weights(random_state(), tmp_path, max_shard_bytes=3 * KIB)
    path = tmp_path / "model-00002-of-00002.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:size])
    with pytest.raises(ValueError, match=r"model-00002-of-00002\.safetensors is truncated"):
        Checkpoint(tmp_path)
    path.write_bytes(data)
    assert len(Checkpoint(tmp_path).entries) == 6


def write_header(path: Path, header: bytes, data: bytes = b"") -> None:
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)


@pytest.mark.parametrize(
    "header",
    [b"not json", b"\xff\xfe{}", b"[1, 2]", b'{"a": {"dtype": "F32"}}', b'{"a": 1}'],
    ids=["text", "no utf-8", "a list", "no offsets", "a number"],
)
def test_a_header_that_is_none_is_named(header, tmp_path):
    write_header(tmp_path / SINGLE_FILE, header)
    with pytest.raises(ValueError, match=rf"{SINGLE_FILE} is not a safetensors file"):
        Checkpoint(tmp_path)


def test_an_unknown_dtype_is_named(tmp_path):
    write_header(tmp_path / SINGLE_FILE, b'{"odd": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}', b"\0")
    with pytest.raises(ValueError, match="tensor odd has dtype F4; supported: F64, F32"):
        Checkpoint(tmp_path)


def test_a_tensor_whose_bytes_do_not_fit_its_shape_is_named(tmp_path):
    write_header(tmp_path / SINGLE_FILE, b'{"odd": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}', b"\0" * 8)
    with pytest.raises(ValueError, match="tensor odd has 8 bytes"):
        Checkpoint(tmp_path)


def test_a_shard_that_shrank_after_its_header_was_read_is_named(tmp_path):
    save_model_weights(random_state(), tmp_path, max_shard_bytes=2**30)
    checkpoint = Checkpoint(tmp_path)
    path = tmp_path / SINGLE_FILE
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match="tensor tensor_5 ends early"):
        checkpoint.read("tensor_5")


# Identity.


def test_the_digest_is_of_the_contents_wherever_they_lie_and_whenever_they_were_written(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        save_model_weights(random_state(), with_config(tmp_path / name), max_shard_bytes=2 * KIB)
    digests = {content_digest(tmp_path / "a"), content_digest(tmp_path / "b")}
    (tmp_path / "a" / "README.md").write_text("no result follows from it")
    os.utime(tmp_path / "a" / "config.json", ns=(0, 0))
    assert {content_digest(tmp_path / "a")} == digests and fingerprint(tmp_path / "a") != fingerprint(tmp_path / "b")


def test_the_fingerprint_is_the_same_until_something_is_touched(tmp_path):
    save_model_weights(random_state(), with_config(tmp_path), max_shard_bytes=2 * KIB)
    before = [fingerprint(tmp_path) for _ in range(2)]
    os.utime(tmp_path / "config.json", ns=(0, 0))
    assert before[0] == before[1] != fingerprint(tmp_path) and len(before[0]) == 12


def test_the_last_byte_of_a_tensor_overwritten_in_place_is_noticed(tmp_path):
    save_model_weights(random_state(), with_config(tmp_path), max_shard_bytes=2**30)
    weights, before = tmp_path / SINGLE_FILE, (fingerprint(tmp_path), content_digest(tmp_path))
    times, size = weights.stat(), weights.stat().st_size
    with weights.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x55")
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))  # who copies may set the old time again
    assert weights.stat().st_size == size and weights.stat().st_mtime_ns == times.st_mtime_ns
    assert fingerprint(tmp_path) != before[0] and content_digest(tmp_path) != before[1]


@pytest.mark.parametrize("name", ["tokenizer.json", "chat_template.jinja", "generation_config.json"])
def test_a_file_that_results_follow_from_is_part_of_both(name, tmp_path):
    save_model_weights(random_state(), with_config(tmp_path), max_shard_bytes=2**30)
    before = fingerprint(tmp_path), content_digest(tmp_path)
    (tmp_path / name).write_text("{}")
    assert fingerprint(tmp_path) != before[0] and content_digest(tmp_path) != before[1]


def test_what_is_read_for_a_digest_is_all_and_is_heard(tmp_path):
    save_model_weights(random_state(), with_config(tmp_path), max_shard_bytes=2 * KIB)
    heard = []
    content_digest(tmp_path, heard.append)
    assert sum(heard) == content_bytes(tmp_path) == sum(path.stat().st_size for path in tmp_path.iterdir())


def _change_config(folder: Path) -> None:
    write_json(folder / "config.json", {"model_type": "other"})


def _write_instead(**changes) -> object:
    def write(folder: Path) -> None:
        state = random_state(changes.get("number", 6), changes.get("dtype", torch.float32))
        if "shape" in changes:
            state["tensor_0"] = state["tensor_0"].reshape(changes["shape"])
        if "name" in changes:
            state = {changes["name"] if name == "tensor_0" else name: tensor for name, tensor in state.items()}
        save_model_weights(state, folder, max_shard_bytes=changes.get("shard", 2 * KIB))

    return write


@pytest.mark.parametrize(
    "change",
    [_change_config, _write_instead(number=7), _write_instead(dtype=torch.bfloat16), _write_instead(shape=(8, 32)), _write_instead(name="tensor_x"),
     _write_instead(shard=2**30)],
    ids=["config", "tensor more", "dtype", "shape", "name", "shards"],
)  # fmt: skip
def test_the_digest_changes_with_what_the_folder_holds(change, tmp_path):
    save_model_weights(random_state(), with_config(tmp_path), max_shard_bytes=2 * KIB)
    before = content_digest(tmp_path)
    change(tmp_path)
    assert content_digest(tmp_path) != before


def test_number_of_parameters_is_the_number_of_elements(tmp_path):
    save_model_weights(random_state(5) | {"scalar": torch.tensor(1.0)}, tmp_path, max_shard_bytes=2 * KIB)
    assert Checkpoint(tmp_path).num_parameters == 5 * 256 + 1


# Memory.


def resident_file_bytes() -> int:
    """Resident pages of this process that a file backs."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssFile"))
    return int(line.split()[1]) * 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_reading_leaves_no_file_pages_in_memory(tmp_path):
    size = 32 * 2**20
    save_model_weights({"large": torch.zeros(size // 4)}, tmp_path, max_shard_bytes=2**30)
    checkpoint, before = Checkpoint(tmp_path), resident_file_bytes()
    tensor = checkpoint.read("large")
    assert resident_file_bytes() - before < size // 4
    with open(tmp_path / SINGLE_FILE, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:  # the control
        assert sum(mapped[offset] for offset in range(4096, size, 4096)) == 0 == tensor.sum()
        assert resident_file_bytes() - before > size // 2


def test_writing_holds_the_piece_written_and_the_next_one(tmp_path):
    alive, most = set(), []

    def pieces():
        for number in range(12):
            most.append(len(alive))
            piece = torch.zeros(16, 16)
            alive.add(number)
            weakref.finalize(piece, alive.discard, number)
            yield piece
            del piece

    write_weights(tmp_path, [PlannedTensor("large", "F32", (12 * 16, 16), pieces)], max_shard_bytes=2**30)
    assert most[0] == 0 and max(most) <= 2  # before the next is made: one being written, and one that waits


# Pieces.


@pytest.mark.parametrize("rows", [1, 5, 16, 100])
def test_a_tensor_written_in_pieces_is_the_tensor(rows, tmp_path):
    state = random_state()
    write_weights(tmp_path, planned(state, rows), max_shard_bytes=2 * KIB)
    assert_bit_equal(read_all(tmp_path), state)


@pytest.mark.parametrize(
    "pieces",
    [[torch.zeros(15, 16)], [torch.zeros(8, 16)] * 3, [torch.zeros(16, 8)] * 2, [torch.zeros(16, 16, dtype=torch.float64)], []],
    ids=["too few rows", "too many rows", "narrow", "dtype", "none"],
)
def test_pieces_that_differ_from_the_plan_are_our_mistake(pieces, tmp_path):
    with pytest.raises(AssertionError, match="tensor_0"):
        write_weights(tmp_path, [PlannedTensor("tensor_0", "F32", (16, 16), lambda: pieces)], max_shard_bytes=2**30)
    assert not list(tmp_path.glob("*.safetensors"))


@pytest.mark.parametrize("most_bytes", [1, 64, 100, 200, 10**6])
def test_rows_read_one_after_the_other_are_the_tensor(most_bytes, tmp_path):
    state = {"matrix": torch.randn(7, 16), "vector": torch.randn(33), "empty": torch.zeros(0, 4), "three": torch.randn(5, 1, 4)}
    save_model_weights(state, tmp_path, max_shard_bytes=2**30)
    checkpoint = Checkpoint(tmp_path)
    for name, tensor in state.items():
        pieces = list(checkpoint.read_rows(name, most_bytes))
        assert [first for first, _ in pieces] == [sum(len(rows) for _, rows in pieces[:number]) for number in range(len(pieces))]
        assert all(len(rows) == 1 or rows.nbytes <= most_bytes for _, rows in pieces)
        assert torch.equal(torch.cat([tensor[:0], *(rows for _, rows in pieces)]), tensor)


def test_a_planned_tensor_is_held_only_bit_for_bit(tmp_path):
    state = {"a": torch.tensor([[0.0, float("nan")], [1.0, 2.0]])}
    write_weights(tmp_path, planned(state), max_shard_bytes=2**30)
    checkpoint = Checkpoint(tmp_path)
    assert all(checkpoint.holds(planned(state, rows)[0]) for rows in (1, 2))
    others = {"a": torch.tensor([[-0.0, float("nan")], [1.0, 2.0]])}, {"b": state["a"]}, {"a": state["a"].double()}, {"a": state["a"].flatten()}
    assert not any(checkpoint.holds(planned(other)[0]) for other in others)


# Room on the disk.


def too_large(folder: Path) -> int:
    """Rows of 1 MiB that the whole disk would not hold."""
    return 2 * shutil.disk_usage(folder).total // 2**20


def never() -> list[torch.Tensor]:
    raise AssertionError("nothing should have been made")


def test_weights_that_the_disk_cannot_hold_are_refused_before_any_is_made(tmp_path):
    huge = PlannedTensor("huge", "U8", (too_large(tmp_path), 2**20), never)
    with pytest.raises(ValueError, match=r"is on a disk with [\d.,]+ GiB free; the weights to write there need [\d.,]+ GiB$"):
        write_weights(tmp_path, [*planned(random_state()), huge], max_shard_bytes=2 * KIB)
    assert list(tmp_path.iterdir()) == []


def test_a_shard_that_is_already_there_needs_no_room(tmp_path):
    huge, small = PlannedTensor("huge", "U8", (too_large(tmp_path), 2**20), never), planned(random_state(1))
    header = json.dumps({"huge": {"dtype": "U8", "shape": list(huge.shape), "data_offsets": [0, huge.num_bytes]}}).encode()
    path = tmp_path / "model-00001-of-00002.safetensors"
    write_header(path, header)
    try:
        os.truncate(path, path.stat().st_size + huge.num_bytes)  # a hole: whole by its length, without blocks on the disk
    except OSError:
        pytest.skip("this file system has no files larger than itself")
    write_weights(tmp_path, [huge, *small], max_shard_bytes=2 * KIB)
    assert Checkpoint(tmp_path).entries.keys() == {"huge", "tensor_0"}


def test_companion_files_are_carried_over_byte_for_byte(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir(), target.mkdir()
    files = {"tokenizer.json": b'{"a":  1}\r\n', "chat_template.jinja": "{{ x }}\n\n é".encode(), "tokenizer.model": bytes(range(256))}
    for name, data in files.items():
        (source / name).write_bytes(data)
    (source / "notes.txt").write_bytes(b"not ours")
    copy_companions(source, target)
    assert {path.name: path.read_bytes() for path in target.iterdir()} == files
