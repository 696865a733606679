"""What is peculiar to Granite-4-H: numbers that multiply, documents in packed rows, words of config.json, and Mamba-2 in some of its blocks or in none."""

from copy import deepcopy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from distill.batches import PADDING, mark_start
from distill.objectives import distillation_loss, head_of
from distill.products import logits_of as products_of
from memory_budget.architecture import check_architecture
from memory_budget.hf_config import architecture_from_config, read_config
from minitron.checkpoints.placement import StreamedModel, WholeModel
from minitron.families.config_json import transformers_config
from minitron.families.known import family_of
from minitron.mamba import dispatch, mixer
from minitron.pruning.cut import build_pruned
from minitron.pruning.plan import PruningPlan
from minitron.settings.derived import by_kind
from minitron.settings.follow import RULES
from nas.couplings import QUERY_HEADS, completed, following

TRANSFORMERS_OWN = {(owner, name): getattr(owner, name) for owner, name, _ in dispatch.replacements()}  # before any test puts ours in their place
KINDS, floor_of = ("granite tied", "granite untied"), RULES["search.floors.attention"]


def put(monkeypatch, functions) -> None:
    for (owner, name), function in functions.items():
        monkeypatch.setattr(owner, name, function)


OURS = {(owner, name): function for owner, name, function in dispatch.replacements()}


@pytest.fixture(scope="module", params=KINDS)
def granite(request, build_tiny):
    """Not to be changed."""
    return build_tiny(request.param)


def away(one: torch.Tensor, other: torch.Tensor) -> float:
    return ((one - other).norm() / other.norm()).item()


def furthest(model, gradients, expected) -> float:
    """Of all parameters but biases of keys, which without positions move no score and so have no gradient."""
    triples = zip(model.named_parameters(), gradients, expected, strict=True)
    return max(away(one, other) for (name, _), one, other in triples if not name.endswith("k_proj.bias"))


# Numbers that multiply.


@torch.no_grad()
def test_each_multiplier_is_transformers_and_has_its_say(granite, token_ids, logits_of, write_checkpoint, tmp_path):
    """Of transformers' own class, which multiplies elsewhere, the same logits; of a model that is told another number, others."""
    folder = write_checkpoint(tmp_path / "it", granite.model, granite.config)
    loaded = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval()
    assert loaded.config.logits_scaling == 6 and granite.model.config.logits_scaling == 1, "ours divides in the last norm"
    assert away(logits_of(granite.model), logits_of(loaded)) <= 1e-6
    for key in ("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling"):
        other = granite.family.build(granite.config | {key: 1.0}).eval()
        other.load_state_dict(granite.model.state_dict())
        assert away(logits_of(other), logits_of(loaded)) > 1e-3, key


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hidden_states_and_head_alone_give_the_models_logits(dtype, granite, token_ids, logits_of, write_checkpoint, tmp_path):
    """What training, the teacher's cache and zero-shot losses multiply out themselves; and walks, also of a model in bf16 read from disk."""
    folder = write_checkpoint(tmp_path / "it", granite.model, granite.config, dtype=dtype)
    model = granite.family.load(folder)
    assert model.dtype == dtype
    head, wanted = head_of(model, token_ids()), logits_of(model)
    assert torch.equal(products_of(head.hidden_BTD.flatten(0, 1), head.weight_VD), wanted.flatten(0, 1).float())
    streamed = StreamedModel(granite.family, folder, read_config(folder), granite.architecture, torch.device("cpu"))
    for placed in (WholeModel(granite.family, model, granite.architecture), streamed):
        (hidden,) = placed.embed([token_ids()])
        for _, block in placed.visit(range(placed.architecture.num_sublayers)):
            hidden = block(hidden)
        with placed.open_head() as opened:
            assert torch.equal(opened.logits(hidden), wanted.float())


@pytest.mark.parametrize("value", [0, None, "12", True, float("nan"), -1.0])
def test_a_multiplier_that_is_no_number_above_0_is_refused(value, configs):
    family_of(configs["granite tied"] | {"residual_multiplier": 0.3})  # the control
    with pytest.raises(ValueError, match=r"residual_multiplier is .*; it must be a number above 0"):
        family_of(configs["granite tied"] | {"residual_multiplier": value})


# Our functions in transformers' place.


def test_logits_and_gradients_are_those_of_transformers_own_path(granite, token_ids, monkeypatch):
    model, ids, hearts, found = deepcopy(granite.model).requires_grad_(True), token_ids(2, 75), [], []
    heart = mixer._Heart.forward
    monkeypatch.setattr(mixer._Heart, "forward", staticmethod(lambda *args: hearts.append(1) or heart(*args)))
    for functions in (TRANSFORMERS_OWN, OURS):
        put(monkeypatch, functions)
        logits = model(ids, use_cache=False).logits
        found.append((logits, torch.autograd.grad(F.cross_entropy(logits.flatten(0, 1), ids.flatten()), model.parameters())))
    (theirs, expected), (ours, gradients) = found
    assert len(hearts) == granite.architecture.num_layers_of("M") and away(ours, theirs) <= 1e-5
    assert furthest(model, gradients, expected) <= 1e-4


LENGTHS = ((7, 41, 2, 12), (30, 33))  # of the documents of two rows


def rows_of(token_ids, *, packed: bool) -> torch.Tensor:
    """The documents one behind another in two rows, or each in a row of its own."""
    ids, numbers = token_ids(rows=6, tokens=64, seed=7), iter(range(6))
    documents = [[ids[next(numbers), :length] for length in row] for row in LENGTHS]
    joined = [torch.cat([torch.cat([mark_start(one[:1]), one[1:]]) if place else one for place, one in enumerate(row)]) for row in documents]
    rows = joined if packed else [one for row in documents for one in row]
    return torch.stack([F.pad(row, (0, 64 - len(row)), value=PADDING) for row in rows])


