"""Cutting a NemotronH by the axis table: what has no effect, a slow slicing by hand, the counted sizes (symmetries: test_families_cuts.py)."""

import math
import random
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch

from memory_budget.architecture import Architecture
from memory_budget.hf_config import architecture_from_config, read_config
from memory_budget.parameters import count_total_parameters
from minitron.checkpoints.files import Checkpoint
from minitron.checkpoints.shards import write_weights
from minitron.families.base import ATTENTION_HEAD, FFN, HIDDEN, MAMBA_CHANNEL, MAMBA_HEAD
from minitron.families.nemotron_h import FAMILY
from minitron.families.table import check_tensors, expected_shape, required_names, row_of
from minitron.importance.scores import ImportanceScores
from minitron.pruning.cut import TensorCut, build_pruned, cut_state, plan_cuts
from minitron.pruning.disk_to_disk import planned_tensors
from minitron.pruning.plan import PruningPlan, make_plan, top, top_per_group
from minitron.settings.teachers import CONF_FOLDER
from nas.depth import check_is_cut, subsequence_layers

NANO_9B_PATTERN = "M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-"


def everywhere(pattern: str, kind: str, order: tuple[int, ...]) -> dict[int, tuple[int, ...]]:
    return {layer: order for layer, letter in enumerate(pattern) if letter == kind}


def random_scores(architecture: Architecture, seed: int = 0) -> ImportanceScores:
    """Scores drawn at random, in the shapes that calibration gives."""
    draw = np.random.default_rng(seed)
    shapes = {
        "M": (MAMBA_HEAD, (architecture.mamba_num_heads, architecture.mamba_head_dim)),
        "-": (FFN, (architecture.ffn,)),
        "*": (ATTENTION_HEAD, (architecture.num_attention_heads, architecture.attention_head_dim)),
    }
    sites = {(HIDDEN, layer): draw.random(architecture.hidden) for layer in range(architecture.num_layers + 1)}
    for layer, kind in enumerate(architecture.pattern):
        axis, shape = shapes[kind]
        sites[axis, layer] = draw.random(shape)
    return ImportanceScores(sites=sites)


def relative_difference(left: torch.Tensor, right: torch.Tensor) -> float:
    """Largest difference over the largest value: the tiny model's logits reach 4."""
    return ((left - right).abs().max() / right.abs().max()).item()


# What has no effect is cut without loss.


def _with_dead_neurons(build_model, dead: list[int]):
    model = build_model()
    with torch.no_grad():
        for layer in (1, 4, 6, 8):
            model.model.layers[layer].mixer.up_proj.weight[dead] = 0
    return model


@pytest.mark.parametrize(("dropped", "moves"), [([0, 7, 8, 31, 47], False), ([1, 7, 8, 31, 47], True)], ids=["dead", "one alive"])
def test_dropping_ffn_neurons_is_exact_only_if_they_are_dead(dropped, moves, build_model, tiny, config_of, logits_of):
    model = _with_dead_neurons(build_model, [0, 7, 8, 31, 47])
    kept = tuple(neuron for neuron in range(48) if neuron not in dropped)
    plan = PruningPlan(tiny, replace(tiny, ffn=43), tuple(range(9)), {FFN: everywhere(tiny.pattern, "-", kept)})
    difference = relative_difference(logits_of(build_pruned(FAMILY, model, plan, config_of(tiny))), logits_of(model))
    assert difference > 1e-2 if moves else difference <= 1e-5


def test_dropping_a_layer_whose_output_is_zero_is_exact(build_model, tiny, config_of, logits_of):
    model = build_model()
    with torch.no_grad():
        model.model.layers[5].mixer.out_proj.weight.zero_()
    kept = (0, 1, 2, 3, 4, 6, 7, 8)
    pattern = "".join(tiny.pattern[layer] for layer in kept)
    plan = make_plan(tiny, replace(tiny, pattern=pattern), kept, random_scores(tiny))
    assert relative_difference(logits_of(build_pruned(FAMILY, model, plan, config_of(tiny))), logits_of(model)) <= 1e-6


# A slow slicing by hand.


