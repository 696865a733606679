"""Surfaces that are text: documents in files of every kind, chat templates, tokenizers."""

import csv
import gzip
import io
import json
import random
import struct
from collections.abc import Callable
from pathlib import Path

from fuzz_mutations import as_bytes, mutated_bytes, mutated_text, mutated_value, odd

from minitron.settings.data import DataSettings, Form
from minitron.sources.source import FileSource

Case = Callable[[random.Random], None]
RECORDS = [
    {"text": "A document, and what it says. " * 3, "id": 7},
    {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Hello", "reasoning_content": "Hm"}], "tools": None},
    {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "Hello"}]},
    {"instruction": "Add", "input": "1 2", "output": "3", "history": [["a", "b"]]},
    {"prompt": "hi", "chosen": [{"role": "assistant", "content": "x"}], "rejected": "y"},
    {"question": "What?", "answer": "That.", "system": "Be kind."},
]
TEMPLATE = """{%- for message in messages %}{{ '<|' + message.role + '|>' }}
{% if message.reasoning_content is defined and enable_thinking is not false %}<think>{{ message.reasoning_content }}</think>{% endif %}
{%- generation %}{{ message['content'] | trim }}{% endgeneration %}{% for call in message.tool_calls or [] %}{{ call | tojson }}{% endfor %}{% endfor %}
{%- if add_generation_prompt %}<|assistant|>{% if loop is defined %}x{% endif %}{% endif %}"""
BITS = ["{% for a in range(10**9) %}x{% endfor %}", "{{ 'a' * 10**9 }}", "{% include '/etc/passwd' %}", "{{ ''.__class__.__mro__ }}",
        "{% macro f(a) %}{{ f(a) }}{% endmacro %}{{ f(1) }}",
        "{% set x = namespace(a=1) %}", "{{ raise_exception('no') }}", "{{ messages[99].content }}", "{{ messages | tojson(indent=4) }}", "{% if %}", "}}",
        "{{", "{%- break %}",
        "{{ strftime_now('%Y') }}", "{{ 1 / 0 }}", "{{ cycler.__init__.__globals__ }}", "{{ 2 ** 10 ** 9 }}"]  # fmt: skip


def _write(kind: str, records: list, chance: random.Random, path: Path) -> None:
    """Records as a file of that kind; what the kind cannot hold is left to the bytes."""
    if kind in (".parquet", ".arrow"):
        import pyarrow
        import pyarrow.feather
        import pyarrow.parquet

        table = pyarrow.Table.from_pylist(chance.choice([[RECORDS[0]] * 3, [RECORDS[1]] * 2, [{"input_ids": [1, 2, 3]}] * 3, [{"text": None}, {"text": "a"}]]))
        sink = io.BytesIO()
        pyarrow.parquet.write_table(table, sink) if kind == ".parquet" else pyarrow.feather.write_feather(table, sink)
        path.write_bytes(mutated_bytes(sink.getvalue(), chance))
    elif kind == ".bin":
        lengths, begins, bounds = [3, 2, 4], [0, 6, 10], [0, 1, 3]
        idx = struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, 8, 3, 3) + struct.pack("<3i3q3q", *lengths, *begins, *bounds)
        path.write_bytes(mutated_bytes(bytes(range(18)), chance) if chance.random() < 0.3 else bytes(range(18)))
        path.with_suffix(".idx").write_bytes(mutated_bytes(idx, chance))
    elif kind in (".csv", ".tsv"):
        text = io.StringIO()
        csv.writer(text, delimiter="\t" if kind == ".tsv" else ",").writerows([["text", "id"], ["a, b", 1], ['"q"\nx', 2]])
        path.write_bytes(mutated_bytes(text.getvalue().encode(), chance))
    elif kind == ".json":
        path.write_bytes(as_bytes(chance.choice([records, {"version": 1, "data": records}, records[:1]]), chance))
    else:
        lines = b"\n".join(as_bytes(record, chance) for record in records)
        path.write_bytes(lines if kind == ".jsonl" else mutated_bytes(b"Some text.\n\n\xc3\xbc More.\n" * 9, chance))


