"""ThinkingBudgetClient against servers that differ from the usual one in what they answer: each test scripts a real server's replies."""

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from minitron.serving.__main__ import main
from minitron.serving.client import ThinkingBudgetClient


class Answers(BaseHTTPRequestHandler):
    """Answers every request as the server's `answer` says: of the request's fields, (status, content type, body)."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(asked)
        status, kind, body = self.server.answer(asked)
        data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Nothing on the console."""


@pytest.fixture(scope="module")
def server():
    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture(scope="module")
def folder(chat_tokenizer, tmp_path_factory) -> Path:
    """Tokenizers by the names of their templates."""
    path = tmp_path_factory.mktemp("tokenizers")
    for name in ("deepseek_r1", "llama3", "qwen3"):
        chat_tokenizer(name).save_pretrained(path / name)
    return path


@pytest.fixture(scope="module")
def client(server, folder) -> Callable[..., ThinkingBudgetClient]:
    """The client of a server that answers as it is told to, one for each template: they take a while to make."""
    clients = {}

    def make(answer: Callable[[dict], tuple], template: str = "deepseek_r1") -> ThinkingBudgetClient:
        server.answer, server.asked = answer, []
        if template not in clients:
            clients[template] = ThinkingBudgetClient(url_of(server), "student", tokenizer=folder / template, max_retries=0)
        return clients[template]

    return make


def url_of(server) -> str:
    return f"http://127.0.0.1:{server.server_address[1]}/v1"


def answering(*choices: dict, usage: dict | None = None, **fields) -> Callable[[dict], tuple]:
    """A completion with these choices, as one object or as a stream of a part for each."""

    def answer(asked: dict) -> tuple:
        if not asked["stream"]:
            return 200, "application/json", {"id": "1", "object": "text_completion", "choices": list(choices), **fields} | ({"usage": usage} if usage else {})
        last = [{"choices": [], "usage": usage}] if usage else []
        parts = [{"choices": []}, {"object": "ping"}, {"choices": None}, *({"choices": [choice]} for choice in choices), *last]
        return 200, "text/event-stream", "".join(f"data: {json.dumps(part)}\n\n" for part in parts) + "data: [DONE]\n\n"

    return answer


def reply_of(client: ThinkingBudgetClient, streaming: bool, **arguments):
    if not streaming:
        return client.ask("Hello", **arguments)
    pieces = client.stream("Hello", **arguments)
    text = ""
    while True:
        try:
            text += next(pieces)
        except StopIteration as end:
            assert end.value.text == text
            return end.value


BOTH_WAYS = pytest.mark.parametrize("streaming", [False, True])


@BOTH_WAYS
@pytest.mark.parametrize(("reason", "most", "ended", "stopped"), [
    ("stop", 9, True, ""), ("eos", 9, True, ""), ("eos_token", 9, True, ""), ("stop_sequence", 9, True, ""), ("end_turn", 9, True, ""), (None, 9, True, ""),
    ("length", 4, False, ""), ("MAX_TOKENS", 4, False, ""), (None, 4, False, ""), ("stop", 4, True, ""), ("what is this", 4, False, ""),
    ("length", 9, False, ""), ("abort", 9, False, "abort"), ("content_filter", 9, False, "content_filter"), ("error", 4, False, "error"),
])  # fmt: skip
def test_a_text_ends_for_many_reasons(reason, most, ended, stopped, streaming, client):
    """Four tokens come, the model's own last one included."""
    asked = client(answering({"text": "abc", "finish_reason": reason}, usage={"completion_tokens": 4, "prompt_tokens": 1}))
    reply = reply_of(asked, streaming, max_tokens=most)
    assert (reply.text, reply.ended, reply.stopped, reply.note) == ("abc", ended, stopped, "")


@BOTH_WAYS
@pytest.mark.parametrize("usage", [None, {"prompt_tokens": 3}, {"completion_tokens": None}, {"total_tokens": 9}])
def test_counts_that_are_missing_are_counted_here(usage, streaming, client, server):
    asked = client(answering({"text": "abcde", "finish_reason": "length"}, usage=usage))
    reply = reply_of(asked, streaming, thinking_budget=5, max_tokens=20)
    assert (reply.reasoning, reply.reasoning_tokens, reply.closed_here, reply.answer) == ("abcde", 5, True, "abcde")
    assert [one["max_tokens"] for one in server.asked] == [5, 14]


@BOTH_WAYS
def test_a_text_that_a_server_stopped_is_not_gone_on_with(streaming, client, server):
    asked = client(answering({"text": "abc", "finish_reason": "content_filter"}, usage={"completion_tokens": 3}))
    reply = reply_of(asked, streaming, thinking_budget=5, max_tokens=20)
    assert (reply.reasoning, reply.answer, reply.stopped, len(server.asked)) == ("abc", "", "content_filter", 1)


@BOTH_WAYS
@pytest.mark.parametrize("choice", [{"text": "ab"}, {"message": {"role": "assistant", "content": "ab"}}, {"delta": {"content": "ab"}}, {"text": None}, {}])
def test_a_choice_has_one_shape_or_another(choice, streaming, client):
    reply = reply_of(client(answering({"index": 0, "finish_reason": "stop", **choice}, usage={"completion_tokens": 2})), streaming, max_tokens=9)
    assert reply.text == ("ab" if "ab" in str(choice) else "") and reply.ended


