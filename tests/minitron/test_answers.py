"""Which characters and tokens of a conversation the assistant writes, against marks made by hand: ⟦ where it begins, ⟧ where it ends."""

import json
import re

import numpy as np
import pytest

from minitron.generation.answers import token_mask
from minitron.generation.conversations import ConversationWriter, Written

THOUGHT = "<think>\nadd\n</think>\n\n"


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **fields):
    return {"role": "assistant", "content": text, **fields}


def tool(text):
    return {"role": "tool", "content": text}


def with_marks(written: Written) -> str:
    parts, end = [], 0
    for begin, finish in written.answers:
        parts += [written.text[end:begin], "⟦", written.text[begin:finish], "⟧"]
        end = finish
    return "".join([*parts, written.text[end:]])


def mask_by_hand(marked: str, tokenizer) -> tuple[list[int], list[bool]]:
    """Ids and mask of a text with marks, piece by piece: this tokenizer's tokens are single bytes and special ones, so pieces are cut as the whole is."""
    ids, mask = [], []
    for piece in re.findall("⟦[^⟧]*⟧|[^⟦]+", marked):
        own = tokenizer(piece.strip("⟦⟧"), add_special_tokens=False)["input_ids"] if piece != "⟦⟧" else []
        ids, mask = ids + own, mask + [piece.startswith("⟦")] * len(own)
    return ids, mask


def check(messages, marked: str, tokenizer, tools=None) -> None:
    """Text and marks as by hand, and the mask token for token. The control: the same with a mark a character on is another."""
    writer = ConversationWriter(tokenizer)
    written = writer.write(messages, tools, mark_answers=True)
    assert with_marks(written) == marked and written.text == writer(messages, tools)
    encoded = tokenizer(written.text, add_special_tokens=False, return_offsets_mapping=True)
    ids, mask = mask_by_hand(marked, tokenizer)
    assert encoded["input_ids"] == ids and token_mask(encoded["offset_mapping"], written.answers).tolist() == mask
    for before, behind in ((1, 0), (0, 1)):
        if not behind or written.answers[0][1] < len(written.text):
            assert token_mask(encoded["offset_mapping"], [(begin - before, end + behind) for begin, end in written.answers]).tolist() != mask


# Every template, by hand.

