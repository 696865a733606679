"""Asks llama.cpp, where LLAMACPP_PYTHON names an interpreter that has llama-cpp-python, and reads its answers."""

import json
import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import gguf

LLAMACPP_PYTHON = os.environ.get("LLAMACPP_PYTHON")
MIB = 1 << 20
WHOLE = {"use_extra_bufts": False, "load_mode": 0}  # read into one buffer: neither mapped nor repacked for the CPU's instructions
QUANTISED = r"- \[ *(\d+), *(\d+), *(\d+), .* MiB \((\w+)\)"


@contextmanager
def started_engine() -> Iterator[Callable[..., dict]]:
    """What asks llamacpp_engine.py, which lives as long as this is open."""
    command = [LLAMACPP_PYTHON, str(Path(__file__).parent / "llamacpp_engine.py")]
    with tempfile.TemporaryFile() as log, subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True) as process:

        def ask(**asked) -> dict:
            process.stdin.write(json.dumps(asked) + "\n")
            process.stdin.flush()
            answer = json.loads(process.stdout.readline())
            assert "error" not in answer, answer["error"][-2000:]
            return answer

        yield ask
        process.stdin.close()


def logged(answer: dict, buffer: str) -> float:
    """MiB of the buffers of that name, together; 0 where none is logged."""
    return sum(float(found[1]) for line in answer["log"] if (found := re.search(rf" {buffer} buffer size = +([\d.]+) MiB", line)))


def same(number_bytes: int, answer: dict, buffer: str) -> bool:
    """Whether the bytes are the logged MiB with its two decimals, of two buffers at most."""
    return abs(number_bytes / MIB - logged(answer, buffer)) <= 0.0101


def chosen_types(ask: Callable[..., dict], path: Path, file_type: str, *, importance: bool) -> Counter[tuple[int, int, str]]:
    """(row length, rows, type) of every tensor that llama.cpp's quantiser would write in another type than F32."""
    number = gguf.LlamaFileType["ALL_F32" if file_type == "F32" else f"MOSTLY_{file_type}"].value
    log = "\n".join(ask(path=str(path), file_type=number, importance=importance)["log"])
    return Counter((int(length), int(rows) * int(experts), name.upper()) for length, rows, experts, name in re.findall(QUANTISED, log))
