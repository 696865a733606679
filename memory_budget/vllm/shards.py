"""What one of several devices holds of a model under vLLM's tensor parallelism (--tensor-parallel-size).

Split are heads, neurons and the vocabulary; norms, routers and biases of outputs are whole on every device, and here also tables of embeddings that are not of
words. Source: the models of vllm/model_executor/models,
layers/vocab_parallel_embedding.py (rows padded to a multiple of 64, on one device too) and layers/mamba/mamba_mixer2.py of vLLM 0.32.0.
"""

from dataclasses import fields, replace

from memory_budget.model import Model
from memory_budget.parts.part import Part

VOCABULARY_MULTIPLE = 64
# Fields of parts that are split, and what messages call them.
SPLIT = {
    "query_heads": "attention heads",
    "heads": "heads",
    "neurons": "neurons",
    "shared_neurons": "neurons of the shared experts",
    "inner": "channels",
    "channels": "channels",
    "key_heads": "key heads",
    "value_heads": "value heads",
}


def shard(model: Model, tp: int) -> Model:
    """The part of a model that each of tp devices holds; with 1, the model with its vocabulary padded. Scalars only.

    Raises ValueError naming what tp does not split and by which it can be.
    """
    if isinstance(tp, bool) or not isinstance(tp, int) or tp < 1:
        raise ValueError(f"tp ({tp}) must be a whole number of at least 1 device")
    rows = -(-model.vocab // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
    if tp == 1:
        return replace(model, vocab=rows)
    layers = tuple((count, _shard_part(part, tp)) for count, part in model.layers)
    return replace(model, vocab=_split("vocabulary rows, padded", rows, tp), layers=layers)


def _shard_part(part: Part, tp: int) -> Part:
    names = {field.name for field in fields(part)}
    found = {name: _split(said, getattr(part, name), tp) for name, said in SPLIT.items() if name in names}
    if not found or getattr(part, "adapter_rank", 0):
        raise ValueError(f"tp ({tp}) must be 1 for {type(part).__name__}: how vLLM splits it is not known here")
    if "experts" in names and part.experts < tp:
        raise ValueError(f"tp ({tp}) must be at most the {part.experts} experts")
    if "key_value_heads" in names:
        found["key_value_heads"] = _shard_key_value_heads(part.key_value_heads, tp)
    if "groups" in names:
        found["groups"] = _shard_groups(part.groups, tp)
    return replace(part, **found)


def _split(what: str, number: int, tp: int) -> int:
    if number % tp:
        raise ValueError(f"tp ({tp}) must divide the {number:,} {what}")
    return number // tp


def _shard_key_value_heads(heads: int, tp: int) -> int:
    """Of fewer heads than devices every device holds one, several the same."""
    if heads % tp and tp % heads:
        raise ValueError(f"tp ({tp}) must divide the {heads} key-value heads or be a multiple of them")
    return max(1, heads // tp)


def _shard_groups(groups: int, tp: int) -> int:
    """Mamba-2's: one group is on every device."""
    if groups % tp and groups != 1:
        raise ValueError(f"tp ({tp}) must divide the {groups} groups of Mamba-2, unless there is 1 group")
    return max(1, groups // tp)
