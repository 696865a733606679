"""ThinkingBudgetClient against transformers' own server, which serves a tiny model whose every character is a token."""

import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import openai
import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from minitron.families.nemotron_h import FAMILY
from minitron.generation.generate import generate
from minitron.generation.prompts import Tags, write_prompt
from minitron.serving.__main__ import main
from minitron.serving.client import Reply, ThinkingBudgetClient
from minitron.serving.errors import in_one_line
from minitron.walk.store import write_json

PROMPT = "What is 3 plus 4?"
TEMPLATE = "{{ messages[-1].content }} A: {% if enable_thinking is defined %}{{ '<think>' if enable_thinking else '<think></think>' }}{% endif %}"
MAX_TOKENS = 60


@pytest.fixture(scope="module")
def folder(build_model, config_of, tiny, write_checkpoint, tmp_path_factory) -> Path:
    """A checkpoint with a tokenizer of 95 characters: text and tokens turn into each other exactly."""
    path = write_checkpoint(tmp_path_factory.mktemp("served") / "student", build_model(), config_of(tiny) | {"max_position_embeddings": 4096})
    characters = ["<|end|>", "<|pad|>", *map(chr, range(32, 127))]
    tokenizer = Tokenizer(models.WordLevel({character: number for number, character in enumerate(characters)}, unk_token="?"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Split(Regex("."), "isolated"), decoders.Fuse()
    tokenizer.add_special_tokens(characters[:2])
    tokenizer.save(str(path / "tokenizer.json"))
    write_json(path / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>", "pad_token": "<|pad|>",
                                                "clean_up_tokenization_spaces": False, "chat_template": TEMPLATE})  # fmt: skip
    write_json(path / "generation_config.json", {"eos_token_id": 0, "pad_token_id": 1})
    return path


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture(scope="module")
def server(folder, environment, tmp_path_factory):
    """The address of `transformers serve`, once it answers."""
    port, log = free_port(), tmp_path_factory.mktemp("log") / "server.log"
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(folder), "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    with log.open("w") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
    until = time.monotonic() + 120
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            break
        except OSError:
            assert process.poll() is None and time.monotonic() < until, log.read_text()
            time.sleep(0.2)
    yield f"http://127.0.0.1:{port}/v1"
    process.kill()  # asked to end, it would wait for connections that are kept open
    process.wait()


@pytest.fixture
def client(server, folder):
    """A client of the server, with what is given in place of its defaults."""

    def make(url: str = server, model: str = str(folder), **settings) -> ThinkingBudgetClient:
        return ThinkingBudgetClient(url, model, tokenizer=settings.pop("tokenizer", folder), **settings)

    return make


@pytest.fixture(scope="module")
def in_process(folder):
    """The text that the logits processor gives for a budget and tags, by the same checkpoint in this process."""
    from transformers import AutoTokenizer

    model, tokenizer = FAMILY.load(folder), AutoTokenizer.from_pretrained(folder)

    def run(budget: int | None, tags: Tags) -> str:
        prompt = write_prompt(tokenizer, PROMPT, thinking=True)
        (ids,) = generate(model, tokenizer, [prompt], new_tokens=MAX_TOKENS, thinking_budget=budget, tags=tags)
        return tokenizer.decode(ids, skip_special_tokens=True)

    return run


@pytest.fixture(scope="module")
def own_tags(in_process) -> Tags:
    """Tags whose closing one the model comes to by itself after 20 characters."""
    text = in_process(None, Tags())
    closing = text[20:23]
    assert len(text) == MAX_TOKENS and text.find(closing) == 20
    return Tags(closing=closing)


def streamed(pieces) -> tuple[list[str], Reply]:
    found = []
    while True:
        try:
            found.append(next(pieces))
        except StopIteration as end:
            return found, end.value


@pytest.mark.parametrize("budget", [0, 1, 32, 512])
@pytest.mark.parametrize("closes", ["never", "after 20"])
def test_the_text_is_the_logits_processors_and_reasons_no_longer_than_its_budget(budget, closes, client, in_process, own_tags):
    tags = Tags() if closes == "never" else own_tags
    reply = client(tags=tags).ask(PROMPT, thinking_budget=budget, thinking=True, max_tokens=MAX_TOKENS)
    assert reply.text == in_process(budget, tags)
    own = 20 if closes == "after 20" else MAX_TOKENS
    assert reply.reasoning_tokens == len(reply.reasoning) == min(budget, own) and reply.closed_here == (budget < own)
    assert reply.text == reply.reasoning + (tags.closing if budget < MAX_TOKENS or own == 20 else "") + reply.answer


def test_unbudgeted_text_reasons_longer(client, own_tags):
    """The control of the above: without a budget the tag comes after 20 characters, or never."""
    assert client(tags=own_tags).ask(PROMPT, thinking=True, max_tokens=MAX_TOKENS).reasoning_tokens == 20
    reply = client().ask(PROMPT, thinking=True, max_tokens=MAX_TOKENS)
    assert (reply.reasoning_tokens, reply.answer, reply.closed_here, reply.ended) == (MAX_TOKENS, "", False, False)


@pytest.mark.parametrize("budget", [None, 0, 32])
def test_a_stream_gives_the_same_text_piece_by_piece(budget, client):
    arguments = {"thinking_budget": budget, "thinking": True, "max_tokens": MAX_TOKENS}
    pieces, reply = streamed(client().stream(PROMPT, **arguments))
    assert reply == client().ask(PROMPT, **arguments) and "".join(pieces) == reply.text and len(pieces) > 20


def test_a_closing_tag_begun_at_the_end_of_the_budget_is_finished_not_begun_again(client, in_process, own_tags):
    for budget in (21, 22):
        text = client(tags=own_tags).ask(PROMPT, thinking_budget=budget, thinking=True, max_tokens=MAX_TOKENS).text
        assert text.find(own_tags.closing) == 20 and text == in_process(None, own_tags)


def test_reasoning_that_the_template_leaves_open_to_the_model_is_opened_here(client):
    opened = client().ask(PROMPT, thinking_budget=5, max_tokens=MAX_TOKENS)
    assert opened == client().ask(PROMPT, thinking_budget=5, thinking=True, max_tokens=MAX_TOKENS)


def test_reasoning_that_the_model_opens_itself_is_told_from_the_answer(client):
    text = client().ask(PROMPT, max_tokens=MAX_TOKENS).text
    reply = client(tags=Tags(text[:3], text[20:23])).ask(PROMPT, max_tokens=MAX_TOKENS)
    assert (reply.text, reply.reasoning, reply.answer, reply.reasoning_tokens) == (text, text[3:20], text[23:], 17)


def test_without_thinking_a_budget_changes_nothing(client):
    off = client().ask(PROMPT, thinking_budget=5, thinking=False, max_tokens=MAX_TOKENS)
    assert off == client().ask(PROMPT, thinking=False, max_tokens=MAX_TOKENS) and off.reasoning == "" and off.answer == off.text


def test_the_command_prints_the_reply(server, folder, client, capsys):
    command = [PROMPT, "--url", server, "--model", str(folder), "--tokenizer", str(folder), "--thinking", "on", "--max-tokens", "40"]
    assert main([*command, "--budget", "8"]) == 0
    printed = capsys.readouterr()
    assert printed.out == client().ask(PROMPT, thinking_budget=8, thinking=True, max_tokens=40).text + "\n"
    assert printed.err == "8 tokens of reasoning, closed here; cut off by --max-tokens\n"
    assert main([*command, "--budget", "-1"]) == 2
    assert capsys.readouterr().err == "error: thinking_budget is -1; it must be at least 0 (None: no limit)\n"
    assert main([*command, "--url", "http://127.0.0.1:1/v1"]) == 1
    assert capsys.readouterr().err.startswith("error: no answer from http://127.0.0.1:1/v1: ")


# What goes wrong.


@pytest.mark.parametrize(("arguments", "message"), [
    ({"thinking_budget": -1}, "thinking_budget is -1; it must be at least 0 (None: no limit)"),
    ({"max_tokens": 0}, "max_tokens is 0; it must be at least 1"),
    ({"max_tokens": 4096}, "the prompt has 21 tokens and max_tokens is 4,096; together they must be at most 4,096"),
])  # fmt: skip
def test_a_request_that_cannot_be_is_refused_before_it_is_sent(arguments, message, client):
    with pytest.raises(ValueError) as caught:
        client("http://127.0.0.1:1/v1").ask(PROMPT, **arguments)
    assert str(caught.value) == message


def test_a_server_of_another_model_says_so(client, server, folder):
    with pytest.raises(ValueError) as caught:
        client(model="other").ask(PROMPT)
    assert str(caught.value) == f"the server at {server} refuses the request (400): Server is pinned to '{folder}'; requested 'other'."


def test_a_field_that_the_server_does_not_know_is_said(client):
    with pytest.raises(ValueError, match=r"refuses the request \(422\): Unexpected fields in the request: \{'skip_special_tokens'\}"):
        client(extra_body={"skip_special_tokens": False}).ask(PROMPT)


@pytest.mark.parametrize("streaming", [False, True])
def test_no_server_is_one_line(streaming, client):
    with pytest.raises(ConnectionError) as caught:
        list(client("http://127.0.0.1:1/v1", max_retries=0).stream(PROMPT)) if streaming else client("http://127.0.0.1:1/v1", max_retries=0).ask(PROMPT)
    assert str(caught.value).startswith("no answer from http://127.0.0.1:1/v1: ") and "\n" not in str(caught.value)


def test_a_server_that_takes_too_long_is_given_up(client, server):
    with pytest.raises(TimeoutError) as caught:
        client(timeout_seconds=0.02, max_retries=0).ask(PROMPT, max_tokens=MAX_TOKENS)
    assert str(caught.value) == f"the server at {server} said nothing for 0.02 s; timeout_seconds gives it longer"


@pytest.fixture
def unreliable(server):
    """An address that drops as many connections as it is told to, then passes the others on to the server."""
    listener = socket.create_server(("127.0.0.1", 0))
    target = ("127.0.0.1", int(server.split(":")[2].split("/")[0]))
    dropped = []

    def pump(source: socket.socket, sink: socket.socket) -> None:
        while data := source.recv(65536):
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)

    def serve(drops: int) -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:  # closed: the test is over
                return
            if len(dropped) < drops:
                dropped.append(connection)  # before the close: the client may count them as soon as it sees one
                connection.close()
                continue
            onward = socket.create_connection(target)
            for pair in ((connection, onward), (onward, connection)):
                threading.Thread(target=pump, args=pair, daemon=True).start()

    def start(drops: int) -> str:
        threading.Thread(target=serve, args=(drops,), daemon=True).start()
        return f"http://127.0.0.1:{listener.getsockname()[1]}/v1"

    yield start, dropped
    listener.close()


