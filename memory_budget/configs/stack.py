"""What the readers of recurrent and hybrid models share: the kinds of their layers, and sizes that fit one another. Refusals are ValueErrors of one line."""

import json
from collections import Counter
from collections.abc import Callable, Iterable

from memory_budget.configs.values import Config, boolean, integer
from memory_budget.parts.attention import Attention
from memory_budget.parts.part import Part

MOST_LAYERS = 2**16  # lists have an entry for every layer; no published model has 200
OLD_NAMES = {"mamba": "linear_attention", "attention": "full_attention"}  # transformers' (5.23) _LEGACY_LAYER_TYPE_REMAP


def layer_number(config: Config, *, default: int) -> int:
    number = integer(config, "num_hidden_layers", default=default)
    if number > MOST_LAYERS:
        raise ValueError(f"num_hidden_layers ({number}) must be at most {MOST_LAYERS:,}")
    return number


def layer_types(config: Config, keys: tuple[str, ...], kinds: tuple[str, ...], *, num_layers: int, otherwise: Callable[[int], str]) -> list[str]:
    """The kind of every layer by its new name, as the first of the keys that says it; where none does, what `otherwise` says of its index.

    Raises ValueError for a list that is none, whose length is not num_layers, that holds other kinds, or that another key contradicts.
    """
    said = {key: _kinds_in(config, key, kinds, num_layers) for key in keys if config.get(key) is not None}
    if len({tuple(types) for types in said.values()}) > 1:
        raise ValueError(f"{' and '.join(said)} must agree")
    return next(iter(said.values()), None) or [otherwise(index) for index in range(num_layers)]


def _kinds_in(config: Config, key: str, kinds: tuple[str, ...], num_layers: int) -> list[str]:
    value = config[key]
    if not isinstance(value, list) or len(value) != num_layers:
        entries = f"{len(value)} entries" if isinstance(value, list) else json.dumps(value)[:80]
        raise ValueError(f"{key} ({entries}) must have an entry for each of the {num_layers} layers that num_hidden_layers says")
    types = [OLD_NAMES.get(one, one) if isinstance(one, str) else one for one in value]
    if unknown := [one for one in types if one not in kinds]:
        raise ValueError(f"{key} holds {json.dumps(unknown[0])[:80]}; the kinds of layer are {', '.join(kinds)}")
    return types


def indices(config: Config, key: str, num_layers: int) -> list[int] | None:
    """A list of indices of layers; None where it is missing or null. Raises ValueError for what is none."""
    value = config.get(key)
    if value is not None and (not isinstance(value, list) or not all(isinstance(one, int) and not isinstance(one, bool) for one in value)):
        raise ValueError(f"{key} ({json.dumps(value)[:80]}) must be a list of indices of layers, 0 to {num_layers - 1}")
    return value


def counted(parts: Iterable[Part]) -> tuple[tuple[int, Part], ...]:
    """Equal mixers together, with their number, in the order in which they first come."""
    return tuple((number, part) for part, number in Counter(parts).items())


def multiple(config: Config, sizes: tuple[str, int], of: tuple[str, int]) -> None:
    """Refuse a size that another does not divide, each given by its key and its value."""
    if of[1] < 1 or sizes[1] % of[1]:
        raise ValueError(f"{sizes[0]} ({sizes[1]}) must be a multiple of {of[0]} ({of[1]})")


def heads(config: Config, *, query_heads: int, key_value_heads: int, may_be_null: bool = True) -> tuple[int, int]:
    """Query heads and key-value heads, which divide them; where null is allowed for these, they are as many."""
    queries = integer(config, "num_attention_heads", default=query_heads, least=1)
    keys = integer(config, "num_key_value_heads", default=key_value_heads or queries, null=queries if may_be_null else None, least=1)
    multiple(config, ("num_attention_heads", queries), ("num_key_value_heads", keys))
    return queries, keys


def plain_attention(config: Config, hidden: int, *, key_value_heads: int, bias_key: str | None = None, qk_norm: bool = False) -> Attention:
    """Attention whose head dim is the key head_dim's, or hidden over heads. key_value_heads 0: by default as many as query heads; bias_key: of all
    projections."""
    queries, keys = heads(config, query_heads=32, key_value_heads=key_value_heads)
    head_dim = integer(config if config.get("head_dim") is not None else {}, "head_dim", default=hidden // queries, least=1)
    bias = boolean(config, bias_key, default=False) if bias_key else False
    return Attention(hidden=hidden, query_heads=queries, key_value_heads=keys, head_dim=head_dim, input_bias=bias, output_bias=bias,
                     qk_norms=2 * head_dim * int(qk_norm))  # fmt: skip


def experts_per_token(config: Config, *, default: int, experts: int) -> int:
    """num_experts_per_tok, at most as many as there are."""
    chosen = integer(config, "num_experts_per_tok", default=default, least=1)
    if chosen > experts:
        raise ValueError(f"num_experts_per_tok ({chosen}) must be at most the number of experts ({experts})")
    return chosen


def positions(config: Config) -> int | None:
    """max_position_embeddings, where the config says it."""
    return integer(config, "max_position_embeddings", default=0, null=0) or None
