"""Training on the answers alone: loss and gradients of rows with marks, against whole logits of each document by itself, its marks put down beside it."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from distill.batches import PADDING, RowBatches, count_counted, mark_start, not_counted, split_padding
from distill.chunked_loss import LossRecipe
from distill.objectives import HiddenTerm, cached_loss, distillation_loss, head_of, next_token_objective
from distill.plan import Phase, TrainPlan
from distill.teacher_cache import TeacherCache, write_teacher_cache
from distill.top_k import top_k_of_hidden
from distill.trainer import HeldOut, train_phases

VOCABULARY, WIDTH = 65, 16
# Of every row its documents: at which of their tokens something is learned. One row in which nothing is, and counts from 1 to 15.
PACKED = (("0110", "000000100111"), ("0000000", "00000"), ("1", "00010"), ("111111111111111",))
ALONE = (("00000111",), ("0000000000000000",), ("0001",), ("1111111111111110",))
MIXED = LossRecipe(cross_entropy_weight=0.3)


@dataclass(frozen=True)
class Document:
    ids_T: torch.Tensor
    counted: list[bool]
    row: int
    first: int


def documents_of(flags) -> list[Document]:
    random, found = np.random.default_rng(5), []
    for row, documents in enumerate(flags):
        first = 0
        for text in documents:
            found.append(Document(torch.from_numpy(random.integers(VOCABULARY, size=len(text))), [flag == "1" for flag in text], row, first))
            first += len(text)
    return found


def rows_of(documents: list[Document]) -> np.ndarray:
    rows = np.full((documents[-1].row + 1, WIDTH), PADDING, dtype=np.int32)
    for document in documents:
        for place, (token, counted) in enumerate(zip(document.ids_T.tolist(), document.counted, strict=True), start=document.first):
            token = token if counted else not_counted(token)
            rows[document.row, place] = mark_start(token) if place == document.first > 0 else token
    return rows


def slow_loss(model, teacher_logs, documents: list[Document], recipe: LossRecipe, hidden=None) -> torch.Tensor:
    """`teacher_logs` gives a document's log-probabilities [T, V]; `hidden` is (weight, the teacher)."""
    total, number = torch.zeros(()), sum(sum(document.counted) for document in documents)
    for document in documents:
        own_TD = model.base_model(document.ids_T[None], use_cache=False).last_hidden_state[0]
        own_TV, teacher_TV = model.lm_head(own_TD).log_softmax(-1), teacher_logs(document)
        target_TD = hidden[1].base_model(document.ids_T[None], use_cache=False).last_hidden_state[0] if hidden else None
        for place, counted in enumerate(document.counted):
            if counted:
                total = total + (1 - recipe.cross_entropy_weight) * (teacher_TV[place].exp() * (teacher_TV[place] - own_TV[place])).sum()
                if place + 1 < len(document.ids_T):
                    total = total - recipe.cross_entropy_weight * own_TV[place, document.ids_T[place + 1]]
                if hidden:
                    total = total + hidden[0] * (own_TD[place] - target_TD[place]).square().mean()
    return total / number


