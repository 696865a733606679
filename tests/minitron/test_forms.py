"""What a record is: every form of a data set read and written out as a text made by hand, and what is not plain refused."""

import json
import pickle
import subprocess
import sys

import pytest

from minitron.generation.conversations import ConversationWriter
from minitron.sources.forms import Conversation, Fields, MissingField, Reading, Refused, recognise

THOUGHT = "<think>\nadd\n</think>\n\n7"
CALL = {"name": "weather", "arguments": {"city": "Bern"}}
CALLS = [{"type": "function", "function": CALL}]
CALLS_AS_TEXT = [{"type": "function", "function": CALL | {"arguments": '{"city": "Bern"}'}}]


def said(role: str, content, **others) -> dict:
    return {"role": role, "content": content, **others}


def shared(who: str, value) -> dict:
    return {"from": who, "value": value}


# One conversation in every form that can hold it, and what each template makes of it, by hand.

SYSTEM, QUESTION, ANSWER = said("system", "Be brief."), said("user", "3+4?"), said("assistant", THOUGHT)
SIMPLE = {
    "messages": {"messages": [SYSTEM, QUESTION, ANSWER]},
    "messages in JSON": {"messages": json.dumps([SYSTEM, QUESTION, ANSWER])},
    "messages, content in parts": {"messages": [SYSTEM, said("user", [{"type": "text", "text": "3+"}, {"type": "text", "text": "4?"}]), ANSWER]},
    "messages, reasoning in a field": {"messages": [SYSTEM, QUESTION, said("assistant", "7", reasoning_content="add")]},
    "messages, system beside": {"conversation": [QUESTION, ANSWER], "system": "Be brief."},
    "messages, other roles": {"conversations": [SYSTEM, said("Human", "3+4?"), said("gpt", THOUGHT)]},
    "sharegpt": {"conversations": [shared("system", "Be brief."), shared("human", "3+4?"), shared("gpt", THOUGHT)]},
    "sharegpt, system beside": {"conversations": [shared("user", "3+4?"), shared("ChatGPT", THOUGHT)], "system": "Be brief."},
    "prompt_answer": {"question": "3+4?", "answer": THOUGHT, "system_prompt": "Be brief.", "id": 7},
    "prompt_answer, turns": {"input": [QUESTION], "output": THOUGHT, "system_prompt": "Be brief.", "reasoning": "on", "category": "math"},
    "prompt_answer, system in the turns": {"prompt": [SYSTEM, QUESTION], "response": [ANSWER], "system": "Not this one."},
    "prompt_answer, a turn": {"problem": "3+4?", "solution": ANSWER, "system": "Be brief."},
    "alpaca": {"instruction": "3+4?", "input": "", "output": THOUGHT, "system": "Be brief."},
    "preference": {"prompt": "3+4?", "chosen": THOUGHT, "rejected": "8", "system": "Be brief."},
    "preference, turns": {"prompt": [SYSTEM, QUESTION], "chosen": [ANSWER], "rejected": [said("assistant", "8")]},
    "preference, the whole": {"prompt": "3+4?", "chosen": [SYSTEM, QUESTION, ANSWER], "rejected": [SYSTEM, QUESTION, said("assistant", "8")]},
}  # fmt: skip
SIMPLE_TEXT = {
    "nemotron_nano_v2": "<SPECIAL_10>System\nBe brief.\n\n<SPECIAL_11>User\n3+4?\n<SPECIAL_11>Assistant\n<think>\nadd\n</think>\n\n7\n<SPECIAL_12>\n",
    "qwen3": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n3+4?<|im_end|>\n<|im_start|>assistant\n<think>\nadd\n</think>\n\n7<|im_end|>\n",
    "llama3": "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n3+4?<|eot_id|>"
              "<|start_header_id|>assistant<|end_header_id|>\n\n<think>\nadd\n</think>\n\n7<|eot_id|>",
    "mistral": "<s>[INST] Be brief.\n\n3+4?[/INST] <think>\nadd\n</think>\n\n7</s>",
    "deepseek_r1": "<s>Be brief.<|User|>3+4?<|Assistant|><think>\nadd\n</think>\n\n7<|end_of_sentence|>",
}  # fmt: skip

