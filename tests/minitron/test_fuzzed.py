"""What `make fuzz` has found, as small as it gets: a line in place of a trace, beside test_nothing_let_in.py; and that the fuzzing itself works."""

import json
import struct
import subprocess
import sys

import pytest
import torch

from distill.states import FACTS_FILE, TENSORS_FILE, load_weights, newest_state
from memory_budget.hf_config import architecture_from_config
from minitron.door.composed import compose_settings
from minitron.door.mistakes import users_mistakes
from minitron.generation.templates import check_template, plain_messages, render
from minitron.settings.gguf_header import GGUFHeader, gguf_config, read_gguf_header
from minitron.walk.store import check_format


@pytest.fixture
def line(capsys):
    """The one line that work ends in."""

    def of(work) -> str:
        with pytest.raises(SystemExit) as end, users_mistakes():
            work()
        said = capsys.readouterr().err
        assert end.value.code == 2 and said.count("\n") == 1
        return said

    return of


@pytest.mark.parametrize(("words", "said"), [
    (("distill.phases=${run_name}",), "distill.phases is 'tiny', but distill.phases is a list"),
    (("scoring.protect=${seed}",), "scoring.protect is 0, but scoring.protect is a list"),
    (("scoring.ceilings=${run_name}",), "scoring.ceilings is 'tiny', but scoring.ceilings is a mapping"),
    (("+=[1, 2]",), "'+=[1, 2]' names no setting"),
    (("~",), "'~' names no setting"),
    (("+search.mamba_heads.values.x=1",), "search.mamba_heads.values.x is no setting; did you mean search.mamba_heads.values?"),
    (("+search.mamba_heads.values.0=1",), "search.mamba_heads.values.0 is no setting"),
    (("data=${seed}",), "data is 0, but data is a group of settings"),
    (("+foo=1",), "foo is no setting"),
    (("teacher.train.learning_rate=1" + "0" * 400,), "teacher.train.learning_rate: int too large to convert to float"),
])  # fmt: skip
def test_settings_that_are_something_else(words, said, line):
    assert said in line(lambda: compose_settings(*words))


def test_the_settings_are_right_without_them():
    assert compose_settings("distill.phases=[{tokens: 65536}]", "seed=1").distill.phases[0].tokens == 65536


@pytest.mark.parametrize(("config", "said"), [
    ({"model_type": []}, "model_type ([]) is not supported"),
    ({"model_type": "llama", "num_hidden_layers": 2**40}, "num_hidden_layers (1099511627776) must be at most 16,384"),
])  # fmt: skip
def test_a_config_that_no_model_has(config, said, line):
    assert said in line(lambda: architecture_from_config(config))


@pytest.mark.parametrize("template", ["{%- break %}", "{% for a in messages %}{% endfor %}{%- continue %}"])
def test_a_template_that_python_cannot_compile(template, chat_tokenizer, line):
    tokenizer = chat_tokenizer("mistral")
    tokenizer.chat_template = template
    check_template(template)
    assert "the chat template cannot write it (SyntaxError" in line(lambda: render(tokenizer, [{"role": "user", "content": "x"}]))


def test_a_conversation_that_is_none(line):
    assert "the conversation is 5; it must be a list" in line(lambda: plain_messages(5))


def test_a_gguf_of_arrays_within_arrays(tmp_path, line):
    path = tmp_path / "a.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1) + b"a" + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 5000)
    assert "its metadata nests arrays without end" in line(lambda: read_gguf_header(path))


def test_a_gguf_whose_numbers_are_none(tmp_path, line):
    def metadata(rope: float) -> GGUFHeader:
        sizes = dict.fromkeys(("embedding_length", "feed_forward_length", "block_count", "context_length", "vocab_size", "attention.head_count"), 4)
        named = {f"llama.{name}": value for name, value in {**sizes, "attention.layer_norm_rms_epsilon": 1e-5, "rope.freq_base": rope}.items()}
        return GGUFHeader(tmp_path, {"general.architecture": "llama", **named}, (), 0)

    assert gguf_config(metadata(10000.0))["rope_parameters"]["rope_theta"] == 10000.0
    assert "llama.rope.freq_base is nan; it must be a finite number" in line(lambda: gguf_config(metadata(float("nan"))))


