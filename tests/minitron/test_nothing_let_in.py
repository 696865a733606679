"""Files from elsewhere: none is read that lies outside of its folder, none is run, and none fills a memory."""

import gzip
import json
import os
import re
import resource
import shutil
import stat
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from memory_budget.hf_config import read_config
from memory_budget.json_files import is_inside, parse_json
from memory_budget.sources.safetensors import tensors_of_folder
from minitron.checkpoints.files import Checkpoint
from minitron.checkpoints.folder import fingerprint
from minitron.checkpoints.given import given_checkpoint
from minitron.door.mistakes import users_mistakes
from minitron.families.config_json import load
from minitron.formats import streams
from minitron.formats.blocks import records
from minitron.formats.files import blocks_of
from minitron.formats.folders import saved_files
from minitron.generation.tokenizers import load_tokenizer
from minitron.machine.panics import panics_caught
from minitron.settings.teachers import STORED_FOLDER
from minitron.walk.store import DONE, damaged, find_result, finish

INDEX = "model.safetensors.index.json"


def shard(path: Path, name: str = "a") -> Path:
    header = json.dumps({name: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    return path


@pytest.fixture
def cached(tmp_path) -> Path:
    """A folder as the Hub's cache has it: a snapshot of links into blobs, which lie beside it."""
    snapshot = tmp_path / "snapshots" / "0f1e2d"
    snapshot.mkdir(parents=True)
    (tmp_path / "blobs").mkdir()
    for number in (1, 2):
        shard(tmp_path / "blobs" / f"b{number}", f"t{number}")
        (snapshot / f"model-0000{number}-of-00002.safetensors").symlink_to(f"../../blobs/b{number}")
    weight_map = {f"t{number}": f"model-0000{number}-of-00002.safetensors" for number in (1, 2)}
    (tmp_path / "blobs" / "index").write_text(json.dumps({"weight_map": weight_map}))
    (snapshot / INDEX).symlink_to("../../blobs/index")
    return snapshot


def test_a_snapshot_of_the_hubs_cache_is_read_through_its_links(cached):
    """The control: where a link leads to is the user's matter, the name in the index is the file's."""
    assert set(Checkpoint(cached).entries) == {"t1", "t2"} == set(tensors_of_folder(cached))


@pytest.mark.parametrize("name", ["../elsewhere.safetensors", "/ABSOLUTE", "a/../../elsewhere.safetensors", "..", "", "x\0.safetensors", "a\\b.safetensors",
                                  "x" * 300 + ".safetensors", 7, None, ["model-00001-of-00002.safetensors"]])  # fmt: skip
@pytest.mark.parametrize("linked", [False, True])
def test_an_index_that_points_elsewhere_is_refused_in_a_line(name, linked, cached):
    elsewhere = shard(cached.parent / "elsewhere.safetensors", "t1")
    if linked:
        shutil.move(elsewhere, cached.parent / "blob")
        elsewhere.symlink_to("blob")
    index = {"weight_map": {"t1": str(elsewhere) if name == "/ABSOLUTE" else name, "t2": "model-00002-of-00002.safetensors"}}
    (cached / INDEX).unlink()
    (cached / INDEX).write_text(json.dumps(index))
    for read in (Checkpoint, tensors_of_folder):
        with pytest.raises(ValueError, match="(outside of the folder|must be a .safetensors file|must name .* beside it|file names by tensors)") as caught:
            read(cached)
        assert "\n" not in str(caught.value)
    assert fingerprint(cached)


def test_a_config_that_names_weights_elsewhere_is_refused(cached):
    shard(cached.parent / "elsewhere.safetensors")
    for name in ("../elsewhere.safetensors", str(cached.parent / "elsewhere.safetensors")):
        (cached / "config.json").write_text(json.dumps({"transformers_weights": name}))
        with pytest.raises(ValueError, match="lies outside of the folder"):
            Checkpoint(cached)


def test_a_saved_dataset_that_names_files_elsewhere_is_refused(tmp_path):
    folder = tmp_path / "saved"
    folder.mkdir()
    for path in (tmp_path / "x.arrow", folder / "x.arrow"):
        path.write_bytes(b"ARROW1")
    for name in ("../x.arrow", str(tmp_path / "x.arrow"), None, 3, "x.arrow"):
        (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name}]}))
        if name == "x.arrow":
            assert saved_files(folder, "saved") == [folder / "x.arrow"]
            continue
        with pytest.raises(ValueError, match="which is no file of its folder"):
            saved_files(folder, "saved")