SYSTEM = {"role": "system", "content": "Be brief."}
REASONED = [SYSTEM, user("a"), assistant(THOUGHT + "7"), user("b"), assistant("8"), user("c"), assistant("9", reasoning_content="count")]
REASONED_MARKED = {
    "nemotron_nano_v2": "<SPECIAL_10>System\nBe brief.\n\n<SPECIAL_11>User\na\n<SPECIAL_11>Assistant\n<think>\n⟦add\n</think>\n\n7\n<SPECIAL_12>⟧\n"
                        "<SPECIAL_11>User\nb\n<SPECIAL_11>Assistant\n⟦8\n<SPECIAL_12>⟧\n"
                        "<SPECIAL_11>User\nc\n<SPECIAL_11>Assistant\n<think>\n⟦count\n</think>\n\n9\n<SPECIAL_12>⟧\n",
    "qwen3": "<|im_start|>system\nBe brief.<|im_end|>\n"
             "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n⟦<think>\nadd\n</think>\n\n7<|im_end|>⟧\n"
             "<|im_start|>user\nb<|im_end|>\n<|im_start|>assistant\n⟦8<|im_end|>⟧\n"
             "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n⟦<think>\ncount\n</think>\n\n9<|im_end|>⟧\n",
    "llama3": "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\na<|eot_id|>"
              "<|start_header_id|>assistant<|end_header_id|>\n\n⟦<think>\nadd\n</think>\n\n7<|eot_id|>⟧"
              "<|start_header_id|>user<|end_header_id|>\n\nb<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n⟦8<|eot_id|>⟧"
              "<|start_header_id|>user<|end_header_id|>\n\nc<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
              "⟦<think>\ncount\n</think>\n\n9<|eot_id|>⟧",
    "mistral": "<s>[INST] Be brief.\n\na[/INST]⟦ <think>\nadd\n</think>\n\n7</s>⟧[INST] b[/INST]⟦ 8</s>⟧[INST] c[/INST]⟦ <think>\ncount\n</think>\n\n9</s>⟧",
    "deepseek_r1": "<s>Be brief.<|User|>a<|Assistant|><think>\n⟦add\n</think>\n\n7<|end_of_sentence|>⟧<|User|>b<|Assistant|>⟦8<|end_of_sentence|>⟧"
                   "<|User|>c<|Assistant|><think>\n⟦count\n</think>\n\n9<|end_of_sentence|>⟧",
}  # fmt: skip
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Bern"}}}
CALLED = [user("w?"), assistant(None, tool_calls=[CALL]), tool("12 C"), assistant("I ask again.", tool_calls=[CALL]), tool("13 C"), assistant("13.")]
ONE, ALL = json.dumps(CALL), json.dumps([CALL])
CALLED_MARKED = {
    "nemotron_nano_v2": f"<SPECIAL_10>System\n\n\n<SPECIAL_11>User\nw?\n<SPECIAL_11>Assistant\n⟦<TOOLCALL>{ALL}</TOOLCALL>\n<SPECIAL_12>⟧\n"
                        f"<SPECIAL_11>User\n<TOOL_RESPONSE>12 C</TOOL_RESPONSE>\n<SPECIAL_11>Assistant\n"
                        f"⟦I ask again.<TOOLCALL>{ALL}</TOOLCALL>\n<SPECIAL_12>⟧\n"
                        "<SPECIAL_11>User\n<TOOL_RESPONSE>13 C</TOOL_RESPONSE>\n<SPECIAL_11>Assistant\n<think></think>⟦13.\n<SPECIAL_12>⟧\n",
    "qwen3": f"<|im_start|>user\nw?<|im_end|>\n<|im_start|>assistant\n⟦\n<tool_call>{ONE}</tool_call><|im_end|>⟧\n"
             f"<|im_start|>user\n<tool_response>12 C</tool_response><|im_end|>\n"
             f"<|im_start|>assistant\n⟦I ask again.\n<tool_call>{ONE}</tool_call><|im_end|>⟧\n"
             "<|im_start|>user\n<tool_response>13 C</tool_response><|im_end|>\n<|im_start|>assistant\n⟦<think>\n\n</think>\n\n13.<|im_end|>⟧\n",
    "llama3": f"<s><|start_header_id|>user<|end_header_id|>\n\nw?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n⟦{ONE}<|eot_id|>⟧"
              f"<|start_header_id|>tool<|end_header_id|>\n\n12 C<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n⟦I ask again.{ONE}<|eot_id|>⟧"
              "<|start_header_id|>tool<|end_header_id|>\n\n13 C<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n⟦13.<|eot_id|>⟧",
    "mistral": f"<s>[INST] w?[/INST]⟦ [TOOL_CALLS]{ALL}</s>⟧[TOOL_RESULTS]12 C[/TOOL_RESULTS]⟦ I ask again.[TOOL_CALLS]{ALL}</s>⟧"
               "[TOOL_RESULTS]13 C[/TOOL_RESULTS]⟦ 13.</s>⟧",
    "deepseek_r1": f"<s><|User|>w?<|Assistant|>⟦<|tool_calls|>{ALL}<|end_of_sentence|>⟧<|tool_output|>12 C"
                   f"<|Assistant|>⟦I ask again.<|tool_calls|>{ALL}<|end_of_sentence|>⟧<|tool_output|>13 C<|Assistant|>⟦13.<|end_of_sentence|>⟧",
}  # fmt: skip
ODD = [user("a"), assistant("   "), user("b"), assistant(None), user("c"), assistant(""), user("d"), assistant("e ")]
ODD_MARKED = {
    "nemotron_nano_v2": "<SPECIAL_10>System\n\n\n<SPECIAL_11>User\na\n<SPECIAL_11>Assistant\n⟦\n<SPECIAL_12>⟧\n"
                        "<SPECIAL_11>User\nb\n<SPECIAL_11>Assistant\n⟦\n<SPECIAL_12>⟧\n<SPECIAL_11>User\nc\n<SPECIAL_11>Assistant\n⟦\n<SPECIAL_12>⟧\n"
                        "<SPECIAL_11>User\nd\n<SPECIAL_11>Assistant\n<think></think>⟦e\n<SPECIAL_12>⟧\n",
    "qwen3": "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n⟦   <|im_end|>⟧\n<|im_start|>user\nb<|im_end|>\n<|im_start|>assistant\n⟦<|im_end|>⟧\n"
             "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n⟦<|im_end|>⟧\n"
             "<|im_start|>user\nd<|im_end|>\n<|im_start|>assistant\n⟦<think>\n\n</think>\n\ne <|im_end|>⟧\n",
    "llama3": "<s>" + "".join(f"<|start_header_id|>user<|end_header_id|>\n\n{asked}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
                              f"⟦{said}<|eot_id|>⟧" for asked, said in (("a", ""), ("b", ""), ("c", ""), ("d", "e"))),
    "mistral": "<s>[INST] a[/INST]⟦    </s>⟧[INST] b[/INST]⟦ </s>⟧[INST] c[/INST]⟦ </s>⟧[INST] d[/INST]⟦ e </s>⟧",
    "deepseek_r1": "<s><|User|>a<|Assistant|>⟦   <|end_of_sentence|>⟧<|User|>b<|Assistant|>⟦<|end_of_sentence|>⟧"
                   "<|User|>c<|Assistant|>⟦<|end_of_sentence|>⟧<|User|>d<|Assistant|>⟦e <|end_of_sentence|>⟧",
}  # fmt: skip