COUNTED = "<think>\ncount\n</think>\n\n8"
LATER = [said("user", "And 1 more?"), said("assistant", "8", reasoning="count")]
TURNS = {
    "messages": {"messages": [QUESTION, ANSWER, *LATER]},
    "sharegpt": {"conversations": [shared("human", "3+4?"), shared("gpt", THOUGHT), shared("human", "And 1 more?"), shared("gpt", COUNTED)]},
    "prompt_answer": {"input": [QUESTION, ANSWER, LATER[0]], "output": COUNTED},
    "alpaca": {"instruction": "And 1 more?", "input": None, "output": COUNTED, "history": [["3+4?", THOUGHT]]},
    "preference": {"chosen": [QUESTION, ANSWER, *LATER], "rejected": [QUESTION]},
}
TURNS_TEXT = {
    "nemotron_nano_v2": "<SPECIAL_10>System\n\n\n<SPECIAL_11>User\n3+4?\n<SPECIAL_11>Assistant\n<think>\nadd\n</think>\n\n7\n<SPECIAL_12>\n"
                        "<SPECIAL_11>User\nAnd 1 more?\n<SPECIAL_11>Assistant\n<think>\ncount\n</think>\n\n8\n<SPECIAL_12>\n",
    "qwen3": "<|im_start|>user\n3+4?<|im_end|>\n<|im_start|>assistant\n<think>\nadd\n</think>\n\n7<|im_end|>\n"
             "<|im_start|>user\nAnd 1 more?<|im_end|>\n<|im_start|>assistant\n<think>\ncount\n</think>\n\n8<|im_end|>\n",
    "llama3": "<s><|start_header_id|>user<|end_header_id|>\n\n3+4?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
              "<think>\nadd\n</think>\n\n7<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nAnd 1 more?<|eot_id|>"
              "<|start_header_id|>assistant<|end_header_id|>\n\n<think>\ncount\n</think>\n\n8<|eot_id|>",
    "mistral": "<s>[INST] 3+4?[/INST] <think>\nadd\n</think>\n\n7</s>[INST] And 1 more?[/INST] <think>\ncount\n</think>\n\n8</s>",
    "deepseek_r1": "<s><|User|>3+4?<|Assistant|><think>\nadd\n</think>\n\n7<|end_of_sentence|>"
                   "<|User|>And 1 more?<|Assistant|><think>\ncount\n</think>\n\n8<|end_of_sentence|>",
}  # fmt: skip

TOLD = [said("tool", "12 C"), said("assistant", "It is 12 C.")]
TOOLS = {
    "messages": {"messages": [said("user", "Weather?"), said("assistant", None, tool_calls=CALLS), *TOLD]},
    "messages, arguments as text": {"messages": [said("user", "Weather?"), said("assistant", None, tool_calls=CALLS_AS_TEXT), *TOLD]},
    "messages, calls as text": {"messages": [said("user", "Weather?"), said("assistant", "", tool_calls=json.dumps(CALLS)), *TOLD]},
    "sharegpt": {"conversations": [shared("human", "Weather?"), shared("function_call", json.dumps(CALL)), shared("observation", "12 C"),
                                   shared("gpt", "It is 12 C.")]},
    "prompt_answer": {"prompt": "Weather?", "completion": [said("assistant", None, tool_calls=CALLS), *TOLD]},
}  # fmt: skip
WRITTEN = json.dumps(CALLS)
TOOLS_TEXT = {
    "nemotron_nano_v2": f"<SPECIAL_10>System\n\n\n<SPECIAL_11>User\nWeather?\n<SPECIAL_11>Assistant\n<TOOLCALL>{WRITTEN}</TOOLCALL>\n<SPECIAL_12>\n"
                        "<SPECIAL_11>User\n<TOOL_RESPONSE>12 C</TOOL_RESPONSE>\n<SPECIAL_11>Assistant\n<think></think>It is 12 C.\n<SPECIAL_12>\n",
    "qwen3": f"<|im_start|>user\nWeather?<|im_end|>\n<|im_start|>assistant\n\n<tool_call>{WRITTEN[1:-1]}</tool_call><|im_end|>\n"
             "<|im_start|>user\n<tool_response>12 C</tool_response><|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\nIt is 12 C.<|im_end|>\n",
    "llama3": f"<s><|start_header_id|>user<|end_header_id|>\n\nWeather?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n{WRITTEN[1:-1]}<|eot_id|>"
              "<|start_header_id|>tool<|end_header_id|>\n\n12 C<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nIt is 12 C.<|eot_id|>",
    "mistral": f"<s>[INST] Weather?[/INST] [TOOL_CALLS]{WRITTEN}</s>[TOOL_RESULTS]12 C[/TOOL_RESULTS] It is 12 C.</s>",
    "deepseek_r1": f"<s><|User|>Weather?<|Assistant|><|tool_calls|>{WRITTEN}<|end_of_sentence|><|tool_output|>12 C"
                   "<|Assistant|>It is 12 C.<|end_of_sentence|>",
}  # fmt: skip
CASES = [(form, record, texts) for records, texts in ((SIMPLE, SIMPLE_TEXT), (TURNS, TURNS_TEXT), (TOOLS, TOOLS_TEXT)) for form, record in records.items()]


