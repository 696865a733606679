"""make reap-check: llm-compressor's own REAP scores of a tiny Qwen3-MoE against ours; REAP_PYTHON names the interpreter that has it. Prints what it measures.

Where the two differ, a plain loop in float64 over every expert and the tokens that are sent to it says who is right. docs/notes/moe.md
"""

import os
import subprocess
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from memory_budget.hf_config import architecture_from_config, read_config
from minitron.checkpoints.placement import WholeModel
from minitron.families.known import family_of
from minitron.importance.activations import measure_width
from minitron.importance.scores import aggregate

REAP_PYTHON = os.environ.get("REAP_PYTHON")
pytestmark = [pytest.mark.reap, pytest.mark.skipif(REAP_PYTHON is None, reason="no llm-compressor: make reap-check")]

LAYERS, DENSE, EXPERTS, EACH, DROPPED, UNREACHED = 4, 1, 16, 4, 4, 5
CHANGES = {"num_hidden_layers": LAYERS, "mlp_only_layers": [DENSE], "decoder_sparse_step": 1, "num_experts": EXPERTS, "num_experts_per_tok": EACH,
           "attention_bias": False, "use_sliding_window": False, "sliding_window": None}  # fmt: skip
TOLERANCE = 1e-4  # relative; float32 on both sides, measured: 3e-7

Scores = dict[int, torch.Tensor]  # float64 [E] by the number of the layer


@torch.no_grad()
def draw(model: nn.Module) -> None:
    """Random weights. Rows of a router are of different lengths, so that some experts see many tokens and others few, and outputs of different sizes; UNREACHED
    sees none, by a channel that all tokens have."""
    random = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        value = torch.randn(parameter.shape, generator=random)
        parameter.copy_(1 + 0.3 * value if parameter.ndim == 1 else 3 * value if "embed" in name else value * parameter.shape[1] ** -0.5)
        if "down_proj" in name:
            parameter *= 1.3 ** torch.randn((), generator=random)
        if name.endswith("mlp.gate.weight"):
            parameter *= torch.logspace(-0.5, 0.5, EXPERTS)[torch.randperm(EXPERTS, generator=random), None]
            parameter[:, 0], parameter[UNREACHED] = 0, -9 * torch.eye(parameter.shape[1])[0]
    model.get_input_embeddings().weight[:, 0] += 9


@pytest.fixture(scope="module", params=[True, False], ids=["normalised", "as they are"])
def folder(request, configs, tmp_path_factory, token_ids, write_checkpoint) -> Path:
    """A model whose routers make a token's weights add up to 1, or do not; and its tokens [2, B, T], with a mask of all and one without the last of a row."""
    config = configs["qwen3_moe"] | CHANGES | {"norm_topk_prob": request.param}
    model = family_of(config).build(config)
    draw(model)
    folder = write_checkpoint(tmp_path_factory.mktemp("moe"), model, config)
    ids = token_ids(rows=6).view(2, 3, 40)
    padded = torch.ones_like(ids)
    padded[0, 2, 22:] = 0
    save_file({"ids": ids, "mask": torch.ones_like(ids)}, folder / "whole.tokens")
    save_file({"ids": ids, "mask": padded}, folder / "padded.tokens")
    return folder


@cache
def theirs(folder: Path, tokens: str, pipeline: str) -> Scores:
    out, script = folder / f"{tokens}-{pipeline}.scores", Path(__file__).parents[2] / "benchmarks" / "reap_theirs.py"
    command = [REAP_PYTHON, script, folder, folder / f"{tokens}.tokens", pipeline, str(DROPPED / EXPERTS), out]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    return {int(name.split(".")[2]): scores_E for name, scores_E in load_file(out).items()}


def ours(folder: Path, tokens: str) -> Scores:
    config, given = read_config(folder), load_file(folder / f"{tokens}.tokens")
    family, architecture = family_of(config), architecture_from_config(config)
    model = WholeModel(family, family.load(folder, dtype=torch.float32, device="cpu").eval(), architecture)
    scores = aggregate(measure_width(model, list(given["ids"].masked_fill(given["mask"] == 0, -1))))
    return {layer: torch.tensor(scores.experts(2 * layer + 1)) for layer in range(LAYERS) if layer != DENSE}


