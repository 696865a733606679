"""Generation under a thinking budget: on real models, in batches, and at the door."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lm_eval.api.instance import Instance
from transformers import AutoTokenizer, LogitsProcessorList

from minitron.families.nemotron_h import FAMILY
from minitron.generation.ends import end_ids
from minitron.generation.generate import generate
from minitron.generation.prompts import write_prompt
from minitron.generation.thinking import ThinkingBudget, count_reasoning
from minitron.measures.continuations import continuations
from minitron.measures.tasks import language_model
from minitron.text.own_tokenizer import train_tokenizer
from minitron.walk.store import write_json

OPEN = [5, 6]
LENGTH = 60


@pytest.fixture(scope="module")
def prompts(token_ids):
    """Two prompts that end in the opening tag, the shorter one padded on its left."""
    ids = token_ids(rows=2, tokens=12, seed=3)
    ids[:, -2:] = torch.tensor(OPEN)
    mask = torch.ones_like(ids)
    ids[1, :4], mask[1, :4] = 0, 0
    return ids, mask


@pytest.fixture(scope="module")
def go_on(teacher, prompts):
    """Greedy new tokens of both prompts, unbudgeted or under a budget; made once for what is asked again."""
    made = {}

    def run(budget: int | None = None, close: list[int] | None = None, new_tokens: int = LENGTH) -> list[list[int]]:
        asked = (budget, tuple(close or ()), new_tokens)
        if asked not in made:
            made[asked] = generated(budget, close, new_tokens)
        return made[asked]

    def generated(budget: int | None, close: list[int] | None, new_tokens: int) -> list[list[int]]:
        ids, mask = prompts
        processors = LogitsProcessorList([] if budget is None else [ThinkingBudget(budget, OPEN, close, ids.shape[1])])
        made = teacher.generate(ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False, pad_token_id=0, eos_token_id=None,
                                logits_processor=processors)  # fmt: skip
        return made[:, ids.shape[1] :].tolist()

    return run


@pytest.fixture(scope="module", params=[1, 3], ids=["a tag of one token", "a tag of three"])
def close(request, go_on) -> list[int]:
    """A closing tag that the first row's text comes to by itself after some tokens, and neither text holds before."""
    own = go_on()[0]
    return next(own[start : start + request.param] for start in range(8, LENGTH - request.param) if _first(own, own[start : start + request.param]) == start)


def _first(ids: list[int], wanted: list[int]) -> int:
    return next((start for start in range(len(ids)) if ids[start : start + len(wanted)] == wanted), len(ids))


@pytest.mark.parametrize("budget", [0, 1, 32, 512])
def test_no_row_reasons_longer_than_its_budget(budget, go_on, close):
    for row, free in zip(go_on(budget, close, new_tokens=LENGTH), go_on(), strict=True):
        reasoning = _first(row, close)
        assert reasoning <= budget and count_reasoning([*OPEN, *row], OPEN, close) == min(reasoning, len(row))
        if _first(free, close) <= budget:  # it stops by itself: nothing may change
            assert row == free
        elif budget < LENGTH:
            assert row[:reasoning] == free[:reasoning] and row[reasoning : reasoning + len(close)] == close


def test_a_budget_of_512_is_held_where_the_text_is_longer(go_on):
    free = go_on(new_tokens=520)
    never = next([token, token, token] for token in range(97) if all(_first(row, [token, token, token]) == len(row) for row in free))
    for row, unbudgeted in zip(go_on(512, never, new_tokens=520), free, strict=True):
        assert row[:515] == [*unbudgeted[:512], *never] and len(row) == 520


def test_unbudgeted_text_does_reason_longer(go_on, close):
    """The control: of the two rows one stops by itself within 32 tokens or goes on longer than 1."""
    lengths = [_first(row, close) for row in go_on()]
    assert 1 < lengths[0] < LENGTH and max(lengths) > 1


def test_a_text_without_reasoning_is_left_alone(teacher, prompts, go_on):
    ids, mask = prompts
    free = go_on()
    used = ThinkingBudget(0, [96, 95, 94], [1], ids.shape[1])
    made = teacher.generate(ids, attention_mask=mask, max_new_tokens=LENGTH, do_sample=False, pad_token_id=0, eos_token_id=None,
                            logits_processor=LogitsProcessorList([used]))  # fmt: skip
    assert made[:, ids.shape[1] :].tolist() == free


