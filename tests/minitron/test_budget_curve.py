"""Accuracy against the thinking budget: the stages in miniature at the door, and the measurement against decoding by hand."""

import json
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from memory_budget.hf_config import read_config
from minitron.families.known import family_of
from minitron.generation.generate import Tags
from minitron.measures.budget_curve import answer_of, budget_curve
from minitron.settings.reasoning import ArithmeticSettings
from minitron.sources.arithmetic import held_out_problems

ARITHMETIC = ArithmeticSettings(problems=1000, most_operands=3)
MINIATURE = (
    "device=cpu", "experiment=tiny_reasoning", "data.arithmetic.problems=1000", "data.arithmetic.most_operands=3", "data.sequence_length=16",
    "teacher.tiny={pattern: 'M*-', hidden: 32, ffn: 64, num_attention_heads: 2, num_key_value_heads: 1, mamba_num_heads: 4}",
    "teacher.train.tokens=20000", "distill.train.tokens=4000", "scoring.samples=16", "scoring.layer_samples=8", "search.fixed={hidden: 24, ffn: 64}",
    "evaluate.samples=8", "reasoning.problems=16", "reasoning.budgets=[0, 1, 2]",
)  # fmt: skip


@pytest.fixture(scope="module")
def reasoned(door, tmp_path_factory):
    """A finished walk of the experiment in miniature: its folder."""
    folder = tmp_path_factory.mktemp("reasoned")
    finished = door(folder, *MINIATURE)
    assert finished.returncode == 0, finished.stderr
    return folder / "runs"


@pytest.fixture(scope="module")
def result_of(reasoned):
    return lambda stage: next((reasoned / "store" / stage).glob("*/done.json")).parent


@pytest.fixture(scope="module")
def taught(result_of):
    """The miniature's teacher, which writes the format but knows few answers, and its tokenizer."""
    folder = result_of("teacher") / "checkpoint"
    return family_of(read_config(folder)).load(folder), AutoTokenizer.from_pretrained(folder)


def test_summary_and_page_have_the_three_curves(reasoned):
    summary = json.loads((reasoned / "tiny_reasoning" / "summary.json").read_text())
    assert set(summary["reasoning"]["curves"]) == {"teacher", "student", "student_whole"} and summary["reasoning"]["problems"] == 16
    for points in summary["reasoning"]["curves"].values():
        assert [point["budget"] for point in points] == [0, 1, 2]
        assert all(point["most_reasoning_tokens"] <= point["budget"] for point in points)
    page = (reasoned / "tiny_reasoning" / "report.md").read_text()
    assert "![Right answers by the tokens of reasoning allowed, then closed](thinking_budget.png)" in page
    assert "| student of whole traces alone |" in page and (reasoned / "tiny_reasoning" / "thinking_budget.png").exists()


@pytest.mark.parametrize(("settings", "message"), [
    (("reasoning.problems=5000",), "reasoning.problems is 5000, but of data.arithmetic.problems 1000 only "),
    (("stage=reasoning", "data.arithmetic.problems=0"), "reasoning.problems is 16, but of data.arithmetic.problems 0 only 0 are held out"),
    (("distill.cached=true",), "distill.cached is true, but a student is to learn from whole traces too"),
])  # fmt: skip
def test_what_cannot_be_measured_is_refused_before_any_work(settings, message, door, tmp_path):
    finished = door(tmp_path, *MINIATURE, *settings)
    assert finished.returncode == 2 and finished.stderr.startswith(f"error: {message}") and not (tmp_path / "runs").exists()


def test_the_student_to_compare_with_sees_no_cut_trace(result_of):
    tokenizer = AutoTokenizer.from_pretrained(result_of("data") / "tokenizer")

    def has_cut_traces(file) -> bool:
        texts = tokenizer.batch_decode([row[row >= 0] for row in np.load(file)])
        return any(text.partition("=")[0].count("-") > text.partition("<think>")[2].partition("</think>")[0].count(" ") for text in texts)

    (whole,) = result_of("whole_rows").glob("*.npy")
    assert has_cut_traces(result_of("data") / "train.npy") and not has_cut_traces(whole)


@torch.no_grad()
def by_hand(model, tokenizer, question: str, budget: int, new_tokens: int) -> tuple[str, int]:
    """Greedy text without a cache or a batch, the closing tag put in by hand; and how many tokens of reasoning it has."""
    ids, closing, reasoning, closed = tokenizer(question + "<think>")["input_ids"], tokenizer.convert_tokens_to_ids("</think>"), 0, False
    before = len(ids)
    for _ in range(new_tokens):
        likeliest = model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax().item()
        token = closing if not closed and reasoning == budget else likeliest
        closed = closed or token == closing
        reasoning += not closed
        ids.append(token)
        if token == tokenizer.eos_token_id:
            break
    return tokenizer.decode(ids[before:]), reasoning


@dataclass(frozen=True)
class Asked:
    """A question with whatever answer counts as right."""

    question: str
    answer: str | None


@pytest.mark.parametrize("budget", [0, 1, 2])
def test_the_curve_is_what_decoding_by_hand_gives(taught, budget):
    model, tokenizer = taught
    questions = [problem.question for problem in held_out_problems(ARITHMETIC)[:12]]
    texts, reasoning = zip(*(by_hand(model, tokenizer, question, budget, 8) for question in questions), strict=True)
    answers = [text.partition("</think>")[2].removesuffix("<|endoftext|>").strip() for text in texts]
    assert all(text.endswith("<|endoftext|>") for text in texts) and all(answers)
    asked = [Asked(question, answer if number % 3 else f"not {answer}") for number, (question, answer) in enumerate(zip(questions, answers, strict=True))]
    (point,) = budget_curve(model, tokenizer, asked, [budget], batch=5, new_tokens=8)
    assert (point.accuracy, point.mean_reasoning_tokens, point.most_reasoning_tokens) == (8 / 12, sum(reasoning) / 12, max(reasoning))
    assert point.standard_error == pytest.approx((8 / 12 * 4 / 12 / 12) ** 0.5)


def test_an_answer_follows_the_closing_tag_of_a_text_that_ended():
    assert answer_of(" 2</think> 4", Tags()) == "4" and answer_of(" 2</think> 4 4", Tags()) == "4 4" and answer_of(" 2 4", Tags()) is None


def test_an_answer_ends_at_any_id_that_ends_a_text(taught):
    """The control: without the id it goes on to the end of text, and is another."""
    model, tokenizer = taught
    problem = held_out_problems(ARITHMETIC)[0]
    text, _ = by_hand(model, tokenizer, problem.question, 0, 8)
    answer = text.partition("</think>")[2].removesuffix("<|endoftext|>").strip()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    asked, before = [Asked(problem.question, answer)], model.generation_config.eos_token_id
    assert budget_curve(model, tokenizer, asked, [0], batch=1, new_tokens=8)[0].accuracy == 1
    model.generation_config.eos_token_id = [before, ids[ids.index(tokenizer.convert_tokens_to_ids("</think>")) + 1]]  # the answer's own first token
    try:
        assert budget_curve(model, tokenizer, asked, [0], batch=1, new_tokens=8)[0].accuracy == 0
        assert budget_curve(model, tokenizer, [Asked(problem.question, "")], [0], batch=1, new_tokens=8)[0].accuracy == 1
    finally:
        model.generation_config.eos_token_id = before
