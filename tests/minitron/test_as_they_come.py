"""Checkpoints as they are found: what transformers loads is what is read, and what no stage can take is named in one line."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from memory_budget.hf_config import read_config
from minitron.checkpoints.files import Checkpoint, copy_companions
from minitron.checkpoints.given import given_checkpoint
from minitron.checkpoints.shards import save_model_weights, write_weights
from minitron.checkpoints.weight_files import INDEX_FILE, SINGLE_FILE, check_plain_weights, weight_files
from minitron.families.known import family_of
from minitron.generation.tokenizers import load_tokenizer
from minitron.settings.hand_over import MergeSettings
from minitron.settings.run import BaseSettings, Settings, Stage, TeacherSettings
from minitron.settings.teachers import STORED_FOLDER, teacher_config, teacher_name
from minitron.walk.pipeline import check_before_work
from minitron.walk.store import write_json

SHARD_BYTES = 20_000


@pytest.fixture
def own(tmp_path, build_model, tiny, config_of, write_checkpoint) -> Path:
    """A checkpoint of seed 0 in several shards."""
    return write_checkpoint(tmp_path / "own", build_model(), config_of(tiny), max_shard_bytes=SHARD_BYTES)


@pytest.fixture
def other_state(build_model) -> dict[str, torch.Tensor]:
    """Tensors of seed 1 by their names on disk: another save of the same architecture."""
    model = build_model(seed=1)
    return {family_of({"model_type": "nemotron_h"}).file_name(name.removeprefix("model.")): value for name, value in model.state_dict().items()}


def head_that_transformers_loads(folder: Path) -> torch.Tensor:
    return AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).lm_head.weight


def head_that_is_read(folder: Path) -> torch.Tensor:
    return Checkpoint(folder).read("lm_head.weight")


def change_config(folder: Path, **changes) -> None:
    write_json(folder / "config.json", read_config(folder) | changes)


def refused(folder: Path) -> str:
    """The one line by which a stage refuses the folder."""
    with pytest.raises(ValueError) as caught:
        given_checkpoint(folder, "own", "teacher.path")
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Which file the weights are in.


def _whole_file_and_stale_index(folder: Path, other: dict) -> None:
    """As after save_pretrained into a folder of shards: those are gone, the index is not."""
    for path in folder.glob("model-*"):
        path.unlink()
    save_file(other, folder / SINGLE_FILE)


def _newer_whole_file_beside_shards(folder: Path, other: dict) -> None:
    save_file(other, folder / SINGLE_FILE)


def _shards_of_two_saves(folder: Path, other: dict) -> None:
    """The index is of the newer one."""
    save_model_weights(other, folder.parent / "other", max_shard_bytes=2 * SHARD_BYTES)
    for path in (folder.parent / "other").iterdir():
        shutil.copy(path, folder / path.name)


def _file_named_in_the_config(folder: Path, other: dict) -> None:
    save_file(other, folder / "newest.safetensors")
    change_config(folder, transformers_weights="newest.safetensors")


def _nothing(folder: Path, other: dict) -> None:
    pass


@pytest.mark.parametrize(("change", "is_other", "said"), [
    (_nothing, False, None),
    (_whole_file_and_stale_index, True, f"holds {SINGLE_FILE} and {INDEX_FILE}"),
    (_newer_whole_file_beside_shards, True, "the shards beside it are not"),
    (_shards_of_two_saves, True, "does not list: not read"),
    (_file_named_in_the_config, True, None),
])  # fmt: skip
def test_the_weights_read_are_those_that_transformers_loads(change, is_other, said, own, other_state):
    (own.parent / "other").mkdir()
    before = head_that_is_read(own)
    change(own, other_state)
    assert torch.equal(head_that_is_read(own), head_that_transformers_loads(own))
    assert torch.equal(head_that_is_read(own), before) != is_other
    heard = []
    given_checkpoint(own, "own", "teacher.path", say=heard.append)
    assert [said in text and text.startswith("teacher.path: ") for text in heard] == [True] * (said is not None)


def test_a_student_written_again_in_one_file_or_in_shards_leaves_nothing_of_the_other(own):
    one = Checkpoint(own)
    planned = [one.planned(name, new_name=name, dtype=entry.dtype) for name, entry in one.entries.items()]
    folder = own.parent / "again"
    folder.mkdir()
    for most, files in ((2**30, {SINGLE_FILE}), (10**6, {SINGLE_FILE})):
        write_weights(folder, planned, max_shard_bytes=most)
        assert {path.name for path in folder.iterdir()} == files
    write_weights(folder, planned, max_shard_bytes=SHARD_BYTES)
    assert not (folder / SINGLE_FILE).exists() and weight_files(folder).notes == ()
    write_weights(folder, planned, max_shard_bytes=2**30)
    assert {path.name for path in folder.iterdir()} == {SINGLE_FILE} and torch.equal(head_that_is_read(folder), head_that_is_read(own))


def _lose_a_shard(folder: Path, other: dict) -> None:
    sorted(folder.glob("model-00002-*"))[0].unlink()


def _index_of_an_earlier_save(folder: Path, other: dict) -> None:
    index = (folder / INDEX_FILE).read_text()
    save_model_weights(other, folder, max_shard_bytes=2 * SHARD_BYTES)
    (folder / INDEX_FILE).write_text(index)


def _only(name: str, content: bytes = b"x" * 100):
    def only(folder: Path, other: dict) -> None:
        for path in folder.glob("model*"):
            path.unlink()
        (folder / name).write_bytes(content)

    return only


def _no_index(folder: Path, other: dict) -> None:
    (folder / INDEX_FILE).unlink()


def _index_to_elsewhere(folder: Path, other: dict) -> None:
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": {"lm_head.weight": "../secret.safetensors"}}))
    save_file(other, folder.parent / "secret.safetensors")


@pytest.mark.parametrize(("change", "said"), [
    (_lose_a_shard, "is listed in model.safetensors.index.json but missing"),
    (_index_of_an_earlier_save, "the index is of another save than the"),
    (_no_index, "the index that lists it is missing"),
    (_only("pytorch_model.bin"), "pytorch_model.bin is no safetensors"),
    (_only("pytorch_model-00001-of-00002.bin"), "is no safetensors; load them with transformers"),
    (_only("adapter_model.safetensors"), "an adapter (LoRA)"),
    (_only("own.gguf"), "teacher.gguf takes one"),
    (_only("consolidated.00.pth"), "convert them to a folder of transformers first"),
    (_only(SINGLE_FILE, b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"), "is a pointer of Git LFS"),
    (_index_to_elsewhere, "lies outside of the folder"),
    (lambda folder, other: change_config(folder, transformers_weights="model.bin"), "transformers_weights in config.json is 'model.bin'"),
    (lambda folder, other: change_config(folder, transformers_weights="gone.safetensors"), "gone.safetensors is named as the file of weights but missing"),
])  # fmt: skip
def test_a_folder_that_transformers_could_not_load_is_refused_with_what_would_work(change, said, own, other_state):
    change(own, other_state)
    assert said in refused(own)


# Quantised checkpoints.


def _add(name: str, tensor: torch.Tensor):
    def add(folder: Path) -> None:
        path = sorted(folder.glob("*.safetensors"))[0]
        save_file(load_file(path) | {name: tensor}, path)

    return add


def _config(**changes):
    return lambda folder: change_config(folder, **changes)


def _json(name: str, value: dict):
    return lambda folder: write_json(folder / name, value)


FP8 = torch.zeros(4, 4).to(torch.float8_e4m3fn)


@pytest.mark.parametrize(("change", "said"), [
    (_config(quantization_config={"quant_method": "fp8", "fmt": "e4m3"}), "quantization_config is there (fp8, e4m3)"),
    (_config(quantization_config={"quant_method": "modelopt", "quant_algo": "NVFP4"}), "quantization_config is there (modelopt, NVFP4)"),
    (_config(compression_config={"format": "pack-quantized"}), "compression_config is there (pack-quantized)"),
    (_json("hf_quant_config.json", {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}}),
     "hf_quant_config.json is there (FP8)"),
    (_json("hf_quant_config.json", {"quantization": {"quant_algo": "NVFP4"}}), "hf_quant_config.json is there (NVFP4)"),
    (_json("quantize_config.json", {"bits": 4, "group_size": 128}), "quantize_config.json is there (4 bits)"),
    (_add("backbone.layers.0.mixer.in_proj.weight_scale", torch.tensor(1.0)), "FP8: tensor backbone.layers.0.mixer.in_proj.weight_scale"),
    (_add("backbone.layers.0.mixer.in_proj.weight_scale_inv", torch.ones(2, 2)), "FP8: tensor"),
    (_add("backbone.layers.0.mixer.in_proj.weight_scale_2", torch.tensor(1.0)), "NVFP4: tensor"),
    (_add("backbone.layers.3.mixer.k_proj.k_scale", torch.tensor(1.0)), "FP8: tensor"),
    (_add("backbone.layers.1.mixer.up_proj.qweight", torch.zeros(2, 2, dtype=torch.int32)), "GPTQ or AWQ: tensor"),
    (_add("backbone.layers.1.mixer.up_proj.weight_packed", torch.zeros(2, 2, dtype=torch.int32)), "compressed-tensors: tensor"),
    (_add("backbone.layers.1.mixer.up_proj.weight.quant_state.bitsandbytes__nf4", torch.zeros(2, dtype=torch.uint8)), "bitsandbytes: tensor"),
    (_add("backbone.layers.1.mixer.experts.5.up_proj.weight_scale", torch.tensor(1.0)), "FP8: tensor backbone.layers.1.mixer.experts.5.up_proj.weight_scale"),
    (_add("backbone.layers.1.mixer.experts.5.down_proj.input_scale", torch.tensor(1.0)), "FP8: tensor"),
    (_add("model.layers.1.mlp.experts.5.gate_proj.weight_packed", torch.zeros(2, 2, dtype=torch.int32)), "compressed-tensors: tensor"),
    (_add("model.layers.1.mlp.experts.gate_up_proj_blocks", torch.zeros(2, 2, dtype=torch.uint8)), "MXFP4: tensor"),
    (_add("backbone.layers.1.mixer.up_proj.other", FP8), "FP8: tensor backbone.layers.1.mixer.up_proj.other is F8_E4M3"),
    (_add("backbone.layers.1.mixer.up_proj.other", torch.zeros(2, 2).to(torch.float8_e5m2)), "is F8_E5M2"),
    (_add("backbone.layers.1.mixer.up_proj.other", torch.zeros(2, 2, dtype=torch.int8)), "is I8"),
])  # fmt: skip
def test_a_quantised_checkpoint_is_refused_by_its_kind(change, said, own):
    check_plain_weights(own, read_config(own), "teacher.path")  # the control
    change(own)
    line = refused(own)
    assert said in line and line.startswith(f"teacher.path is {str(own)!r}, a quantised checkpoint") and line.endswith("give the bf16 one")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_plain_weights_of_every_precision_are_no_quantised_ones(dtype, tmp_path, build_model, tiny, config_of, write_checkpoint):
    folder = write_checkpoint(tmp_path / "own", build_model(), config_of(tiny) | {"quantization_config": None}, dtype=dtype)
    check_plain_weights(folder, read_config(folder), "teacher.path")


@pytest.mark.parametrize(("stage", "named"), [("prune", "teacher.path"), ("base", "base.path"), ("merge", "merge.checkpoints[1]")])
def test_quantised_weights_are_refused_before_any_work(stage, named, own, monkeypatch):
    """By what the walk does before it makes a folder."""
    quantised = shutil.copytree(own, own.parent / "quantised")
    _add("backbone.layers.0.mixer.in_proj.weight_scale", torch.tensor(1.0))(quantised)
    given = {
        "prune": {"teacher": TeacherSettings(path=str(quantised))},
        "base": {"teacher": TeacherSettings(path=str(own)), "base": BaseSettings(path=str(quantised))},
        "merge": {"teacher": TeacherSettings(path=str(own)), "merge": MergeSettings(checkpoints=[str(own), str(quantised)])},
    }[stage]
    with pytest.raises(ValueError) as caught:
        check_before_work(Settings(stage=Stage[stage], device="cpu", **given))
    assert str(caught.value).startswith(f"{named} is {str(quantised)!r}, a quantised checkpoint (FP8: tensor")


# Tensors that transformers leaves out, and numbers of layers that are stale.


@pytest.mark.parametrize("name", ["mtp.layers.0.mixer.in_proj.weight", "mtp.layers.1.mixer.experts.5.up_proj.weight", "backbone.mtp.norm.weight",
                                  "mtp_head.weight"])  # fmt: skip
def test_tensors_of_further_tokens_heads_are_left_out_with_a_note(name, own):
    _add(name, torch.ones(3, 3))(own)
    change_config(own, num_nextn_predict_layers=1, mtp_hybrid_override_pattern="*-")
    heard = []
    facts = given_checkpoint(own, "own", "teacher.path", say=heard.append)
    said = f"teacher.path: tensors that transformers does not load are left out: 1, {name} the first; they foretell the teacher's tokens, "
    assert len(heard) == len(facts["notes"]) == 1 and heard[0].startswith(said) and "--freeze-base-for-mtp" in heard[0] and "\n" not in heard[0]
    assert torch.equal(head_that_is_read(own), head_that_transformers_loads(own))


def test_a_tensor_of_no_known_kind_is_still_named(own):
    _add("backbone.layers.0.mixer.odd", torch.ones(3))(own)
    assert "tensor layers.0.mixer.odd is matched by 0 rows" in refused(own)


@pytest.mark.parametrize("name", ["llama tied", "qwen3 tied"])
def test_layers_beyond_the_configs_number_are_left_out_as_transformers_does(name, build_tiny, write_checkpoint, tmp_path):
    blocks = build_tiny(name)
    folder = write_checkpoint(tmp_path / "own", blocks.model, blocks.config)
    change_config(folder, num_hidden_layers=3, **({"layer_types": ["full_attention"] * 3} if "layer_types" in blocks.config else {}))
    heard = []
    facts = given_checkpoint(folder, "own", "teacher.path", say=heard.append)
    loaded = blocks.family.load(folder)
    assert facts["parameters"] == loaded.num_parameters() < blocks.model.num_parameters()
    assert [text for text in heard if "config.json says 3 layers and the files hold 4: layers 3 to 3 are left out" in text] == heard != []


@pytest.mark.parametrize(("name", "change", "said"), [
    ("qwen3 tied", {"num_hidden_layers": 3}, "layer_types (4 entries) must have an entry for each of the 3 layers"),
    ("llama tied", {"rms_norm_eps": "small"}, "expected float, got str"),
    ("llama tied", {"num_attention_heads": 5, "num_key_value_heads": 5, "head_dim": 8}, "is not a multiple of the number of attention heads (5)"),
])  # fmt: skip
def test_a_config_that_transformers_refuses_is_refused_in_a_line(name, change, said, build_tiny, write_checkpoint, tmp_path):
    blocks = build_tiny(name)
    folder = write_checkpoint(tmp_path / "own", blocks.model, blocks.config)
    change_config(folder, **change)
    assert said in refused(folder)


def test_old_tables_of_positions_are_left_out(build_tiny, write_checkpoint, tmp_path):
    blocks, heard = build_tiny("llama tied"), []
    folder = write_checkpoint(tmp_path / "own", blocks.model, blocks.config)
    _add("model.layers.0.self_attn.rotary_emb.inv_freq", torch.ones(4))(folder)
    given_checkpoint(folder, "own", "teacher.path", say=heard.append)
    assert len(heard) == 1 and heard[0].endswith("rotary_emb.inv_freq the first")


def test_more_layers_in_the_config_than_in_the_files_are_refused(own, tiny, build_tiny, write_checkpoint, tmp_path):
    change_config(own, hybrid_override_pattern=tiny.pattern + "M-", num_hidden_layers=11)
    assert "says 11 layers, but its files hold 9, and transformers would make up the others at random" in refused(own)
    blocks = build_tiny("llama tied")
    folder = write_checkpoint(tmp_path / "blocks", blocks.model, blocks.config | {"num_hidden_layers": 6})
    assert "says 6 layers, but its files hold 4" in refused(folder)


def test_a_pattern_of_another_length_than_the_number_of_layers_is_refused(own):
    change_config(own, num_hidden_layers=8)
    assert refused(own) == "num_hidden_layers (8) must be the length of the pattern M-M*-M-*- (9 layers)"


# Code beside the weights, places and paths.

RUNS = "open({!r}, 'w').write('it ran')\n"


def _with_code(folder: Path, *, tokenizer_class: str) -> Path:
    """The tiny teacher's tokenizer and, beside it, code for everything, which leaves a trace where it is run."""
    for name in ("tokenizer.json", "special_tokens_map.json"):
        shutil.copyfile(STORED_FOLDER / name, folder / name)
    auto = {"AutoConfig": "configuration_mine.Mine", "AutoModelForCausalLM": "modeling_mine.Mine"}
    change_config(folder, auto_map=auto)
    for name in ("configuration_mine.py", "modeling_mine.py", "tokenization_mine.py"):
        (folder / name).write_text(RUNS.format(str(folder / "trace")))
    given = json.loads((STORED_FOLDER / "tokenizer_config.json").read_text())
    own = {"tokenizer_class": tokenizer_class, "auto_map": {"AutoTokenizer": ["tokenization_mine.Mine", None]}, "name_or_path": "/home/me/secret",
           "special_tokens_map_file": "/home/me/special_tokens_map.json"}  # fmt: skip
    write_json(folder / "tokenizer_config.json", given | own)
    return folder


