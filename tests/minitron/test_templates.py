"""Chat templates as they are: five stand-ins with the logic of published ones, and the peculiarities of others in a line each."""

import json
import re

import numpy as np
import pytest
from tokenizers import processors

from minitron.generation import templates
from minitron.generation.conversations import ConversationWriter
from minitron.generation.ends import end_ids
from minitron.generation.prompts import Tags, make_prompt, write_prompt
from minitron.settings.data import DataSettings
from minitron.settings.training import Rows
from minitron.sources.document import Document
from minitron.sources.source import open_source
from minitron.text.encoding import Encoder, Encoding
from minitron.text.passes import Place, run_passes
from minitron.text.tokenise import read_documents, said_of
from minitron.walk.console import Console

THOUGHT = "<think>\nadd\n</think>\n\n"


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **fields):
    return {"role": "assistant", "content": text, **fields}


def system(text):
    return {"role": "system", "content": text}


# Switching reasoning.

OPEN, SHUT, EMPTY = "<think>\n", "<think></think>", "<think>\n\n</think>\n\n"
BEGIN = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<a>"
END = "{% endif %}"
WORD = "{% set on = namespace(v=true) %}{% for m in messages if WHO %}{% if 'OFF' in m.content %}{% set on.v = false %}{% endif %}{% endfor %}"
OFF_BY_WORD = BEGIN + "{{ '' if on.v else '<think></think>' }}" + END
REFUSES_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"


def by_word(off: str, who: str = "true") -> str:
    return WORD.replace("OFF", off).replace("WHO", who) + OFF_BY_WORD


# A template, and what its prompt ends in with reasoning on and off; None: it has no switch.
SWITCHED = {
    "nemotron_nano_v2": ("nemotron_nano_v2", OPEN, SHUT),
    "qwen3": ("qwen3", "assistant\n", EMPTY),
    "llama3": ("llama3", None, None),
    "mistral": ("mistral", None, None),
    "deepseek_r1": ("deepseek_r1", None, None),
    "thinking, off by default": (BEGIN + "{{ '<think>' if thinking else '</think>' }}" + END, "<a><think>", "<a></think>"),
    "a variable of any name": (BEGIN + "{{ '<think>' if use_reasoning is not defined or use_reasoning else '</think>' }}" + END, "<think>", "<a></think>"),
    "a variable that says the contrary": (BEGIN + "{% if not skip_thinking %}<think>{% else %}<think></think>{% endif %}" + END, "<a><think>", SHUT),
    "an effort": (BEGIN + "{{ '</think>' if reasoning_effort == 'none' else '<think>' }}" + END, "<a><think>", "<a></think>"),
    "an effort handed on": ("Reasoning: {{ reasoning_effort or 'medium' }}\n" + BEGIN + END, "high", "low"),
    "a budget of none": (BEGIN + "{% if thinking_budget == 0 %}<think></think>{% endif %}" + END, "<a>", SHUT),
    "words of the system": (by_word("detailed thinking off", "m.role == 'system'"), "<a>", SHUT),
    "a user's word": (by_word("/no_think", "m.role == 'user'"), "<a>", SHUT),
    "another user's word": (by_word("/nothink", "m.role == 'user'"), "<a>", SHUT),
    "no system message": (REFUSES_SYSTEM + by_word("/no_think"), "<a>", SHUT),
    "the word as text": (BEGIN + "{# /no_think enable_thinking #}" + END, None, None),
    "an inner variable": ("{% set enable_thinking = true %}" + BEGIN + "{{ '<think>' if enable_thinking }}" + END, None, None),
    "in a block of transformers": ("{% generation %}{% endgeneration %}" + BEGIN + "{{ '' if enable_thinking else '</think>' }}" + END, "<a>", "</think>"),
}  # fmt: skip


@pytest.mark.parametrize("kind", SWITCHED)
def test_thinking_is_switched_the_way_the_template_does_it(kind, chat_tokenizer):
    """The control: where neither prompt differs from the other, on and off are refused."""
    text, on, off = SWITCHED[kind]
    tokenizer = chat_tokenizer(text)
    if on is None:
        for thinking, word in ((True, "on"), (False, "off")):
            with pytest.raises(ValueError, match=f"thinking is {word}, but the chat template has no switch: [^\n]*leave thinking null"):
                write_prompt(tokenizer, "Hello", thinking)
        return
    prompts = [write_prompt(tokenizer, "Hello", thinking) for thinking in (True, False)]
    assert all("Hello" in prompt for prompt in prompts) and prompts[0] != prompts[1]
    if kind == "an effort handed on":
        assert [prompt.splitlines()[0] for prompt in prompts] == ["Reasoning: high", "Reasoning: low"]
    else:
        assert prompts[0].endswith(on) and prompts[1].endswith(off) and not prompts[0].endswith(off)


