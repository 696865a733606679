"""A whole model written in its stream's principal directions, where it is: a student of any hidden size is then a prefix of it.

The norms' weights go into what reads the stream and the stream into the basis Q (rotation.py); to the full width that is the same
function. Only a norm's mean square is another for the first K directions y of a residual x. So every norm of a student has one
number s, the least squares fit of s·n(y) to the first K of n(x): with E_K the energy (sum of squares) of the first K directions
of a token and d_K = √(E_K/K + ε) its root mean square,

    s_K = Σ E_K/(d_D·d_K) / Σ E_K/d_K²     over tokens, at every norm,

which one walk gives for all K at once; s_D is 1. (The compensated cut fits s the same, from the student's own residuals.)

A head that is the table of embeddings E cannot take the last norm's weight w in: the table becomes E·Q, the head would be E·diag(w)·Q. So a tied model is
given a head of its own first; it is there to rank candidates by, and what is written stays tied (refits/tied_head.py).
Letters: N tokens of a batch, D hidden of the model, K hidden of a student.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from memory_budget.architecture import Architecture
from minitron.checkpoints.placement import WholeModel
from minitron.families.base import Family
from minitron.families.state import model_tensors
from minitron.families.table import row_of, split_layer
from minitron.pruning.basis import Basis
from minitron.pruning.directions import principal_basis, stream_covariance
from minitron.pruning.rotation import NORM, READ, check_rms, check_turns, factors, in_basis, norm_inputs, stream_role


def with_own_head(architecture: Architecture) -> Architecture:
    """The architecture that a model has once it is rotated."""
    return replace(architecture, tied_embeddings=False)


@torch.no_grad()
def rotate_model(family: Family, model: nn.Module, architecture: Architecture, batches: Sequence[torch.Tensor], *, config: dict,
                 basis_DD: torch.Tensor | None = None) -> dict[str, torch.Tensor]:  # fmt: skip
    """Rotates the model's weights in place; gives for every norm of the stream, by canonical name, its number for each hidden size
    1 … D, [D], as weights are stored.

    `batches` are calibration rows [B, T], padding included. The basis is that of the principal directions unless one is given. Weights keep their
    dtype, so in bf16 they are rounded anew; a tied head becomes a matrix of its own, and the architecture `with_own_head`. Raises ValueError for norms that
    are no RMSNorm, for a norm behind a mixer, and for residuals that are not finite.
    """
    check_turns(architecture)
    if architecture.tied_embeddings:
        untie(model)
        architecture = with_own_head(architecture)
    base, epsilon = WholeModel(family, model, architecture), check_rms(family, config)
    if basis_DD is None:
        basis_DD = principal_basis(stream_covariance(base, batches, epsilon))
    basis = Basis(basis_DD)
    state = model_tensors(family, model)
    roles = {name: stream_role(family, row_of(family, architecture, name)) for name in state}
    norms = {split_layer(name)[0]: name for name, role in roles.items() if role == NORM}
    for name, tensor in state.items():
        weight_D = factors(family, state[norms[split_layer(name)[0]]]) if roles[name] == READ else None
        tensor.copy_(in_basis(tensor, roles[name], basis, lambda rows, weight_D=weight_D: basis.project(rows, weight_D), tensor.dtype))
    for name in norms.values():
        state[name].fill_(1 - family.norm_offset)
    return {norms[layer]: scale_D - family.norm_offset for layer, scale_D in _scales(base, batches, epsilon).items()}


def untie(model: nn.Module) -> None:
    """Makes a copy of the table of embeddings the model's head, where it was the table itself."""
    model.config.tie_word_embeddings = False
    model.all_tied_weights_keys = {}
    model.get_output_embeddings().weight = nn.Parameter(model.get_input_embeddings().weight.detach().clone(), requires_grad=False)


def _scales(base: WholeModel, batches: Sequence[torch.Tensor], epsilon: float) -> dict[int | None, torch.Tensor]:
    """s_K of the file's top for K = 1 … D, float32 [D], by the norm's layer (None: the last), from a model that is rotated already."""
    alike_D, square_D = defaultdict(float), defaultdict(float)
    sizes_D = torch.arange(1, base.architecture.hidden + 1, device=base.device)
    for layer, residual_ND in norm_inputs(base, batches):
        energy_ND = residual_ND.double().square().cumsum(1)
        root_ND = (energy_ND / sizes_D + epsilon).sqrt()
        alike_D[layer] += (energy_ND / (root_ND[:, -1:] * root_ND)).sum(0)
        square_D[layer] += (energy_ND / root_ND.square()).sum(0)
    return {layer: (alike_D[layer] / square_D[layer]).float() for layer in alike_D}
