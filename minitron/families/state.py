"""A model's tensors by canonical names, each once: those that a tied model has under two names, under the one that is stored."""

from collections.abc import Iterable, Mapping
from copy import copy

import torch
from torch import nn

from minitron.families.base import Family


def model_tensors(family: Family, model: nn.Module) -> dict[str, torch.Tensor]:
    """The state of a model of transformers, by canonical name."""
    return {family.canonical_name(name): tensor for name, tensor in stored_state(model).items()}


def stored_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """state_dict() without the second names of tied tensors."""
    tied = _second_names(model)
    return {name: tensor for name, tensor in model.state_dict().items() if name not in tied}


def load_tensors(family: Family, model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Gives a model built on the meta device these tensors, by canonical name, without a copy; raises RuntimeError where one is missing or too many."""
    tied = _second_names(model)
    names = {family.canonical_name(name): name for name in model.state_dict() if name not in tied}
    if missing := set(names) ^ set(tensors):
        raise RuntimeError(f"tensors that a model of {family.model_type} and what is loaded into it do not share: {', '.join(sorted(missing))}")
    modules = dict(model.named_modules())
    for name, tensor in tensors.items():  # load_state_dict looks at all of a module's names for each of its children: seconds for thousands of experts
        place, _, last = names[name].rpartition(".")
        empty = getattr(modules[place], last)
        if empty.shape != tensor.shape:
            raise RuntimeError(f"tensor {names[name]} is of shape {list(empty.shape)} in a model of {family.model_type}; loaded was {list(tensor.shape)}")
        setattr(modules[place], last, nn.Parameter(tensor, requires_grad=empty.requires_grad) if isinstance(empty, nn.Parameter) else tensor)
    if tied:
        model.tie_weights()
    _make_buffers(model)


def _second_names(model: nn.Module) -> Iterable[str]:
    return getattr(model, "all_tied_weights_keys", None) or {}


def in_dtype(model: nn.Module, dtype: torch.dtype) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """A model on the meta device with its parameters in a dtype, and by name the tables that no checkpoint stores. Buffers keep their own, stored ones too."""
    buffers, stored = {}, {name: buffer.dtype for name, buffer in model.named_buffers()}
    model = model.to(dtype)
    for path, module in model.named_modules():
        for name, buffer in module.named_buffers(path, recurse=False):
            setattr(module, name.rpartition(".")[2], buffer.to(stored[name]))
    for prefix, parent, name, module in _unstored(model):
        exact = _made_anew(module)
        buffers |= {f"{prefix}{buffer_name}": buffer for buffer_name, buffer in exact.named_buffers()}
        setattr(parent, name, exact.to("meta"))
    return model, buffers


def _make_buffers(model: nn.Module) -> None:
    """What a checkpoint does not store, tables of rotary positions and the factor of Gemma's embeddings, follows from the configuration alone."""
    device = next(model.parameters()).device
    for _, parent, name, module in _unstored(model):
        setattr(parent, name, _made_anew(module).to(device))


def _unstored(model: nn.Module) -> list[tuple[str, nn.Module, str, nn.Module]]:
    """Prefix of names, parent, name and module of those with buffers on the meta device that are not stored."""
    return [
        (f"{path}.{name}." if path else f"{name}.", parent, name, module)
        for path, parent in model.named_modules() for name, module in parent.named_children()
        if any(buffer.is_meta for buffer_name, buffer in module.named_buffers(recurse=False) if buffer_name in module._non_persistent_buffers_set)
    ]  # fmt: skip


def _made_anew(module: nn.Module) -> nn.Module:
    with torch.device("cpu"):
        if not (scale := getattr(module, "scalar_embed_scale", None)):
            return type(module)(module.config)
        anew = copy(module)  # with the same weight
        anew._buffers = {"embed_scale": torch.tensor(scale)}
        return anew