def rows_by_hand(tensor: torch.Tensor, indices: list[int], dimension: int) -> torch.Tensor:
    return torch.stack([tensor.select(dimension, index) for index in indices], dim=dimension)


def sliced_by_hand(state, teacher: Architecture, layers, hidden, ffn, heads, channels, queries) -> dict[str, torch.Tensor]:
    """The student's tensors, one named tensor and one segment after another. `ffn`, `heads`, … map a teacher layer to kept units."""
    P, Q = teacher.mamba_head_dim, teacher.attention_head_dim
    inner, states = teacher.mamba_inner, teacher.mamba_num_groups * teacher.mamba_state_size
    result = {"embeddings.weight": rows_by_hand(state["embeddings.weight"], hidden, 1), "norm_f.weight": rows_by_hand(state["norm_f.weight"], hidden, 0)}
    result["lm_head.weight"] = rows_by_hand(state["lm_head.weight"], hidden, 1)
    for new, old in enumerate(layers):
        source, target = f"layers.{old}.", f"layers.{new}."
        result[target + "norm.weight"] = rows_by_hand(state[source + "norm.weight"], hidden, 0)
        source, target = source + "mixer.", target + "mixer."
        if teacher.pattern[old] == "-":
            up = rows_by_hand(state[source + "up_proj.weight"], ffn[old], 0)
            result[target + "up_proj.weight"] = rows_by_hand(up, hidden, 1)
            down = rows_by_hand(state[source + "down_proj.weight"], ffn[old], 1)
            result[target + "down_proj.weight"] = rows_by_hand(down, hidden, 0)
        elif teacher.pattern[old] == "*":
            rows = [head * Q + channel for head in queries[old] for channel in range(Q)]
            result[target + "q_proj.weight"] = rows_by_hand(rows_by_hand(state[source + "q_proj.weight"], rows, 0), hidden, 1)
            result[target + "o_proj.weight"] = rows_by_hand(rows_by_hand(state[source + "o_proj.weight"], rows, 1), hidden, 0)
            for name in ("k_proj.weight", "v_proj.weight"):
                result[target + name] = rows_by_hand(state[source + name], hidden, 1)
        else:
            units = [head * P + channel for head in heads[old] for channel in channels[old]]
            z, x = units, [inner + unit for unit in units]
            b = [2 * inner + index for index in range(states)]
            c = [2 * inner + states + index for index in range(states)]
            dt = [2 * inner + 2 * states + head for head in heads[old]]
            result[target + "in_proj.weight"] = rows_by_hand(rows_by_hand(state[source + "in_proj.weight"], z + x + b + c + dt, 0), hidden, 1)
            conv = units + [inner + index for index in range(2 * states)]
            result[target + "conv1d.weight"] = rows_by_hand(state[source + "conv1d.weight"], conv, 0)
            result[target + "conv1d.bias"] = rows_by_hand(state[source + "conv1d.bias"], conv, 0)
            for name in ("A_log", "D", "dt_bias"):
                result[target + name] = rows_by_hand(state[source + name], heads[old], 0)
            result[target + "norm.weight"] = rows_by_hand(state[source + "norm.weight"], units, 0)
            result[target + "out_proj.weight"] = rows_by_hand(rows_by_hand(state[source + "out_proj.weight"], units, 1), hidden, 0)
    return result


def highest(scores: np.ndarray, number: int) -> list[int]:
    return sorted(sorted(range(len(scores)), key=lambda unit: -scores[unit])[:number])


