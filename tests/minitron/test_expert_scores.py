"""Scores of experts and of their neurons against a float64 loop that runs every expert on every token sent to it, for each kind of router."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from memory_budget.hf_config import read_config
from minitron.checkpoints.placement import StreamedModel, WholeModel
from minitron.families.base import EXPERT, EXPERT_FFN, SHARED_FFN
from minitron.families.state import model_tensors
from minitron.importance import experts
from minitron.importance.activations import measure_width
from minitron.importance.scores import WidthSums, aggregate, load_sums
from minitron.importance.scoring import _reduced, _width_curves, score_model
from minitron.pruning.plan import top_per_group
from minitron.report.plots import _experts
from minitron.settings.data import DataSettings
from minitron.settings.run import Criterion, ScoringSettings, Settings, TeacherSettings
from minitron.walk.console import Console
from minitron.walk.stage import StageContext
from minitron.walk.store import Result

SIGMOID = {"hybrid_override_pattern": "ME*E", "num_hidden_layers": 4, "n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 12,
           "moe_shared_expert_intermediate_size": 20, "n_group": 1, "topk_group": 1, "norm_topk_prob": True, "routed_scaling_factor": 1.0}  # fmt: skip
SOFTMAX = {"model_type": "qwen3_moe", "num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 12, "decoder_sparse_step": 1, "mlp_only_layers": [1]}
# Of each kind of router a model, and whether its weights are made to add up to 1.
ROUTERS = {
    "sigmoid, of groups, normalised, scaled": ("nemotron_h", SIGMOID | {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5}, True),
    "sigmoid, on a latent": ("nemotron_h", SIGMOID | {"norm_topk_prob": False, "moe_latent_size": 10}, False),
    "softmax, normalised": ("qwen3 tied", SOFTMAX | {"norm_topk_prob": True}, True),
    "softmax": ("qwen3 tied", SOFTMAX | {"norm_topk_prob": False}, False),
}
UNREACHED = 5


@pytest.fixture(scope="module")
def build(build_tiny):
    """A model with experts of one kind of router, its correction bias drawn too."""

    def make(router: str, **changes):
        one = build_tiny(ROUTERS[router][0], **ROUTERS[router][1] | changes)
        random = torch.Generator().manual_seed(5)
        for name, tensor in model_tensors(one.family, one.model).items():
            if name.endswith("e_score_correction_bias"):
                tensor.copy_(0.3 * torch.randn(tensor.shape, generator=random))
        return one

    return make


@pytest.fixture(scope="module")
def batches(token_ids) -> list[torch.Tensor]:
    """Two batches [3, 20], a row of the first one padded."""
    padded = token_ids(rows=3, tokens=20, seed=41)
    padded[1, 11:] = -1
    return [padded, token_ids(rows=3, tokens=20, seed=42)]


def measure(one, batches) -> WidthSums:
    return measure_width(WholeModel(one.family, one.model, one.architecture), batches)


def chosen(one, scores_E: torch.Tensor, bias_E: torch.Tensor | None, normalised: bool) -> tuple[list[int], torch.Tensor]:
    """A token's experts, and what their outputs are multiplied by."""
    config, number = one.config, one.config["num_experts_per_tok"]
    if bias_E is None:
        weights_E = torch.softmax(scores_E, 0)
        order, scale = weights_E.argsort(descending=True).tolist(), 1.0
    else:
        weights_E, scale = torch.sigmoid(scores_E), config["routed_scaling_factor"]
        groups = (weights_E + bias_E).view(config["n_group"], -1)
        best = groups.sort(descending=True).values[:, :2].sum(1).argsort(descending=True)[: config["topk_group"]].tolist()
        size = groups.shape[1]
        order = sorted((group * size + place for group in best for place in range(size)), key=lambda expert: -float(weights_E[expert] + bias_E[expert]))
    weights = weights_E[order[:number]]
    return order[:number], scale * (weights / weights.sum() if normalised else weights)