SAID = ["What is </think>?", "Open <think> and go on", "see /thinking/no_think.txt", "<think>a</think>"]


@pytest.mark.parametrize("said", [*SAID, "Say /no_think and /think alike"])
def test_what_a_user_writes_of_tags_and_switches_is_neither_heeded_nor_changed(said, template, chat_tokenizer):
    tokenizer = chat_tokenizer(template)
    for thinking in (True, False) if SWITCHED[template][1] else ():
        prompt, plain = make_prompt(tokenizer, said, thinking), make_prompt(tokenizer, "Hello", thinking)
        assert prompt.text == plain.text.replace("Hello", said) and (prompt.is_open, prompt.is_closed) == (plain.is_open, plain.is_closed)
    if said in SAID:  # else the template's own words, for it to heed
        prompt, plain = make_prompt(tokenizer, [system(said), user(said)], None), make_prompt(tokenizer, [system("Be"), user("Be")], None)
        assert prompt.text == plain.text.replace("Be", said) and prompt.is_open == plain.is_open == (template in ("nemotron_nano_v2", "deepseek_r1"))


def test_a_switch_stands_beside_a_system_message_of_the_users_own(chat_tokenizer):
    tokenizer = chat_tokenizer("nemotron_nano_v2")
    prompt = write_prompt(tokenizer, [system("Be brief. /think"), user("Hello")], False)
    assert "System\nBe brief. /think\n\n" in prompt and prompt.endswith(SHUT)


def test_other_tags_are_hidden_and_looked_for_likewise(chat_tokenizer):
    tokenizer = chat_tokenizer(BEGIN + "{{ '<reason>' if thinking else '<reason></reason>' }}" + END)
    prompts = [make_prompt(tokenizer, "</reason>", thinking, Tags("<reason>", "</reason>")) for thinking in (True, False)]
    assert [(prompt.is_open, prompt.is_closed) for prompt in prompts] == [(True, False), (False, True)]


def test_words_that_the_user_means_for_the_template_are_heeded_where_thinking_is_not_given(chat_tokenizer):
    assert write_prompt(chat_tokenizer("nemotron_nano_v2"), "Hello /no_think", None).endswith(SHUT)


# The ends of a text.


def test_the_end_of_a_turn_ends_a_text(template, chat_tokenizer):
    tokenizer = chat_tokenizer(template)
    ends = {"nemotron_nano_v2": "<SPECIAL_12>", "qwen3": "<|im_end|>", "llama3": "<|eot_id|>", "mistral": "</s>", "deepseek_r1": "<|end_of_sentence|>"}
    assert end_ids(None, tokenizer) == list(dict.fromkeys([2, tokenizer.convert_tokens_to_ids(ends[template])]))


@pytest.mark.parametrize("text", [None, "{{ messages[0].content }}", "{{ raise_exception('never') }}", BEGIN + END])
def test_a_template_without_an_end_of_a_turn_adds_none(text, chat_tokenizer):
    assert end_ids(None, chat_tokenizer(text)) == [2]


# Conversations to train on.


def turns_of(text: str, answers: list[str]) -> list[str]:
    """What stands before each answer, from the one before on."""
    found = []
    for answer in answers:
        before, _, text = text.partition(answer)
        found.append(before)
    return found


@pytest.mark.parametrize("number", [1, 2, 3])
@pytest.mark.parametrize("kind", ["in the content", "in a field", "as parts", "without the opening tag", "opened twice"])
def test_every_turn_keeps_its_reasoning_within_one_pair_of_tags(kind, number, template, chat_tokenizer):
    def said(place: int):
        thought, answer = f"thought {place}", f"Answer {place}."
        return {
            "in the content": assistant(f"<think>\n{thought}\n</think>\n\n{answer}"),
            "in a field": assistant(answer, reasoning_content=thought),
            "as parts": assistant([{"type": "thinking", "thinking": thought}, {"type": "text", "text": answer}]),
            "opened twice": assistant(f"<think>\n<think>\n{thought}</think>{answer}"),
            "without the opening tag": assistant(f"{thought}\n</think>\n\n{answer}"),
        }[kind]  # fmt: skip

    writer = ConversationWriter(chat_tokenizer(template))
    text = writer([message for place in range(number) for message in (user(f"Question {place}?"), said(place))])
    for place, before in enumerate(turns_of(text, [f"Answer {place}." for place in range(number)])):
        assert before.count("<think>") == before.count("</think>") == 1
        assert before.partition("<think>")[2].partition("</think>")[0].strip() == f"thought {place}" and before.rstrip().endswith("</think>")
        assert f"Question {place}?" in before.partition("<think>")[0]
    assert writer.without_reasoning == 0


