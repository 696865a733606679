"""Candidates as prefix views of a teacher whose units were sorted once: no weight is copied per candidate.

Sorting changes no logit. Hidden channels and neurons go by descending score, Mamba and attention heads and experts by descending
score inside their group. A candidate is then a prefix of every axis, and of the layers some. Experts are modules that change places as
they are, each with its neurons in an order of its own; where they are in groups, the router's rows are copied, once for every number of
experts. Tensors that *read* heads in groups (`out_proj`, `o_proj`) keep their columns with a group's best heads side by side (rank first, then group), so that
they too are cut to a prefix; the activation is brought into that order on its way in. Tensors that *write* one
(Mamba's fused in-projection, its convolution, `q_proj`) must be group by group; where heads are cut they are copied,
once for every number of heads. Of a rotated model (rotated.py) the hidden channels are the stream's principal directions,
in order from the start, and a norm of fewer of them is one number. What writes to the stream may have been refitted to
a width (width_refits.py); then that is what hidden takes its first rows of.
"""

import hashlib
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

import numpy as np
import torch
from torch import nn

from memory_budget.architecture import Architecture
from memory_budget.parameters import count_total_parameters
from minitron.families.base import ATTENTION_HEAD, EXPERT, EXPERT_FFN, FFN, HIDDEN, KEY_VALUE_HEAD, MAMBA_CHANNEL, MAMBA_HEAD, SHARED_FFN, Family
from minitron.families.experts import experts_of
from minitron.families.state import load_tensors, model_tensors
from minitron.families.table import BUFFER, row_of, split_layer
from minitron.importance.scores import ImportanceScores
from minitron.pruning.cut import TensorCut, is_run, kept_indices, plan_cuts
from minitron.pruning.plan import Indices, PruningPlan, expert_place, top, top_per_group

GROUPED = (MAMBA_HEAD, ATTENTION_HEAD)
ColumnsKey = tuple[str, int, bytes]  # a tensor's name, how many of its columns are kept, and which, where they are not the first


@dataclass(frozen=True, slots=True)
class View:
    """A candidate as a model. `copied_bytes` are of tensors that are no views, Mamba's in-projection and convolution
    aside: theirs are `mamba_copied_bytes`. `digest` names what the model is made of."""

    model: nn.Module
    copied_bytes: int
    mamba_copied_bytes: int
    digest: str