def test_a_full_cut_is_the_slicing_by_hand(teacher, tiny):
    layers = (0, 1, 3, 5, 7, 8)
    student = replace(tiny, pattern="M-*M*-", hidden=24, ffn=20, mamba_num_heads=4, mamba_head_dim=3, num_attention_heads=4)
    scores = random_scores(tiny)
    ffn = {layer: highest(scores.ffn(layer), 20) for layer in (1, 4, 6, 8)}
    channels = {layer: highest(sum(scores.sites[MAMBA_HEAD, layer][head] ** 2 for head in range(8)), 3) for layer in (0, 2, 5)}
    heads, queries = {}, {}
    for layer in (0, 2, 5):
        norms = [sum(scores.sites[MAMBA_HEAD, layer][head][channel] ** 2 for channel in channels[layer]) for head in range(8)]
        heads[layer] = highest(norms[:4], 2) + [4 + head for head in highest(norms[4:], 2)]
    for layer in (3, 7):
        norms = [sum(scores.sites[ATTENTION_HEAD, layer][head] ** 2) for head in range(6)]
        queries[layer] = highest(norms[:3], 2) + [3 + head for head in highest(norms[3:], 2)]
    hidden = highest(sum(scores.sites[HIDDEN, layer] for layer in range(10)), 24)

    state = {FAMILY.canonical_name(name): tensor for name, tensor in teacher.state_dict().items()}
    expected = sliced_by_hand(state, tiny, layers, hidden, ffn, heads, channels, queries)
    cut = cut_state(FAMILY, make_plan(tiny, student, layers, scores), teacher.state_dict())
    assert cut.keys() == expected.keys()
    assert [name for name in cut if not torch.equal(cut[name], expected[name])] == []


def test_the_slicing_by_hand_notices_another_choice(teacher, tiny):
    student = replace(tiny, ffn=20)
    state = teacher.state_dict()
    ours, others = (cut_state(FAMILY, make_plan(tiny, student, tuple(range(9)), random_scores(tiny, seed)), state) for seed in (0, 1))
    assert not torch.equal(ours["layers.1.mixer.up_proj.weight"], others["layers.1.mixer.up_proj.weight"])


# Sizes.


def random_students(teacher: Architecture, number: int, seed: int = 0) -> list[tuple[Architecture, tuple[int, ...]]]:
    draw, students = random.Random(seed), []
    for _ in range(number):
        layers = tuple(sorted(draw.sample(range(teacher.num_layers), draw.randint(1, teacher.num_layers))))
        sizes = {
            "hidden": draw.randint(8, 32), "ffn": draw.randint(5, 48), "mamba_num_heads": draw.choice([2, 4, 6, 8]), "mamba_head_dim": draw.randint(1, 4),
            "num_attention_heads": draw.choice([2, 4, 6]),
        }  # fmt: skip
        students.append((replace(teacher, pattern="".join(teacher.pattern[layer] for layer in layers), **sizes), layers))
    return students


def test_counted_parameters_equal_those_of_the_written_checkpoint(tmp_path, teacher, tiny, config_of, write_checkpoint):
    source = Checkpoint(write_checkpoint(tmp_path / "teacher", teacher, config_of(tiny)))
    counts = set()
    for number, (student, layers) in enumerate(random_students(tiny, 40)):
        plan = make_plan(tiny, student, layers, random_scores(tiny, number))
        folder = tmp_path / str(number)
        folder.mkdir()
        write_weights(folder, planned_tensors(FAMILY, plan, source), max_shard_bytes=2**30)
        assert Checkpoint(folder).num_parameters == count_total_parameters(student), student
        counts.add(count_total_parameters(student))
    assert len(counts) > 30  # the students do differ


def test_the_streamed_cut_is_the_cut_in_memory(tmp_path, teacher, tiny, config_of, write_checkpoint):
    source = Checkpoint(write_checkpoint(tmp_path, teacher, config_of(tiny), max_shard_bytes=30_000))
    student, layers = random_students(tiny, 1, seed=3)[0]
    plan = make_plan(tiny, student, layers, random_scores(tiny))
    in_memory = cut_state(FAMILY, plan, teacher.state_dict())
    streamed = {FAMILY.canonical_name(tensor.name): torch.cat(list(tensor.pieces())) for tensor in planned_tensors(FAMILY, plan, source)}
    assert streamed.keys() == in_memory.keys() and all(torch.equal(streamed[name], in_memory[name]) for name in streamed)


