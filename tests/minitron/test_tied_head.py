"""A head that is the table of embeddings: a student's last norm, and checkpoints that store it a second time."""

import pytest
import torch
from safetensors.torch import save_file

from memory_budget.hf_config import architecture_from_config, read_config
from minitron.checkpoints.files import Checkpoint
from minitron.checkpoints.given import given_checkpoint
from minitron.families.known import family_of
from minitron.families.state import model_tensors
from minitron.families.table import names_by_canonical
from minitron.pruning.basis import Basis
from minitron.pruning.refits.tied_head import SMOOTHING, TiedHead, aligned

VOCAB, HIDDEN, KEPT, TOKENS = 30, 8, 5, 200


def numbers(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(scope="module")
def basis() -> Basis:
    return Basis(torch.linalg.qr(numbers(HIDDEN, KEPT, seed=0))[0].float())


@pytest.fixture(scope="module")
def weight_D() -> torch.Tensor:
    return 1.8 + 0.5 * numbers(HIDDEN, seed=1)


def fitted(weight_D, basis, table_VD, wanted_ND, own_NK, counts_V, ridge=0.0) -> torch.Tensor:
    fit = TiedHead(weight_D, basis)
    for some, other in zip(wanted_ND.split(70), own_NK.split(70), strict=True):
        fit.add(some, other)
    for rows, counts in zip(table_VD.split(11), counts_V.split(11), strict=True):
        fit.add_rows(rows, counts)
    return fit.solve(ridge).double()


def test_the_weight_is_the_least_squares_fit_of_centred_logits(basis, weight_D):
    """Against one dense system over all tokens and the whole vocabulary; an unweighted metric, the control, gives other numbers."""
    table_VD, wanted_ND, own_NK = numbers(VOCAB, HIDDEN, seed=2), numbers(TOKENS, HIDDEN, seed=3), numbers(TOKENS, KEPT, seed=4)
    counts_V = torch.arange(VOCAB) % 7
    found = fitted(weight_D, basis, table_VD, wanted_ND, own_NK, counts_V)
    share_V = (counts_V + SMOOTHING) / (counts_V + SMOOTHING).sum()

    def dense(share_V) -> torch.Tensor:
        student_VK = table_VD @ basis.matrix_DK.double()
        logits_NV, parts_NVK = wanted_ND * weight_D @ table_VD.T, own_NK[:, None] * student_VK
        logits_NV, parts_NVK = logits_NV - (logits_NV @ share_V)[:, None], parts_NVK - torch.einsum("nvk,v->nk", parts_NVK, share_V)[:, None]
        scale_V = share_V.sqrt()
        return torch.linalg.lstsq((parts_NVK * scale_V[:, None]).flatten(0, 1), (logits_NV * scale_V).flatten()[:, None]).solution[:, 0]

    assert torch.allclose(found, dense(share_V.double()), rtol=1e-4)
    assert not torch.allclose(found, dense(torch.full((VOCAB,), 1 / VOCAB, dtype=torch.float64)), rtol=1e-2)


def test_a_strong_ridge_gives_the_directions_own_weights(basis, weight_D):
    table_VD, wanted_ND, own_NK = numbers(VOCAB, HIDDEN, seed=2), numbers(TOKENS, HIDDEN, seed=3), numbers(TOKENS, KEPT, seed=4)
    found = fitted(weight_D, basis, table_VD, wanted_ND, own_NK, torch.ones(VOCAB), ridge=1e9)
    assert torch.allclose(found, (basis.matrix_DK.double().square() * weight_D[:, None]).sum(0), rtol=1e-4)


def test_the_aligned_basis_spans_the_same_and_leaves_the_weight_its_diagonal(basis, weight_D):
    turned_DK, own_DK = aligned(basis, weight_D).matrix_DK.double(), basis.matrix_DK.double()
    assert torch.allclose(turned_DK @ turned_DK.T, own_DK @ own_DK.T, atol=1e-6)
    beside = [one_DK.T @ (weight_D[:, None] * one_DK) for one_DK in (turned_DK, own_DK)]
    largest = [(matrix - torch.diag(matrix.diagonal())).abs().max().item() for matrix in beside]
    assert largest[0] < 1e-6 < 0.05 < largest[1]


def test_in_the_aligned_basis_directions_that_the_weight_leaves_together_lose_nothing(weight_D):
    """Kept directions that diag(w) maps onto themselves: the logits are the base's, which in another basis of them they are not."""
    kept_DK = torch.eye(HIDDEN, dtype=torch.float64)[:, :KEPT]
    mixed = Basis((kept_DK @ torch.linalg.qr(numbers(KEPT, KEPT, seed=5))[0]).float())
    table_VD, stream_NK = numbers(VOCAB, HIDDEN, seed=2), numbers(TOKENS, KEPT, seed=6)
    wanted_ND = stream_NK @ kept_DK.T
    losses = []
    for basis in (aligned(mixed, weight_D), mixed):
        basis_DK = basis.matrix_DK.double()
        own_NK = wanted_ND @ basis_DK
        logits_NV = (own_NK * fitted(weight_D, basis, table_VD, wanted_ND, own_NK, torch.ones(VOCAB))) @ (table_VD @ basis_DK).T
        losses.append((logits_NV - wanted_ND * weight_D @ table_VD.T).abs().max().item())
    assert losses[0] < 1e-4 < 0.1 < losses[1]


# A checkpoint that stores the head a second time.


@pytest.fixture
def tied(build_tiny, tmp_path, write_checkpoint):
    """A tied checkpoint, and what stores a second tensor in it."""
    one = build_tiny("llama tied", num_hidden_layers=1)
    folder = write_checkpoint(tmp_path / "tied", one.model, one.config)

    def add_head(weight: torch.Tensor):
        state = {one.family.file_name(name): tensor for name, tensor in model_tensors(one.family, one.model).items()}
        save_file(state | {"lm_head.weight": weight}, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return folder, one.model.model.embed_tokens.weight.detach().clone(), add_head


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_head_stored_a_second_time_is_none_of_the_models_parameters(dtype, tied):
    folder, table, add_head = tied
    before = given_checkpoint(folder, "it")
    assert given_checkpoint(add_head(table.to(dtype)), "it") == before
    family, architecture = family_of(read_config(folder)), architecture_from_config(read_config(folder))
    assert "lm_head.weight" not in names_by_canonical(family, architecture, Checkpoint(folder).entries)


OTHER_HEADS = {"one number": lambda table: torch.cat([table[:-1], table[-1:] + (torch.arange(48) == 47)]), "fewer rows": lambda table: table[:90].clone()}


@pytest.mark.parametrize("change", OTHER_HEADS.values(), ids=OTHER_HEADS)
def test_a_head_of_other_values_in_a_tied_checkpoint_is_refused_by_both_names(change, tied):
    _, table, add_head = tied
    with pytest.raises(ValueError, match=r"tie_word_embeddings is true in .*, but lm_head.weight holds other values than model.embed_tokens.weight"):
        given_checkpoint(add_head(change(table)), "it")