def with_gradients(model, loss: torch.Tensor) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss.backward()
    return loss.item(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def check_same(found, expected) -> None:
    assert found[0] == pytest.approx(expected[0], rel=1e-6)
    flat, wanted = (torch.cat([gradients[name].flatten() for name in expected[1]]) for gradients in (found[1], expected[1]))
    assert (flat - wanted).norm() <= 1e-6 * wanted.norm() and (flat - wanted).abs().max() <= 1e-6 * wanted.abs().max()


@pytest.fixture(scope="module")
def teacher(worker):
    model = worker.build_llama(1, tied=False).eval()
    model.lm_head.weight.data.mul_(20)
    return model


def live_logs(teacher):
    return lambda document: teacher(document.ids_T[None], use_cache=False).logits[0].detach().log_softmax(-1)


def cache_of(folder, teacher, rows: np.ndarray) -> TeacherCache:
    @torch.no_grad()
    def top_k_of_rows(rows_BT):
        head = head_of(teacher, rows_BT)
        return top_k_of_hidden(head.hidden_BTD, head.weight_VD, VOCABULARY)

    write_teacher_cache(folder, rows, teacher="a", vocabulary=VOCABULARY, k=VOCABULARY, top_k_of_rows=top_k_of_rows)
    return TeacherCache(folder, rows_RT=rows)


def cached_logs(cache: TeacherCache):
    def logs(document: Document) -> torch.Tensor:
        kept = cache.rows([document.row])
        whole_TV = torch.zeros(WIDTH, VOCABULARY).scatter(-1, kept.ids_BTK[0], kept.log_probabilities_BTK[0])
        return whole_TV[document.first : document.first + len(document.counted)]

    return logs


@pytest.mark.parametrize("flags", [ALONE, PACKED], ids=["alone", "packed"])
@pytest.mark.parametrize(("recipe", "weight", "cached"), [(LossRecipe(), 0.0, False), (LossRecipe(), 0.0, True), (MIXED, 0.0, False), (MIXED, 0.0, True),
                                                         (MIXED, 0.5, False)], ids=["kl", "kl cached", "mixed", "mixed cached", "hidden"])  # fmt: skip
def test_loss_and_gradients_on_answers_are_those_of_whole_logits_at_their_positions(flags, recipe, weight, cached, worker, teacher, tmp_path):
    documents, student = documents_of(flags), worker.build_llama(2, tied=False)
    rows, hidden = rows_of(documents), HiddenTerm(weight, torch.arange(18)) if weight else None
    if cached:
        cache = cache_of(tmp_path / "cache", teacher, rows)
        ours, logs = cached_loss(cache, rows, recipe)(student, torch.arange(len(rows))), cached_logs(cache)
    else:
        ours, logs = distillation_loss(teacher, recipe, hidden=hidden)(student, torch.from_numpy(rows).long()), live_logs(teacher)
    found = with_gradients(student, ours["loss"])
    check_same(found, with_gradients(student, slow_loss(student, logs, documents, recipe, (weight, teacher) if weight else None)))
    everything = [replace(document, counted=[True] * len(document.counted)) for document in documents]
    assert found[0] != pytest.approx(slow_loss(student, logs, everything, recipe, (weight, teacher) if weight else None).item(), rel=1e-3)  # the control


@pytest.fixture
def gradients_seen() -> Iterator[list[list[torch.Tensor]]]:
    """What every optimiser step was given."""
    seen: list[list[torch.Tensor]] = []

    def see(optimizer, *_given) -> None:
        seen.append([parameter.grad.clone() for group in optimizer.param_groups for parameter in group["params"]])

    hook = register_optimizer_step_pre_hook(see)
    yield seen
    hook.remove()


def one_step(worker, teacher, rows, folder, gradients_seen, **more) -> tuple[float, float, dict]:
    """Loss and the gradient's norm of a step over all rows, one at a time, and what was watched. Clipping leaves its gradients as they are."""
    batches, records = RowBatches(rows, len(rows), seed=0), []
    plan = TrainPlan(**worker.PLAN | {"tokens": batches.tokens_per_step, "clip_norm": 1e9}, micro_batch=1)
    train_phases(worker.build_llama(2, tied=False), [Phase(batches, plan)], distillation_loss(teacher, MIXED), folder=folder, on_step=records.append, **more)
    norm = torch.cat([one.flatten() for step in gradients_seen[-1:] for one in step]).norm().item()
    return records[0].loss, norm, records[0].watched


def test_micro_batches_with_few_many_and_no_answers_add_up_to_the_mean_over_all(worker, teacher, tmp_path, gradients_seen):
    documents = documents_of(PACKED)
    rows, student = rows_of(documents), worker.build_llama(2, tied=False)
    loss, norm, _ = one_step(worker, teacher, rows, tmp_path / "one", gradients_seen)
    expected = with_gradients(student, slow_loss(student, live_logs(teacher), documents, MIXED))
    flat = torch.cat([value.flatten() for value in expected[1].values()])
    assert (loss, norm) == (pytest.approx(expected[0], rel=1e-6), pytest.approx(flat.norm().item(), rel=1e-6))
    by_real, *_ = one_step(worker, teacher, rows, tmp_path / "two", gradients_seen, counted_of=lambda some: int(split_padding(some)[1].sum()))
    assert by_real != pytest.approx(loss, rel=1e-2)  # the control: means weighed by real tokens


def test_a_batch_without_any_answer_has_loss_and_gradient_zero(worker, teacher, tmp_path, gradients_seen):
    rows = rows_of(documents_of([["0" * len(text) for text in row] for row in PACKED]))
    loss, norm, watched = one_step(worker, teacher, rows, tmp_path, gradients_seen)
    assert loss == norm == 0 and set(watched.values()) == {0.0}
    student = worker.build_llama(2, tied=False)
    for objective in (next_token_objective, lambda *given: distillation_loss(teacher, hidden=HiddenTerm(0.5, torch.arange(18)))(*given)["loss"]):
        value, gradients = with_gradients(student, objective(student, torch.from_numpy(rows).long()))
        assert value == 0 and all((gradient == 0).all() for gradient in gradients.values())


def test_held_out_answers_are_measured_by_their_own_number_and_none_are_refused(worker, teacher, tmp_path):
    documents = documents_of(PACKED)
    rows, records = torch.from_numpy(rows_of(documents)).long(), []
    batches, student = RowBatches(worker.padded_rows(), 4, seed=1), worker.build_llama(2, tied=False)
    plan = TrainPlan(**worker.PLAN | {"tokens": batches.tokens_per_step, "learning_rate": 0.0})
    train_phases(student, [Phase(batches, plan)], distillation_loss(teacher), folder=tmp_path, on_step=records.append,
                 held_out=HeldOut(batches=rows.split(1), every_steps=1))  # fmt: skip
    expected = slow_loss(student, live_logs(teacher), documents, LossRecipe()).item()
    assert records[0].watched["held_out_loss"] == pytest.approx(expected, rel=1e-6)
    assert count_counted(rows[1]) == 0
    with pytest.raises(ValueError, match="held-out rows: of their 1 none has a position at which something is learned"):
        HeldOut(batches=[rows[1:2]], every_steps=1)