@pytest.mark.parametrize("tokenizer_class", ["Mine", "PreTrainedTokenizerFast"])
def test_code_beside_the_weights_is_neither_run_nor_asked_about(tokenizer_class, own, monkeypatch):
    _with_code(own, tokenizer_class=tokenizer_class)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a person is asked"))
    model, tokenizer = family_of(read_config(own)).load(own), load_tokenizer(own)
    assert torch.equal(model.lm_head.weight, head_that_is_read(own)) and tokenizer.decode(tokenizer("import os")["input_ids"]).endswith("import os")
    assert not (own / "trace").exists()
    with pytest.raises(Exception), monkeypatch.context() as patch:  # noqa: B017 the control: where it is trusted it runs, and is no model
        patch.setitem(sys.modules, "tokenization_mine", None)
        AutoModelForCausalLM.from_pretrained(own, trust_remote_code=True)
        AutoTokenizer.from_pretrained(own, trust_remote_code=True)


def test_a_tokenizer_that_only_code_makes_is_refused_in_one_line(own, monkeypatch):
    _with_code(own, tokenizer_class="Mine")
    (own / "tokenizer.json").unlink()
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a person is asked"))
    with pytest.raises(ValueError, match="which is not run; a tokenizer.json is needed") as caught:
        load_tokenizer(own)
    assert "\n" not in str(caught.value) and not (own / "trace").exists()