def test_a_tag_begun_at_the_end_of_the_budget_is_finished_not_begun_again():
    processor, scores = ThinkingBudget(3, [5], [7, 8], prompt_tokens=1), torch.zeros(1, 10)
    assert processor(torch.tensor([[5, 1, 2, 7]]), scores.clone()).argmax().item() == 8
    assert processor(torch.tensor([[5, 1, 2, 3]]), scores.clone()).argmax().item() == 7
    assert torch.equal(processor(torch.tensor([[5, 1, 7]]), scores.clone()), scores), "two tokens: the budget is not spent"
    assert torch.equal(processor(torch.tensor([[5, 1, 7, 8, 1, 1, 1]]), scores.clone()), scores), "an answer may be of any length"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(iter(["one two three four " * 20]), 300, folder)
    return AutoTokenizer.from_pretrained(folder)


def test_the_switch_goes_through_the_chat_template(tokenizer):
    assert write_prompt(tokenizer, "Hi", None) == "user: Hi\nassistant: "
    assert write_prompt(tokenizer, "Hi", True) == "user: Hi\nassistant: <think>"
    assert write_prompt(tokenizer, "Hi", False) == "user: Hi\nassistant: <think></think>"
    tokenizer.chat_template = "{% for m in messages %}{% if '/no_think' in m.content %}off {% else %}{{ m.content }}{% endif %}{% endfor %}"
    assert (write_prompt(tokenizer, "Hi", False), write_prompt(tokenizer, "Hi", True)) == ("off Hi", "/thinkHi")
    tokenizer.chat_template = "{{ messages[0].content }}"
    with pytest.raises(ValueError, match="thinking is on, but the chat template has no switch"):
        write_prompt(tokenizer, "Hi", True)
    tokenizer.chat_template = None
    assert write_prompt(tokenizer, "Hi", None) == "Hi"
    with pytest.raises(ValueError, match="thinking is off, but the tokenizer has no chat template"):
        write_prompt(tokenizer, "Hi", False)


@pytest.fixture(scope="module")
def chatting(build_model):
    return build_model(vocab=300)


def test_prompts_of_a_batch_get_the_text_that_each_gets_alone(chatting, tokenizer):
    prompts = ["one <think>", "three four two one <think>"]
    together = generate(chatting, tokenizer, prompts, new_tokens=24, thinking_budget=5)
    assert together == [generate(chatting, tokenizer, [prompt], new_tokens=24, thinking_budget=5)[0] for prompt in prompts]
    closing = tokenizer.convert_tokens_to_ids("</think>")
    assert all(row.index(closing) == 5 for row in together)


TURN = 70  # a byte, which only a configuration can call an end of text


@pytest.fixture(scope="module")
def insists(build_model, chat_tokenizer):
    """A model whose likeliest token is TURN whatever it reads: a channel that outweighs all others holds a constant, and TURN alone looks at it."""
    model = build_model(vocab=len(chat_tokenizer("llama3")))
    with torch.no_grad():
        model.model.embeddings.weight[:, 0] = 1000
        model.model.norm_f.weight[0] = 1
        model.lm_head.weight[:, 0] = 0
        model.lm_head.weight[TURN, 0] = 10
    return model


@pytest.fixture(scope="module")
def ending(insists, config_of, tiny, write_checkpoint, chat_tokenizer, tmp_path_factory):
    """Writes it as a checkpoint with a chat template, and with what is given as generation_config.json and in config.json."""

    def write(template: str = "llama3", generation: dict | None = None, **config) -> Path:
        folder = tmp_path_factory.mktemp("ending")
        sizes = config_of(replace(tiny, vocab=insists.config.vocab_size)) | {"max_position_embeddings": 512, "eos_token_id": 2} | config
        write_checkpoint(folder, insists, sizes)
        chat_tokenizer(template).save_pretrained(folder)
        if generation is not None:
            write_json(folder / "generation_config.json", generation)
        return folder

    return write


ENDS = {"generation_config.json": ({"eos_token_id": [2, TURN]}, {}), "config.json": (None, {"eos_token_id": [2, TURN]}),
        "config.json, the other being silent": ({"pad_token_id": 0}, {"eos_token_id": [TURN, 2]}),
        "one id of generation_config.json": ({"eos_token_id": TURN}, {})}  # fmt: skip


@pytest.mark.parametrize("place", ENDS)
def test_every_id_that_ends_a_text_ends_it(place, ending, chat_tokenizer):
    generation, config = ENDS[place]
    folder = ending(generation=generation, **config)
    model, tokenizer = FAMILY.load(folder), AutoTokenizer.from_pretrained(folder)
    assert set(end_ids(model, tokenizer)) == {2, TURN, tokenizer.convert_tokens_to_ids("<|eot_id|>")}
    assert generate(model, tokenizer, ["one"], new_tokens=20) == [[TURN]]
    assert continuations(model, tokenizer, ["one"], new_tokens=20) == [{"prompt": "one", "text": "", "ended": True}]
    requests = [Instance("generate_until", {}, (prompt, {"until": ["never"], "max_gen_toks": 20}), 0) for prompt in ("one", "two three")]
    assert language_model(model, tokenizer, 2).generate_until(requests, disable_tqdm=True) == ["", ""]