def read(record: dict, **fields) -> str | Conversation:
    return recognise([record], Fields(**fields)).content(record)


def written(content: str | Conversation, tokenizer) -> str:
    return content if isinstance(content, str) else ConversationWriter(tokenizer)(content.messages, content.tools)


@pytest.mark.parametrize("number", range(len(CASES)), ids=[f"{form} {number}" for number, (form, *_) in enumerate(CASES)])
def test_every_form_is_told_and_written_as_by_hand(number, template, chat_tokenizer):
    """The controls: the form given by name reads the same, and any other form reads something else or refuses."""
    name, record, texts = CASES[number]
    tokenizer, form = chat_tokenizer(template), name.partition(",")[0].partition(" ")[0]
    assert written(read(record), tokenizer) == texts[template] == written(read(record, form=form), tokenizer)
    for other in {"text", "messages", "prompt_answer", "alpaca", "preference"} - {form, "messages" if form == "sharegpt" else form}:
        fields = {"form": other, "text": next(iter(record))} if other == "text" else {"form": other}
        try:
            assert written(read(record, **fields), tokenizer) != texts[template]
        except ValueError:
            continue


def test_alpacas_input_follows_its_instruction(template, chat_tokenizer):
    record = {"instruction": "Add.", "input": "3 and 4", "output": "7"}
    text, without = (written(read(one), chat_tokenizer(template)) for one in (record, record | {"input": "  "}))
    assert "Add.\n\n3 and 4" in text and without == text.replace("Add.\n\n3 and 4", "Add.")
    assert "3 and 4" not in written(read(record, form="prompt_answer", prompt="instruction"), chat_tokenizer(template))


def test_tools_reach_the_template(chat_tokenizer):
    schema = [{"type": "function", "function": {"name": "weather", "description": "of a city", "parameters": {}}}]
    tokenizer = chat_tokenizer("{{ tools | tojson if tools else 'none' }}{% for m in messages %}<{{ m.content }}>{% endfor %}")
    messages = [said("user", "Weather?"), said("assistant", "12 C")]
    for tools in (schema, json.dumps(schema)):
        assert written(read({"messages": messages, "tools": tools}), tokenizer) == json.dumps(schema) + "<Weather?><12 C>"
    for tools in (None, [], "", "[]"):
        assert written(read({"messages": messages, "tools": tools}), tokenizer) == "none<Weather?><12 C>"
    for tools in ("weather", [7], 7):
        with pytest.raises(Refused, match="its tools are .*; they must be a list of JSON schemas"):
            read_late({"messages": messages}, {"messages": messages, "tools": tools})


def read_late(first: dict, later: dict, **fields) -> str | Conversation:
    """A later record, read as the first one of its source is."""
    return recognise([first], Fields(**fields)).content(later)


# Texts.

CHAT = [said("user", "a"), said("assistant", "b")]


@pytest.mark.parametrize(
    "beside", [{}, {"messages": CHAT}, {"instruction": "a", "output": "b"}, {"prompt": "a", "answer": "b"}, {"chosen": "a", "rejected": "b"}]
)
def test_a_text_wins_over_everything(beside):
    """The control: without the text, or with one that is a number, it does not."""
    assert read({"text": "A text.", **beside}) == "A text." and read({"body": "A text.", **beside}, text="body") == "A text."
    if beside:
        assert read(beside) != "A text." and read({"text": 7, **beside}) == read(beside)


def test_null_and_empty_is_no_text():
    pairs = [{"prompt": "a", "answer": None}, {"prompt": None, "answer": "b"}, {"prompt": "a", "answer": "  "}, {"prompt": [], "answer": "b"}]
    others = [{"instruction": "", "input": "", "output": "b"}, {"prompt": "a", "chosen": None, "rejected": "c"}]
    for record in ({"text": None}, {"text": ""}, {"messages": None}, {"messages": []}, {"messages": ""}, *pairs, *others):
        assert read(record) == ""
    assert read({"chosen": " A text. ", "rejected": "b"}) == " A text. "


