"""A user's mistakes: one line on stderr that names setting, value and rule, exit code 2, and nothing left as done."""

import json
import re
import shutil
import struct
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from minitron.machine.processes import check_launch


@pytest.fixture
def refused(door, done_folders, tmp_path, small_settings):
    """Runs the small walk with further overrides; returns the one line it was refused with, all else checked."""

    def run(*arguments: str) -> str:
        finished = door(tmp_path, "runs_folder=runs", *small_settings, *arguments)
        assert finished.returncode == 2, finished.stdout + finished.stderr
        assert len(finished.error_lines) == 1 and finished.stderr.startswith("error: ") and "Traceback" not in finished.stderr + finished.stdout
        assert done_folders(tmp_path / "runs") == set()
        return finished.error_lines[0].removeprefix("error: ")

    return run


def test_a_command_that_is_right_is_not_refused(door, tmp_path, small_settings):
    """The control: the same arguments and the same door."""
    (tmp_path / "order").write_text("10 8 1 0")
    finished = door(tmp_path, *small_settings, "stage=search", "search.layer_order=order")
    assert (finished.returncode, finished.stderr) == (0, "")


def test_processes_for_gpus_are_refused_where_there_are_none(door_of_two, done_folders, tmp_path, small_settings):
    """conf/accelerate/fsdp2.yaml on a machine without GPUs; with device=cpu or auto the same launch trains in test_distill_stage.py."""
    finished = door_of_two("fsdp2", tmp_path, "runs_folder=runs", *small_settings, "device=cuda")
    assert finished.returncode == 2 and "Traceback" not in finished.stderr + finished.stdout
    said = "error: device is cuda, but torch sees no GPU here, and num_processes puts 2 processes on this machine, each of which needs one for NCCL; it must be"
    lines = finished.error_lines  # one of each process, but for one that the launcher has ended before it could say it
    assert 1 <= len(lines) <= 2 and all(line.startswith(said) for line in lines)
    assert done_folders(tmp_path / "runs") == set()


@pytest.mark.parametrize(("device", "processes", "gpus", "refused"), [("auto", 4, 2, True), ("cuda", 2, 1, True), ("cuda", 2, 0, True), ("auto", 2, 2, False),
                                                                      ("cpu", 4, 2, False), ("cpu", 2, 0, False), ("auto", 2, 0, False),
                                                                      ("auto", 1, 0, False)])  # fmt: skip
