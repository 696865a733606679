"""Gemma 3, the language model alone: windows in five layers of six, norms before and behind every mixer (transformers' models/gemma3, Gemma3TextConfig).

What is peculiar to it, and where it is stated:
- Norms multiply by 1 + w (`norm_offset`). A second norm follows every mixer, before the residual is added: it looks at the mixer's output as it is and
  weighs its channels, so the stream cannot be written in another basis (`Architecture.post_norms`; docs/compensated.md says what a cut does in its stead).
- Rows of the table of embeddings are multiplied by √hidden (`embed_scale`), which another hidden size changes: a cut table is multiplied by what undoes that,
  and where the table is the output head too, the last norm by the inverse.
- The two kinds of attention have rotary frequencies of their own, so `rope_parameters` is written by kind and `layer_types` for every layer. A student keeps
  one layer at least that sees all tokens.
- Queries are divided by √query_pre_attn_scalar, a number of its own, which stays.
"""

from math import sqrt

from memory_budget.architecture import Architecture
from minitron.families.blocks import HALVES, Blocks, attention_types, block_family
from nas.couplings import Multiple

HALVES_OF_FOUR_NORMS = (
    {**HALVES[0], "post_norm": "post_attention_layernorm"},
    {"norm": "pre_feedforward_layernorm", "mixer": "mlp", "post_norm": "post_feedforward_layernorm"},
)
THETAS = {"full_attention": 1_000_000.0, "sliding_attention": 10_000.0}  # of transformers' configuration class, where config.json has none
OLD_THETAS = {"full_attention": "rope_theta", "sliding_attention": "rope_local_base_freq"}  # as versions before 5 call them


DEFAULTS = {"query_pre_attn_scalar": 256, "hidden_activation": "gelu_pytorch_tanh"}  # of transformers' class: written, since others have defaults of their own


def config(teacher: dict, architecture: Architecture) -> dict:
    types = attention_types(architecture)
    window = {"sliding_window": architecture.window} if architecture.window else {}
    own = {key: teacher.get(key, default) for key, default in DEFAULTS.items()}
    return {"architectures": ["Gemma3ForCausalLM"], "layer_types": types, "sliding_window_pattern": _period(types), **window, **own}


def _period(types: list[str]) -> int | None:
    """The number P that says which layers see all tokens, every P-th, to programs that know no `layer_types`; None where none does, with which they stop
    instead of computing another model."""
    kinds = [kind == "full_attention" for kind in types]
    return next((period for period in range(1, len(kinds) + 2) if kinds == [(layer + 1) % period == 0 for layer in range(len(kinds))]), None)


def refused(config: dict) -> str | None:
    """Logits or scores squeezed by a hyperbolic tangent, and attention in both directions, which the walks do not compute."""
    for key in ("final_logit_softcapping", "attn_logit_softcapping"):
        if config.get(key) is not None:
            return f"{key} is {config[key]}; logits that are capped cannot be distilled or cut here yet: it must be null, as Gemma 3 has it"
    if config.get("use_bidirectional_attention"):
        return "use_bidirectional_attention is true: a model that looks ahead is no language model that could be cut here"
    return None


def handed_over(config: dict) -> dict:
    """Rotary positions in both spellings, by kind of attention: transformers from version 5 on has `rope_parameters`, older ones have a number for each
    kind and a scaling that is of full attention alone."""
    given = config.get("rope_parameters") or {}
    parameters = {kind: {"rope_type": "default", **(given.get(kind) or {})} for kind in THETAS}
    parameters["full_attention"] |= config.get("rope_scaling") or {}
    for kind, old in OLD_THETAS.items():
        parameters[kind].setdefault("rope_theta", config.get(old, THETAS[kind]))
    scaling = {key: value for key, value in parameters["full_attention"].items() if key != "rope_theta"}
    thetas = {old: parameters[kind]["rope_theta"] for kind, old in OLD_THETAS.items()}
    return config | thetas | {"rope_parameters": parameters, "rope_scaling": None if scaling["rope_type"] == "default" else scaling}


FAMILY = block_family(
    "gemma3_text",
    Blocks("gemma3", "Gemma3", HALVES_OF_FOUR_NORMS, rope_by_type=True),
    config=config,
    dropped=("_sliding_window_pattern",),
    computing_too=("hidden_activation", "query_pre_attn_scalar", "sliding_window", "final_logit_softcapping", "attn_logit_softcapping",
                   "use_bidirectional_attention"),
    handed_over=handed_over,
    couplings=(Multiple("hidden", "num_attention_heads"),),
    refused=refused,
    norm_offset=1.0,
    embed_scale=lambda architecture: sqrt(architecture.hidden),
)  # fmt: skip