def test_a_dropped_request_is_sent_again(unreliable, client):
    start, dropped = unreliable
    reply = client(start(drops=2), max_retries=2).ask(PROMPT, max_tokens=8)
    assert len(reply.text) == 8 and len(dropped) == 2


def test_a_request_that_is_dropped_too_often_is_one_line(unreliable, client):
    start, dropped = unreliable
    with pytest.raises(ConnectionError, match="^no answer from .*[^\n]$"):
        client(start(drops=9), max_retries=1).ask(PROMPT, max_tokens=8)
    assert len(dropped) == 2


def test_an_error_in_the_middle_of_a_stream_is_one_line():
    with pytest.raises(ConnectionError) as caught, in_one_line("URL", 1):
        raise openai.APIError("An error occurred", request=None, body="CUDA out of memory\nmore")
    assert str(caught.value) == "the server at URL broke off: CUDA out of memory"


# Tokenizers.


def test_a_tokenizer_that_is_not_there_or_lacks_the_tags_is_refused(client, tmp_path):
    with pytest.raises(ValueError, match="tokenizer is .*nowhere.*, which cannot be loaded: [^\n]*$"):
        client(tokenizer=str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="the tokenizer has no tokens for the thinking tag '⟨'; name the tags that it knows"):
        client(tags=Tags("<think>", "⟨"))


def test_tags_that_servers_hide_are_refused_unless_the_server_is_told_to_show_them(folder, tmp_path):
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    tokenizer.add_special_tokens(["</think>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="the thinking tag '</think>' is a special token, which servers leave out of their text"):
        ThinkingBudgetClient("http://127.0.0.1:1/v1", "student", tokenizer=tmp_path)
    ThinkingBudgetClient("http://127.0.0.1:1/v1", "student", tokenizer=tmp_path, extra_body={"skip_special_tokens": False})


def test_the_client_needs_no_torch(environment):
    code = ("import sys; sys.modules['torch'] = None; import minitron.serving.__main__; from transformers import AutoTokenizer; "
            "print(minitron.serving.client.ThinkingBudgetClient.__name__)")  # fmt: skip
    finished = subprocess.run([sys.executable, "-c", code], env=environment, text=True, capture_output=True)
    assert finished.stdout.strip() == "ThinkingBudgetClient", finished.stderr