@pytest.mark.parametrize("change", [{"files": {"../x": [1, "a"]}}, {"files": {"/x": [1, "a"]}}, {"files": []}, {"files": {"x": 3}}, {"facts": []}, {"key": 3},
                                    {"facts": {"identity": 3}}])  # fmt: skip
def test_a_record_of_another_shape_is_no_result(change, tmp_path):
    """Also where nobody vouches for it, as earlier versions did not."""
    finish(tmp_path, {"key": "0", "facts": {"path": "."}})
    assert find_result(tmp_path)
    record = json.loads((tmp_path / DONE).read_text())
    del record["digest"]
    (tmp_path / DONE).write_text(json.dumps(record | change))
    assert find_result(tmp_path) is None and damaged(tmp_path) == "done.json is not what was written"


def test_names_are_judged_as_names():
    assert all(map(is_inside, ("a", "a/b.safetensors", "..a", "a..b", "ü")))
    assert not any(map(is_inside, ("..", "a/..", "/a", "", "a\nb", "a\0", 3, None, "a\\b", "ü" * 128)))


# Claims, and bombs. Each is answered within a second or two and a few hundred MiB.


@pytest.mark.parametrize("content", [b"[" * 10**6, b"[" * 9000 + b"]" * 9000, b"[" + b"[]," * 2**21 + b"0]", b'{"a":' * 10**5, b"1" * 10**6, b"\xff\xfe{\0}\0"])
def test_json_that_is_a_bomb_is_no_json(content, tmp_path):
    (tmp_path / "config.json").write_bytes(content)
    begun = time.monotonic()
    with pytest.raises(ValueError):
        parse_json(content)
    with pytest.raises(ValueError, match="must be JSON"):
        read_config(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(content)) + content)
    (tmp_path / "quantize_config.json").write_bytes(content)
    for read in (Checkpoint, tensors_of_folder):
        with pytest.raises(ValueError):
            read(tmp_path)
    assert time.monotonic() - begun < 5


def test_a_config_of_gigabytes_is_not_read(tmp_path):
    with open(tmp_path / "config.json", "wb") as file:
        file.truncate(2**33)
    with pytest.raises(ValueError, match="has more than 16,777,216 bytes"):
        read_config(tmp_path)


@pytest.mark.parametrize("change", [{"shape": [2**40], "data_offsets": [0, 2**42]}, {"shape": [2**70]}, {"data_offsets": [8, 0]}, {"shape": [-2]},
                                    {"dtype": []}, {"shape": ["x"]}, {"data_offsets": [0]}, {"data_offsets": [0, 8, 16]}])  # fmt: skip
def test_a_header_that_claims_what_is_not_there_is_refused(change, tmp_path):
    written = json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | change}).encode()
    for claimed in (len(written), 2**63, 2**40):
        (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", claimed) + written + bytes(8))
        with pytest.raises(ValueError, match=r"(truncated|is not a safetensors file)"):
            Checkpoint(tmp_path)


@pytest.mark.parametrize(("name", "unit", "times"), [("a.txt.gz", b"a" * 2**20, 300), ("a.json.gz", b"a" * 2**20, 300), ("a.jsonl.gz", b"a" * 2**20, 300),
                                                     ("b.jsonl.gz", b'{"text": ""}\n' * 2**16, 400), ("a.csv.gz", b"a" * 2**20, 300)])  # fmt: skip
def test_a_file_that_unpacks_to_anything_is_read_no_further_than_text_goes(name, unit, times, tmp_path):
    with gzip.open(tmp_path / name, "wb", 9) as file:
        file.write(b'[{"text": "' if ".json." in name else b"")
        for _ in range(times):
            file.write(unit)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=r"(unpacks to more than 500 times its size|has a line of more than|is a document of more than)"):
        for block in blocks_of(tmp_path / name, cut_kib=0):
            next(records(block))
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < 2**30


def test_a_packed_text_that_repeats_itself_as_texts_do_is_read(tmp_path, monkeypatch):
    """The control: one page over and over, by a bound that is as much smaller as the file is."""
    monkeypatch.setattr(streams, "MOST_UNPACKED", 2**22)
    page = " ".join(f"word{number % 977} {number * 7919 % 10007}" for number in range(9000)).encode()
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress((page + b"\n\n") * 60, 1))
    assert sum(len(block.payload) for block in blocks_of(tmp_path / "a.txt.gz", cut_kib=64)) > 30
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"a" * 2**23))
    with pytest.raises(ValueError, match="unpacks to more than 500 times its size"):
        list(blocks_of(tmp_path / "a.txt.gz", cut_kib=64))


