"""The tensors of a model's GGUF file, as convert_hf_to_gguf.py writes them and llama-quantize stores them: which, in what rows, of what type.

Matrices of the mixers, token_embd and output are quantised; all else (norms, biases, convolutions, vectors of heads, routers) is F32 whatever the file's
type (conversion/base.py, `prepare_tensors`; src/llama-quant.cpp, `tensor_allows_quantization`).
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

from memory_budget.architecture import Architecture
from memory_budget.gguf_types import BLOCKS, Place, check_file_type, row_bytes, tensor_type, wanted_type
from memory_budget.model import Model, as_model, part_of
from memory_budget.parts.attention import Attention
from memory_budget.parts.delta import GatedDelta
from memory_budget.parts.experts import Experts
from memory_budget.parts.feed_forward import FeedForward
from memory_budget.parts.latent import LatentAttention
from memory_budget.parts.part import Part

F32_BYTES = 4
LARGEST_BLOCK = 256
CORRECTED_TYPES = ("nemotron_h", "deepseek_v3", "glm4_moe")  # a number an expert that corrects the router's scores; in transformers no parameter but a buffer
ALTERNATING_TYPES = ("jamba", "llama4", "llama4_text")  # dense and mixed FFNs take turns
FUSED_TYPES = ("phi3",)  # q, k and v are one tensor, gate and up are another
MOST_LAYERS = 512  # src/llama-hparams.h, LLAMA_MAX_LAYERS
SEVENTY_LAYERS = 80
SEVENTY_TYPES = ("llama", "mistral", "qwen2")  # types of which llama.cpp calls those with 80 layers "70B" (src/models); of Llama's only with grouped queries


@dataclass(frozen=True, slots=True, kw_only=True)
class Tensor:
    """A matrix of the file: rows of row_length numbers; place is what the quantiser looks at."""

    rows: int
    row_length: int
    place: Place

    def type_in(self, file_type: str) -> str:
        """The type it is stored in, in a file of that type."""
        return tensor_type(file_type, self.place, self.row_length)

    def bytes_in(self, file_type: str) -> int:
        return self.rows * row_bytes(self.type_in(file_type), self.row_length)


@lru_cache(maxsize=256)  # of one model at many contexts
def gguf_bytes(counted: Architecture | Model, file_type: str, *, importance: bool = False) -> int:
    """Bytes of all tensors of a file, without its header. Raises ValueError for a type that is not known.

    Not counted, as a config's sizes do not tell: factors of a stretched RoPE, at most a few hundred numbers. importance: whether an importance matrix is
    used, which the rules of some types ask.
    """
    file_type, model = check_file_type(file_type), as_model(counted)
    tensors = tuple(gguf_tensors(counted, importance=importance))
    matrices = sum(tensor.bytes_in(file_type) for tensor in tensors)
    corrections = sum(number * part.experts for number, part in model.layers if isinstance(part, Experts)) if model.model_type in CORRECTED_TYPES else 0
    others = model.norms + model.embeddings + corrections + sum(number * part.parameters().others for number, part in model.layers)
    return matrices + others * F32_BYTES


def fallbacks(counted: Architecture | Model, file_type: str, *, importance: bool = False) -> tuple[str, ...]:
    """A sentence for every kind of tensor whose rows the type does not divide: what it is stored in instead."""
    file_type = check_file_type(file_type)
    fallen: Counter[tuple[str, int, str, str]] = Counter()
    for tensor in gguf_tensors(counted, importance=importance):
        wanted, stored = wanted_type(file_type, tensor.place, LARGEST_BLOCK), tensor.type_in(file_type)
        if stored != wanted:
            fallen[tensor.place.role, tensor.row_length, wanted, stored] += 1
    return tuple(
        f"{count} {role} tensor{'s' if count > 1 else ''} in {stored}: rows of {length:,} are no multiple of {BLOCKS[wanted][0]}, {wanted}'s block"
        for (role, length, wanted, stored), count in fallen.items()
    )


def gguf_tensors(counted: Architecture | Model, *, importance: bool = False) -> Iterator[Tensor]:
    """Every matrix of the file, in the order in which the quantiser counts them: token_embd, output, then layer by layer.

    Raises ValueError for more layers than llama.cpp takes.
    """
    model = as_model(counted)
    if (layers := max([model.num_layers, *(number for number, _ in model.layers)])) > MOST_LAYERS:
        raise ValueError(f"num_hidden_layers ({layers}) must be at most {MOST_LAYERS} for llama.cpp")
    ordered = _in_order(counted)
    experts = max((part.experts for _, part in ordered if isinstance(part, Experts)), default=0)
    facts = Place(role="other", tied=model.tied_embeddings, queries_per_key=_queries_per_key(model, ordered), experts=experts,
                  is_70b=_is_70b(model, ordered), importance=importance)  # fmt: skip
    for role in ("token_embd",) if model.tied_embeddings else ("token_embd", "output"):
        yield Tensor(rows=model.vocab, row_length=model.hidden, place=replace(facts, role=role))
    rows = [(layer, _matrices(model.model_type, part)) for layer, part in ordered]
    values = sum(role == "attn_v" for _, matrices in rows for role, *_ in matrices)
    seen: Counter[str] = Counter()
    for layer, matrices in rows:
        for role, copies, outputs, inputs in matrices:
            nth = seen[role]
            index = layer if role.startswith("ffn_") and experts > 1 else nth
            seen[role] += 1
            of = values if role == "attn_v" else model.num_layers
            if copies and outputs and inputs:
                yield Tensor(rows=copies * outputs, row_length=inputs, place=replace(facts, role=role, index=index, nth=nth, of=of, stacked=copies > 1))


def _matrices(model_type: str, part: Part) -> list[tuple[str, int, int, int]]:
    """(role, copies, outputs, inputs) of a mixer's tensors. Kinds are told by their classes' names where this module would have to import many."""
    matrices = part.parameters().matrices
    if isinstance(part, Experts):
        (gates, neurons, width), down, (shared_gates, *shared), *rest = matrices
        routed = [(role, part.experts, neurons, width) for role in ("ffn_up", "ffn_gate")[: gates // max(part.experts, 1)]]
        beside = [(role, 1, *shared) for role in ("ffn_up", "ffn_gate")[:shared_gates]]
        shared_down, *latents = rest
        return [("ffn_down", *down), *routed, ("ffn_down", *shared_down), *beside, *(("other", *latent) for latent in latents)]
    if type(part) is FeedForward:
        (gates, *up), down = matrices
        return [("ffn_down", *down), *((role, 1, *up) for role in ("ffn_up", "ffn_gate")[:gates])]
    if type(part) is Attention:
        (_, *read), (copies, *kept), write = matrices
        if model_type in FUSED_TYPES:
            return [("attn_v", 1, read[0] + copies * kept[0], read[1]), ("attn_output", *write)]
        return [("attn_q", 1, *read), *((role, 1, *kept) for role in ("attn_k", "attn_v")[:copies]), ("attn_output", *write)]
    if type(part) is LatentAttention:  # keys and values are read out of the latent by a tensor each, that of the keys transposed
        *reading, (_, _, latent), write = matrices
        keys, values = ("other", part.heads, latent, part.plain_dim), ("other", part.heads, part.value_dim, latent)
        first = "attn_q" if len(reading) == 2 else "other"
        return [(first, *reading[0]), *(("other", *matrix) for matrix in reading[1:]), keys, values, ("attn_output", *write)]
    if type(part) is GatedDelta:  # q, k and v are one tensor, attn_qkv, which counts among the values, and z is another
        convolved, values = ("attn_v", 1, part.conv_channels, part.hidden), ("other", 1, part.values, part.hidden)
        return [convolved, values, *(("other", *matrix) for matrix in matrices[1 if part.fused else 2 :])]
    return [("other", copies, outputs, inputs) for copies, outputs, inputs in matrices]


def _in_order(counted: Architecture | Model) -> list[tuple[int, Part]]:
    """Every mixer with the number of its layer, first to last.

    A model does not say in which order its kinds of mixers come: they are taken to be spread evenly, the rarer one behind (as every third layer of many is).
    FFNs of two kinds, as many as layers together, come in the order in which they are listed, dense ones first, but for types where they take turns.
    """
    if isinstance(counted, Architecture):
        from_letter = {letter: part_of(counted, letter) for letter in dict.fromkeys(counted.pattern)}
        return [(place // counted.sublayers_per_layer, from_letter[letter]) for place, letter in enumerate(counted.pattern)]
    layers, feeds = counted.num_layers, [part for _, part in counted.layers if part.kind in ("ffn", "moe")]
    one_each = sum(number for number, part in counted.layers if part in feeds) == layers
    placed: list[tuple[float, int, Part]] = []
    first = 0
    for number, part in counted.layers:
        listed = part in feeds and one_each and counted.model_type not in ALTERNATING_TYPES
        placed += [(first + copy if listed else (copy + 1) * layers / number - 1, -number, part) for copy in range(number)]
        first += number * (part in feeds)
    ordered, passed = [], 0
    for position, _, part in sorted(placed, key=lambda item: item[:2]):
        ordered.append((passed if part in feeds and one_each else int(position), part))
        passed += part in feeds
    return ordered


def _queries_per_key(model: Model, ordered: list[tuple[int, Part]]) -> int:
    """Of the first layer, which in a hybrid of Mamba and attention has none."""
    attention = [part for _, part in ordered if isinstance(part, Attention)]
    if not attention or (any(part.kind == "mamba" and part.letter != "D" for _, part in ordered) and len(attention) < model.num_layers):
        return 0
    return attention[0].query_heads // attention[0].key_value_heads


def _is_70b(model: Model, ordered: list[tuple[int, Part]]) -> bool:
    if model.model_type not in SEVENTY_TYPES or model.num_layers != SEVENTY_LAYERS:
        return False
    return model.model_type == "qwen2" or _queries_per_key(model, ordered) > 1