def documents(folder: Path) -> Case:
    """Records out of files, as texts and conversations."""
    kinds = (".jsonl", ".jsonl", ".json", ".json", ".csv", ".tsv", ".txt", ".parquet", ".arrow", ".bin")

    def case(chance: random.Random) -> None:
        kind = chance.choice(kinds)
        path = folder / f"corpus{kind}"
        records = [mutated_value(record, chance) if chance.random() < 0.6 else record for record in [chance.choice(RECORDS)] * chance.choice([1, 2, 5])]
        _write(kind, records, chance, path)
        if kind in (".jsonl", ".json", ".txt", ".csv") and chance.random() < 0.3:
            packed = path.with_name(path.name + ".gz")
            content = gzip.compress(path.read_bytes(), 1)
            packed.write_bytes(mutated_bytes(content, chance) if chance.random() < 0.5 else content + chance.choice([b"", b"x", content]))
            path = packed
        data = DataSettings(files=[str(path)], form=chance.choice([Form.auto] * 3 + list(Form)))
        for piece in FileSource(data).pieces():
            _contents(piece)

    return case


def _contents(piece) -> None:
    from minitron.formats.blocks import records
    from minitron.sources.turns import Refused

    for _, record in records(piece.block):
        if piece.reading is not None and isinstance(record, dict):
            try:
                piece.reading.content(record)
            except Refused:
                continue


def _tokenizer(folder: Path) -> dict:
    from minitron.text.own_tokenizer import train_tokenizer

    texts = ["the year 1984 and  the year 2024", "a list of numbers: 12 345 6789", "def f(x): return x ** 2\n\n\tthe end"]
    train_tokenizer(iter(texts * 3), 300, folder)
    return json.loads((folder / "tokenizer.json").read_text())


def templates(folder: Path) -> Case:
    """A chat template: its prompt, its switches of reasoning, what an assistant wrote in it."""
    from minitron.generation.prompts import make_prompt
    from minitron.generation.templates import marked_ranges, plain_messages
    from minitron.generation.tokenizers import load_tokenizer

    _tokenizer(folder)
    tokenizer, messages = load_tokenizer(folder), RECORDS[1]["messages"]

    def case(chance: random.Random) -> None:
        tokenizer.chat_template = mutated_text(TEMPLATE, chance, BITS) if chance.random() < 0.7 else chance.choice(BITS) + TEMPLATE
        given = plain_messages(mutated_value(messages, chance) if chance.random() < 0.3 else messages)
        make_prompt(tokenizer, given, chance.choice([None, None, True, False]))
        marked_ranges(tokenizer, given)

    return case


def tokenizer_json(folder: Path) -> Case:
    """tokenizer.json and tokenizer_config.json; what can be loaded writes a prompt and reads it back."""
    from minitron.generation.tokenizers import beginning, begun, load_tokenizer

    given = _tokenizer(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text()) if (folder / "tokenizer_config.json").exists() else {}
    given["model"]["merges"] = given["model"]["merges"][:20]

    def case(chance: random.Random) -> None:
        (folder / "tokenizer.json").write_bytes(as_bytes(given if chance.random() < 0.4 else mutated_value(given, chance), chance))
        other = mutated_value(config, chance) if chance.random() < 0.4 else dict(config)
        if isinstance(other, dict) and chance.random() < 0.1:
            other[chance.choice(["auto_map", "tokenizer_class", "chat_template", "bos_token", "model_max_length", "extra_special_tokens"])] = odd(chance)
        (folder / "tokenizer_config.json").write_bytes(as_bytes(other, chance))
        tokenizer = load_tokenizer(folder)
        beginning(tokenizer)
        ids = tokenizer(begun(tokenizer, "the year 1984 ü😀\x00 "))["input_ids"]
        tokenizer.decode(ids)

    return case
