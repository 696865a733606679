"""What is peculiar to models of Mamba-2 alone: a float32 residual stream, our functions in transformers' place, no positions, no attention; and a walk."""

import json
import shutil
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from distill import products
from distill.batches import PADDING, mark_start
from distill.objectives import distillation_loss, head_of
from distill.top_k import top_k_of_hidden
from memory_budget.calculator import memory_report
from memory_budget.hf_config import architecture_from_config, read_config
from memory_budget.parameters import count_total_parameters
from memory_budget.workload import Workload
from minitron.checkpoints.files import Checkpoint
from minitron.checkpoints.placement import StreamedModel, WholeModel
from minitron.families.config_json import transformers_config
from minitron.families.known import can_decode, family_of
from minitron.generation.generate import generate
from minitron.mamba import dispatch, mixer
from minitron.measures.speed import decode_tokens_per_second
from minitron.pruning.cut import build_pruned
from minitron.search.distances import measure_batch
from minitron.settings.run import Settings, TeacherSettings
from minitron.settings.teachers import MOST_POSITIONS, STORED_FOLDER, max_positions

TRANSFORMERS_OWN = {(owner, name): getattr(owner, name) for owner, name, _ in dispatch.replacements()}  # before any test puts ours in their place


@pytest.fixture
def ours(monkeypatch) -> None:
    """Our functions in transformers' place, for this test."""
    for owner, name, function in dispatch.replacements():
        monkeypatch.setattr(owner, name, function)


@pytest.fixture(scope="module", params=["mamba2 tied", "mamba2 untied"])
def mamba2(request, build_tiny):
    """Not to be changed."""
    return build_tiny(request.param)


# A residual stream in float32, of a model in bf16.