class SortedTeacher:
    """A teacher with its units in order of importance; `model` gives the same logits as before."""

    def __init__(self, family: Family, model: nn.Module, config: dict, architecture: Architecture, scores: ImportanceScores, head_dim: int | None = None, *,
                 norm_scales: Mapping[str, torch.Tensor] = MappingProxyType({}), sort_key_values: bool = False):  # fmt: skip
        """Sorts the model's weights in place, one tensor at a time. `head_dim` is how many channels of a Mamba head
        candidates keep (None: all), since the ranking of the heads goes by the channels that stay. `norm_scales` are those
        of a rotated model (rotated.rotate_model), whose hidden directions are in order already. KV heads stay where they are unless some candidate
        has fewer (`sort_key_values`). `refitted` has, by `columns_key`, matrices that candidates take in place of their columns (width_refits.refit_widths)."""
        self.family, self.config, self.architecture = family, config, architecture
        everything = tuple(range(architecture.num_layers))
        orders = _orders(architecture, scores, head_dim or architecture.mamba_head_dim, sort_key_values=sort_key_values)
        self._norm_scales = norm_scales
        if norm_scales:
            del orders[HIDDEN]
        self.state = model_tensors(family, model)
        self._shapes = {name: tuple(tensor.shape) for name, tensor in self.state.items()}
        self._readers: dict[int, list[str]] = defaultdict(list)  # by sublayer, matrices whose columns are heads in groups
        for name in self._shapes:
            if self._reads_groups(name):
                self._readers[split_layer(name)[0]].append(name)
        for cut in self._cuts(PruningPlan(architecture, architecture, everything, orders)):
            tensor = self.state[cut.source]  # experts stay where they are: names of others would be overwritten
            tensor.copy_(cut.apply(tensor))
        for layer, order in orders.get(EXPERT, {}).items():
            experts = experts_of(family.parts(model).layers[layer])
            for place, expert in enumerate([experts[number] for number in order]):
                experts[place] = expert
        self.state = model_tensors(family, model) if EXPERT in orders else self.state
        self._regroup_inputs(model, architecture, everything)
        self._copies: dict[tuple, torch.Tensor] = {}
        self.refitted: dict[ColumnsKey, torch.Tensor] = {}
        self.model = model.eval()

    def view(self, student: Architecture, kept_layers: Indices) -> View:
        """The candidate of these sizes and layers; of a tied model that was rotated, which has a head of its own now (rotated.py), so has it. Raises
        RuntimeError where its parameters are not the planned number."""
        student = replace(student, tied_embeddings=self.architecture.tied_embeddings)
        tensors = {cut.target: self._cut(cut) for cut in self._cuts(self._plan(student, kept_layers))}
        model = _empty_model(self.family, self.family.hf_config(self.config, student))
        load_tensors(self.family, model, tensors)
        if (scale := self.family.embed_scale(self.architecture)) != self.family.embed_scale(student):
            self.family.parts(model).embed.embed_scale.fill_(scale)  # the table is not multiplied: that would be a copy for every hidden size
        self._regroup_inputs(model, student, kept_layers)
        self._check(tensors, student)
        viewed = {tensor.untyped_storage().data_ptr() for tensor in (*self.state.values(), *self.refitted.values())}
        copied = {name: tensor.numel() * tensor.element_size() for name, tensor in tensors.items() if tensor.untyped_storage().data_ptr() not in viewed}
        mamba = sum(size for name, size in copied.items() if _is_fused_mamba(name))
        return View(model.eval(), sum(copied.values()) - mamba, mamba, _digest(tensors))

    def mamba_layers(self, student: Architecture) -> dict[int, nn.Module]:
        """The Mamba-2 layers, by number, with a student's heads and channels in the whole stream, for what is measured of heads alone. In some families no
        model could be made so, whose hidden size goes with its heads."""
        teacher = self.architecture
        wide = replace(teacher, mamba_num_heads=student.mamba_num_heads, mamba_head_dim=student.mamba_head_dim)
        config = self.family.hf_config(self.config, replace(student, pattern=teacher.pattern))
        with torch.device("meta"):
            blocks = {layer: self.family.build_layer(config, layer).eval() for layer, kind in enumerate(teacher.pattern) if kind == "M"}
        for cut in self._cuts(self._plan(wide, tuple(range(teacher.num_layers)))):
            layer, name = split_layer(cut.target)
            if layer in blocks:
                place, _, last = name.rpartition(".")
                setattr(blocks[layer].get_submodule(place), last, nn.Parameter(self._cut(cut), requires_grad=False))
        for layer, block in blocks.items():
            self._regroup(block, layer, wide)
        return blocks

    def kept_columns(self, name: str, student: Architecture) -> tuple[ColumnsKey, torch.Tensor | None]:
        """Which columns of a tensor a student keeps, and `columns_key` of that; None for all."""
        plan = self._by_columns(self._plan(student, tuple(range(self.architecture.num_layers))))
        columns = kept_indices(self.family, plan, name)[1]
        return _columns_key(name, self._shapes[name][1] if columns is None else len(columns), columns), columns

    def _plan(self, student: Architecture, kept_layers: Indices) -> PruningPlan:
        """What a student keeps of the sorted teacher: the first of every axis, of grouped ones the first of every group."""
        teacher, sizes = self.architecture, self.family.axis_sizes(self.architecture)
        units: dict[str, dict[int, Indices]] = {HIDDEN: {-1: _prefix(student.hidden)}}
        for axis, number, groups in ((FFN, student.ffn, 1), (MAMBA_CHANNEL, student.mamba_head_dim, 1),
                                     (MAMBA_HEAD, student.mamba_num_heads, teacher.mamba_num_groups),
                                     (ATTENTION_HEAD, student.num_attention_heads, teacher.num_key_value_heads),
                                     (KEY_VALUE_HEAD, student.num_key_value_heads, 1), (SHARED_FFN, student.moe_shared_ffn, 1),
                                     (EXPERT, student.moe_num_experts, teacher.moe_groups), (EXPERT_FFN, student.moe_ffn, 1)):  # fmt: skip
            if number < sizes.get(axis, 0):
                groups_kept = _prefix(student.num_key_value_heads) if axis == ATTENTION_HEAD else None
                kept = _prefix(number) if groups == 1 else top_per_group(-np.arange(sizes[axis]), groups, number, groups_kept)
                units[axis] = dict.fromkeys(range(teacher.num_sublayers * (teacher.moe_num_experts if axis == EXPERT_FFN else 1)), kept)
        return PruningPlan(teacher, student, kept_layers, units)

    def _cuts(self, plan: PruningPlan) -> list[TensorCut]:
        """The plan's cuts, those of columns that read a grouped axis in the order of the columns: rank first, then group."""
        columns, readers = self._by_columns(plan), {name for names in self._readers.values() for name in names}
        return [
            replace(cut, keep=(cut.keep[0], kept_indices(self.family, columns, cut.source)[1]), factor=1.0, shift=0.0) if cut.source in readers
            else cut if (cut.factor, cut.shift) == (1.0, 0.0) else replace(cut, factor=1.0, shift=0.0)
            for cut in plan_cuts(self.family, plan, self._shapes)
        ]  # fmt: skip

    def _by_columns(self, plan: PruningPlan) -> PruningPlan:
        """A plan with heads by their columns in what reads them."""
        return replace(plan, units={axis: {layer: self._by_rank(axis, kept) for layer, kept in layers.items()} if axis in GROUPED else layers
                                    for axis, layers in plan.units.items()})  # fmt: skip

    def _by_rank(self, axis: str, kept: Indices) -> Indices:
        """Kept heads, given group by group, as columns: the sorted teacher's own order, or for a candidate a prefix."""
        groups = self.architecture.mamba_num_groups if axis == MAMBA_HEAD else self.architecture.num_key_value_heads
        heads = self.architecture.mamba_num_heads if axis == MAMBA_HEAD else self.architecture.num_attention_heads
        if len(kept) < heads:  # of columns that are sorted already
            group, place = np.divmod(np.array(kept), heads // groups)
            return tuple(np.sort(place * groups + group).tolist())
        return tuple(np.array(kept).reshape(groups, -1).T.reshape(-1).tolist())

    def _reads_groups(self, name: str) -> bool:
        """Whether the columns of a matrix are heads in groups."""
        dimensions = row_of(self.family, self.architecture, name).dimensions
        return len(dimensions) == 2 and dimensions[1][0][0] in GROUPED

    def _cut(self, cut: TensorCut) -> torch.Tensor:
        """A view of the sorted tensor, or of what was refitted to its columns; a copy, shared by all candidates, only of what is no run along its
        first dimension, and of one number for a rotated model's norm."""
        key = _columns_key(cut.source, cut.shape[-1], cut.keep[-1])
        if key in self.refitted:
            return self.refitted[key][: cut.shape[0]]
        tensor = self.state[cut.source]
        if cut.source in self._norm_scales and cut.shape != tuple(tensor.shape):
            (hidden,) = cut.shape
            return self._norm_scales[cut.source][hidden - 1].to(tensor.dtype).repeat(hidden)
        keep = list(cut.keep)
        for dimension, indices in enumerate(cut.keep):
            if indices is not None and not is_run(indices):
                key = (cut.source, dimension, len(indices), indices.numpy().tobytes())
                if key not in self._copies:
                    self._copies[key] = self.state[cut.source].index_select(dimension, indices.to(tensor.device))
                tensor, keep[dimension] = self._copies[key], None
        return replace(cut, keep=tuple(keep)).apply(tensor)

    def _regroup_inputs(self, model: nn.Module, architecture: Architecture, kept_layers: Indices) -> None:
        for layer, block in zip(self.architecture.sublayers_of(kept_layers), self.family.parts(model).layers, strict=True):
            self._regroup(block, layer, architecture)

    def _regroup(self, block: nn.Module, layer: int, architecture: Architecture) -> None:
        """Modules that read heads get them rank first, then group, as their columns are."""
        for name in self._readers.get(layer, ()):
            is_mamba = row_of(self.family, self.architecture, name).dimensions[1][0][0] == MAMBA_HEAD
            groups = architecture.mamba_num_groups if is_mamba else architecture.num_key_value_heads
            heads = architecture.mamba_num_heads if is_mamba else architecture.num_attention_heads
            block.get_submodule(name.split(".", 2)[2].removesuffix(".weight")).register_forward_pre_hook(_by_rank_hook(groups, heads // groups))

    def _check(self, tensors: Mapping[str, torch.Tensor], student: Architecture) -> None:
        planned, effective = count_total_parameters(student), sum(tensor.numel() for name, tensor in tensors.items() if not BUFFER.search(name))
        if planned != effective:
            raise RuntimeError(f"the view of a candidate has {effective:,} parameters, its plan {planned:,}")


def _columns_key(name: str, width: int, columns: torch.Tensor | None) -> ColumnsKey:
    return name, width, b"" if columns is None or is_run(columns) else columns.numpy().tobytes()


def _by_rank_hook(groups: int, per_group: int):
    def regroup(_module, args):
        activation = args[0]  # [..., G·R·P], heads group by group
        split = activation.unflatten(-1, (groups, per_group, -1))
        return (split.transpose(-3, -2).flatten(-3),)

    return regroup


def _orders(architecture: Architecture, scores: ImportanceScores, head_dim: int, *, sort_key_values: bool) -> dict[str, dict[int, Indices]]:
    """Every unit of every axis in descending order of its score, grouped ones inside their group."""
    orders: dict[str, dict[int, Indices]] = {HIDDEN: {-1: _descending(scores.hidden())}}
    for layer, kind in enumerate(architecture.mixers):
        if kind == "-":
            orders.setdefault(FFN, {})[layer] = _descending(scores.ffn(layer))
        elif kind == "M":
            channels = scores.mamba_channels(layer)
            kept = top(channels, head_dim) if head_dim < architecture.mamba_head_dim else None
            orders.setdefault(MAMBA_CHANNEL, {})[layer] = _descending(channels)
            orders.setdefault(MAMBA_HEAD, {})[layer] = _descending(scores.mamba_heads(layer, kept), architecture.mamba_num_groups)
        elif kind == "*":
            groups = architecture.num_key_value_heads
            heads = np.array(_descending(scores.attention_heads(layer), groups)).reshape(groups, -1)
            if sort_key_values:
                order = _descending(scores.key_value_heads(layer, groups))
                orders.setdefault(KEY_VALUE_HEAD, {})[layer], heads = order, heads[list(order)]
            orders.setdefault(ATTENTION_HEAD, {})[layer] = tuple(heads.reshape(-1).tolist())
        elif kind == "E":
            orders.setdefault(EXPERT, {})[layer] = _descending(scores.experts(layer), architecture.moe_groups)
            if architecture.moe_shared_ffn:
                orders.setdefault(SHARED_FFN, {})[layer] = _descending(scores.shared_neurons(layer))
            places = {expert_place(architecture, layer, expert): _descending(one) for expert, one in enumerate(scores.expert_neurons(layer))}
            orders.setdefault(EXPERT_FFN, {}).update(places)
    return orders


def _descending(scores: np.ndarray, groups: int = 1) -> Indices:
    """Indices by descending score inside each of `groups` equal runs; ties go to the lower index, as in pruning.plan.top."""
    by_group = np.argsort(-scores.reshape(groups, -1), axis=1, kind="stable")
    return tuple((by_group + np.arange(groups)[:, None] * by_group.shape[1]).reshape(-1).tolist())


def _prefix(number: int) -> Indices:
    return tuple(range(number))


def _is_fused_mamba(name: str) -> bool:
    return ".in_proj." in name or ".conv1d." in name


def _empty_model(family: Family, config: dict) -> nn.Module:
    """The modules of a config on the meta device: no weight is made or initialised."""
    with torch.device("meta"):
        return family.build(config)


def _digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """12 hex digits of names, shapes and every tensor's first and last row: differs where candidates do."""
    text = hashlib.sha256()
    for name, tensor in tensors.items():
        ends = torch.stack([tensor[0].reshape(-1), tensor[-1].reshape(-1)]).float().cpu()
        text.update(f"{name} {tuple(tensor.shape)}".encode() + ends.contiguous().numpy().tobytes())
    return text.hexdigest()[:12]