@pytest.mark.parametrize(("first", "fields", "later", "error"), [
    ({"text": "a"}, {}, {"body": "b"}, "data.text_field is 'text'; there is no such field, it must be one of 'body'"),
    ({"text": "a"}, {}, {"text": 7}, "data.text_field is 'text'; it must hold text, but it holds int: 7"),
    ({"messages": CHAT}, {}, {"messages": 7}, "data.messages_field is 'messages'; it must hold a list of {role, content}, but it holds int: 7"),
    ({"messages": CHAT}, {}, {"messages": "hello"}, "data.messages_field is 'messages'; .* holds str: hello"),
    ({"messages": CHAT}, {}, {"messages": "7"}, "data.messages_field is 'messages'; .* holds str: 7"),
    ({"prompt": "a", "answer": "b"}, {}, {"prompt": "a"}, "data.answer_field is 'answer'; there is no such field, it must be one of 'prompt'"),
    ({"prompt": "a", "answer": "b"}, {}, {"prompt": "a", "answer": 7}, "data.answer_field is 'answer'; it must hold text or turns, but it holds int: 7"),
    ({"prompt": "a", "answer": "b"}, {}, {"prompt": ["a"], "answer": "b"}, "data.prompt_field is 'prompt'; it must hold text or turns"),
    ({"instruction": "a", "output": "b"}, {}, {"instruction": CHAT, "output": "b"}, "data.prompt_field is 'instruction'; it must hold text, but it holds list"),
    ({"messages": CHAT, "system": "s"}, {}, {"messages": CHAT, "system": 7}, "data.system_field is 'system'; it must hold text, but it holds int: 7"),
])  # fmt: skip
def test_a_field_that_is_missing_or_holds_something_else_is_named(first, fields, later, error):
    with pytest.raises(MissingField, match=f"^{error}".replace("{", r"\{")) as caught:
        read_late(first, later, **fields)
    assert "\n" not in str(caught.value) and read_late(first, first, **fields)


# Conversations that are none.


@pytest.mark.parametrize(("turns", "error"), [
    ([said("user", "a")], "no turn is the assistant's, so there is nothing to learn; the roles are user"),
    ([said("system", "a"), said("user", "b"), said("user", "c")], "no turn is the assistant's.*; the roles are system, user"),
    ([said("user", "a"), "b"], "turn 2 is str: b; it must be {role, content} or {from, value}"),
    ([said("user", "a"), {"content": "b"}], "turn 2 is dict: .*; it must be {role, content} or {from, value}"),
    ([shared("human", "a"), shared("narrator", "b")], "turn 2 is from 'narrator'; it must be one of user, human, assistant, gpt, "),
    ([shared("human", "a"), {"from": "gpt"}], "turn 2, from 'gpt', has no value"),
    ([shared("human", "a"), shared("function_call", "weather(Bern)")], "turn 2, from 'function_call', holds str: weather.Bern.; it must be JSON of"),
])  # fmt: skip
def test_a_conversation_that_cannot_be_trained_on_is_refused_alone(turns, error):
    with pytest.raises(Refused, match=f"^{error}".replace("{", r"\{")) as caught:
        read_late({"messages": CHAT}, {"messages": turns})
    assert "\n" not in str(caught.value)
    reading = recognise([{"messages": turns}, {"messages": CHAT}], Fields())  # one of them among others does not hide what the source is
    assert reading.content({"messages": CHAT}) == Conversation(CHAT)


QUESTIONS = {"input": [said("user", "3+4?")], "output": THOUGHT}


@pytest.mark.parametrize("name", ["input", "messages"])
def test_questions_alone_are_refused_where_the_answers_stand_beside(name):
    record = {name: QUESTIONS["input"], "output": THOUGHT}
    said_so = f"has 'output' beside it: data.form=prompt_answer data.prompt_field={name} data.answer_field=output reads both"
    with pytest.raises(ValueError, match=f"data.messages_field is '{name}'; no turn there is the assistant's, and chat.jsonl {said_so}"):
        recognise([record], Fields(messages=name), source="chat.jsonl")
    assert read(record, form="prompt_answer", prompt=name, answer="output").messages == [said("user", "3+4?"), ANSWER]
    assert read({name: [QUESTION, ANSWER], "output": THOUGHT}, messages=name).messages == [QUESTION, ANSWER]  # there they do not


# What is not plain.