def test_without_such_an_id_the_text_goes_on_to_its_limit(ending):
    """The control."""
    folder = ending()
    model, tokenizer = FAMILY.load(folder), AutoTokenizer.from_pretrained(folder)
    assert generate(model, tokenizer, ["one"], new_tokens=20) == [[TURN] * 20]
    assert continuations(model, tokenizer, ["one"], new_tokens=20)[0] == {"prompt": "one", "text": tokenizer.decode([TURN] * 20), "ended": False}
    request = Instance("generate_until", {}, ("one", {"until": ["never"], "max_gen_toks": 20}), 0)
    assert language_model(model, tokenizer, 1).generate_until([request], disable_tqdm=True) == [tokenizer.decode([TURN] * 20)]


def test_a_prompt_says_itself_whether_reasoning_is_open():
    """A user's tag opens none. The control: taken from the tokens, it does."""
    ids, scores = torch.tensor([[1, 5, 2, 3]]), torch.zeros(1, 10)
    told, taken = (ThinkingBudget(1, [5], [7], prompt_tokens=3, opened=opened)(ids, scores.clone()) for opened in ([False], None))
    assert torch.equal(told, scores) and taken.argmax().item() == 7


@pytest.mark.parametrize(("template", "settings"), [("nemotron_nano_v2", ("thinking=off",)), ("mistral", ("prompt=What is <think>?", "thinking_budget=3"))])
def test_no_reasoning_is_open_where_it_is_off_or_a_user_speaks_of_it(template, settings, ending, door, tmp_path):
    finished = door(tmp_path, "stage=generate", "device=cpu", f"checkpoint={ending(template)}", "prompt=Hello", "generate.new_tokens=20", *settings)
    assert finished.returncode == 0 and "20 tokens, 0 of them reasoning, cut off by generate.new_tokens" in finished.stdout, finished


def test_a_text_that_ended_is_said_to_have_ended_and_what_has_none_is_one_line(ending, door, tmp_path):
    folder = ending(generation={"eos_token_id": [2, TURN]})
    finished = door(tmp_path, "stage=generate", "device=cpu", f"checkpoint={folder}", "prompt=Hello", "generate.new_tokens=64")
    assert finished.returncode == 0 and "1 tokens, 0 of them reasoning, ended;" in finished.stdout, finished
    (folder / "chat_template.jinja").write_text("{{ raise_exception('Only tools\\nmay speak') }}")
    raised = door(tmp_path, "stage=generate", "device=cpu", f"checkpoint={folder}", "prompt=Hello")
    assert (raised.returncode, raised.stderr) == (2, "error: the chat template refuses it: Only tools may speak\n")
    (folder / "tokenizer.json").write_text("{}")
    none = door(tmp_path, "stage=generate", "device=cpu", f"checkpoint={folder}", "prompt=Hello")
    assert none.returncode == 2 and len(none.error_lines) == 1 and "which cannot be loaded" in none.stderr


@pytest.mark.parametrize(("settings", "message"), [
    (("thinking_budget=-1",), "thinking_budget is -1; it must be at least 0 (null: no limit)"),
    ((), "checkpoint is 'student', which is not there yet under these settings; run stage=distill first, or give a folder"),
    (("checkpoint=nowhere",), "checkpoint is 'nowhere'; it must be teacher, pruned, student, or the folder of a checkpoint"),
    (("generate.thinking_tags=[a]",), "generate.thinking_tags is ['a']; it must be two texts, what opens reasoning and what closes it"),
])  # fmt: skip
def test_what_cannot_be_is_refused_in_one_line(settings, message, door, tmp_path):
    finished = door(tmp_path, "stage=generate", "prompt=Hi", "device=cpu", *settings)
    assert finished.returncode == 2 and finished.stderr.strip() == f"error: {message}"


def test_the_student_speaks_at_the_door(walk, door):
    odd = 'prompt=It\'s "odd": ${x} \\'
    finished = door(walk.runs.parent, *walk.settings, "stage=generate", odd, "thinking=on", "thinking_budget=4", "generate.new_tokens=12")
    assert finished.returncode == 0, finished.stderr
    assert ", 4 of them reasoning" in finished.stdout and "</think>" in finished.stdout
    longer = door(walk.runs.parent, *walk.settings, "stage=generate", "prompt=Hi", "generate.new_tokens=200000")
    assert longer.returncode == 2 and "together they must be at most" in longer.stderr
    none = door(walk.runs.parent, *walk.settings, "stage=generate")
    assert none.returncode == 2 and "prompt has no value" in none.stderr
