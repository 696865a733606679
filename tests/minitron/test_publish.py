"""A model folder is checked by reading it back as a user would."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from memory_budget.hf_config import read_config
from memory_budget.parameters import count_total_parameters
from minitron.checkpoints.files import SINGLE_FILE, Checkpoint, PlannedTensor
from minitron.checkpoints.publish import check_layer_by_layer, check_reload, model_card, write_model
from minitron.checkpoints.shards import save_model_weights
from minitron.families.nemotron_h import FAMILY
from minitron.walk.store import write_json

COMPANIONS = {
    "tokenizer.json": b'{"version":  "1.0",\r\n "added_tokens": []}',
    "chat_template.jinja": "{{ messages }}\n\n<think></think> é".encode(),
    "tokenizer.model": bytes(range(256)),
}


@pytest.fixture
def companions(tmp_path) -> Path:
    folder = tmp_path / "companions"
    folder.mkdir()
    for name, data in COMPANIONS.items():
        (folder / name).write_bytes(data)
    return folder


@pytest.fixture
def written(tmp_path, companions, teacher, tiny, config_of) -> Path:
    """A folder that write_model made of the shared teacher."""
    folder = tmp_path / "model"
    dtypes = {FAMILY.canonical_name(name): torch.float32 for name in teacher.state_dict()}
    card = model_card("Tiny", lines=["A line."], architecture=tiny, base="owner/teacher")
    write_model(folder, FAMILY, teacher, config=config_of(tiny), dtypes=dtypes, companions=companions, card=card, max_shard_bytes=2**30)
    return folder


def overwrite(folder: Path, change) -> None:
    """Replace a folder's weights after `change` worked on them."""
    checkpoint = Checkpoint(folder)
    state = {name: checkpoint.read(name) for name in checkpoint.entries}
    change(state)
    save_model_weights(state, folder, max_shard_bytes=2**30)


def test_what_was_written_gives_the_same_logits(written, teacher):
    assert check_reload(written, FAMILY, teacher) <= 1e-6


def test_the_check_accepts_a_checkpoint_of_several_shards(tmp_path, teacher, tiny, config_of, write_checkpoint):
    write_checkpoint(tmp_path, teacher, config_of(tiny), max_shard_bytes=20_000)
    assert check_reload(tmp_path, FAMILY, teacher) <= 1e-6


@pytest.mark.parametrize(
    "name",
    ["embeddings.weight", "layers.0.mixer.A_log", "layers.0.mixer.D", "layers.0.mixer.dt_bias", "layers.2.mixer.conv1d.weight", "layers.2.mixer.conv1d.bias",
     "layers.3.mixer.k_proj.weight", "layers.4.norm.weight", "layers.5.mixer.norm.weight", "layers.8.mixer.down_proj.weight", "norm_f.weight"],
)  # fmt: skip
def test_one_altered_tensor_on_disk_is_noticed(name, written, teacher):
    overwrite(written, lambda state: state[f"backbone.{name}"].view(-1)[:8].add_(0.1))
    with pytest.raises(RuntimeError, match="read back, gives logits that differ"):
        check_reload(written, FAMILY, teacher)


def test_a_lost_head_is_noticed(written, teacher):
    overwrite(written, lambda state: state.pop("lm_head.weight"))
    with pytest.raises(RuntimeError, match="parameters"):
        check_reload(written, FAMILY, teacher)


def test_exchanged_layers_are_noticed(written, teacher):
    def exchange(state):
        one, other = "backbone.layers.0.mixer.out_proj.weight", "backbone.layers.2.mixer.out_proj.weight"
        state[one], state[other] = state[other], state[one]

    overwrite(written, exchange)
    with pytest.raises(RuntimeError, match="logits that differ"):
        check_reload(written, FAMILY, teacher)


def test_weights_that_are_not_finite_are_noticed(written, teacher):
    overwrite(written, lambda state: state["backbone.norm_f.weight"].fill_(math.nan))
    with pytest.raises(RuntimeError, match="differ by nan"):
        check_reload(written, FAMILY, teacher)


def test_a_config_of_another_size_is_noticed(written, teacher):
    config = read_config(written)
    write_json(written / "config.json", config | {"intermediate_size": 47})
    with pytest.raises(RuntimeError, match=r"holds .* parameters, its config\.json has"):
        check_reload(written, FAMILY, teacher)


def test_weights_rounded_on_disk_are_noticed_at_the_default_tolerance(tmp_path, teacher, tiny, config_of, write_checkpoint):
    write_checkpoint(tmp_path, teacher, config_of(tiny), dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="is rounding"):
        check_reload(tmp_path, FAMILY, teacher)
    assert 1e-4 < check_reload(tmp_path, FAMILY, teacher, tolerance=0.1) < 0.1


def test_every_tensor_is_stored_in_the_dtype_asked_for(tmp_path, companions, teacher, tiny, config_of):
    names = [FAMILY.canonical_name(name) for name in teacher.state_dict()]
    dtypes = {name: torch.float32 if name.endswith(("A_log", "dt_bias")) else torch.bfloat16 for name in names}
    write_model(tmp_path, FAMILY, teacher, config=config_of(tiny), dtypes=dtypes, companions=companions, card="", max_shard_bytes=2**30)
    stored = {FAMILY.canonical_name(name): entry.dtype for name, entry in Checkpoint(tmp_path).entries.items()}
    assert stored == {name: "F32" if name.endswith(("A_log", "dt_bias")) else "BF16" for name in names}


# Layer by layer.


@pytest.fixture
def planned(teacher) -> list[PlannedTensor]:
    """The tensors of the shared teacher, as a plan to write them."""
    return [PlannedTensor(FAMILY.file_name(FAMILY.canonical_name(name)), "F32", tuple(tensor.shape), lambda tensor=tensor: [tensor])
            for name, tensor in teacher.state_dict().items()]  # fmt: skip