@pytest.mark.parametrize("rows", [1, 3, 50])
def test_a_tensor_cut_in_pieces_is_the_tensor_cut_whole(rows, teacher, tiny):
    student, layers = replace(tiny, hidden=24, ffn=40, mamba_num_heads=4), tuple(range(9))
    state = {FAMILY.canonical_name(name): tensor for name, tensor in teacher.state_dict().items()}
    cuts = plan_cuts(FAMILY, make_plan(tiny, student, layers, random_scores(tiny)), {name: tuple(tensor.shape) for name, tensor in state.items()})
    for cut in cuts:
        pieces = [cut.apply_rows(piece, rows * number) for number, piece in enumerate(state[cut.source].split(rows))]
        assert torch.equal(torch.cat(pieces), cut.apply(state[cut.source]))


def test_kept_rows_out_of_order_cannot_be_cut_in_pieces(teacher, tiny, keep_all):
    order = tuple(reversed(range(tiny.hidden)))
    shapes = {FAMILY.canonical_name(name): tuple(tensor.shape) for name, tensor in teacher.state_dict().items()}
    cut = next(cut for cut in plan_cuts(FAMILY, keep_all(hidden={-1: order}), shapes) if cut.source == "norm_f.weight")
    with pytest.raises(AssertionError, match="ascending"):
        cut.apply_rows(teacher.model.norm_f.weight.detach(), 0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.bool], ids=str)
def test_columns_of_every_dtype_are_those_asked_for(dtype):
    matrix = (torch.randn(6, 9, generator=torch.Generator().manual_seed(0)) * 3).to(dtype)
    cut = TensorCut("source", "target", (6, 4), (None, torch.tensor([8, 0, 3, 3])))
    expected = torch.stack([matrix.float()[:, column] for column in (8, 0, 3, 3)], dim=1)
    assert torch.equal(cut.apply(matrix).float(), expected)
    assert torch.equal(cut.apply(matrix.t().contiguous().t()).float(), expected)  # whatever its strides
    with pytest.raises(AssertionError, match="out of range"):
        TensorCut("source", "target", (6, 2), (None, torch.tensor([9, 0]))).apply(matrix)


def test_random_students_run(teacher, tiny, config_of, logits_of):
    for student, layers in random_students(tiny, 6, seed=7):
        plan = make_plan(tiny, student, layers, random_scores(tiny))
        assert torch.isfinite(logits_of(build_pruned(FAMILY, teacher, plan, config_of(tiny)))).all(), student


def nano_12b() -> tuple[Architecture, dict[str, tuple[int, ...]]]:
    architecture = architecture_from_config(read_config(CONF_FOLDER / "architectures/nemotron-nano-12b-v2-base.json"))
    return architecture, {name: expected_shape(FAMILY, architecture, row_of(FAMILY, architecture, name)) for name in required_names(FAMILY, architecture)}


@pytest.mark.parametrize(("hidden", "ffn", "parameters"), [(4480, 15680, 8_888_227_328), (5120, 20480, 11_386_496_128)], ids=["9B", "depth only"])
def test_cutting_the_12b_shapes_gives_the_published_sizes(hidden, ffn, parameters):
    teacher, shapes = nano_12b()
    student = replace(teacher, pattern=NANO_9B_PATTERN, hidden=hidden, ffn=ffn)
    layers = subsequence_layers(teacher.pattern, NANO_9B_PATTERN)
    plan = make_plan(teacher, student, layers, random_scores(teacher))
    cuts = plan_cuts(FAMILY, plan, shapes)
    assert sum(math.prod(cut.shape) for cut in cuts) == parameters == count_total_parameters(student)
    check_tensors(FAMILY, student, {cut.target: cut.shape for cut in cuts})


# What is refused.


@pytest.fixture
def shapes(teacher) -> dict[str, tuple[int, ...]]:
    return {FAMILY.canonical_name(name): tuple(tensor.shape) for name, tensor in teacher.state_dict().items()}


def test_a_whole_checkpoint_is_accepted(shapes, keep_all):
    assert len(plan_cuts(FAMILY, keep_all(), shapes)) == len(shapes)


@pytest.mark.parametrize(
    "name", ["layers.0.mixer.gate.weight", "rotary.inv_freq", "layers.1.mixer.A_log", "mtp.layers.0.norm.weight", "layers.3.mixer.q_proj.bias"]
)
def test_a_tensor_that_no_row_matches_is_named(name, shapes, keep_all):
    with pytest.raises(ValueError, match=rf"tensor {name} is matched by 0 rows"):
        plan_cuts(FAMILY, keep_all(), shapes | {name: (8,)})