def test_the_templates_by_themselves_lose_it_or_leave_it_open(template, chat_tokenizer):
    """The control of the above: of the five, only two that know nothing of reasoning keep it in every turn."""
    messages = [user("a"), assistant(THOUGHT + "7"), user("b"), assistant(THOUGHT + "8")]
    text = chat_tokenizer(template).apply_chat_template(messages, tokenize=False)
    kept = text.count("<think>") == text.count("</think>") == text.count("add") == 2
    assert kept == (template in ("llama3", "mistral"))


def test_an_answer_without_reasoning_has_no_tag_left_open(template, chat_tokenizer):
    text = ConversationWriter(chat_tokenizer(template))([user("3+4?"), assistant("7"), user("4+4?"), assistant("8")])
    assert text.count("<think>") == text.count("</think>") == (template in ("nemotron_nano_v2", "qwen3")) and "7" in text
    assert {"nemotron_nano_v2": "<think></think>8", "qwen3": "<think>\n\n</think>\n\n8"}.get(template, "8") in text


@pytest.mark.parametrize("said", SAID)
def test_tags_that_a_user_writes_stay_as_they_are(said, template, chat_tokenizer):
    writer = ConversationWriter(chat_tokenizer(template))
    text, plain = (writer([user(asked), assistant(THOUGHT + "7"), user(asked), assistant("8")]) for asked in (said, "Hello"))
    assert text == plain.replace("Hello", said)


def test_tags_that_an_answer_speaks_of_are_no_reasoning(template, chat_tokenizer):
    writer = ConversationWriter(chat_tokenizer(template))
    for answer in ("Use the </think> tag.", "Between <think> and </think>."):
        text, plain = (writer([user("How?"), assistant(said)]) for said in (answer, "So."))
        assert text == plain.replace("So.", answer)


def test_reasoning_that_was_cut_off_is_closed(template, chat_tokenizer):
    text = ConversationWriter(chat_tokenizer(template))([user("How?"), assistant("<think>\nwell")])
    assert text.count("<think>") == text.count("</think>") == 1 and text.index("<think>") < text.index("well") < text.index("</think>")


