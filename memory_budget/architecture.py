"""Architecture: the sizes and the pattern of a model, without weights.

Legend of pattern letters: M Mamba-2 · * attention · W attention within a window · - FFN · E mixture of experts (MoE) FFN.
A letter is a sublayer: a norm and a mixer whose output is added to the residual stream. A layer, what config.json's
num_hidden_layers counts, is one sublayer in NemotronH and Mamba-2, and two, attention and `-` or `E`, in a transformer block of Llama's kind; a Granite-4-H
has blocks with M in the place of attention.
W is the same mixer as *, with the same tensors, but for what it looks at.

Sizes may be numpy arrays instead of int where the search evaluates many architectures of one pattern
at once: the formulas of this package are plain arithmetic and pass them through.
"""

from collections.abc import Iterable
from dataclasses import MISSING, dataclass, fields
from typing import Any

LAYER_KINDS = {"M": "mamba", "*": "attention", "-": "ffn", "E": "moe"}  # mixers, by their letters
WINDOWED = "W"  # attention that sees the last `window` tokens alone
BLOCK, WINDOWED_BLOCK, MOE_BLOCK, WINDOWED_MOE_BLOCK, MAMBA_BLOCK, MAMBA_MOE_BLOCK = "*-", "W-", "*E", "WE", "M-", "ME"
BLOCKS = (BLOCK, WINDOWED_BLOCK, MOE_BLOCK, WINDOWED_MOE_BLOCK, MAMBA_BLOCK, MAMBA_MOE_BLOCK)
BLOCK_TYPES = ("llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "gemma3_text", "granitemoehybrid")  # model types whose layers are such blocks
MAMBA_BLOCK_TYPES = ("granitemoehybrid",)  # and of which some may have Mamba-2 in the place of attention


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """Sizes of one model; the pattern has a letter for every sublayer, everything else derivable is a property.

    window: tokens that a query of a W layer sees, its own among them; 0 in a model without such layers.
    post_norms: whether a second norm follows every mixer, before its output is added.
    moe_*: of a layer of experts their number, how many a token goes to, the neurons of one and those of the shared expert that all tokens see (0: there is
    none), the width that experts read and write where it is another than `hidden` (0: it is not), and the groups of neighbours that the router sees experts
    in, of which it takes so many for a token. Experts are gated and biased as the FFN is.
    """

    model_type: str
    pattern: str
    hidden: int
    vocab: int
    tied_embeddings: bool = False

    ffn: int = 0
    ffn_gated: bool = False
    ffn_bias: bool = False

    num_attention_heads: int = 0
    num_key_value_heads: int = 0
    attention_head_dim: int = 0
    attention_input_bias: bool = False
    attention_output_bias: bool = False
    attention_qk_norm: bool = False
    window: int = 0
    post_norms: bool = False

    mamba_num_heads: int = 0
    mamba_head_dim: int = 0
    mamba_num_groups: int = 0
    mamba_state_size: int = 0
    mamba_conv_kernel: int = 0
    mamba_conv_bias: bool = True
    mamba_projection_bias: bool = False

    moe_num_experts: int = 0
    moe_experts_per_token: int = 0
    moe_ffn: int = 0
    moe_shared_ffn: int = 0
    moe_latent: int = 0
    moe_groups: int = 1
    moe_groups_per_token: int = 1

    def __post_init__(self) -> None:
        """What no layer of the pattern has is as if it had not been given, so that a cut to other layers is what its own config.json says."""
        if self.window and WINDOWED not in self.pattern:
            object.__setattr__(self, "window", 0)
        absent = [] if "E" in self.pattern else ["moe_"]
        if self.model_type in MAMBA_BLOCK_TYPES and "M" not in self.pattern:  # config.json goes on to have sizes, which hidden size decides
            absent.append("mamba_")
        for field in fields(self):
            if field.name.startswith(tuple(absent)):
                value = field.default if isinstance(field.default, bool) else 0 * getattr(self, field.name) + field.default  # an array stays one
                object.__setattr__(self, field.name, value)

    def num_layers_of(self, kind: str) -> int:
        """Number of sublayers of one kind, by its letter; * is all attention, W that of it which is within a window."""
        return self.pattern.count(kind) + (self.pattern.count(WINDOWED) if kind == "*" else 0)

    @property
    def mixers(self) -> str:
        """The pattern by mixers alone: attention is *, whatever it looks at."""
        return self.pattern.replace(WINDOWED, "*")

    @property
    def num_sublayers(self) -> int:
        return len(self.pattern)

    @property
    def sublayers_per_layer(self) -> int:
        return len(BLOCK) if self.model_type in BLOCK_TYPES else 1

    @property
    def num_layers(self) -> int:
        """Depth, as config.json's num_hidden_layers counts it."""
        return len(self.pattern) // self.sublayers_per_layer

    @property
    def layer_kinds(self) -> tuple[str, ...]:
        """The letters of every layer: one each, or those of a block."""
        per_layer = self.sublayers_per_layer
        return tuple(self.pattern[first : first + per_layer] for first in range(0, len(self.pattern), per_layer))

    def sublayers_of(self, layers: Iterable[int]) -> tuple[int, ...]:
        """The sublayers, by number, that layers consist of."""
        per_layer = self.sublayers_per_layer
        return tuple(per_layer * layer + part for layer in layers for part in range(per_layer))

    @property
    def experts_read_stream(self) -> bool:
        """Whether routed experts read and write the residual stream, and no latent of it."""
        return self.moe_latent == 0

    @property
    def moe_latent_bias(self) -> bool:
        """Whether the matrices to and from the experts' latent have biases."""
        return self.moe_latent > 0 and self.ffn_bias

    @property
    def has_own_head(self) -> bool:
        """Whether the output projection is a matrix of its own."""
        return not self.tied_embeddings

    @property
    def mamba_inner(self) -> int:
        """Channels of the Mamba mixer, M·P."""
        return self.mamba_num_heads * self.mamba_head_dim

    @property
    def mamba_conv_channels(self) -> int:
        """Channels of the causal convolution, x | B | C: M·P + 2·G·N."""
        return self.mamba_inner + 2 * self.mamba_num_groups * self.mamba_state_size


def as_dict(architecture: Architecture) -> dict[str, Any]:
    """The fields by name, to be kept: of those that came later, at the end of LATER, only what is not as it was before them."""
    return {field.name: value for field in fields(architecture)
            if (value := getattr(architecture, field.name)) != field.default or field.name not in LATER or field.default is MISSING}  # fmt: skip


LATER = ("window", "post_norms", "moe_groups", "moe_groups_per_token")  # so that what was stored of an architecture without them stays what it was


def describe_layers(architecture: Architecture) -> str:
    """What the layers are, for a person: their pattern, or how many blocks."""
    if not set(architecture.layer_kinds) <= set(BLOCKS):
        return f"pattern {architecture.pattern}"
    windowed, moe, mamba = architecture.num_layers_of(WINDOWED), architecture.num_layers_of("E"), architecture.num_layers_of("M")
    attending = architecture.num_layers - mamba
    mixers = "attention" if not mamba else f"Mamba-2 or, {attending} of them, attention," if attending else "Mamba-2"
    said = f"{architecture.num_layers} blocks of {mixers} and {'FFN' if not moe else 'experts' if moe == architecture.num_layers else 'FFN or experts'}"
    if not windowed:
        return said
    which = "all" if windowed == architecture.num_layers else f"{windowed}"
    return f"{said}, {which} of them within a window of {architecture.window:,} tokens"


def check_architecture(architecture: Architecture) -> None:
    """Refuse sizes that no model can have. Scalars only.

    Raises ValueError naming the setting, the value and the rule.
    """
    unknown = sorted(set(architecture.pattern) - {*LAYER_KINDS, WINDOWED})
    if unknown or not architecture.pattern:
        raise ValueError(
            f"pattern {architecture.pattern!r} must be a string of layer letters M (Mamba-2), * (attention), W (attention within a window), - (FFN), E (MoE)"
            + (f"; unknown: {' '.join(unknown)}" if unknown else "; it is empty")
        )
    blocks = [block for block in BLOCKS if "M" not in block or architecture.model_type in MAMBA_BLOCK_TYPES]
    if architecture.model_type in BLOCK_TYPES and not set(architecture.layer_kinds) <= set(blocks):
        raise ValueError(f"pattern {architecture.pattern!r} must be blocks of attention and FFN or experts, {' or '.join(blocks)}, "
                         f"for {architecture.model_type}")  # fmt: skip
    needed = {"hidden": True, "vocab": True, "ffn": "-" in architecture.pattern, **_needed_by_kind(architecture)}
    for name, is_needed in needed.items():
        if is_needed and getattr(architecture, name) < 1:
            raise ValueError(f"{name} is {getattr(architecture, name)}; it must be at least 1 for pattern {architecture.pattern}")
    if "M" in architecture.pattern:
        _check_divides("mamba heads", architecture.mamba_num_heads, "groups", architecture.mamba_num_groups)
    if "*" in architecture.mixers:
        _check_divides("attention heads", architecture.num_attention_heads, "key-value heads", architecture.num_key_value_heads)
    if "E" in architecture.pattern:
        _check_experts(architecture)


def least_experts(architecture: Architecture) -> int:
    """The fewest experts of a layer among which a token finds as many as it goes to, in the groups that the router takes for it; a group is judged by the best
    two of its experts."""
    groups, per_token = architecture.moe_groups, architecture.moe_experts_per_token
    return per_token if groups == 1 else groups * max(2, -(-per_token // architecture.moe_groups_per_token))


def _check_experts(architecture: Architecture) -> None:
    """Refuse experts among which a token does not find as many as it goes to."""
    experts, per_token, groups, taken = (getattr(architecture, f"moe_{name}") for name in ("num_experts", "experts_per_token", "groups", "groups_per_token"))
    if per_token > experts:
        raise ValueError(f"experts per token ({per_token}) must be at most the number of experts ({experts})")
    if not 1 <= taken <= groups:
        raise ValueError(f"routing groups of a token ({taken}) must be at least 1 and at most the routing groups ({groups})")
    _check_divides("experts", experts, "routing groups", groups)
    if experts < least_experts(architecture):
        raise ValueError(f"experts ({experts}) in {groups} routing groups, {taken} of which a token sees, must be at least {least_experts(architecture)}: "
                         f"two in a group, and {per_token} in those of a token")  # fmt: skip


def _needed_by_kind(architecture: Architecture) -> dict[str, bool]:
    mamba = ("mamba_num_heads", "mamba_head_dim", "mamba_num_groups", "mamba_state_size", "mamba_conv_kernel")
    attention = ("num_attention_heads", "num_key_value_heads", "attention_head_dim")
    moe = ("moe_num_experts", "moe_experts_per_token", "moe_ffn")
    kinds = (("M", mamba), ("*", attention), ("E", moe), (WINDOWED, ("window",)))
    return {name: letter in architecture.pattern or letter in architecture.mixers for letter, names in kinds for name in names}


def _check_divides(what: str, number: int, of: str, divisor: int) -> None:
    if number % divisor:
        below = number - number % divisor
        nearest = ", ".join(str(value) for value in (below, below + divisor) if value > 0)
        raise ValueError(f"{what} ({number}) must be a multiple of the {divisor} {of}; nearest: {nearest}")