def test_a_value_without_end_is_shown_in_part(line):
    assert len(line(lambda: compose_settings("stage=" + "x" * 10**5))) < 2100


@pytest.mark.parametrize("found", ['{"format": {}}', '{"format": "2"}', "[" * 10**5])
def test_an_earlier_result_that_says_no_format(found, tmp_path):
    (tmp_path / "store" / "data" / "0").mkdir(parents=True)
    (tmp_path / "store" / "data" / "0" / "done.json").write_text(found)
    check_format(str(tmp_path), lambda _: None)


@pytest.mark.parametrize(("facts", "header", "said"), [
    ("[]", None, "state.json is not what was written"), ("[" * 10**5, None, "state.json is not what was written"),
    ("{}", b"{", "step-1 cannot be read"),
    ("{}", json.dumps({"model.weight": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode(), "of another model"),
])  # fmt: skip
def test_a_state_that_is_none(facts, header, said, tmp_path, line):
    state = tmp_path / "states" / "step-1"
    state.mkdir(parents=True)
    (state / FACTS_FILE).write_text(facts)
    (state / TENSORS_FILE).write_bytes(struct.pack("<Q", len(header)) + header + bytes(4) if header else b"")
    assert said in line(lambda: load_weights(newest_state(tmp_path), torch.nn.Linear(3, 2)))


EVERY_BYTE = """
import io, sys, pathlib, pyarrow, pyarrow.parquet
from minitron.formats.files import blocks_of
path, sink = pathlib.Path(sys.argv[1]), io.BytesIO()
pyarrow.parquet.write_table(pyarrow.table({"text": [None, "a"]}), sink)
def read():
    return sum(block.count for block in blocks_of(path))
def ask():
    return pyarrow.parquet.ParquetFile(path).metadata.row_group(0).column(0).total_uncompressed_size
for place, byte in enumerate(sink.getvalue()):
    path.write_bytes(sink.getvalue()[:place] + bytes([byte ^ 64]) + sink.getvalue()[place + 1 :])
    try:
        {"read": read, "ask": ask}[sys.argv[2]]()
    except Exception as error:
        assert sys.argv[2] == "ask" or str(error).startswith("data.files: a.parquet"), error
"""


@pytest.mark.parametrize(("way", "ends"), [("read", 0), ("ask", -6)])  # the control asks for what a column alone takes
def test_no_bit_of_a_parquet_file_ends_the_process(way, ends, environment, tmp_path):
    done = subprocess.run([sys.executable, "-c", EVERY_BYTE, tmp_path / "a.parquet", way], env=environment, capture_output=True, text=True)
    assert done.returncode == ends, done.stderr[-2000:]



def test_the_fuzzing_counts_its_cases_and_finds_none(environment, repository):
    """A few of the surfaces, for seconds."""
    command = [sys.executable, "tests/fuzz", "--count", "60", "--surface", "export_config", "--surface", "index", "--surface", "settings, as typed"]
    finished = subprocess.run(command, cwd=repository, env=environment, capture_output=True, text=True)
    assert finished.returncode == 0 and "findings = 0" in finished.stdout, finished.stdout + finished.stderr
    rows = [line.split(" | ") for line in finished.stdout.splitlines() if line.startswith("| ")][1:]
    assert [row[1:2] + row[4:5] for row in rows] == [["60", "0"]] * 3
    assert all(int(row[2]) and int(row[3]) for row in rows)  # answered and refused: the mutations are neither harmless nor noise


def test_the_fuzzing_tells_of_a_trace(environment, repository, tmp_path):
    """The control: a surface whose code is broken."""
    script = """
import runpy, sys
sys.path.insert(0, "tests/fuzz")
import fuzz_words
fuzz_words.for_hydra = lambda words: {}[0]
sys.argv = ["tests/fuzz", "--count", "5", "--surface", "settings, as typed"]
sys.path_importer_cache.clear()
runpy.run_path("tests/fuzz/__main__.py", run_name="__main__")
"""
    finished = subprocess.run([sys.executable, "-c", script], cwd=repository, env=environment, capture_output=True, text=True)
    assert finished.returncode == 1 and "settings, as typed-0: KeyError at" in finished.stdout, finished.stdout + finished.stderr
    assert "findings = 5" in finished.stdout