def test_more_processes_than_gpus_are_refused(device, processes, gpus, refused):
    with pytest.raises(ValueError, match=r"num_processes puts \d processes on this machine") if refused else nullcontext():
        check_launch(device, processes_here=processes, gpus_here=gpus)


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("stage=eval", "stage is 'eval'; did you mean evaluate?"),
        ("stage=bogus", "stage: Invalid value 'bogus', expected one of [against_slice, base, data, distill, distill_cache, distill_slice, distill_whole, "),
        ("foo=1", "foo is no setting"),
        ("+foo=1", "foo is no setting"),
        ("search.fixed={hiden: 3}", "search.fixed.hiden is no setting; did you mean search.fixed.hidden?"),
        ("seed=1,2", "seed is '1,2', several values; -m runs one job for each, and a list goes in brackets: seed='[1,2]'"),
        ("seed=a=b", "seed is 'a=b', which cannot be read as a value (mismatched input '=' expecting <EOF>)"),
        ("--config-dir=nowhere", "--config-dir: the folder '"),
        ("distill.train.learning_rat=1", "distill.train.learning_rat is no setting"),
        ("data.vocab=many", "data.vocab: Value 'many'"),
        ("distill.train.optimizer=sgd", "distill.train.optimizer: Invalid value 'sgd', expected one of [adamw, adamw_8bit, muon]"),
        ("experiment=nano3", "experiment/nano3 is not in conf/; there are: nano2, nano2-base, nano2-reasoning, own, smollm2, tiny"),
        ("experiment=nano2-bas", "; did you mean nano2-base?"),
        ("scoring.samples=0", "scoring.samples is 0; it must be at least 1"),
        ("workload.context_tokens=0", "context_tokens (0) must be a whole number of at least 1 token"),
        ("workload.batch=0", "batch (0) must be"),
        ("workload.kv_dtype=int4", "kv_dtype (int4) must be one of"),
        ("budget.device_gib=0", "device_gib (0.0)"),
        ("budget.set_aside_gib=1", "set_aside_gib (1.0)"),
        ("search.hidden={low: 40, high: 48, step: 8}", "above the teacher's 32"),
        ("search.layers={values: [1]}", "the floors per kind of layer keep at least 2"),
        ("search.fixed.mamba_num_heads=5", "mamba heads (5) must be a multiple of the 2 groups; nearest: 4, 6"),
        ("search.fixed.pattern='***'", "pattern *** is not the teacher's M-M*-M-*-M- with layers left out"),
        ("teacher.tiny.mamba_num_heads=7", "mamba heads (7) must be a multiple of the 2 groups"),
        ("teacher.tiny.pattern=MX", "pattern 'MX' must be a string of layer letters"),
        ("data.files=nowhere.txt", "data.files names 'nowhere.txt', which does not exist"),
        ("data.dataset=wikitext", "data.dataset is 'wikitext'; it must be a Hub id of the form owner/name"),
        ("data.rows=pages", "data.rows: Invalid value 'pages', expected one of [windows, documents, packed]"),
        ("run_name=a/b", "run_name is 'a/b'"),
        ("search.floors.attn=1", "search.floors.attn is no setting"),
        ("teacher.train.tokens=255", "teacher.train.tokens is 255; it must be at least one batch, 4 rows of data.sequence_length: 256"),
        ("distill.train.tokens=255", "distill.train.tokens is 255; it must be at least one batch, 4 rows of data.sequence_length: 256"),
        ("teacher.path=no/such/checkpoint", "teacher.path is 'no/such/checkpoint': no folder is there"),
        ("teacher.path=owner/name", "teacher.path is 'owner/name': no folder is there, HF_HUB_OFFLINE is set, and its cache on this machine does not have it"),
        ("throughput.device=rtx-4090", "; did you mean rtx4090?"),
        ("throughput={device: abacus, gb_per_second: null, tflops: null}", "throughput.device (abacus) must be one of a10g, l4"),
        ("throughput.tflops=null", "throughput.gb_per_second and throughput.tflops belong together"),
        ("search.min_tokens_per_second=5", "it needs throughput.batch"),
        ("search.weights.loss=-1", "search.weights.loss is -1.0; it must be at least 0"),
        ("search.finalists=-1", "search.finalists is -1; it must be at least 0"),
        ("search.attention_heads={values: [3]}", "attention heads to keep (3) must be a multiple of the 2 key-value heads; nearest: 2, 4"),
        ("search.fixed.file=nowhere.json", "search.fixed.file: export_config nowhere.json cannot be read: "),
        ("screen.top_k=0", "screen.top_k is 0; it must be at least 1"),
        ("distill.loss.beta=1", "distill.loss.beta is 1.0; it must be above 0"),
        ("distill.loss.cross_entropy_weight=1.5", "distill.loss.cross_entropy_weight is 1.5; it must be at least 0 and at most 1"),
        ("base.path=nowhere", "base.path is 'nowhere'; it must be the folder of a checkpoint"),
        ("search.layer_order=nowhere.json", "search.layer_order is 'nowhere.json', which cannot be read: No such file"),
    ],
)
def test_a_setting_that_cannot_be_is_refused_before_any_work(argument, said, refused, tmp_path):
    assert said in refused(argument)
    assert not (tmp_path / "runs" / "store").exists()


def test_a_runs_folder_that_cannot_be_is_refused(door, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "order").write_text("1 0 4 5")
    for folder in ("file", "file/inside", "/proc/inside"):
        finished = door(tmp_path, f"runs_folder={folder}", "stage=search", "search.layer_order=order")
        assert (finished.returncode, len(finished.error_lines)) == (2, 1) and f"runs_folder is {folder!r}" in finished.stderr


def test_a_budget_that_nothing_fits_says_the_smallest_size(refused):
    said = refused("budget.device_gib=0.0001")
    assert re.search(r"budget of 0.00010+ GiB fits none .* the smallest, L8-H24-F48-M4, needs at least 0.0002\d+ GiB; lowering search.\w+ helps most", said)


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("least important first", "must hold layer numbers, least important first"),
        ('{"layers": [1]}', "must hold layer numbers, least important first"),
        ("[[1, 2]]", "must hold layer numbers, least important first"),
        ("", "must hold layer numbers"),
        ("[1, 11]", "names layer 11; the teacher has layers 0 to 10"),
        ("[1, 2, 1]", "names layer 1 twice"),
        ("\xff\x00", "must hold layer numbers, least important first"),
    ],
    ids=["words", "other object", "nested", "empty", "layer too many", "layer twice", "bytes"],
)
def test_a_file_that_is_no_layer_order_is_refused(written, said, refused, tmp_path):
    (tmp_path / "order").write_bytes(written.encode("latin-1"))
    assert said in refused("stage=search", "search.layer_order=order")


