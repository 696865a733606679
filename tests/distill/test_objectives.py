"""What a student is trained for: the chunked loss of two models, against their whole logits."""

from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from distill import chunk_sizes
from distill.batches import RowBatches, split_padding
from distill.chunked_loss import LossRecipe
from distill.losses import forward_kl, next_token_loss
from distill.objectives import HiddenTerm, distillation_loss
from distill.plan import Phase, TrainPlan
from distill.trainer import train_phases


@pytest.fixture(scope="module")
def rows_BT(worker) -> torch.Tensor:
    return torch.from_numpy(worker.padded_rows()[:4]).long()


def whole_logits_loss(teacher, temperature: float = 1.0):
    def loss(model, rows_BT):
        ids_BT, mask_BT = split_padding(rows_BT)
        student_BTV, teacher_BTV = (one(ids_BT, use_cache=False).logits for one in (model, teacher))
        agreement = (student_BTV.argmax(-1) == teacher_BTV.argmax(-1))[mask_BT].float().mean()
        kl = forward_kl(student_BTV, teacher_BTV.detach(), temperature=temperature, mask_BT=mask_BT)
        return {"loss": kl, "cross_entropy": next_token_loss(student_BTV, rows_BT), "top1_agreement": agreement}

    return loss


def measured(loss, model, rows_BT) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """The means and every parameter's gradient of the loss."""
    model.zero_grad()
    means = loss(model, rows_BT)
    means["loss"].backward()
    return {name: value.item() for name, value in means.items()}, {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_means_and_gradients_are_those_of_whole_logits(worker, rows_BT):
    teacher, student = worker.build_teacher(), worker.build_model(2)
    means, gradients = measured(distillation_loss(teacher), student, rows_BT)
    expected, expected_gradients = measured(whole_logits_loss(teacher), student, rows_BT)
    assert means == pytest.approx(expected, rel=1e-6)
    assert all(torch.allclose(gradients[name], value, rtol=1e-5, atol=1e-6) for name, value in expected_gradients.items())
    otherwise, _ = measured(whole_logits_loss(teacher, 2.0), student, rows_BT)
    assert otherwise["loss"] != pytest.approx(means["loss"], rel=1e-3)  # the control


class LargestOver(TorchDispatchMode):
    """The most rows of any tensor that is one vocabulary wide."""

    def __init__(self, vocabulary: int):
        super().__init__()
        self.vocabulary, self.rows = vocabulary, 0

    def __torch_dispatch__(self, function, types, arguments=(), settings=None):
        made = function(*arguments, **(settings or {}))
        for tensor in made if isinstance(made, tuple | list) else (made,):
            if isinstance(tensor, torch.Tensor) and tensor.shape[-1:] == (self.vocabulary,):
                self.rows = max(self.rows, tensor.numel() // self.vocabulary)
        return made


def test_logits_exist_for_a_chunk_of_tokens_at_a_time(worker, rows_BT, monkeypatch):
    teacher, student = worker.build_teacher(), worker.build_model(2)
    vocabulary = 71  # nothing else in the models is that wide
    for model in (teacher, student):
        model.resize_token_embeddings(vocabulary)
    monkeypatch.setattr(chunk_sizes, "CHUNK_VALUES", 7 * vocabulary)
    with LargestOver(vocabulary) as ours:
        measured(distillation_loss(teacher), student, rows_BT)
    with LargestOver(vocabulary) as whole:
        measured(whole_logits_loss(teacher), student, rows_BT)
    assert ours.rows == 32 < rows_BT.numel() == whole.rows  # 32: the teacher's output matrix, transposed; a chunk is 7 tokens


def test_under_autocast_the_hidden_states_are_rounded_and_the_sums_are_not(worker, rows_BT):
    teacher, student = worker.build_teacher(), worker.build_model(2)
    loss = distillation_loss(teacher)
    exact, _ = measured(loss, student, rows_BT)
    with torch.autocast("cpu", torch.bfloat16):
        means = loss(student, rows_BT)
    assert means["loss"].dtype == torch.float32
    assert means["loss"].item() == pytest.approx(exact["loss"], rel=3e-2) and means["loss"].item() != exact["loss"]


def test_a_mix_with_cross_entropy_adds_up_over_micro_batches(worker, tmp_path):
    """Rows of different lengths: a mean of means would be another loss."""
    recipe = LossRecipe("jsd", beta=0.3, cross_entropy_weight=0.4)
    curves = []
    for micro_batch in (None, 1):
        records, folder = [], tmp_path / str(micro_batch)
        plan = replace(TrainPlan(**worker.PLAN), micro_batch=micro_batch, tokens=4 * 54)
        phases = [Phase(RowBatches(worker.padded_rows(), 4, seed=1), plan)]
        train_phases(worker.build_model(2), phases, distillation_loss(worker.build_teacher(), recipe), folder=folder, on_step=records.append)
        curves.append([(record.loss, record.gradient_norm) for record in records])
    assert curves[1] == [pytest.approx(step, rel=1e-5) for step in curves[0]]


def test_what_is_no_plain_divergence_is_watched_beside_the_loss(worker, rows_BT):
    teacher, student = worker.build_teacher(), worker.build_model(2)
    plain, mixed = (measured(distillation_loss(teacher, recipe), student, rows_BT)[0] for recipe in (LossRecipe(), LossRecipe(cross_entropy_weight=0.5)))
    assert "divergence" not in plain and mixed["divergence"] == pytest.approx(plain["loss"], rel=1e-6)
    assert mixed["loss"] != pytest.approx(plain["loss"], rel=1e-3)


def test_a_hidden_state_term_adds_its_mean_square_and_reaches_every_layer(worker, rows_BT):
    teacher, student, kept = worker.build_teacher(), worker.build_model(2), torch.arange(0, 32, 2)
    plain, gradients = measured(distillation_loss(teacher), student, rows_BT)
    means, moved = measured(distillation_loss(teacher, hidden=HiddenTerm(0.5, kept)), student, rows_BT)
    ids, mask = split_padding(rows_BT)
    own, target = (model.base_model(ids, use_cache=False).last_hidden_state[mask] for model in (student, teacher))
    expected = (own - target[:, kept]).square().mean().item()
    assert means["hidden_state"] == pytest.approx(expected, rel=1e-5) and means["loss"] == pytest.approx(plain["loss"] + 0.5 * expected, rel=1e-5)
    assert not torch.allclose(moved["model.layers.0.norm.weight"], gradients["model.layers.0.norm.weight"], rtol=1e-2)
    other, _ = measured(distillation_loss(teacher, hidden=HiddenTerm(0.5, kept + 1)), student, rows_BT)  # the control: channels that it was not cut from
    assert other["hidden_state"] != pytest.approx(expected, rel=1e-2)


def test_another_vocabulary_is_refused(worker, rows_BT):
    teacher, student = worker.build_teacher(), worker.build_model(2)
    student.resize_token_embeddings(66)
    with pytest.raises(ValueError, match="the student's vocabulary has 66 tokens, the teacher's 65; they must be the same"):
        distillation_loss(teacher)(student, rows_BT)