def test_a_tensor_that_two_rows_match_is_named(shapes, keep_all):
    twice = replace(FAMILY, table=(*FAMILY.table, next(row for row in FAMILY.table if row.suffix == "mixer.D")))
    with pytest.raises(ValueError, match=r"tensor layers\.0\.mixer\.D is matched by 2 rows"):
        plan_cuts(twice, keep_all(), shapes)


@pytest.mark.parametrize("name", ["layers.0.mixer.in_proj.weight", "layers.3.mixer.k_proj.weight", "lm_head.weight", "layers.5.mixer.D"])
def test_a_tensor_of_another_shape_is_named_with_both(name, shapes, keep_all):
    wrong = (shapes[name][0] + 1, *shapes[name][1:])
    with pytest.raises(ValueError, match=rf"tensor {name} has shape \[{wrong[0]}.*config.json says \[{shapes[name][0]}"):
        plan_cuts(FAMILY, keep_all(), shapes | {name: wrong})


def test_a_tensor_of_transposed_shape_is_named(shapes, keep_all):
    name = "layers.1.mixer.up_proj.weight"
    with pytest.raises(ValueError, match=name):
        plan_cuts(FAMILY, keep_all(), shapes | {name: shapes[name][::-1]})


def test_every_missing_tensor_is_named(shapes, keep_all):
    for name in shapes:
        with pytest.raises(ValueError, match=rf"tensor {name} is missing"):
            plan_cuts(FAMILY, keep_all(), {other: shape for other, shape in shapes.items() if other != name})


def test_a_bias_that_the_config_denies_is_named(shapes, tiny, keep_all):
    with pytest.raises(ValueError, match=r"layers\.0\.mixer\.conv1d\.bias .*mamba_conv_bias is false"):
        plan_cuts(FAMILY, keep_all(replace(tiny, mamba_conv_bias=False)), shapes)


def test_a_layer_beyond_the_pattern_is_named(shapes, keep_all):
    with pytest.raises(ValueError, match=r"tensor layers\.9\.norm\.weight belongs to layer 9; the pattern has 9 layers"):
        plan_cuts(FAMILY, keep_all(), shapes | {"layers.9.norm.weight": (32,)})


@pytest.mark.parametrize("name", ["layers.norm.weight", "layers.x.norm.weight", "layers.-1.norm.weight"])
def test_a_layer_without_a_number_is_named(name, shapes, keep_all):
    with pytest.raises(ValueError, match=rf"tensor {name} "):
        plan_cuts(FAMILY, keep_all(), shapes | {name: (32,)})


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"hidden": 40}, r"hidden of the student \(40\) must be at most the teacher's \(32\)"),
        ({"num_attention_heads": 8}, "num_attention_heads of the student"),
        ({"vocab": 96}, "vocab of the student .* must equal"),
        ({"mamba_state_size": 5}, "mamba_state_size of the student .* must equal"),
        ({"num_key_value_heads": 1, "num_attention_heads": 4}, "4 query heads for 1 KV heads are more for each than the teacher has"),
        ({"attention_head_dim": 4}, "attention_head_dim of the student .* must equal"),
        ({"mamba_num_heads": 5}, r"mamba heads \(5\) must be a multiple of the 2 groups"),
        ({"pattern": "M-M*-M-*M"}, "kept layers give the pattern"),
    ],
)
def test_a_student_that_is_no_cut_is_refused(sizes, message, tiny):
    check_is_cut(tiny, tiny, tuple(range(9)))
    with pytest.raises(ValueError, match=message):
        make_plan(tiny, replace(tiny, **sizes), tuple(range(9)), random_scores(tiny))


# Choosing.


def test_top_keeps_the_highest_in_ascending_order():
    assert top(np.array([3.0, 1.0, 5.0, 4.0]), 2) == (2, 3)


def test_top_breaks_ties_by_the_lower_index():
    assert top(np.array([1.0, 2.0, 2.0, 2.0, 0.0]), 2) == (1, 2)