def test_what_is_carried_over_names_no_code_and_no_place_and_loads(own, tmp_path):
    _with_code(own, tokenizer_class="MineFast")
    write_json(own / "generation_config.json", {"eos_token_id": [2, 11], "_name_or_path": "/home/me/own", "temperature": 0.6})
    target = tmp_path / "student"
    target.mkdir()
    copy_companions(own, target)
    written = json.loads((target / "tokenizer_config.json").read_text())
    assert written["tokenizer_class"] == "PreTrainedTokenizerFast" and "/home/me" not in json.dumps(written) and "auto_map" not in written
    assert json.loads((target / "generation_config.json").read_text()) == {"eos_token_id": [2, 11], "temperature": 0.6}
    assert (target / "tokenizer.json").read_bytes() == (own / "tokenizer.json").read_bytes()
    assert AutoTokenizer.from_pretrained(target, trust_remote_code=True)("import os")["input_ids"] == load_tokenizer(own)("import os")["input_ids"]


@pytest.mark.parametrize(("file", "said"), [
    ("own/model.safetensors", "which is a file; its folder is meant: teacher.path=own"),
    ("own/config.json", "its folder is meant: teacher.path=own"),
    ("loose.safetensors", "its folder is meant, one that holds config.json and the weights"),
    ("some.gguf", "or teacher.gguf=some.gguf"),
])  # fmt: skip
def test_a_file_in_place_of_its_folder_is_told_of_the_folder(file, said, own, monkeypatch):
    shutil.copy(next(own.glob("*.safetensors")), own / SINGLE_FILE)
    monkeypatch.chdir(own.parent)
    for name in ("loose.safetensors", "some.gguf"):
        Path(name).write_bytes(b"x")
    with pytest.raises(ValueError) as caught:
        teacher_config(Settings(teacher=TeacherSettings(path=file)))
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_teacher_is_called_by_its_folder_or_its_hub_id(own, monkeypatch):
    monkeypatch.chdir(own)
    names = [teacher_name(Settings(teacher=TeacherSettings(path=path))) for path in (str(own), "../own", ".", f"{own}/", "owner/model")]
    assert names == ["own", "own", "own", "own", "owner/model"]