@pytest.mark.parametrize(("record", "words"), [
    ({"messages": CHAT, "conversations": CHAT}, ['conversations in "messages"', 'conversations in "conversations"', "data.form="]),
    ({"instruction": "a", "output": "b", "response": "c"}, ['answers in "output" .alpaca.', 'answers in "response"']),
    ({"prompt": "a", "chosen": "b", "rejected": "c", "answer": "d"}, ['chosen answers in "chosen", questions in "prompt"', 'answers in "answer"']),
    ({"problem": "a", "solution": "b", "answer": "7"}, ['answers in "answer"', 'answers in "solution"', "data.answer_field="]),
    ({"id": 1, "body": "a"}, ["has the fields 'id', 'body'", "data.text_field=", "data.form="]),
    ({"text": 7}, ["'text' there holds int: 7", "data.text_field="]),
    ({"question": "a", "answer": 7}, ["'question', 'answer'", "data.form="]),
    ({"messages": ["a", "b"]}, ["has the fields 'messages'"]),
    ({}, ["data.text_field="]),
])  # fmt: skip
def test_what_is_not_plain_is_refused_with_the_settings_that_say_it(record, words):
    with pytest.raises(ValueError, match=f"^corpus.jsonl .*{'.*'.join(words)}") as caught:
        recognise([record], Fields(), source="corpus.jsonl")
    assert "\n" not in str(caught.value)


def test_settings_make_it_plain():
    record = {"problem": "a", "solution": "b", "answer": "7", "note": "n", "persona": "p"}
    assert read(record, answer="answer").messages == [said("user", "a"), said("assistant", "7")]
    assert read(record, form="prompt_answer", answer="solution", system="persona").messages[0] == said("system", "p")
    assert read(record, text="note") == "n"
    for fields, name in (({"answer": "reply"}, "answer"), ({"prompt": "reply"}, "prompt"), ({"text": "reply"}, "text"), ({"messages": "reply"}, "messages"),
                         ({"answer": "answer", "system": "reply"}, "system")):  # fmt: skip
        with pytest.raises(ValueError, match=f"data.{name}_field is 'reply'; x.jsonl has no such field, it must be one of 'problem', 'solution'"):
            recognise([record], Fields(**fields), source="x.jsonl")
    with pytest.raises(ValueError, match="data.form is 'chat'; it must be one of auto, text, messages"):
        read(record, form="chat")
    with pytest.raises(ValueError, match="data.form is alpaca; in the source none of instruction is there and fits, data.prompt_field must be one of"):
        read(record, form="alpaca")


def test_a_field_that_is_null_in_the_first_records_is_known_by_the_others():
    records = [{"messages": None, "conversations": None}, {"messages": None, "conversations": [shared("human", "a"), shared("gpt", "b")]}]
    assert recognise(records, Fields()).described == 'conversations in "conversations" (sharegpt)'
    with pytest.raises(ValueError, match="can be read as"):
        recognise(records[:1], Fields())


@pytest.mark.parametrize(("record", "described", "columns"), [
    ({"text": "a", "id": 1}, 'text in "text"', ["text"]),
    ({"messages": CHAT, "id": 1}, 'conversations in "messages"', ["messages", "system", "system_prompt", "tools"]),
    ({"messages": CHAT, "tools": "[{}]", "system": 7}, 'conversations in "messages", tools in "tools"', ["messages", "system_prompt", "tools"]),
    ({"instruction": "a", "input": "b", "output": "c", "id": 1}, 'questions in "instruction" and "input", answers in "output" (alpaca)',
     ["output", "instruction", "system", "system_prompt", "tools", "input", "history"]),
    ({"input": CHAT[:1], "output": "b", "system_prompt": "s"}, 'questions in "input", answers in "output", system prompts in "system_prompt"',
     ["output", "input", "system", "system_prompt", "tools"]),
    ({"prompt": "a", "chosen": "b", "rejected": "c"}, 'chosen answers in "chosen", questions in "prompt" (preference)',
     ["chosen", "prompt", "system", "system_prompt", "tools"]),
])  # fmt: skip
def test_a_reading_says_what_it_is_and_looks_at_its_columns_alone(record, described, columns):
    reading = pickle.loads(pickle.dumps(recognise([record], Fields())))
    assert reading.described == described and list(reading.columns) == columns and isinstance(reading, Reading)
    assert reading.content({name: record[name] for name in columns if name in record}) == reading.content(record)
    with pytest.raises(MissingField):
        reading.content({name: value for name, value in record.items() if name != columns[0]})


def test_what_only_later_records_have_is_read():
    later = {"messages": CHAT, "system": "Be brief.", "tools": [{"name": "f"}]}
    assert read_late({"messages": CHAT}, later) == Conversation([said("system", "Be brief."), *CHAT], [{"name": "f"}])


def test_forms_load_neither_torch_nor_transformers(environment):
    code = "import sys, minitron.sources.forms; print('torch' in sys.modules or 'transformers' in sys.modules, 'json' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True).stdout.split() == ["False", "True"]