def test_answers_with_reasoning_in_some_turns_are_marked_as_by_hand(template, chat_tokenizer):
    check(REASONED, REASONED_MARKED[template], chat_tokenizer(template))


def test_calls_of_tools_are_marked_and_their_results_not(template, chat_tokenizer):
    check(CALLED, CALLED_MARKED[template], chat_tokenizer(template))


def test_answers_of_nothing_end_their_turn(template, chat_tokenizer):
    check(ODD, ODD_MARKED[template], chat_tokenizer(template))


def test_a_long_conversation_is_marked_turn_by_turn(template, chat_tokenizer):
    """Of many turns alike, one of them with a call; the control: as many marks as turns, none of them of the same text as another's."""
    turns = [turn for number in range(30) for turn in (user(f"question {number}"), assistant(f"{THOUGHT if number % 3 else ''}answer {number}."))]
    turns[21] |= {"tool_calls": [CALL]}
    written = ConversationWriter(chat_tokenizer(template)).write(turns, mark_answers=True)
    marked = [written.text[begin:end] for begin, end in written.answers]
    assert len(set(marked)) == 30 and not any("question" in text for text in marked)
    for number, text in enumerate(marked):
        assert f"answer {number}." in text and ("add" in text) == bool(number % 3) and ("Bern" in text) == (number == 10) and len(text) < 180


@pytest.mark.parametrize("calls", [[], [CALL]])
def test_reasoning_that_a_prompt_opens_is_closed_where_nothing_follows(calls, chat_tokenizer):
    """The control: what the template writes by itself leaves the tag open."""
    tokenizer, messages = chat_tokenizer("nemotron_nano_v2"), [user("a"), assistant("", tool_calls=calls)]
    called = f"<TOOLCALL>{ALL}</TOOLCALL>" if calls else ""
    check(messages, f"<SPECIAL_10>System\n\n\n<SPECIAL_11>User\na\n<SPECIAL_11>Assistant\n<think></think>⟦{called}\n<SPECIAL_12>⟧\n", tokenizer)
    assert "</think>" not in tokenizer.apply_chat_template(messages, tokenize=False)


@pytest.mark.parametrize("turns", [
    [assistant("hi"), user("a"), assistant("b")],
    [user("a"), assistant("b"), assistant("c"), user("d"), assistant("e")],
    [user("a"), assistant(THOUGHT + "b"), assistant(THOUGHT + "c"), user("d"), assistant("e")],
    [user("a"), assistant("b"), user("c")],
    [assistant("<think>\n<think>\nadd</think>7"), user("a"), assistant(THOUGHT)],
])  # fmt: skip
def test_turns_in_any_order_are_marked_with_what_they_hold(turns, template, chat_tokenizer):
    """Nothing of a user is ever marked, and everything of the assistant is; mistral's template refuses some of the orders."""
    tokenizer = chat_tokenizer(template)
    turns = [turn | {"content": turn["content"].replace("add", "ADD")} for turn in turns]
    try:
        written = ConversationWriter(tokenizer).write(turns, mark_answers=True)
    except ValueError as error:
        assert template == "mistral" and "must take turns" in str(error)
        return
    marked = [written.text[begin:end] for begin, end in written.answers]
    assert len(marked) == sum(turn["role"] == "assistant" for turn in turns)
    for turn, text in zip((turn for turn in turns if turn["role"] == "assistant"), marked, strict=True):
        assert turn["content"].rpartition("</think>")[2].strip() in text and text.count("ADD") == turn["content"].count("ADD") and "ser" not in text


# What is hidden in the texts.

TAGS = ["What is </think>?", "<think>", "<think>a</think>", "/no_think/"]
ENDS = ["<|im_end|>\n<|im_start|>assistant\n7<|im_end|>", "assistant", "[/INST]", "</s>", "7", "<|Assistant|>"]
ODDITIES = ["\U0001f9ee\U0001d518 \U000f0000 \U000f0001 e\u0301\u200b", "x" * 50_000]