def test_an_order_too_short_for_every_depth_is_refused(refused, tmp_path):
    (tmp_path / "order").write_text("[1]")
    assert "search.layers has the option 9, but the layer order and the floors reach only 10 layers" in refused(
        "stage=search", "search.layer_order=order", "search.layers={low: 8, high: 9}"
    )


def test_a_report_of_nothing_is_refused(refused):
    assert "nothing is under these settings" in refused("stage=report")


# Data.


def write_corpus(path: Path, texts: list, field: str = "text") -> Path:
    """JSON lines, one document each."""
    path.write_text("".join(json.dumps({"id": index, field: text}) + "\n" for index, text in enumerate(texts)))
    return path


TEXTS = [f"Document {index} says what number it has: {index}, and again {index}. " * 8 for index in range(80)]


def test_a_corpus_that_is_right_is_taken(door, tmp_path, small_settings):
    """The control for all that follows: one name, with whatever a file's name may have."""
    name = "my, [own] {a}=(b) #1 ~it's $HOME ü.jsonl"
    write_corpus(tmp_path / name, TEXTS)
    finished = door(tmp_path, *small_settings, "stage=data", f"data.files={name}")
    assert (finished.returncode, finished.stderr) == (0, ""), finished.stdout


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("corpus.pdf", b"text", "data.files names 'corpus.pdf'; the extension must be one of .jsonl, .ndjson, .json, .csv, .tsv, .txt"),
        ("corpus.jsonl", b"not json\n", "data.files: corpus.jsonl, document 1 is no JSON (Expecting value at character 1): not json"),
        ("corpus.jsonl", b'{"text": 3}\n', "corpus.jsonl has the fields 'text', and 'text' there holds int: 3; data.text_field=… must name a text"),
        ("corpus.jsonl", b'{"text": " "}\n' * 99, "data: corpus.jsonl has 99 documents and none with text for held-out text (left out: "),
        ("corpus.txt", b"one long document " * 99, "data: corpus.txt has 1 document and none to hold out"),
    ],
)
def test_a_file_that_is_no_corpus_is_named(name, content, said, refused, tmp_path):
    (tmp_path / name).write_bytes(content)
    assert said in refused("stage=data", f"data.files=[{name}]")


def test_an_empty_folder_is_no_corpus(refused, tmp_path):
    (tmp_path / "texts").mkdir()
    assert "data.files names 'texts', a folder without a file that can be read: .jsonl, " in refused("data.files=[texts]")


def test_a_missing_text_field_is_named_with_those_there_are(refused, tmp_path):
    write_corpus(tmp_path / "corpus.jsonl", TEXTS, field="body")
    said = refused("stage=data", "data.files=[corpus.jsonl]")
    assert said.startswith("corpus.jsonl has the fields 'id', 'body', and none of them is plainly a text or a conversation; data.text_field=… must name a text")
    said = refused("stage=data", "data.files=[corpus.jsonl]", "data.text_field=story")
    assert said == "data.text_field is 'story'; corpus.jsonl has no such field, it must be one of 'id', 'body'"


def test_too_few_documents_to_hold_one_out_are_counted(refused, tmp_path):
    write_corpus(tmp_path / "corpus.jsonl", TEXTS[:3])
    said = refused("stage=data", "data.files=[corpus.jsonl]")
    assert "corpus.jsonl has 3 documents and none to hold out; about 1 in 20 is held out" in said


def test_documents_that_are_too_short_are_counted_with_their_tokens(refused, tmp_path):
    write_corpus(tmp_path / "corpus.jsonl", ["short"] * 80)
    said = refused("stage=data", "data.files=[corpus.jsonl]")
    assert "heldout documents have" in said and "the longest" in said and "needs a document of at least 64 tokens" in said


def test_a_dataset_that_cannot_be_reached_is_named(refused):
    said = refused("stage=data", "data.dataset=owner/name", "data.dataset_revision=abc")
    assert said.startswith("data.dataset: owner/name train at abc cannot be read (ConnectionError")


def test_a_folder_in_place_of_a_dataset_is_refused(refused, tmp_path):
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert "and there is such a folder here" in refused("data.dataset=owner/name")


# Checkpoints.


@pytest.fixture
def checkpoint(walk, tmp_path) -> Path:
    """The walk's teacher as a user's own checkpoint."""
    return shutil.copytree(walk.checkpoint("teacher"), tmp_path / "mine")


@pytest.fixture
def sharded(walk, tmp_path) -> Path:
    folder = shutil.copytree(walk.checkpoint("teacher"), tmp_path / "mine")
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder, max_shard_size="150KB")
    (folder / "model.safetensors").unlink()
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    return folder


def change_config(folder: Path, **values) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({key: value for key, value in (config | values).items() if value is not None}))