def test_packed_documents_are_what_they_are_alone(granite, token_ids, monkeypatch):
    """In attention by a mask, with positions from 0 on, in Mamba-2 by the documents' numbers."""
    put(monkeypatch, OURS)
    student = deepcopy(granite.model).requires_grad_(True).train()
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(1.3)

    def loss_of(packed: bool) -> tuple[float, tuple[torch.Tensor, ...]]:
        loss = distillation_loss(granite.model)(student, rows_of(token_ids, packed=packed))["loss"]
        return loss.item(), torch.autograd.grad(loss, student.parameters())

    (together, gradients), (apart, expected) = map(loss_of, (True, False))
    assert together == pytest.approx(apart, rel=1e-5) and together > 1e-3
    assert furthest(student, gradients, expected) <= 1e-4
    for model in (student, granite.model):  # the control: attention as transformers makes it
        monkeypatch.setattr(model.model, "_forward_pre_hooks", {})
    assert loss_of(True)[0] != pytest.approx(apart, rel=1e-4)


# What config.json says.


def test_layers_are_written_in_the_words_that_other_programs_know(granite):
    said = granite.config["layer_types"]
    modern = [{"mamba": "linear_attention", "attention": "full_attention"}[word] for word in said]
    for teacher in ({"layer_types": said}, {"layer_types": modern}, {"layer_types": modern, "layers_block_type": modern}):
        config = granite.family.hf_config(granite.config | teacher, granite.architecture)
        assert config["layer_types"] == said and "layers_block_type" not in config
        assert transformers_config(config).layer_types == modern


def test_one_ratio_drives_hidden_size_query_heads_and_mamba_heads(granite):
    teacher, couplings = granite.architecture, (*granite.family.couplings, QUERY_HEADS)
    for given in ({"hidden": 24}, {"num_attention_heads": 3}, {"mamba_num_heads": 6}):
        student = completed(replace(teacher, **given), teacher, following(granite.family.couplings, given))
        assert (student.hidden, student.num_attention_heads, student.mamba_num_heads) == (24, 3, 6)
        assert all(one.holds(student, teacher) for one in couplings)
        transformers_config(granite.family.hf_config(granite.config, student))
    broken = replace(teacher, hidden=40)
    assert [bool(one.holds(broken, teacher)) for one in granite.family.couplings] == [False, False]
    with pytest.raises(ValueError, match="mamba_n_heads must divide mamba_expand"):  # transformers' own words
        transformers_config(granite.family.hf_config(granite.config, broken))


@torch.no_grad()
def test_blocks_of_attention_alone_are_cut_and_loaded_though_config_json_has_mamba_sizes(build_tiny, logits_of, write_checkpoint, tmp_path):
    """As a Granite that is no hybrid is published, and as a student whose blocks with Mamba-2 all went; of what is not there nothing is asked."""
    one = build_tiny("granite untied", layer_types=["attention"] * 4)
    assert one.architecture.pattern == "*-*-*-*-" and one.architecture.mamba_inner == 0 and one.architecture.mamba_conv_bias is True
    student = replace(one.architecture, hidden=32, num_attention_heads=4, num_key_value_heads=2)
    assert all(coupling.holds(student, one.architecture) for coupling in one.family.couplings)
    units = {"hidden": {-1: tuple(range(32))}, "attention_head": dict.fromkeys(range(8), (0, 1, 2, 3)), "key_value_head": dict.fromkeys(range(8), (0, 1))}
    cut = build_pruned(one.family, one.model, PruningPlan(one.architecture, student, (0, 1, 2, 3), units), one.config)
    config = one.family.hf_config(one.config, student)
    folder = write_checkpoint(tmp_path / "it", cut, config)
    assert (config["mamba_n_heads"] * config["mamba_d_head"], config["mamba_expand"]) == (64, 2) and architecture_from_config(config) == student
    assert away(logits_of(AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval()), logits_of(cut)) <= 1e-6
    hybrid = build_tiny("granite untied").architecture
    left = replace(hybrid, pattern="*-*-")
    assert left == architecture_from_config(one.family.hf_config(one.config, left)) and left.mamba_inner == 0 < hybrid.mamba_inner


def test_of_few_layers_with_attention_most_stay_unless_somebody_says_otherwise(build_tiny, configs):
    """The default floor, of a hybrid of blocks as of one of single mixers; of a model whose layers all have attention there is none."""
    patterns = {"granitemoehybrid": "M-M-*-" * 4, "nemotron_h": "M-M*" * 4, "llama": "*-" * 12}
    floors = {kind: floor_of(SimpleNamespace(architecture=replace(build_tiny("granite tied").architecture, model_type=kind, pattern=pattern)))
              for kind, pattern in patterns.items()}  # fmt: skip
    assert floors == {"granitemoehybrid": 3, "nemotron_h": 3, "llama": 0}
    assert by_kind({"attention": 3}, ("M-", "*-")) == {"*-": 3}


def test_half_a_pattern_is_no_pattern(granite):
    with pytest.raises(ValueError, match="must be blocks of attention and FFN or experts"):
        check_architecture(replace(granite.architecture, pattern="MM*-"))
    with pytest.raises(ValueError, match="must be blocks of attention and FFN or experts"):
        check_architecture(replace(granite.architecture, model_type="llama"))