@pytest.mark.parametrize("text", [*TAGS, *ENDS, *ODDITIES], ids=lambda text: text[:12])
def test_what_a_user_or_an_answer_says_moves_no_mark(text, template, chat_tokenizer):
    writer = ConversationWriter(chat_tokenizer(template))

    def marked(asked: str, answered: str, thought: str) -> str:
        turns = [user(asked), assistant(THOUGHT + answered), user(asked), assistant(answered, reasoning_content=thought)]
        return with_marks(writer.write(turns, mark_answers=True))

    plain = marked("QQ", "AA", "TT")
    assert plain.count("⟦") == 2 and plain.count("QQ") == plain.count("AA") == 2
    for asked, answered, thought in ((text, "AA", "TT"), *(() if text in TAGS else (("QQ", text, "TT"), ("QQ", "AA", text), (text, text, text)))):
        assert marked(asked, answered, thought) == plain.replace("QQ", asked).replace("AA", answered).replace("TT", thought)


# Templates of other kinds.

PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
OWN = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
       "{% generation %}{{ m.content }}<|im_end|>\n{% endgeneration %}{% else %}{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}" + PROMPT)  # fmt: skip
LAST = OWN.replace("{% if m.role == 'assistant' %}", "{% if m.role == 'assistant' and loop.last %}")
MACRO = "{% macro said(m) %}<|im_start|>assistant\n{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{{ '\n' }}{% endmacro %}" + (
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ said(m) }}{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
) + PROMPT  # fmt: skip
LEFT = "{{ '<think>\n\n</think>\n\n' if loop.last }}{{ m.content.split('</think>')[-1].strip() }}"
DROPS = OWN.replace("{{ m.content }}<|im_end|>\n{% endg", LEFT + "<|im_end|>\n{% endg")
PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
NO_PROMPT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
BETWEEN = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token if m.role == 'assistant' and loop.last }}\n{% endfor %}" + (
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
OPENED = "<assistant>{{ '<think>' if enable_thinking is not defined or enable_thinking else '<think></think>' }}"
TAGGED = "{% for m in messages %}<{{ m.role }}>{{ '<think></think>' if m.role == 'assistant' }}{{ m.content }}{{ eos_token if m.role == 'assistant' }}" + (
    f"{{% endfor %}}{{% if add_generation_prompt %}}{OPENED}{{% endif %}}"
)
MIDDLE = "{% for m in messages %}{{ m.content }}{{ ' ' if m.role == 'user' else '<|eot_id|>' if loop.index == 4 else '<|im_end|>' }}{% endfor %}"
OTHER = "{{ '<|eot_id|>' if loop.last and not add_generation_prompt and m.role == 'assistant' else '<|im_end|>' }}"
OTHER_END = NO_PROMPT.replace("{% endfor", OTHER + "{% endfor") + "{% if add_generation_prompt %}<assistant>{% endif %}"
LATE_SYSTEM = ("{% for m in messages %}{% if m.role == 'user' %}[{{ 'S ' if m == messages[-2] }}{{ m.content }}]{% else %} {{ m.content }}</s>{% endif %}"
               "{% endfor %}")  # fmt: skip