def test_a_whole_checkpoint_is_taken(checkpoint, door, tmp_path, small_settings):
    """The control for all that follows."""
    finished = door(tmp_path, *small_settings, "teacher.path=mine", "stage=teacher")
    assert (finished.returncode, finished.stderr) == (0, "")


def test_a_whole_checkpoint_in_shards_is_taken(sharded, door, tmp_path, small_settings):
    finished = door(tmp_path, *small_settings, "teacher.path=mine", "stage=teacher")
    assert (finished.returncode, finished.stderr) == (0, "")


def test_a_folder_without_config_json_is_refused(refused, tmp_path):
    (tmp_path / "mine").mkdir()
    assert "mine/config.json not found" in refused("teacher.path=mine", "stage=prune")


def test_a_folder_without_weights_is_refused(refused, checkpoint):
    (checkpoint / "model.safetensors").unlink()
    assert "holds no weights; expected model.safetensors or model.safetensors.index.json" in refused("teacher.path=mine", "stage=prune")


def test_a_config_that_is_no_json_is_refused(refused, checkpoint):
    (checkpoint / "config.json").write_text("{")
    assert "must be JSON" in refused("teacher.path=mine", "stage=prune")


def test_an_unsupported_model_type_is_refused_with_the_supported_ones(refused, checkpoint):
    change_config(checkpoint, model_type="gpt_neox")
    said = refused("teacher.path=mine", "stage=prune")
    assert "gpt_neox" in said and "supported: nemotron_h" in said


def test_a_missing_shard_is_named(refused, sharded):
    shard = sorted(sharded.glob("model-*.safetensors"))[1]
    shard.unlink()
    assert f"shard {shard.name} is listed in model.safetensors.index.json but missing" in refused("teacher.path=mine", "stage=prune")


@pytest.mark.parametrize("left", [-1, 200, 3])
def test_a_truncated_shard_is_named(left, refused, sharded):
    shard = sorted(sharded.glob("model-*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:left])
    said = refused("teacher.path=mine", "stage=prune")
    assert shard.name in said and "is truncated" in said


def test_a_file_that_is_no_safetensors_is_named(refused, checkpoint):
    (checkpoint / "model.safetensors").write_bytes(struct.pack("<Q", 4) + b"oops" + b"\x00" * 100)
    assert "is not a safetensors file" in refused("teacher.path=mine", "stage=prune")


def test_a_tensor_of_the_wrong_shape_is_named_with_both_shapes(refused, checkpoint):
    change_config(checkpoint, intermediate_size=56)
    assert "tensor layers.1.mixer.up_proj.weight has shape [64, 32]; config.json says [56, 32]" in refused(
        "teacher.path=mine", "stage=prune", "search.ffn={values: [48]}"
    )


def test_a_tensor_that_is_missing_is_named(refused, checkpoint):
    state = load_file(checkpoint / "model.safetensors")
    del state["backbone.layers.3.mixer.k_proj.weight"]
    save_file(state, checkpoint / "model.safetensors")
    assert "tensor layers.3.mixer.k_proj.weight is missing" in refused("teacher.path=mine", "stage=prune")


def test_heads_of_a_checkpoint_not_divisible_by_its_groups_are_refused(refused, checkpoint):
    change_config(checkpoint, n_groups=3)
    assert "mamba heads (8) must be a multiple of the 3 groups; nearest: 6, 9" in refused("teacher.path=mine", "stage=prune")


def test_patterns_that_disagree_are_refused(refused, checkpoint):
    change_config(checkpoint, layers_block_type=["mamba", "mlp"] * 5 + ["mamba"])
    assert "hybrid_override_pattern and layers_block_type must agree" in refused("teacher.path=mine", "stage=prune")


def test_a_checkpoint_without_a_tokenizer_is_refused_before_scoring(checkpoint, door, done_folders, tmp_path, small_settings):
    for path in checkpoint.glob("*token*"):
        path.unlink()
    finished = door(tmp_path, "runs_folder=runs", *small_settings, "teacher.path=mine", "stage=score")
    assert finished.returncode == 2 and len(finished.error_lines) == 1 and "tokenizer" in finished.stderr, finished.stderr
    assert {folder.parent.name for folder in done_folders(tmp_path / "runs")} == {"teacher"}


def test_full_traces_are_there_for_who_asks(environment, tmp_path):
    finished = subprocess.run([sys.executable, "-m", "minitron.run", "stage=bogus"], cwd=tmp_path, env=environment | {"HYDRA_FULL_ERROR": "1"},
                              capture_output=True, text=True)  # fmt: skip
    assert finished.returncode != 0 and "Traceback" in finished.stderr