def test_a_server_that_knows_no_stream_options_is_asked_without(client, server):
    def answer(asked: dict) -> tuple:
        if "stream_options" in asked:
            return 422, "application/json", {"detail": [{"loc": ["body", "stream_options"], "msg": "Extra inputs are not permitted"}]}
        return answering({"text": "abcd", "finish_reason": "length"})(asked)

    assert reply_of(client(answer), True, thinking_budget=4, max_tokens=12).reasoning_tokens == 4
    assert ["stream_options" in asked for asked in server.asked] == [True, False, True, False]


@BOTH_WAYS
@pytest.mark.parametrize("budget", [None, 0, 3])
def test_a_template_applied_again_is_noticed(budget, streaming, client):
    """The control: of its own tokens, and of one more that begins a text, nothing is said."""

    def counting(more: int) -> Callable[[dict], tuple]:
        def answer(asked: dict) -> tuple:
            tokens = len(asked_client._tokenizer(asked["prompt"])["input_ids"])
            return answering({"text": "abc", "finish_reason": "length"}, usage={"completion_tokens": 3, "prompt_tokens": tokens + more})(asked)

        return answer

    for more in (0, 1, 7):
        asked_client = client(counting(more))
        note = reply_of(asked_client, streaming, thinking_budget=budget, max_tokens=12).note
        assert ("it seems to apply a chat template to what has been through one" in note) == (more == 7) and "\n" not in note


ERRORS = {
    "OpenAI's": (400, {"error": {"message": "too long", "type": "invalid_request_error"}}),
    "a word": (400, {"error": "too long"}),
    "vLLM's of old": (400, {"object": "error", "message": "too long", "code": 400}),
    "FastAPI's": (422, {"detail": [{"loc": ["body"], "msg": "too long"}]}),
    "a list": (400, [{"error": {"message": "too long"}}]),
    "in two levels": (400, {"error": {"error": {"detail": "too long\nby far"}}}),
    "several": (400, {"errors": [{"message": "too long"}, {"message": "too hot"}]}),
    "no words": (404, {"code": "too long"}),
    "text": (413, "too long\nby far"),
    "of the server": (500, {"error": "too long"}),
    "a page": (503, "<html>too long</html>"),
    "with a good status": (200, {"error": {"message": "too long"}}),
    "with a good status, of another shape": (200, {"object": "error", "message": "too long"}),
    "a list with a good status": (200, ["too long"]),
}  # fmt: skip


@pytest.mark.parametrize("shape", ERRORS)
def test_what_a_server_says_of_an_error_is_one_line(shape, client, server):
    status, body = ERRORS[shape]
    kind = "text/html" if isinstance(body, str) else "application/json"
    with pytest.raises(ValueError if 400 <= status < 500 else ConnectionError, match="too long") as caught:
        client(lambda asked: (status, kind, body)).ask("Hello")
    assert str(caught.value).startswith(f"the server at {url_of(server)} ") and "\n" not in str(caught.value)


@BOTH_WAYS
@pytest.mark.parametrize(("kind", "body"), [("text/html", "<html>hello</html>"), ("application/json", "{"), ("application/json", "null"),
                                            ("application/json", '{"choices": []}'), ("application/json", "{}"), ("text/event-stream", "data: {\n\n"),
                                            ("text/event-stream", 'data: {"error": {"message": "out of memory"}}\n\n'), ("text/plain", "")])  # fmt: skip
def test_what_is_no_completion_is_one_line(kind, body, streaming, client, server):
    with pytest.raises(ConnectionError) as caught:
        reply_of(client(lambda asked: (200, kind, body)), streaming)
    assert str(caught.value).startswith(f"the server at {url_of(server)} ") and "\n" not in str(caught.value)


def test_a_stream_that_breaks_off_is_one_line(client, server):
    def answer(asked: dict) -> tuple:
        return 200, "text/event-stream", 'data: {"choices": [{"text": "ab"}]}\n\ndata: {"error": "gone"}\n\n'

    pieces = client(answer).stream("Hello")
    assert next(pieces) == "ab"
    with pytest.raises(ConnectionError, match=f"the server at {url_of(server)} broke off: gone"):
        next(pieces)


def test_the_command_says_what_is_odd(client, server, folder, capsys):
    command = ["Hello", "--url", url_of(server), "--model", "student", "--tokenizer"]
    client(answering({"text": "ab", "finish_reason": "abort"}, usage={"completion_tokens": 2, "prompt_tokens": 99}))
    assert main([*command, str(folder / "llama3")]) == 1
    note, error = capsys.readouterr().err.splitlines()
    assert note.startswith("note: the server at") and error == f"error: the server at {url_of(server)} stopped the reply (abort)"
    client(answering({"text": "ab", "finish_reason": "eos"}))
    assert main([*command, str(folder / "qwen3"), "--thinking", "off"]) == 0
    assert server.asked[-1]["prompt"].endswith("<think>\n\n</think>\n\n") and capsys.readouterr().err.endswith("; ended\n")
    assert main([*command, str(folder / "llama3"), "--thinking", "off"]) == 2
    assert capsys.readouterr().err.startswith("error: thinking is off, but the chat template has no switch")


def test_a_tag_that_a_user_writes_opens_no_reasoning(client, server):
    """The control: where the template opens it, it is closed after the budget."""
    reply = client(answering({"text": "abc", "finish_reason": "length"}), "llama3").ask("What is <think>?", max_tokens=9)
    assert (reply.reasoning, reply.answer, len(server.asked)) == ("", "abc", 1)
    asked = client(answering({"text": "abc", "finish_reason": "length"}))
    assert asked.ask("What is </think>?", thinking_budget=3, max_tokens=9).reasoning == "abc" and len(server.asked) == 2