def test_what_was_written_is_equal_layer_by_layer(written, planned, config_of, tiny):
    layers = []
    check_layer_by_layer(written, FAMILY, planned, config_of(tiny), on_layer=lambda: layers.append(None))
    assert len(layers) == tiny.num_layers


def test_weights_in_the_dtype_of_config_json_are_equal_layer_by_layer(tmp_path, teacher, tiny, config_of, write_checkpoint):
    write_checkpoint(tmp_path, teacher, config_of(tiny), dtype=torch.bfloat16, max_shard_bytes=20_000)
    checkpoint = Checkpoint(tmp_path)
    planned = [PlannedTensor(entry.name, "BF16", entry.shape, lambda name=entry.name: [checkpoint.read(name)]) for entry in checkpoint.entries.values()]
    check_layer_by_layer(tmp_path, FAMILY, planned, read_config(tmp_path))


@pytest.mark.parametrize("name", ["embeddings.weight", "layers.0.mixer.A_log", "layers.3.mixer.k_proj.weight", "norm_f.weight", "lm_head.weight"])
@pytest.mark.parametrize("torch_dtype", ["float32", "bfloat16"])
def test_one_altered_number_is_noticed_layer_by_layer(name, torch_dtype, written, planned, config_of, tiny):
    """Also where the layers would be converted to another dtype, in which the number is the same."""
    config = config_of(tiny) | {"torch_dtype": torch_dtype}
    write_json(written / "config.json", config)
    overwrite(written, lambda state: state[f"backbone.{name}" if name != "lm_head.weight" else name].view(-1)[-1:].mul_(1 + 2**-20))
    with pytest.raises(RuntimeError, match="read back, is not what was planned"):
        check_layer_by_layer(written, FAMILY, planned, config)


@pytest.mark.parametrize(
    ("change", "said"),
    [({"layer_norm_epsilon": 1e-3}, "does something else to 8 tokens"), ({"mlp_hidden_act": "silu"}, "does something else to 8 tokens"),
     ({"num_attention_heads": 4}, "another architecture")],
    ids=["epsilon", "activation", "heads"],
)  # fmt: skip
def test_another_config_is_noticed_layer_by_layer(change, said, written, planned, config_of, tiny):
    write_json(written / "config.json", read_config(written) | change)
    with pytest.raises(RuntimeError, match=said):
        check_layer_by_layer(written, FAMILY, planned, config_of(tiny))


def test_a_lost_head_is_noticed_layer_by_layer(written, planned, config_of, tiny):
    overwrite(written, lambda state: state.pop("lm_head.weight"))
    with pytest.raises(RuntimeError, match="other tensors than were planned"):
        check_layer_by_layer(written, FAMILY, planned, config_of(tiny))


def test_logits_that_are_not_finite_are_noticed_layer_by_layer(tmp_path, build_model, tiny, config_of, write_checkpoint):
    model = build_model()
    model.model.norm_f.weight.data.fill_(math.inf)
    write_checkpoint(tmp_path, model, config_of(tiny))
    checkpoint = Checkpoint(tmp_path)
    planned = [PlannedTensor(entry.name, "F32", entry.shape, lambda name=entry.name: [checkpoint.read(name)]) for entry in checkpoint.entries.values()]
    with pytest.raises(RuntimeError, match="not finite"):
        check_layer_by_layer(tmp_path, FAMILY, planned, config_of(tiny))


def test_companion_files_are_carried_over_byte_for_byte(written):
    assert {name: (written / name).read_bytes() for name in COMPANIONS} == COMPANIONS


def test_the_folder_holds_nothing_but_the_model(written):
    assert {path.name for path in written.iterdir()} == {"config.json", SINGLE_FILE, "README.md", *COMPANIONS}


def test_weights_written_before_are_replaced(written, companions, build_model, tiny, config_of):
    other = build_model(seed=5)
    dtypes = {FAMILY.canonical_name(name): torch.float32 for name in other.state_dict()}
    write_model(written, FAMILY, other, config=config_of(tiny), dtypes=dtypes, companions=companions, card="", max_shard_bytes=2**30)
    assert check_reload(written, FAMILY, other) <= 1e-6


def test_the_written_config_is_readable_json_without_extensions(written):
    assert json.loads((written / "config.json").read_text())["hybrid_override_pattern"] == "M-M*-M-*-"


def test_auto_model_gives_the_teachers_logits(written, teacher, logits_of):
    loaded = AutoModelForCausalLM.from_pretrained(written, local_files_only=True).eval()
    assert (logits_of(loaded) - logits_of(teacher)).abs().max() <= 1e-2  # transformers clamps the time step from below


def test_the_model_card_names_base_title_and_sizes(written, tiny):
    card = (written / "README.md").read_text()
    assert "base_model: owner/teacher" in card and "# Tiny" in card and "A line." in card
    assert f"{count_total_parameters(tiny):,}" in card and f"9 (`{tiny.pattern}`)" in card


@pytest.mark.parametrize("base", [None, "/data/teacher", "tiny teacher", "models/own", "../models/own"])
def test_the_model_card_has_no_base_that_is_no_hub_id(base, tiny, tmp_path, monkeypatch):
    (tmp_path / "models" / "own").mkdir(parents=True)  # a folder here, though it could be the name of a model on the Hub
    monkeypatch.chdir(tmp_path)
    assert "base_model" not in model_card("Tiny", lines=[], architecture=tiny, base=base)


def test_the_model_card_starts_with_front_matter(tiny):
    lines = model_card("Tiny", lines=[], architecture=replace(tiny, pattern="M"), base="a/b").splitlines()
    assert lines[0] == "---" and "---" in lines[1:7]
