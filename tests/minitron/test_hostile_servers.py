"""ThinkingBudgetClient against servers that stall, break off, send anything at all, or never end: a right result or one line, in bounded time and memory."""

import gzip
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import repeat

import pytest

from minitron.serving.__main__ import main
from minitron.serving.bounds import BASE_BYTES, BYTES_PER_TOKEN
from minitron.serving.client import ThinkingBudgetClient

STALL_SECONDS = 0.5
SOCKET_BYTES = 2**24  # what lies between a server and a client that has gone


class Writes(BaseHTTPRequestHandler):
    """Answers as the server's `answer` says: of the request's fields, (status, headers, chunks of the body). The connection then ends, as HTTP/1.0's."""

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(asked)
        status, headers, chunks = self.server.answer(asked)
        with suppress(OSError):
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            for chunk in chunks:
                self.wfile.write(chunk)
                self.server.sent += len(chunk)

    def log_message(self, *_: object) -> None:
        """Nothing on the console."""


@pytest.fixture(scope="module")
def server():
    with ThreadingHTTPServer(("127.0.0.1", 0), Writes) as server:
        server.daemon_threads, server.block_on_close = True, False
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture(scope="module")
def tokenizer(chat_tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    chat_tokenizer("deepseek_r1").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def _client(server, tokenizer):
    url = f"http://user:password-1@127.0.0.1:{server.server_address[1]}/v1"
    return ThinkingBudgetClient(url, "student", tokenizer=tokenizer, max_retries=1, timeout_seconds=STALL_SECONDS, longest_seconds=1.5)


@pytest.fixture
def client(_client, server) -> Callable[..., ThinkingBudgetClient]:
    """The client of a server that answers as it is told to."""

    def make(chunks: Callable[[], Iterator[bytes]], status: int = 200, **headers: str) -> ThinkingBudgetClient:
        def answer(asked: dict) -> tuple:
            kind = {"Content-Type": "text/event-stream" if asked["stream"] else "application/json"}
            return status, kind | {name.replace("_", "-"): value for name, value in headers.items()}, chunks()

        server.answer, server.asked, server.sent = answer, [], 0
        return _client

    return make


def part(text: str, reason: str | None = None) -> bytes:
    return b"data: " + json.dumps({"choices": [{"text": text, "finish_reason": reason}]}).encode() + b"\n\n"


def streamed(client: ThinkingBudgetClient, **arguments):
    """The reply, and the text as it came."""
    pieces, text = client.stream("Hello", **arguments), []
    while True:
        try:
            text.append(next(pieces))
        except StopIteration as end:
            assert end.value.text == "".join(text)
            return end.value


def refused(client: ThinkingBudgetClient, kind: type = ConnectionError, *, streaming: bool = True, **arguments) -> str:
    """The one line, which comes in time and without the password in the address."""
    begun = time.monotonic()
    with pytest.raises(kind) as caught:
        streamed(client, **arguments) if streaming else client.ask("Hello", **arguments)
    said = str(caught.value)
    assert time.monotonic() - begun < 10 and "\n" not in said and "password-1" not in said and len(said) < 600
    return said


def test_a_stream_that_is_right_is_taken(client):
    """The control for all that follows."""
    reply = streamed(client(lambda: iter([part("ab"), part("c", "stop"), b"data: [DONE]\n\n"])), max_tokens=9)
    assert (reply.text, reply.ended) == ("abc", True)


def stalled(*chunks: bytes) -> Iterator[bytes]:
    yield from chunks
    time.sleep(3 * STALL_SECONDS)


@pytest.mark.parametrize("chunks", [(), (part("ab"),), (b'data: {"choi',)])
def test_a_server_that_stalls_is_given_up(chunks, client):
    assert "said nothing for 0.5 s" in refused(client(lambda: stalled(*chunks)), TimeoutError)


@pytest.mark.parametrize("last", [b"", b": alive\n\n", b'data: {"choices": [{"te'])
def test_a_stream_that_ends_in_its_middle_is_no_reply(last, client):
    assert "broke off: its stream ended after 2 tokens" in refused(client(lambda: iter([part("ab"), last])))


def test_a_connection_that_drops_is_one_line(client):
    """Whoever says how long the body is, and then sends less."""
    for streaming in (True, False):
        assert "no answer from" in refused(client(lambda: iter([part("ab")]), Content_Length="900"), streaming=streaming)


@pytest.mark.parametrize("body", [
    b"[" * 100_000, b'{"choices": ' + b"[" * 100_000, b'{"usage": {"prompt_tokens": 1' + b"0" * 9000 + b"}}", b'{"choices": 5}', b'{"choices": "abc"}',
    b"[1, 2]", b'{"choices": [1, null, "ab"]}', b'{"choices": {"text": "ab"}}', b'{"choices": [{"text": "\xe2\x82"}]}', b"\xff\xfe", b'{"choices"', b"NaN",
    b'{"id": [[1, 2]], "object": "text_completion"}',
])  # fmt: skip
@pytest.mark.filterwarnings("error")  # which would stand on stderr before the line
def test_a_body_that_is_no_completion_is_one_line(body, client):
    said = [refused(client(lambda: iter([body])), streaming=False), refused(client(lambda: iter([b"data: " + body + b"\n\ndata: [DONE]\n\n"])))]
    assert all(one.startswith("the server at http://(hidden)@127.0.0.1") for one in said), said


@pytest.mark.parametrize(("usage", "tokens"), [({"completion_tokens": -5}, 3), ({"completion_tokens": 10**30}, 9), ({"completion_tokens": True}, 3),
                                               ({"completion_tokens": "7"}, 3), ([], 3), ("ab", 3)])  # fmt: skip
def test_counts_that_cannot_be_are_not_believed(usage, tokens, client, server):
    def chunks() -> Iterator[bytes]:
        return iter([part("abc", "length"), b"data: " + json.dumps({"choices": [], "usage": usage}).encode() + b"\n\n"])

    reply = streamed(client(chunks), thinking_budget=9, max_tokens=20)
    assert reply.reasoning_tokens == tokens and all(0 < asked["max_tokens"] <= 20 for asked in server.asked)


@pytest.mark.parametrize(("pieces", "text"), [(["a\ud83d", "\ude00b"], "a😀b"), (["a\ud83d", "b"], "a\ufffdb"), (["ab\ud83d"], "ab"), (["ab\ufffd"], "ab"),
                                              (["\ude00ab"], "\ufffdab"), (["a\ufffd", "b"], "a\ufffdb")])  # fmt: skip
def test_halves_of_a_character_are_put_together_or_shown_as_unknown(pieces, text, client):
    """What ends the text in its half is left out."""
    assert streamed(client(lambda: iter([*map(part, pieces), part("", "stop")]))).text == text


def test_a_million_tokens_are_read_where_they_were_asked_for_and_refused_where_not(client):
    def chunks() -> Iterator[bytes]:
        return iter([*repeat(part("ab cd efg." * 100), 1000), part("", "stop")])

    reply = streamed(client(chunks), max_tokens=1_100_000)
    assert len(reply.text) == 1_000_000 and reply.ended
    assert "goes on beyond the tokens that it was asked for" in refused(client(chunks), max_tokens=1000)


ENDLESS = {
    "text": (part("ab cd "), "goes on beyond the tokens"),
    "half a character": (part("\ufffd"), "goes on beyond the tokens"),
    "a line": (b"data: " + b"a" * 2**16, "sends one part of a stream of more than"),
    "no text": (part(""), "was still sending after 1.5 s"),
    "signs of life": (b": alive\n\n", "was still sending after 1.5 s"),
    "empty lines": (b"\n" * 2**10, "was still sending after 1.5 s"),
}


@pytest.mark.parametrize("what", ENDLESS)
def test_an_endless_stream_ends(what, client, server):
    chunk, said = ENDLESS[what]
    assert said in refused(client(lambda: repeat(chunk)), (ConnectionError, TimeoutError), max_tokens=9)
    if "of more than" in said:
        assert server.sent < BASE_BYTES + 9 * BYTES_PER_TOKEN + SOCKET_BYTES


@pytest.mark.parametrize("status", [200, 500])
def test_an_endless_body_is_read_no_further_than_any_answer_goes(status, client, server):
    said = refused(client(lambda: repeat(b'{"choices": "' + b"a" * 2**16), status=status), streaming=False, max_tokens=9)
    assert "sends an answer of more than" in said and server.sent < 2 * (BASE_BYTES + 9 * BYTES_PER_TOKEN + SOCKET_BYTES)


def test_a_packed_body_is_refused(client):
    """It may unpack to anything, and was not asked for."""
    bomb = gzip.compress(b'{"choices": [{"text": "' + b"a" * 2**26)
    assert "packed by 'gzip'" in refused(client(lambda: iter([bomb]), Content_Encoding="gzip"), streaming=False)


def test_a_busy_server_is_waited_for_as_long_as_it_asks(client, server):
    told = client(lambda: iter([part("ab", "stop")]))
    right, begun = server.answer, time.monotonic()
    server.answer = lambda asked: right(asked) if server.asked[1:] else (429, {"Retry-After": "0.3"}, [b"busy"])
    assert streamed(told).text == "ab" and time.monotonic() - begun > 0.3


def test_a_busy_server_that_asks_for_an_hour_is_not_waited_for(client, server):
    said = refused(client(lambda: iter([b'{"error": "busy"}']), status=429, Retry_After="3600"))
    assert said.endswith("takes no request now (429): busy; it asks to come again in 3600 s") and len(server.asked) == 1


def test_a_key_that_a_server_repeats_is_not_said(client):
    said = refused(client(lambda: iter([b'{"error": {"message": "Incorrect API key provided: sk-proj-aaaabbbbccccddddeeee"}}']), status=401), ValueError)
    assert said.endswith("Incorrect API key provided: (hidden)")


def test_the_command_says_no_password(tokenizer, capsys):
    """And exits with 1: it is the server's fault."""
    assert main(["Hello", "--url", "http://user:password-1@127.0.0.1:9/v1", "--model", "student", "--tokenizer", str(tokenizer)]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "password-1" not in said


@pytest.mark.parametrize("url", ["http://[", "localhost", "", "ftp://127.0.0.1/v1", "http://127.0.0.1:99999/v1"])
def test_an_address_that_is_none_is_one_line(url, tokenizer, capsys):
    assert main(["Hello", "--url", url, "--model", "student", "--tokenizer", str(tokenizer)]) in (1, 2)
    assert capsys.readouterr().err.count("\n") == 1