@torch.no_grad()
def loop(folder: Path, tokens: str, *, padding: bool = False, normalised: bool | None = None, causal: bool = True, dropped: int = 0) -> Scores:
    """The mean of weight · ‖output‖ over the tokens that are sent to an expert, in float64; transformers' model gives only what its blocks are given. Wrong on
    purpose: counting `padding`; weights `normalised` unlike the model's; not `causal`; layers that see what others give without their `dropped` lowest."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager", experts_implementation="eager")
    given, scores = {name: tensor.flatten(0, 1) for name, tensor in load_file(folder / f"{tokens}.tokens").items()}, {}
    counted_N = (given["mask"] > 0).flatten() | padding

    def score(layer: int, block: nn.Module, given_BTD: torch.Tensor) -> None:
        given_ND, gate_up_EFD, down_EDF = given_BTD.flatten(0, 1), block.experts.gate_up_proj, block.experts.down_proj
        weights_NK, experts_NK = (given_ND @ block.gate.weight.T).softmax(1).topk(EACH)
        if model.config.norm_topk_prob if normalised is None else normalised:
            weights_NK = weights_NK / weights_NK.sum(1, keepdim=True)
        found: list[list[float]] = [[] for _ in down_EDF]
        for token in counted_N.nonzero().flatten().tolist():
            for weight, expert in zip(weights_NK[token].tolist(), experts_NK[token].tolist(), strict=True):
                gate_F, up_F = (gate_up_EFD[expert] @ given_ND[token]).chunk(2)
                found[expert].append(weight * (down_EDF[expert] @ (nn.functional.silu(gate_F) * up_F)).norm().item())
        scores[layer] = torch.tensor([sum(values) / max(len(values), 1) for values in found], dtype=torch.float64)
        stay = scores[layer].topk(EXPERTS - dropped).indices.sort().values
        for module, name in ((block.gate, "weight"), (block.experts, "gate_up_proj"), (block.experts, "down_proj")):
            setattr(module, name, nn.Parameter(getattr(module, name)[stay]))
            module.num_experts = len(stay)

    for layer, block in enumerate(model.model.layers):
        if layer != DENSE:
            block.mlp.register_forward_pre_hook(lambda mlp, args, layer=layer: score(layer, mlp, args[0]))
    rows, length = given["ids"].shape
    model(given["ids"], attention_mask=given["mask"] if causal else torch.zeros(rows, 1, length, length, dtype=torch.float64), use_cache=False)
    return scores


def difference(some: Scores, others: Scores) -> float:
    """The largest of an expert, relative to the second; absolute where that is 0, as no token is sent to it."""
    return max(((some[layer] - others[layer]).abs() / others[layer].where(others[layer] > 0, 1)).max().item() for layer in others)


def ranked(scores: Scores) -> list[list[int]]:
    """The experts of every layer that has any, lowest first."""
    return [scores_E.argsort(stable=True).tolist() for _, scores_E in sorted(scores.items())]


def test_scores_and_ranking_are_theirs(folder):
    own, other, exact = ours(folder, "whole"), theirs(folder, "whole", "basic"), loop(folder, "whole")
    unlike = loop(folder, "whole", normalised=not read_config(folder)["norm_topk_prob"])
    print(f"\nours − theirs {difference(own, other):.1e}, theirs − loop {difference(other, exact):.1e}, − unlike {difference(other, unlike):.1e}")
    assert difference(own, other) < TOLERANCE and difference(other, exact) < TOLERANCE < 0.1 < difference(other, unlike)
    assert ranked(own) == ranked(other) != ranked(unlike)
    assert all(scores[layer][UNREACHED] == 0 and (scores[layer] > 0).sum() == EXPERTS - 1 for scores in (own, other) for layer in exact)


def test_they_count_padding_and_we_do_not(folder):
    own, other, exact = ours(folder, "padded"), theirs(folder, "padded", "basic"), loop(folder, "padded")
    print(f"\nours − loop {difference(own, exact):.1e}, theirs − loop {difference(other, exact):.1e}")
    assert difference(own, exact) < TOLERANCE < 0.01 < difference(other, exact)
    assert difference(other, loop(folder, "padded", padding=True)) < TOLERANCE


def test_their_default_scores_other_layers_than_the_models(folder):
    """Those behind layers that have lost experts, all without a causal mask."""
    other, exact = theirs(folder, "whole", "sequential"), loop(folder, "whole")
    pruned, blind = loop(folder, "whole", dropped=DROPPED), loop(folder, "whole", causal=False)
    both = loop(folder, "whole", dropped=DROPPED, causal=False)
    print(f"\ntheirs − loop with both {difference(other, both):.1e}")
    for name, scores in {"theirs": other, "layers pruned before": pruned, "no causal mask": blind}.items():
        moved = sum(len(set(one[:DROPPED]) - set(two[:DROPPED])) for one, two in zip(ranked(scores), ranked(exact), strict=True))
        print(f"{name} − loop {difference(scores, exact):.2f}, {moved} of {DROPPED * len(exact)} dropped experts are others")
    assert difference(other, both) < TOLERANCE < 0.01 < min(difference(other, wrong) for wrong in (exact, pruned, blind))