@torch.no_grad()
def by_loop(one, batches, layer: int, *, normalised: bool) -> tuple[np.ndarray, np.ndarray]:
    """EXPERT_ROWS and NEURON_ROWS of a sublayer: every expert on every token sent to it, a token at a time in float64."""
    parts, sizes = one.family.parts(one.model), one.architecture
    state = {name.removeprefix(f"layers.{layer}."): tensor.double() for name, tensor in model_tensors(one.family, one.model).items()
             if name.startswith(f"layers.{layer}.")}  # fmt: skip
    rows, neurons = np.zeros((3, sizes.moe_num_experts)), np.zeros((2, sizes.moe_num_experts, sizes.moe_ffn))
    for ids in [row[row >= 0] for batch in batches for row in batch]:
        hidden = parts.embed(ids[None])
        for block in parts.layers[:layer]:
            hidden = block(hidden)
        for token in hidden[0].double():
            token = state["norm.weight"] * token / torch.sqrt((token**2).mean() + 1e-5)
            given = state["mixer.fc1_latent_proj.weight"] @ token if sizes.moe_latent else token
            routed = chosen(one, state["mixer.gate.weight"] @ token, state.get("mixer.gate.e_score_correction_bias"), normalised)
            for expert, weight in zip(*routed, strict=True):
                up = state[f"mixer.experts.{expert}.up_proj.weight"] @ given
                gated = f"mixer.experts.{expert}.gate_proj.weight"
                inner = torch.nn.functional.silu(state[gated] @ given) * up if gated in state else torch.relu(up) ** 2
                length = float((state[f"mixer.experts.{expert}.down_proj.weight"] @ inner).norm())
                rows[:, expert] += (1, float(weight) * length, length)
                neurons[:, expert] += np.stack([inner.abs().numpy(), inner.square().numpy()])
    return rows, neurons


@pytest.mark.parametrize("router", ROUTERS)
def test_scores_of_experts_are_those_of_a_float64_loop(router, build, batches):
    one, normalised = build(router), ROUTERS[router][2]
    sums, layer = measure(one, batches), one.architecture.pattern.rindex("E")
    rows, neurons = by_loop(one, batches, layer, normalised=normalised)
    np.testing.assert_allclose(sums.sums[EXPERT, layer], rows, rtol=1e-5)
    np.testing.assert_allclose(sums.sums[EXPERT_FFN, layer], neurons, rtol=1e-5, atol=1e-6 * neurons.max())
    assert rows[0].sum() == 3 * sums.num_tokens == 3 * 111  # none of them padding
    scores = aggregate(sums)
    np.testing.assert_allclose(scores.experts(layer), rows[1] / np.maximum(rows[0], 1), rtol=1e-5)
    np.testing.assert_allclose(replace(scores, rank="activation").experts(layer), rows[2] / np.maximum(rows[0], 1), rtol=1e-5)
    others, _ = by_loop(one, batches, layer, normalised=not normalised)  # control: what reaches the router's sum, and not the outputs
    assert not np.allclose(others[1], rows[1], rtol=1e-2)


@pytest.fixture(scope="module")
def sums(build, batches) -> WidthSums:
    return measure(build("sigmoid, on a latent"), batches)


def test_sums_of_experts_add_up_over_blocks_of_batches_and_are_read_back(sums, build, batches, tmp_path):
    one = build("sigmoid, on a latent")
    measure(one, batches[:1]).save(tmp_path / "part")
    added = load_sums(tmp_path / "part") + measure(one, batches[1:])
    for site, value in sums.sums.items():
        np.testing.assert_allclose(added.sums[site], value, rtol=1e-5, atol=1e-6 * value.max(), err_msg=str(site))
        np.testing.assert_array_equal(_reduced(sums, None).sums[site], value)  # through the one array that processes add up
    assert {value.shape for (axis, _), value in sums.sums.items() if axis in (EXPERT, EXPERT_FFN, SHARED_FFN)} == {(3, 8), (2, 8, 12), (4, 20)}


def test_an_expert_that_no_token_reaches_is_never_read_and_streamed_is_whole_bit_for_bit(build, batches, write_checkpoint, tmp_path):
    def streamed(bias: float) -> tuple[WidthSums, WidthSums, set[int]]:
        one, read = build("sigmoid, on a latent"), set()
        model_tensors(one.family, one.model)["layers.1.mixer.gate.e_score_correction_bias"][UNREACHED] = bias
        folder = write_checkpoint(tmp_path / str(bias), one.model, one.config, max_shard_bytes=20_000)
        model = StreamedModel(one.family, folder, read_config(folder), one.architecture, torch.device("cpu"))

        def listened(name, into=None, really=model.checkpoint.read):
            read.update({int(name.split(".")[5])} if ".1.mixer.experts." in name else {})
            return really(name, into=into)

        model.checkpoint.read = listened
        return measure_width(model, batches), measure(one, batches), read

    found, whole, read = streamed(-9.0)
    assert read == set(range(8)) - {UNREACHED} and all(np.array_equal(found.sums[site], value) for site, value in whole.sums.items())
    scores = aggregate(found)
    assert scores.experts(1)[UNREACHED] == 0 < np.delete(scores.experts(1), UNREACHED).min() and not scores.expert_neurons(1)[UNREACHED].any()
    assert streamed(0.0)[2] == set(range(8))  # control


def test_a_protected_expert_comes_before_all_others(sums):
    scores = aggregate(sums)
    worst = int(scores.experts(1).argmin())
    assert worst not in top_per_group(scores.experts(1), 2, 6) and worst in top_per_group(replace(scores, protected={1: [worst]}).experts(1), 2, 6)