def test_a_tokenizer_of_gigabytes_is_refused(tmp_path):
    with open(tmp_path / "tokenizer.json", "wb") as file:
        file.truncate(2**33)
    with pytest.raises(ValueError, match="at most 268,435,456 are read"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("config", [{"model_max_length": "x"}, {"added_tokens_decoder": 3}, {"bos_token": []}, []])
def test_a_tokenizer_whose_parts_do_not_fit_is_refused_in_a_line(config, tmp_path):
    shutil.copyfile(STORED_FOLDER / "tokenizer.json", tmp_path / "tokenizer.json")
    assert load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="which cannot be loaded") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


LONG = "longer than any token"  # of which the library takes the length off a token's


def tokenizer_file(folder: Path, **model: str) -> Path:
    given = json.loads((STORED_FOLDER / "tokenizer.json").read_text())
    given["model"] |= model
    (folder / "tokenizer.json").write_text(json.dumps(given))
    return folder / "tokenizer.json"


def test_a_tokenizer_that_has_its_library_panic_is_one_line(tmp_path, capfd):
    tokenizer_file(tmp_path, continuing_subword_prefix=LONG)
    with pytest.raises(SystemExit), users_mistakes():
        load_tokenizer(tmp_path)
    assert re.fullmatch(r"error: tokenizer is .* cannot be loaded: range end index .*\n", capfd.readouterr().err)


def test_what_is_written_past_python_comes_where_all_goes_well(tmp_path, capfd):
    """The control: a panic is no Exception, and many lines."""
    with pytest.raises(BaseException, match="out of range") as caught:
        Tokenizer.from_file(str(tokenizer_file(tmp_path, continuing_subword_prefix=LONG)))
    assert not isinstance(caught.value, Exception) and "panicked at" in capfd.readouterr().err
    with pytest.raises(OSError, match="no panic"), panics_caught():
        os.write(1, b"gone"), os.write(2, b"gone")
        raise OSError("no panic")
    with panics_caught():
        os.write(1, b"kept"), os.write(2, b"kept")
    assert capfd.readouterr() == ("kept", "kept")


# Code, and modes of files.


def test_code_that_a_config_names_is_not_run_and_that_is_said(tmp_path):
    folder = shutil.copytree(STORED_FOLDER, tmp_path / "mine")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModelForCausalLM": "theirs.Model", "AutoConfig": "theirs.Config"}}))
    (folder / "theirs.py").write_text(f"open({str(tmp_path / 'was_run')!r}, 'w')")
    said = []
    given_checkpoint(folder, "mine", "teacher.path", say=said.append)
    load(folder)
    assert not (tmp_path / "was_run").exists() and "teacher.path: auto_map in config.json names code beside the weights, which is not run" in said


def test_no_code_of_ours_reads_pickles_or_runs_code_of_others(repository):
    """The control: the pattern finds what it looks for."""
    forbidden = re.compile(r"\bpickle\b|torch\.load\b|allow_pickle|joblib|marshal\.|trust_remote_code\"?\s*[=:]\s*True|yaml\.(unsafe_|full_)?load\(")
    allowed = re.compile(r"Loader=_AnyTag|with trust_remote_code=True|^NOT_FETCHED")  # YAML's safe loader; what a message says; what is left on the Hub
    files = [path for room in ("minitron", "distill", "nas", "memory_budget") for path in (repository / room).rglob("*.py")]
    lines = [(path.name, line) for path in files for line in path.read_text().splitlines()]
    found = [(name, line) for name, line in lines if forbidden.search(line) and not allowed.search(line)]
    assert not found and forbidden.search("torch.load(x)") and forbidden.search("trust_remote_code=True")


def test_files_are_made_with_the_users_umask(environment, small_settings, tmp_path):
    """Nobody else may read them where the user says so, and none can be run."""
    command = [sys.executable, "-m", "minitron.run", *small_settings, "stage=score"]
    finished = subprocess.run(command, cwd=tmp_path, env=environment | {"XDG_CACHE_HOME": str(tmp_path / "cache")}, capture_output=True, text=True, umask=0o027)
    assert finished.returncode == 0, finished.stderr
    files = [path for path in (tmp_path / "runs").rglob("*") if path.is_file()]
    assert len(files) > 10 and {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o640}
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "runs").rglob("*") if path.is_dir()} == {0o750}
