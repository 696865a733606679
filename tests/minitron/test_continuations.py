"""What models write after a prompt: greedy, one prompt at a time; shown on the page whatever it holds; absent, nothing is as it would not have been."""

import re

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from distill.batches import PADDING, mark_start, not_counted
from minitron.measures.continuations import BEGINNING_TOKENS, check_prompts, continuations, row_beginnings
from minitron.report.evaluation import continuations_text
from minitron.report.html import page_html
from minitron.settings.evaluate import EvaluateSettings
from minitron.settings.run import Settings
from minitron.text.own_tokenizer import train_tokenizer
from minitron.walk.table import stages

PROMPTS = ["the year", "a number and the year"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(iter(["the year a number and the year"] * 4), 300, folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def model(build_model):
    return build_model(vocab=300)


@torch.no_grad()
def likeliest(model, tokenizer, prompt: str, number: int) -> str:
    """The same token by token, without a cache."""
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    length = ids.shape[1]
    for _ in range(number):
        token = model(ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
        ids = torch.cat([ids, token], dim=1)
        if token.item() == tokenizer.eos_token_id:
            break
    return tokenizer.decode(ids[0, length:], skip_special_tokens=True)


def test_every_prompt_is_gone_on_with_by_the_likeliest_token(model, tokenizer):
    written = continuations(model, tokenizer, PROMPTS, new_tokens=12)
    assert written == [{"prompt": prompt, "text": likeliest(model, tokenizer, prompt, 12), "ended": False} for prompt in PROMPTS]
    assert written[0]["text"] != written[1]["text"]


def test_beginnings_of_rows_are_their_first_tokens_as_text_whatever_is_marked_in_them(tokenizer):
    """Blanks alone, and what was there before, are no prompt; a row that is not asked for, the control, is in none."""
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("the year a number and " * 9, "a number", "   ", "and the year")]
    rows = np.full((4, 100), PADDING, dtype=np.int32)
    for row, own in zip(rows, ids, strict=True):
        row[: len(own)] = own
    rows[1, 0], rows[1, 1] = mark_start(rows[1, 0]), not_counted(rows[1, 1])
    long, short = (tokenizer.decode(own[:BEGINNING_TOKENS]) for own in ids[:2])
    assert len(ids[0]) > BEGINNING_TOKENS and row_beginnings(tokenizer, np.stack([rows[0], rows[1], rows[2], rows[0]]), 4) == [long, short]
    assert row_beginnings(tokenizer, rows, 0) == [] and "and the year" not in row_beginnings(tokenizer, rows[:3], 3)


def test_a_prompt_longer_than_the_positions_is_refused(tokenizer):
    wanted = EvaluateSettings(prompts=PROMPTS, new_tokens=12)
    length = len(tokenizer(PROMPTS[1])["input_ids"])
    check_prompts(tokenizer, wanted, length + 12)
    said = rf"evaluate.prompts\[1\] has {length} tokens and evaluate.new_tokens is 12; together they must be at most {length + 11}"
    with pytest.raises(ValueError, match=said):
        check_prompts(tokenizer, wanted, length + 11)
    with pytest.raises(ValueError, match="evaluate.held_out_prompts they must be at most 35"):
        check_prompts(tokenizer, EvaluateSettings(held_out_prompts=1, new_tokens=12), 35)


@pytest.mark.parametrize(("given", "said"), [({"prompts": ["a", " "]}, "evaluate.prompts has one without text"), ({"prompts": ["a", "a"]}, "names 'a' twice"),
                                             ({"prompts": ["a"], "new_tokens": 0}, "evaluate.new_tokens is 0; it must be at least 1")])  # fmt: skip
def test_prompts_that_cannot_be_are_refused(given, said):
    with pytest.raises(ValueError, match=said):
        EvaluateSettings(**given)


def test_without_prompts_the_key_is_what_it_was():
    what = stages()["evaluate"].what
    assert list(what(Settings())) == ["samples", "speed", "needle", "tasks"]
    given = ({}, {"new_tokens": 7}, {"prompts": ["a"]}, {"prompts": ["a"], "new_tokens": 7}, {"held_out_prompts": 2})
    keys = [what(Settings(evaluate=EvaluateSettings(**one))) for one in given]
    assert keys[0] == keys[1] and keys[2] not in (keys[0], keys[3]) and keys[4] not in keys[:4]


TEXT = "<script>alert(1)</script>\n# *no* heading | no cell `no code` &lt;b&gt; [no](link)\\"


def test_the_page_shows_any_text_as_it_is():
    """The control: unescaped, the same text would be a heading, emphasis, code and a link."""
    summary = {"models": {name: {"evaluation": {"loss_nats_per_token": 1.0, "continuations": [{"prompt": "<b>&", "text": text}]}}
                          for name, text in (("teacher", TEXT), ("student", None))}}  # fmt: skip
    markdown = continuations_text(summary)
    html = page_html(markdown, "page").partition("<body>")[2]
    assert not re.search(r"<(script|b|em|code|h1|a|table)\b", html) and html.count("<li>") == 2
    shown = TEXT.replace("\n", " ⏎ ").replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    assert f"<strong>teacher</strong>: “{shown}”" in html and "“&lt;b&gt;&amp;”" in html and "<strong>student</strong>: cannot decode" in html
    assert re.search(r"<(em|code|h1|a)\b", page_html(TEXT, "page").partition("<body>")[2])


def test_without_prompts_the_page_says_how_to_have_some_once_there_is_an_evaluation():
    assert "evaluate.prompts=" in continuations_text({"models": {"teacher": {"evaluation": {"loss_nats_per_token": 1.0}}}})
    assert continuations_text({"models": {"teacher": {"evaluation": None}}}) == ""