def test_ranking_jsonl_names_each_layers_experts_best_first(sums, build, tmp_path):
    architecture = build("sigmoid, on a latent").architecture
    experts.write_ranking(tmp_path / "ranking.jsonl", experts.expert_scores(sums, architecture))
    lines = [json.loads(line) for line in (tmp_path / "ranking.jsonl").read_text().splitlines()]
    assert [line["layer"] for line in lines] == [1, 3] and {line["criterion"] for line in lines} == {"reap"}
    rows = aggregate(sums).sites[EXPERT, 3]
    assert lines[1]["experts"] == np.argsort(-rows[1]).tolist() and lines[1]["tokens"] == rows[0][lines[1]["experts"]].tolist()
    assert lines[1]["scores"] == sorted(lines[1]["scores"], reverse=True) and sorted(lines[1]["activation"]) == list(range(8)) != lines[1]["frequency"]


def test_too_few_tokens_of_an_expert_are_said():
    def note(tokens, least):
        return experts.few_tokens_note(experts.reach(tokens, least), ScoringSettings(least_expert_tokens=least), 6)

    tokens = {1: {"tokens": [40, 7]}, 3: {"tokens": [5, 90]}}
    assert "2 of 4 experts saw fewer tokens than scoring.least_expert_tokens, 20" in note(tokens, 20)
    assert note(tokens, 20).endswith("expert 0 of layer 3 the fewest, 5; scoring.samples=24 would do for it")
    assert note(tokens, 5) is None
    unreached = {1: {"tokens": [0, 7]}, 3: {"tokens": [0, 90]}}
    assert "expert 0 of layer 1 the fewest, 0, and what no token reaches is ranked last" in note(unreached, 20)
    assert "2 of them in all reached by no token" in experts.describe_reach(experts.reach(unreached, 20))


def test_an_interrupted_stage_ends_with_the_same_files_and_numbers_layers_as_config_json(build, token_ids, write_checkpoint, tmp_path):
    one = build("softmax")
    write_checkpoint(tmp_path / "teacher", one.model, one.config)
    for name in ("data", "score"):
        (tmp_path / name).mkdir()
    np.save(tmp_path / "data" / "train.npy", token_ids(rows=6, tokens=20, seed=43).int().numpy())
    settings = Settings(device="cpu", teacher=TeacherSettings(path=str(tmp_path / "teacher")), data=DataSettings(sequence_length=20),
                        scoring=ScoringSettings(block_tokens=40, criterion=Criterion.block_influence))  # fmt: skip
    inputs = {name: Result(tmp_path / name, {"key": name, "facts": {"path": "."}}) for name in ("data", "teacher")}
    context = StageContext(settings, tmp_path / "score", inputs, Console(quiet=True))
    facts = score_model(context)
    files = [tmp_path / "score" / name for name in ("scores.safetensors", "layers.json", "ranking.jsonl")]
    made = [path.read_bytes() for path in files]
    last = sorted((tmp_path / "score" / "parts-1" / "0").glob("width-*"))[-1]
    for path in (*files, last):
        path.unlink()
    assert score_model(context) == facts and [path.read_bytes() for path in files] == made
    assert list(json.loads(made[1])["experts"]) == ["0", "2", "3"] and facts["experts"]["experts"] == 8  # block 1 is dense
    assert "8 experts in each of 3 layers" in facts["headline"]


def test_curves_of_experts_fall_from_the_best(sums):
    curves = _width_curves(sums)
    assert all(curve[0] == 1 and curve == sorted(curve, reverse=True) for axis in (EXPERT, EXPERT_FFN, SHARED_FFN) for curve in curves[axis].values())


def test_the_plot_of_experts_says_who_got_no_token_and_how_many_stay():
    layers = {"1": {"tokens": [4, 0, 9], "reap": [1.0, 0.0, 2.0]}, "3": {"tokens": [5, 5, 3], "reap": [1.0, 3.0, 2.0]}}
    models = {name: {"architecture": {"moe_num_experts": number}} for name, number in (("teacher", 3), ("student", 2))}
    summary = {"importance": {"experts": layers}, "models": models, "candidates": []}
    titles = [axes.get_title(loc="left") for axes in _experts(summary).axes]
    assert titles[:2] == ["Tokens sent to each expert (red: none)", "Scores, best expert first; 2 stay"]
    layers["1"]["tokens"][1] = 1
    titles = [axes.get_title(loc="left") for axes in _experts(summary | {"models": {"teacher": models["teacher"]}}).axes]
    assert titles[:2] == ["Tokens sent to each expert", "Scores, best expert first"] and _experts({"importance": {}}) is None