@torch.no_grad()
def walked(placed, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The stream behind the last layer, and the logits."""
    (hidden,) = placed.embed([ids])
    for _, block in placed.visit(range(placed.architecture.num_sublayers)):
        hidden = block(hidden)
    with placed.open_head() as head:
        return hidden, head.logits(hidden)


@pytest.mark.parametrize("float32_stream", [True, False])
def test_a_walk_through_a_bf16_model_is_the_model_bit_for_bit(float32_stream, build_tiny, write_checkpoint, token_ids, logits_of, tmp_path):
    one = build_tiny("mamba2 tied", residual_in_fp32=float32_stream)
    folder = write_checkpoint(tmp_path / "it", one.model, one.config, dtype=torch.bfloat16)
    model = one.family.load(folder)
    streamed = StreamedModel(one.family, folder, read_config(folder), one.architecture, torch.device("cpu"))
    for placed in (WholeModel(one.family, model, one.architecture), streamed):
        (embedded,), (stream, logits) = placed.embed([token_ids()]), walked(placed, token_ids())
        assert embedded.dtype == stream.dtype == (torch.float32 if float32_stream else torch.bfloat16)
        assert torch.equal(logits, logits_of(model))


def test_the_stream_is_float32_unless_config_json_says_otherwise(build_tiny, logits_of):
    """The control of the test before: the two are different models."""
    said = ({}, {"residual_in_fp32": True}, {"residual_in_fp32": False})
    by_default, as_said, narrow = (logits_of(build_tiny("mamba2 tied", **one).model.bfloat16()) for one in said)
    assert torch.equal(by_default, as_said) and not torch.equal(by_default, narrow)


@torch.no_grad()
def test_heads_that_are_applied_here_give_the_models_own_logits(build_tiny, token_ids, logits_of):
    model, ids = build_tiny("mamba2 untied").model.bfloat16(), token_ids()
    stream_BTD, expected_BTV, head = model.base_model(ids, use_cache=False).last_hidden_state, logits_of(model), head_of(model, ids)
    assert (stream_BTD.dtype, head.hidden_BTD.dtype, head.weight_VD.dtype) == (torch.float32, torch.bfloat16, torch.bfloat16)
    for hidden_BTD in (stream_BTD, head.hidden_BTD):
        assert torch.equal(products.logits_of(hidden_BTD.flatten(0, 1), head.weight_VD), expected_BTV.flatten(0, 1))
    kept = top_k_of_hidden(stream_BTD, head.weight_VD, 5)
    assert torch.allclose(kept.log_probabilities_BTK, expected_BTV.log_softmax(-1).gather(-1, kept.ids_BTK), atol=1e-5)
    distance = measure_batch(model, {"itself": model}, ids)["itself"]
    loss = F.cross_entropy(expected_BTV[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").item()
    assert distance.loss == pytest.approx(loss, rel=1e-5) and abs(distance.kl) < 1e-3
    rounded = products.logits_of(stream_BTD.flatten(0, 1).float(), head.weight_VD.float())  # the control: what is not rounded first
    assert not torch.equal(rounded.bfloat16().float(), expected_BTV.flatten(0, 1))


# Our functions in transformers' place.


def logits_and_gradients(model, ids: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad(set_to_none=True)
    logits = model(ids, use_cache=False).logits
    F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    return logits.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


def away(one: torch.Tensor, other: torch.Tensor) -> float:
    return ((one - other).norm() / other.norm()).item()


@pytest.mark.parametrize("limit", [(0.0, float("inf")), [0.0, float("inf")]], ids=["tuple", "as JSON has it"])
def test_logits_and_gradients_are_those_of_transformers_own_path(limit, mamba2, build_tiny, token_ids, monkeypatch):
    model, ids, hearts = deepcopy(mamba2.model).requires_grad_(True), token_ids(2, 75), []
    for block in model.backbone.layers:
        block.mixer.time_step_limit = limit
    for (owner, name), function in TRANSFORMERS_OWN.items():
        monkeypatch.setattr(owner, name, function)
    expected, expected_gradients = logits_and_gradients(model, ids)
    for owner, name, function in dispatch.replacements():
        monkeypatch.setattr(owner, name, function)
    heart = mixer._Heart.forward
    monkeypatch.setattr(mixer._Heart, "forward", staticmethod(lambda *args: hearts.append(1) or heart(*args)))
    found, gradients = logits_and_gradients(model, ids)
    assert hearts == [1] * 4 and away(found, expected) <= 1e-5
    assert all(away(gradient, expected_gradients[name]) <= 1e-4 for name, gradient in gradients.items())


LENGTHS = ((7, 41, 2, 12), (30, 33))  # of the documents of two rows


def rows_of(token_ids, *, packed: bool) -> torch.Tensor:
    """The documents one behind another in two rows, or each in a row of its own."""
    ids, numbers = token_ids(rows=6, tokens=64, seed=7), iter(range(6))
    documents = [[ids[next(numbers), :length] for length in row] for row in LENGTHS]
    joined = [torch.cat([torch.cat([mark_start(one[:1]), one[1:]]) if place else one for place, one in enumerate(row)]) for row in documents]
    rows = joined if packed else [one for row in documents for one in row]
    return torch.stack([F.pad(row, (0, 64 - len(row)), value=PADDING) for row in rows])


def test_packed_documents_are_what_they_are_alone(mamba2, token_ids, ours):
    """Position ids reach the mixer with the documents' numbers, and nothing comes of them."""
    student = deepcopy(mamba2.model).requires_grad_(True).train()
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(1.1)
    loss, found = distillation_loss(mamba2.model), []
    for packed in (True, False):
        means = loss(student, rows_of(token_ids, packed=packed))
        found.append((means["loss"].item(), torch.autograd.grad(means["loss"], student.parameters())))
    (together, gradients), (apart, expected) = found
    assert together == pytest.approx(apart, rel=1e-5) and together > 1e-3
    assert all(away(one, other) <= 1e-4 for one, other in zip(gradients, expected, strict=True))
    as_one = rows_of(token_ids, packed=True)  # the control: the same ids as one document a row
    as_one = torch.where(as_one < PADDING, PADDING - 1 - as_one, as_one)
    assert loss(student, as_one)["loss"].item() != pytest.approx(apart, rel=1e-4)


def test_only_what_a_mixer_knows_reaches_its_kernels():
    heard = []
    dispatch._mix_long(lambda hidden, **named: heard.append(named), torch.zeros(1, 4, 8), position_ids=torch.arange(4)[None], output_attentions=False,
                       seq_idx=torch.zeros(1, 4, dtype=torch.int32))  # fmt: skip
    assert [set(named) for named in heard] == [{"cache_params", "attention_mask", "seq_idx"}]


# A cache without attention.


@torch.no_grad()
def test_decoding_goes_on_as_prefill_does(mamba2, token_ids, logits_of, ours):
    ids, expected = token_ids(), logits_of(mamba2.model)
    output = mamba2.model(ids[:, :30], use_cache=True)
    logits = [output.logits]
    for token_B1 in ids[:, 30:].split(1, dim=1):
        output = mamba2.model(token_B1, cache_params=output.cache_params, use_cache=True)
        logits.append(output.logits)
    assert away(torch.cat(logits, dim=1), expected) <= 1e-5 and can_decode(mamba2.architecture)
    assert decode_tokens_per_second(mamba2.model, ids[0], 2) > 0


def test_nemotron_h_without_attention_still_cannot(tiny):
    assert can_decode(tiny) and not can_decode(replace(tiny, pattern="M-M-"))


@torch.no_grad()
def test_generated_text_is_the_likeliest_token_each_time_however_long(build_tiny, chat_tokenizer, ours):
    """Of two prompts of different lengths, the shorter padded on the left; there is no longest text that it would be held against."""
    tokenizer = chat_tokenizer("{{ messages }}")
    model = build_tiny("mamba2 tied", vocab_size=len(tokenizer), num_hidden_layers=2, eos_token_id=2).model
    assert not hasattr(model.config, "max_position_embeddings")
    prompts = ["import os", "of a text"[:5]]
    for prompt, made in zip(prompts, generate(model, tokenizer, prompts, new_tokens=6), strict=True):
        ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"]
        for token in made:
            assert model(ids, use_cache=False).logits[0, -1].argmax() == token
            ids = torch.cat([ids, torch.tensor([[token]])], dim=1)


def test_a_config_without_positions_sets_no_limit(mamba2, tmp_path):
    for name, config in (("none", mamba2.config), ("some", mamba2.config | {"max_position_embeddings": 512})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    none, some = (max_positions(Settings(teacher=TeacherSettings(path=str(tmp_path / name)))) for name in ("none", "some"))
    assert (none, some) == (MOST_POSITIONS, 512) and isinstance(none, int)


# Students.


def student_of(mamba2, keep_all):
    """A plan of half the hidden size and half of each group's heads, three layers."""
    teacher = mamba2.architecture
    student = replace(teacher, pattern="MMM", hidden=teacher.hidden // 2, mamba_num_heads=teacher.mamba_num_heads // 2)
    per_group = teacher.mamba_num_heads // teacher.mamba_num_groups
    heads = tuple(head for head in range(teacher.mamba_num_heads) if head % per_group < per_group // 2)
    kept = keep_all(teacher, hidden={-1: tuple(range(student.hidden))}, mamba_head=dict.fromkeys(range(4), heads))
    return replace(kept, student=student, kept_layers=(0, 1, 3))


@torch.no_grad()
def test_a_students_states_are_counted_to_the_byte(mamba2, keep_all, token_ids, ours):
    plan = student_of(mamba2, keep_all)
    model = build_pruned(mamba2.family, mamba2.model, plan, mamba2.config)
    layers = model(token_ids(3, 17), use_cache=True).cache_params.layers
    report = memory_report(plan.student, Workload(context_tokens=17, batch=3, weights_dtype="float32", kv_dtype="float32"))
    held = {name: [state for layer in layers for state in getattr(layer, name).values()] for name in ("recurrent_states", "conv_states")}
    assert report.ssm_state == sum(state.nbytes for state in held["recurrent_states"])
    assert report.conv_state == sum(state[..., 1:].contiguous().nbytes for state in held["conv_states"])  # transformers keeps a column that nothing reads
    assert report.weights == 4 * count_total_parameters(plan.student) == 4 * model.num_parameters() and report.kv_cache == 0
    assert report.ssm_state != memory_report(mamba2.architecture, Workload(context_tokens=17, batch=3)).ssm_state


def test_a_students_config_is_its_architectures_and_transformers_takes_it(mamba2, keep_all):
    student = student_of(mamba2, keep_all).student
    foreign = {"time_step_rank": 2, "intermediate_size": 64, "d_inner": 64, "time_step_limit": [0.0, {"__float__": "Infinity"}], "of_their_own": 3}
    config = mamba2.family.hf_config(mamba2.config | foreign, student)
    assert architecture_from_config(config) == student and not {"time_step_rank", "intermediate_size", "d_inner"} & set(config)
    assert config["time_step_limit"] == [0.0, float("inf")] and config["of_their_own"] == 3 and type(config["expand"]) is int
    taken = transformers_config(config)
    assert (taken.expand, taken.time_step_rank) == (mamba2.config["expand"], 1)
    with pytest.raises(ValueError, match="Inconsistent configuration: hidden_size"):
        transformers_config(config | {"hidden_size": student.hidden + 1})


REFUSED = {
    "expand": ({"expand": 3}, r"expand \(3\) times hidden_size \(32\) must equal num_heads times head_dim \(64\)"),
    "heads": ({"num_heads": 6}, r"expand \(2\) times hidden_size \(32\) must equal num_heads times head_dim \(48\)"),
    "groups": ({"n_groups": 3}, r"mamba heads \(8\) must be a multiple of the 3 groups; nearest: 6, 9"),
    "half": ({"expand": 1.5, "num_heads": 6}, r"expand is 1.5; expand × hidden_size == num_heads × head_dim with a whole expand, so it must be a whole number"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_config_of_sizes_that_clash_is_refused_in_a_line(name, build_tiny):
    change, said = REFUSED[name]
    config = build_tiny("mamba2 tied").config | change
    with pytest.raises(ValueError, match=said):
        architecture_from_config(config)
        family_of(config)


# A walk.


SETTINGS = (
    "~experiment", "device=cpu", "run_name=own", "data.sequence_length=32", "data.max_train_tokens=4000", "data.max_heldout_tokens=2000",
    "workload.context_tokens=64", "budget.device_gib=1", "search.fixed={mamba_heads: 4, layers: 3}", "scoring.samples=8", "scoring.layer_samples=4",
    "search.screen_samples=4", "depth_lap.enabled=false", "prune.method=compensated", "prune.samples=16", "prune.direction_samples=4",
    "distill.train.tokens=512", "evaluate.samples=4", "evaluate.prompts=['import os']", "evaluate.new_tokens=4",
    "evaluate.speed=[{input_tokens: 8, output_tokens: 4, batch: 1}]", "evaluate.needle.lengths=[]",
)  # fmt: skip


@pytest.fixture(scope="module")
def own_teacher(build_tiny, write_checkpoint, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("mamba2") / "mine"
    teacher = build_tiny("mamba2 tied", vocab_size=2048)
    write_checkpoint(folder, teacher.model, teacher.config, dtype=torch.bfloat16)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(STORED_FOLDER / name, folder / name)
    return folder


def test_a_walk_ends_in_a_student_whose_hidden_size_followed_its_heads(own_teacher, door):
    folder = own_teacher.parent
    finished = door(folder, *SETTINGS, "teacher.path=mine", f"runs_folder={folder / 'runs'}")
    assert finished.returncode == 0, finished.stderr
    assert "layers 3 of 4, hidden size 16 of 32 (following), Mamba-2 heads 4 of 8" in finished.stdout
    models = json.loads((folder / "runs" / "own" / "summary.json").read_text())["models"]
    student = Path(models["student"]["path"])
    loaded, architecture = AutoModelForCausalLM.from_pretrained(student), architecture_from_config(read_config(student))
    assert (architecture.hidden, architecture.mamba_num_heads, architecture.num_layers) == (16, 4, 3)
    assert loaded.num_parameters() == Checkpoint(student).num_parameters == count_total_parameters(architecture) == models["student"]["parameters"]
    kl = {name: model["evaluation"]["kl_to_teacher_nats_per_token"] for name, model in models.items()}
    assert kl["teacher"] == 0 < kl["student"] < kl["pruned"]
    assert models["student"]["evaluation"]["decode_tokens_per_second"] > 0 and models["student"]["evaluation"]["continuations"][0]["text"]
    assert "attention" not in (student / "README.md").read_text().split("Pattern letters")[0]


def test_a_wrong_size_ends_the_command_in_one_line(own_teacher, door):
    finished = door(own_teacher.parent, *SETTINGS, "teacher.path=mine", "search.fixed.hidden=20", "runs_folder=wrong")
    assert finished.returncode == 2 and len(finished.error_lines) == 1
    said = "the student breaks expand × hidden_size == num_heads × head_dim with a whole expand: hidden is 20, mamba_num_heads 4, mamba_head_dim 8"
    assert said in finished.error_lines[0] and not (own_teacher.parent / "wrong" / "store" / "score").exists()
