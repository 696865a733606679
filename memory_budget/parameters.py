"""Parameter counts of a model, kind by kind, from formulas: no model is built.

Plain arithmetic only, so sizes that are numpy integer arrays pass through and broadcast. The counts equal the
number of elements of transformers' parameters (5.23, `AutoModelForCausalLM.from_config` on the meta device);
tests/memory_budget/test_parameters.py holds them to it. Buffers are not counted: the MoE router's
`e_score_correction_bias`, one number per expert, is a buffer there.
"""

from dataclasses import replace

from memory_budget.architecture import LAYER_KINDS, Architecture
from memory_budget.model import Model, as_model, part_of
from memory_budget.parts.part import LayerParameters


def count_parameters(counted: Architecture | Model, *, active_only: bool = False) -> dict[str, int]:
    """Parameters by kind: embedding, head, mamba, attention, ffn, moe, norm.

    norm holds the norms around mixers and the final one. Norms inside a mixer (Mamba's gated norm, attention's q and k norms) count with their
    mixer. A tied head counts 0. Layers of a model_type that no reader knows count as `other`, a kind that no other model has. With
    active_only, of the routed experts only those that one token passes through count.
    """
    model = as_model(counted)
    counts = {
        "embedding": model.vocab * model.hidden + model.embeddings,
        "head": 0 if model.tied_embeddings else model.vocab * model.hidden,
        **dict.fromkeys(LAYER_KINDS.values(), 0),
    }
    for number, part in model.layers:
        counts[part.kind] = counts.get(part.kind, 0) + number * part.parameters(active_only=active_only).total
    counts["norm"] = model.norms
    return counts


def count_total_parameters(counted: Architecture | Model) -> int:
    """All parameters, each once. What has few dimensions is added up first, where sizes are arrays."""
    model = as_model(counted)
    tables = model.vocab * model.hidden * (1 if model.tied_embeddings else 2)
    return sum((number * part.parameters().total for number, part in model.layers), start=tables + model.embeddings + model.norms)


def count_active_parameters(counted: Architecture | Model) -> int:
    """Parameters that one token passes through: all but the routed experts it is not sent to. Embedding and head count whole."""
    return sum(count_parameters(counted, active_only=True).values())


def layer_parameters(architecture: Architecture, letter: str, *, active_only: bool = False) -> LayerParameters:
    """Parameters of one layer of the kind that a letter of the pattern names."""
    return part_of(architecture, letter).parameters(active_only=active_only)


def expert_parameters(architecture: Architecture) -> int:
    """Parameters of one routed expert, without its row of the router."""
    one, none = (replace(architecture, moe_experts_per_token=number) for number in (1, 0))
    return layer_parameters(one, "E", active_only=True).total - layer_parameters(none, "E", active_only=True).total