@pytest.mark.parametrize(("groups", "number"), [(1, 5), (2, 6), (4, 4), (8, 16), (4, 16)])
def test_top_per_group_keeps_the_same_number_in_every_group(groups, number):
    scores = np.random.default_rng(0).random(16) + np.arange(16)  # the last group scores highest throughout
    kept = top_per_group(scores, groups, number)
    assert [sum(unit // (16 // groups) == group for unit in kept) for group in range(groups)] == [number // groups] * groups
    assert list(kept) == sorted(kept)


def test_top_alone_would_empty_a_group():
    scores = np.random.default_rng(0).random(16) + np.arange(16)
    assert min(top(scores, 8)) >= 4 > min(top_per_group(scores, 4, 8))


def test_heads_are_ranked_by_their_kept_channels(tiny):
    student = replace(tiny, mamba_head_dim=2, mamba_num_heads=6)
    scores = random_scores(tiny)
    site = np.ones((8, 4)) * [9, 8, 1, 1]  # channels 0 and 1 stay
    site[2], site[6] = [1, 1, 99, 0], [2, 2, 99, 0]  # strong only where nothing stays
    site[:, 2] *= 0.5
    site[2, 2] = site[6, 2] = 3
    scores = ImportanceScores(sites={**scores.sites, **{(MAMBA_HEAD, layer): site for layer in (0, 2, 5)}})
    plan = make_plan(tiny, student, tuple(range(9)), scores)
    assert plan.kept(MAMBA_CHANNEL, 0) == (0, 1)
    assert plan.kept(MAMBA_HEAD, 0) == (0, 1, 3, 4, 5, 7)


def test_a_plan_names_only_the_axes_that_shrink(tiny):
    plan = make_plan(tiny, replace(tiny, ffn=40), tuple(range(9)), random_scores(tiny))
    assert set(plan.units) == {FFN} and set(plan.units[FFN]) == {1, 4, 6, 8}


def test_subsequence_of_the_whole_pattern_is_every_layer(tiny):
    assert subsequence_layers(tiny.pattern, tiny.pattern) == tuple(range(9))


def test_subsequence_finds_layers_that_spell_the_student():
    teacher, _ = nano_12b()
    layers = subsequence_layers(teacher.pattern, NANO_9B_PATTERN)
    assert "".join(teacher.pattern[layer] for layer in layers) == NANO_9B_PATTERN and list(layers) == sorted(set(layers))
    removed = set(range(62)) - set(layers)
    assert {layer for layer in removed if teacher.pattern[layer] == "*"} == {7, 52}
    assert sorted(teacher.pattern[layer] for layer in removed) == ["*", "*", "-", "-", "-", "M"]


def test_subsequence_takes_the_earliest_layers_without_ranks():
    assert subsequence_layers("MMM-M", "MM-") == (0, 1, 3)


def test_subsequence_drops_the_layers_that_were_removed_first():
    assert subsequence_layers("MMM-M", "MM-", prefer={0: 0, 1: 1}) == (1, 2, 3)
    assert subsequence_layers("MMM-M", "MM-", prefer={2: 0, 1: 1}) == (0, 1, 3)


def test_subsequence_has_the_highest_total_rank_of_all_matches():
    draw = random.Random(0)
    for _ in range(100):
        pattern = "".join(draw.choice("M-*") for _ in range(9))
        kept = sorted(draw.sample(range(9), 5))
        student = "".join(pattern[layer] for layer in kept)
        ranks = dict(zip(draw.sample(range(9), 9), range(9), strict=True))
        matches = [layers for layers in combinations(range(9), 5) if "".join(pattern[layer] for layer in layers) == student]
        best = max(sum(ranks[layer] for layer in layers) for layers in matches)
        assert sum(ranks[layer] for layer in subsequence_layers(pattern, student, ranks)) == best


@pytest.mark.parametrize("student", ["**", "M-MM", "M-M*-M-*-M", "-M-M*-M-*-"])
def test_subsequence_refuses_a_pattern_that_is_none(student):
    with pytest.raises(ValueError, match="is not the teacher's"):
        subsequence_layers("M-M*-", student)
