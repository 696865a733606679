"""Surfaces that are words: settings as they are typed, and what a server replies."""

import os
import random
import re
from collections.abc import Callable
from pathlib import Path

from fuzz_mutations import NUMBERS, TEXTS, as_bytes, mutated_bytes, mutated_value

from minitron.settings.names import setting_types
from minitron.settings.words import for_hydra

Case = Callable[[random.Random], None]
VALUES = [*map(str, NUMBERS), *TEXTS, "null", "[]", "[1, 2]", "{low: 0.5, high: 1}", "'a,b'", '"', "[", "{", "}", "${seed}", "${", "${oc.env:NOWHERE}",
          "${a.b}", "l4", "24", "1e6", "a,b", "a=b", "choice(1,2)", "range(1,5)", "=", "\\", "\\'", "'", "true", "auto", "glob(*)", "a b", "*", "~", "#",
          "!!python/object:os.system", "${oc.decode:x}"]  # fmt: skip
FLAGS = ["-m", "--cfg=job", "-h", "--config-dir=/nowhere", "--config-dir", "--help", "--multirun", "--info", "-c", "hydra", "--resolve", "--x", "-", "--"]
NAMES = ["budget", "search.hidden", "search", "teacher", "experiment", "hydra.run.dir", "data", "search.num_layers", "foo", "stage", "budget.name", "a.b.c", "",
         "search.fixed", "distill.phases", "followed"]  # fmt: skip


def _word(chance: random.Random, settings: list[str]) -> str:
    if chance.random() < 0.06:
        return chance.choice(FLAGS)
    name = chance.choice(settings if chance.random() < 0.7 else NAMES)
    value = chance.choice(VALUES)
    if chance.random() < 0.15:
        value = mutated_bytes(value.encode("utf-8", "surrogatepass"), chance).decode("utf-8", "surrogateescape")
    return chance.choice(["", "", "", "", "", "+", "++", "~"]) + name + chance.choice(["=", "=", "=", "=", "=", "", "==", ".x="]) + value


def words(_folder: Path) -> Case:
    """What is typed, made what Hydra reads."""
    settings = sorted(setting_types())

    def case(chance: random.Random) -> None:
        for_hydra([_word(chance, settings) for _ in range(chance.choice([1, 1, 2, 4]))])

    return case


def composition(folder: Path) -> Case:
    """Settings composed of what is typed, checked, and, where the teacher is a model of one's own, followed."""
    from hydra.core.global_hydra import GlobalHydra

    from minitron.door.composed import compose_settings
    from minitron.settings.teachers import STORED_FOLDER

    settings, working = sorted(setting_types()), folder / "here"
    working.mkdir(exist_ok=True)
    os.chdir(working)

    def case(chance: random.Random) -> None:
        typed = [_word(chance, settings) for _ in range(chance.choice([1, 1, 2]))]
        own = [f"teacher.path={STORED_FOLDER}", "budget=0.01"] if chance.random() < 0.2 else []
        try:
            compose_settings(*own, *(word for word in typed if not word.startswith("-")))
        finally:
            GlobalHydra.instance().clear()

    return case


def replies(folder: Path) -> Case:
    """What a server answers, whole and as a stream, through the client and its package."""
    import threading
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

    from fuzz_text import _tokenizer

    from minitron.serving.client import ThinkingBudgetClient

    class Server(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            status, kind, body = self.server.answer
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Nothing on the console."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    server.daemon_threads, server.handle_error = True, lambda *_: None  # a client that goes is no news of the client's
    threading.Thread(target=server.serve_forever, daemon=True).start()
    _tokenizer(folder)
    client = ThinkingBudgetClient(f"http://127.0.0.1:{server.server_address[1]}/v1", "x", tokenizer=folder, max_retries=0, timeout_seconds=5)
    whole = {"id": "1", "object": "text_completion", "choices": [{"text": "abc", "index": 0, "finish_reason": "stop"}], "usage": {"completion_tokens": 3}}
    error = {"error": {"message": "no", "type": "x"}}

    def case(chance: random.Random) -> None:
        streams, status = chance.random() < 0.6, chance.choice([200] * 8 + [400, 404, 422, 500])
        number = chance.choice([1, 2, 3]) if streams else 1
        parts = [as_bytes(mutated_value(chance.choice([whole, whole, whole, error]), chance), chance) for _ in range(number)]
        body = b"".join(b"data: " + part + b"\n\n" for part in parts) + b"data: [DONE]\n\n" if streams else parts[0]
        server.answer = status, chance.choice(["text/event-stream" if streams else "application/json"] * 9 + ["text/html"]), body
        budget = chance.choice([None, 2])
        try:
            if streams:
                for piece in client.stream("hi", thinking_budget=budget, max_tokens=9):
                    piece.encode()
            else:
                client.ask("hi", thinking_budget=budget, max_tokens=9)
        except (ConnectionError, TimeoutError) as failure:  # the server's fault, said as such
            if not re.match(r"(the server at|no answer from) http", str(failure)) or "\n" in str(failure):
                raise AssertionError(f"not one line: {failure}") from None
            raise ValueError(str(failure)) from None

    return case