EACH = "{% for m in messages %}<{{ m.role }}>OWN{% endfor %}"
KINDS = {  # of templates, with a form of reasoning of their own
    "closes before every answer": EACH.replace("OWN", "{{ '</think>' if m.role == 'assistant' }}{{ m.content.split('</think>')[-1] }}"),
    "empty before every answer": EACH.replace("OWN", "{{ '<think></think>' if m.role == 'assistant' }}{{ m.content }}"),
    "asks for the field": EACH.replace("OWN", "{{ '<think>' + m.reasoning_content + '</think>' if m.reasoning_content }}{{ m.content }}"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("message", [assistant(THOUGHT + "7"), assistant("7", thinking="add")])
def test_other_templates_keep_it_too(kind, message, chat_tokenizer):
    text = ConversationWriter(chat_tokenizer(KINDS[kind]))([user("a"), message, user("b"), message])
    assert text.count("<think>") == text.count("</think>") == text.count("add") == 2


def test_a_template_with_markers_of_its_own_is_left_to_them(chat_tokenizer):
    own = "{% for m in messages %}{{ '[THINK]' + m.reasoning_content + '[/THINK]' if m.reasoning_content }}{{ m.content }}{% endfor %}"
    assert ConversationWriter(chat_tokenizer(own))([user("a"), assistant("7", reasoning_content="add")]) == "a[THINK]add[/THINK]7"


def test_documents_whose_reasoning_nothing_can_keep_are_counted(chat_tokenizer):
    writer = ConversationWriter(chat_tokenizer("{{ messages[-1].content | upper }}{{ messages[-1].content }}"))
    assert writer([user("a"), assistant(THOUGHT + "7")]) == "77" and writer([user("a"), assistant("7")]) == "77"
    assert writer.without_reasoning == 1


# What messages hold.

CALL = [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Bern"}}}]


@pytest.mark.parametrize("content", [{"content": None}, {"content": None, "reasoning_content": None}, {"content": []}, {}])
def test_a_call_of_a_tool_has_no_content(content, template, chat_tokenizer):
    messages = [user("weather?"), {"role": "assistant", **content, "tool_calls": CALL}, {"role": "tool", "content": "12 C"}, assistant("It is 12 C.")]
    text = ConversationWriter(chat_tokenizer(template))(messages)
    assert "None" not in text and text.count("weather") == 2 and text.index("Bern") < text.index("12 C")


def test_parts_of_text_are_joined(template, chat_tokenizer):
    writer = ConversationWriter(chat_tokenizer(template))
    parts = [{"type": "text", "text": "3+"}, {"type": "input_text", "text": "4"}, "?"]
    assert writer([user(parts), assistant([{"text": "7"}])]) == writer([user("3+4?"), assistant("7")])
    assert write_prompt(writer._tokenizer, [user(parts)], None) == write_prompt(writer._tokenizer, "3+4?", None)


@pytest.mark.parametrize(("message", "said"), [
    (user([{"type": "image_url", "image_url": {"url": "x"}}]), "message 1 has a part of type image_url, .*; only text can be read"),
    (user([{"type": "text", "text": 7}]), "message 1 has a part of type text"),
    (user(7), "message 1 holds 7 of type int; it must be text, null, or a list of parts of text"),
    (user({"a": 1}), "message 1 holds {'a': 1} of type dict"),
    ({"role": "user"}, "message 1, of user, has no content"),
    ({"role": None, "content": "a"}, "message 1 is .*; it must be {role, content}"),
    ("hello", "message 1 is 'hello'; it must be {role, content}"),
])  # fmt: skip
def test_what_is_no_text_is_refused(message, said, chat_tokenizer):
    with pytest.raises(ValueError, match=said):
        ConversationWriter(chat_tokenizer("llama3"))([message])
    with pytest.raises(ValueError, match=said):
        write_prompt(chat_tokenizer("llama3"), [message], None)


# What templates refuse.

WRONG = {
    "its own sentence": ("{{ raise_exception('Roles must\nalternate') }}", "the chat template refuses it: Roles must alternate$"),
    "something undefined": ("{{ messages[0].nothing.at_all }}", r"the chat template cannot write it \(UndefinedError: .* has no attribute 'nothing'\)$"),
    "a sum of a text and none": ("{{ 'a' + none }}", r"the chat template cannot write it \(TypeError: .*\)$"),
    "no end": ("{% for m in messages %}", r"the chat template cannot write it \(TemplateSyntaxError: .*\)$"),
    "no such filter": ("{{ messages | nothing }}", r"the chat template cannot write it \(TemplateRuntimeError|the chat template cannot write it \(Template"),
    "what a sandbox forbids": ("{{ messages.__class__.__mro__ }}", r"the chat template cannot write it \(SecurityError: .*\)$"),
    "a place that is not there": ("{{ messages[0].content.index('x') }}", r"the chat template cannot write it \(ValueError: .*\)$"),
    "a number too large": ("{{ messages[1e999] }}", r"the chat template cannot write it \(NameError: name 'inf' is not defined\)$"),
    "a division by nothing": ("{{ 1 / 0 }}", r"the chat template cannot write it \(ZeroDivisionError: .*\)$"),
}


@pytest.mark.parametrize("what", WRONG)
def test_an_error_of_a_template_is_one_line_that_names_the_document(what, chat_tokenizer, tmp_path):
    text, said = WRONG[what]
    rows = [{"messages": []}, {"messages": [user("a"), assistant("b")]}]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DataSettings(files=[str(tmp_path / "chat.jsonl")])
    encoder = Encoder(Encoding(tmp_path, data, 0, tmp_path / "none.npy"), chat_tokenizer(text))
    (piece,) = open_source(data, tmp_path).pieces()
    ((document, why),) = (one for held_out in (False, True) for one in encoder(piece, held_out).refused)
    assert document == "document 2 of chat.jsonl" and re.search(said, why) and "\n" not in why
    for thinking in (None, True):
        with pytest.raises(ValueError, match=said):
            write_prompt(chat_tokenizer(text), "a", thinking)


@pytest.mark.parametrize("messages", [[user("a"), user("b")], [user("a"), assistant("b"), system("c")], [assistant("a"), user("b")]])
def test_roles_that_do_not_take_turns_are_refused_where_the_template_minds(messages, chat_tokenizer):
    with pytest.raises(ValueError, match="the chat template refuses it: user and assistant must take turns"):
        ConversationWriter(chat_tokenizer("mistral"))(messages)
    ConversationWriter(chat_tokenizer("llama3"))(messages)


def test_a_system_message_goes_where_the_template_has_it(template, chat_tokenizer):
    text = ConversationWriter(chat_tokenizer(template))([system("Be brief."), user("3+4?"), assistant("7")])
    assert text.index("Be brief.") < text.index("3+4?") and text.count("Be brief.") == 1


def test_a_document_that_cannot_be_written_out_ends_stage_data_in_one_line(door, tmp_path):
    rows = [[user(f"Number {number}?"), assistant(f"It is {number}.")] for number in range(60)]
    rows[37:38] = [[user([{"type": "image", "text": None}]), assistant("It.")]]  # the one that is held out
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    finished = door(tmp_path, "device=cpu", "stage=data", "data.files=[chat.jsonl]", "data.refused=stop", "teacher.train_anew=true")
    said = "error: data: document 38 of chat.jsonl cannot be taken: message 1 has a part of type image"
    assert finished.returncode == 2 and len(finished.error_lines) == 1 and finished.stderr.startswith(said), finished


@pytest.mark.parametrize(("text", "lost"), [("mistral", 0), ("llama3", 0), ("{{ bos_token }}{{ messages[-1].content | upper }}{{ messages[-1].content }}", 20)])
def test_rows_begin_and_end_once_and_lost_reasoning_is_said(text, lost, chat_tokenizer, tmp_path):
    rows = [{"messages": [user("a"), assistant(THOUGHT + f"{number}")]} for number in range(20)]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DataSettings(files=[str(tmp_path / "chat.jsonl")], messages_field="messages", rows=Rows.documents, sequence_length=128)
    with_beginning(chat_tokenizer(text)).save_pretrained(tmp_path / "tokenizer")  # this tokenizer puts no <s> before a text; Llama's does
    place = Place(folder=tmp_path, scratch=tmp_path / "source", console=Console(quiet=True), goes_on=lambda _: None)
    split = run_passes(place, data, Encoding(tmp_path / "tokenizer", data, 10**6, tmp_path / "none.npy"), {"train": "train"})["train"]
    ids = np.load(tmp_path / "train.npy")[0].tolist()
    assert ids.count(1) == 1 and ids[0] == 1 and ids.count(2) == 1 and ids[ids.index(2) + 1] == -1
    assert split.num_rows == 20 and split.tally.without_reasoning == lost
    assert ("documents that lost their reasoning to the chat template: 20" in said_of({"train": split})) == bool(lost)


def with_beginning(tokenizer):
    """The tokenizer with <s> put before every text, as Llama's has it."""
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def test_a_tokenizer_without_a_template_writes_no_conversation(chat_tokenizer):
    with pytest.raises(ValueError, match="the tokenizer has no chat template to write a conversation in; data.text_field takes plain text"):
        ConversationWriter(chat_tokenizer(None))([user("a")])


def test_a_conversation_that_is_null_or_empty_is_no_text(chat_tokenizer, tmp_path):
    (tmp_path / "chat.jsonl").write_text('{"messages": null}\n{"messages": []}\n' + json.dumps({"messages": [user("a"), assistant("b")]}) + "\n")
    data = DataSettings(files=[str(tmp_path / "chat.jsonl")], messages_field="messages")
    assert list(read_documents(data, tmp_path, chat_tokenizer("mistral"))) == [Document("chat/2", "<s>[INST] a[/INST] b</s>")]


@pytest.mark.parametrize(("template", "said"), [
    ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "more than 0.5 s"),
    ("{{ 'x' * 10**10 }}", "more than 1024 MiB"),
    ("{% set all = namespace(x='abcdefgh') %}{% for a in range(60) %}{% set all.x = all.x ~ all.x %}{% endfor %}", "more than 1024 MiB"),
])  # fmt: skip
def test_a_template_that_takes_all_time_or_memory_is_refused_before_it_is_used(template, said, monkeypatch):
    monkeypatch.setattr(templates, "TEMPLATE_SECONDS", 0.5 if "range(99999)" in template else 60)
    with pytest.raises(ValueError, match=said):
        templates.check_template(template)
    templates.check_template("{{ messages[0].content }}")
