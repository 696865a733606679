"""Reading a family's table of tensors: a tensor's row, its shape, and a checkpoint held against both."""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from math import prod

from memory_budget.architecture import WINDOWED, Architecture
from minitron.families.base import Family, TensorAxes

# What transformers does not load: layers that foretell further tokens, experts among them, which are of no use to a student as they are; and tables of rotary
# positions that older versions stored. The first are made anew by Megatron-LM (NVIDIA/Megatron-LM #4785) or replaced by a draft model (docs.vllm.ai,
# projects/speculators).
FORETELLING = re.compile(r"(^|\.)mtp(\.|_)")
LEFT_OUT = re.compile(rf"{FORETELLING.pattern}|rotary_emb\.inv_freq$")
ANEW = ("they foretell the teacher's tokens, and none are trained here: for a student, Megatron-LM trains such layers alone (--mtp-num-layers, "
        "--freeze-base-for-mtp), vLLM's speculators an EAGLE-3 draft in their place")  # fmt: skip
BUFFER = re.compile(r"\.e_score_correction_bias$")  # stored, but no parameter
_EXPERT = re.compile(r"\bexperts\.(\d+)\.")


def split_layer(name: str) -> tuple[int | None, str]:
    """("layers.7.mixer.D") → (7, "mixer.D"); a tensor outside the layers has layer None. Raises ValueError for `layers.` without a number."""
    if not name.startswith("layers."):
        return None, name
    match = re.fullmatch(r"layers\.(\d+)\.(.+)", name)
    if match is None:
        raise ValueError(f"tensor {name} is not named layers.NUMBER.…, as tensors of a layer are")
    return int(match[1]), match[2]


def expert_of(suffix: str) -> int | None:
    """The expert's number in a name such as "mixer.experts.5.up_proj.weight"; None where there is none."""
    match = _EXPERT.search(suffix)
    return int(match[1]) if match else None


def row_of(family: Family, architecture: Architecture, name: str) -> TensorAxes:
    """The table's row for a canonical tensor name. Raises ValueError where none or two match."""
    layer, suffix = split_layer(name)
    if layer is not None and layer >= architecture.num_sublayers:
        raise ValueError(f"tensor {name} belongs to layer {layer}; the pattern has {architecture.num_sublayers} layers")
    kind = "" if layer is None else architecture.pattern[layer]
    if (expert := expert_of(suffix)) is not None:
        if expert >= architecture.moe_num_experts:
            raise ValueError(f"tensor {name} belongs to expert {expert}; config.json says {architecture.moe_num_experts} experts")
        suffix = suffix.replace(f"experts.{expert}.", "experts.*.")
    rows = _rows(family, architecture).get((kind, suffix), ())
    if len(rows) != 1:
        raise ValueError(f"tensor {name} is matched by {len(rows)} rows of the {family.model_type} axis table; it must be exactly 1")
    return rows[0]


@lru_cache(32)  # a mixture of experts has thousands of tensors
def _rows(family: Family, architecture: Architecture) -> Mapping[tuple[str, str], list[TensorAxes]]:
    """Rows by the sublayer's letter and the suffix; of several, which are there in one kind of model each, those of this kind."""
    found = defaultdict(list)
    for row in family.table:
        kinds = set(architecture.pattern) if row.kind == "any" else {"*", WINDOWED} if row.kind == "*" else {row.kind}
        for kind in kinds:
            found[kind, row.suffix].append(row)
    return {place: rows if len(rows) == 1 else [row for row in rows if _has(architecture, row)] for place, rows in found.items()}


def names_by_canonical(family: Family, architecture: Architecture, file_names: Iterable[str]) -> dict[str, str]:
    """Names in a checkpoint by canonical names, without those that transformers leaves out too: see `left_out`; nor the head of a tied model, where it is
    stored a second time."""
    named = {family.canonical_name(name): name for name in file_names}
    head = () if architecture.has_own_head else (family.outside_names["head"],)
    return {name: file_name for name, file_name in named.items() if not (name.startswith(head) or _is_left_out(architecture, name))}


def left_out(family: Family, architecture: Architecture, file_names: Iterable[str]) -> list[str]:
    """What a checkpoint holds that transformers leaves out when it loads one, and so does every stage: a sentence a kind, for a person to read."""
    names = [name for name in file_names if _is_left_out(architecture, family.canonical_name(name))]
    unread = [name for name in names if LEFT_OUT.search(name)]
    notes = [f"tensors that transformers does not load are left out: {len(unread):,}, {unread[0]} the first"] if unread else []
    if any(FORETELLING.search(name) for name in unread):
        notes[0] += f"; {ANEW}"
    beyond = sorted({layer_of(family.canonical_name(name)) for name in names if not LEFT_OUT.search(name)})
    if beyond:
        each, stored = architecture.sublayers_per_layer, (beyond[-1] + 1) // architecture.sublayers_per_layer
        notes.append(f"config.json says {architecture.num_layers:,} layers and the files hold {stored:,}: layers {beyond[0] // each} to {stored - 1} are left "
                     "out, as transformers does; if they belong to the model, config.json is stale")  # fmt: skip
    return notes


def _is_left_out(architecture: Architecture, name: str) -> bool:
    return bool(LEFT_OUT.search(name)) or layer_of(name) >= architecture.num_sublayers


def layer_of(name: str) -> int:
    """The sublayer's number in a canonical name, −1 outside of the layers and where there is no number."""
    match = re.match(r"layers\.(\d+)\.", name)
    return int(match[1]) if match else -1


@lru_cache(256)
def expected_shape(family: Family, architecture: Architecture, row: TensorAxes) -> tuple[int, ...]:
    sizes = family.axis_sizes(architecture)
    return tuple(sum(prod(sizes[axis] for axis in segment) for segment in dimension) for dimension in row.dimensions)


def has_router_bias(family: Family, architecture: Architecture) -> bool:
    """Whether experts are chosen by scores with a bias that no gradient trains."""
    return any(row.buffer and row.kind in architecture.mixers for row in family.table if row.kind)


def check_tensors(family: Family, architecture: Architecture, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Hold a checkpoint's tensors against its config. Raises ValueError naming the tensor that is wrong, missing or too many."""
    for name, shape in shapes.items():
        row = row_of(family, architecture, name)
        expected = expected_shape(family, architecture, row)
        if tuple(shape) != expected:
            raise ValueError(f"tensor {name} has shape {list(shape)}; config.json says {list(expected)}")
        if not _has(architecture, row):
            raise ValueError(f"tensor {name} is in the checkpoint, but config.json describes a model without it ({row.only_if} is false)")
    for name in required_names(family, architecture):
        if name not in shapes:
            raise ValueError(f"tensor {name} is missing from the checkpoint; config.json's pattern needs it")


def required_names(family: Family, architecture: Architecture) -> Iterator[str]:
    """Every tensor the pattern and the architecture's bias flags call for."""
    rows = [row for row in family.table if _has(architecture, row)]
    yield from (row.suffix for row in rows if row.kind == "")
    for layer, kind in enumerate(architecture.mixers):  # a letter a sublayer
        yield from (f"layers.{layer}.{suffix}" for row in rows if row.kind in (kind, "any") for suffix in _suffixes(architecture, row))


def _suffixes(architecture: Architecture, row: TensorAxes) -> list[str]:
    if "experts.*" not in row.suffix:
        return [row.suffix]
    return [row.suffix.replace("*", str(number)) for number in range(architecture.moe_num_experts)]


def _has(architecture: Architecture, row: TensorAxes) -> bool:
    return not row.only_if or getattr(architecture, row.only_if)