TWICE = [user("a"), assistant("7"), user("b"), assistant("8")]
THOUGHT_TWICE = [user("a"), assistant(THOUGHT + "7"), user("b"), assistant(THOUGHT + "8")]
HEAD = "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
NEXT = "<|im_start|>user\nb<|im_end|>\n<|im_start|>assistant\n"
OTHERS = {
    "marks of its own": (OWN, TWICE, f"{HEAD}⟦7<|im_end|>\n⟧{NEXT}⟦8<|im_end|>\n⟧"),
    "marks of the last turn alone": (LAST, TWICE, f"{HEAD}7<|im_end|>\n{NEXT}⟦8<|im_end|>\n⟧"),
    "marks in a macro, whose places are wrong": (MACRO, TWICE, f"{HEAD}⟦7<|im_end|>⟧\n{NEXT}⟦8<|im_end|>⟧\n"),
    "marks, and reasoning put back": (DROPS, THOUGHT_TWICE, f"{HEAD}⟦{THOUGHT}7<|im_end|>\n⟧{NEXT}⟦{THOUGHT}8<|im_end|>\n⟧"),
    "no token that ends a turn": (PLAIN, TWICE, "user: a\nassistant:⟦ 7\n⟧user: b\nassistant:⟦ 8\n⟧"),
    "no prompt for an answer": (NO_PROMPT, TWICE, "<user>a⟦<assistant>7⟧<user>b⟦<assistant>8⟧"),
    "a token at the very end alone": (BETWEEN, TWICE, "user: a\nassistant: ⟦7\n⟧user: b\nassistant: ⟦8</s>⟧\n"),
    "another token at the very end": (OTHER_END, TWICE, "<user>a<|im_end|><assistant>⟦7<|im_end|>⟧<user>b<|im_end|><assistant>⟦8<|eot_id|>⟧"),
    "space of its own behind tags": (TAGGED, [user("a"), assistant(" 7\n")], "<user>a<assistant><think></think>⟦ 7\n</s>⟧"),
    "a turn in the middle that ends in another way": (MIDDLE, [*TWICE, *TWICE], "a ⟦7<|im_end|>⟧b ⟦8<|eot_id|>⟧a ⟦7<|im_end|>⟧b ⟦8<|im_end|>⟧"),
    "prompts that are no beginnings": (LATE_SYSTEM, TWICE, "[a]⟦ 7</s>⟧[S b]⟦ 8</s>⟧"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_templates_of_other_kinds_are_marked_as_by_hand(kind, chat_tokenizer):
    text, messages, marked = OTHERS[kind]
    check(messages, marked, chat_tokenizer(text))


WITHIN = ("{% for m in messages %}{% if m.role == 'assistant' %}<a>{{ m.tool_calls[0].function.name if m.tool_calls }}{% if m.tool_calls and not loop.last %}"
          "({{ messages[loop.index0 + 1].content }}){% endif %}{{ m.content }}</s>{% elif m.role == 'user' %}<u>{{ m.content }}{% endif %}{% endfor %}"
          "{% if add_generation_prompt %}<a>{% endif %}")  # fmt: skip


def test_an_answer_with_a_tools_result_within_it_is_refused(chat_tokenizer):
    """As a published template has it. The control: the same where no result follows."""
    tokenizer, calls = chat_tokenizer(WITHIN), [assistant("Let me see.", tool_calls=[CALL])]
    with pytest.raises(ValueError, match="the chat template writes what follows message 2, the assistant's, within it"):
        ConversationWriter(tokenizer).write([user("w?"), *calls, tool("12 C"), assistant("12.")], mark_answers=True)
    check([user("w?"), *calls], "<u>w?<a>⟦weatherLet me see.</s>⟧", tokenizer)


def test_answers_that_cannot_be_told_are_refused(chat_tokenizer):
    """The control: without marks the same is written."""
    writer = ConversationWriter(chat_tokenizer("{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}"))
    with pytest.raises(ValueError, match="the chat template writes message 2, the assistant's, more than once"):
        writer.write(TWICE, mark_answers=True)
    assert writer.write(TWICE) == Written("aa77bb88", None) and writer(TWICE) == "aa77bb88"


def test_nothing_is_marked_where_the_assistant_says_nothing(chat_tokenizer):
    writer = ConversationWriter(chat_tokenizer("qwen3"))
    assert writer.write([], mark_answers=True) == Written("", ()) and writer.write([]) == Written("", None)
    assert writer.write([user("a")], mark_answers=True).answers == () != writer.write(TWICE, mark_answers=True).answers


def test_tools_stand_before_the_marks(chat_tokenizer):
    template = "{% if tools %}{{ tools | tojson }}{% endif %}" + OWN
    tools = [{"type": "function", "function": {"name": "weather", "description": "\U000f0000"}}]
    check(TWICE, f"{json.dumps(tools, ensure_ascii=False)}{HEAD}⟦7<|im_end|>\n⟧{NEXT}⟦8<|im_end|>\n⟧", chat_tokenizer(template), tools)


# Tokens.


def test_a_token_counts_if_any_of_its_characters_is_the_assistants():
    offsets = [(0, 2), (2, 4), (4, 4), (4, 6), (6, 9), (9, 9), (9, 12), (12, 14)]
    assert token_mask(offsets, [(3, 4), (8, 11)]).tolist() == [False, True, False, False, True, False, True, False]
    assert token_mask(offsets, []).tolist() == [False] * 8 and token_mask([], [(0, 1)]).tolist() == []
    assert token_mask(np.array(offsets), [(0, 14)]).tolist() == [begin < end for begin, end in offsets]


def test_a_mask_agrees_with_one_character_by_character():
    random = np.random.default_rng(1)
    for _ in range(50):
        bounds = np.unique(random.integers(0, 60, 12))
        offsets = np.stack([bounds[:-1], bounds[1:]], 1)
        borders = np.unique(random.integers(0, 60, 6))
        answers = [(int(a), int(b)) for a, b in zip(borders[::2], borders[1::2], strict=False)]
        own = {place for begin, end in answers for place in range(begin, end)}
        assert token_mask(offsets, answers).tolist() == [any(place in own for place in range(*pair)) for pair in offsets]
