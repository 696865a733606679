"""Mutations that follow from a chance alone: of values as JSON has them, and of bytes."""

import copy
import json
import random
import re
from typing import Any

TEXTS = ["", "x", "../x", "../../elsewhere.safetensors", "/etc/passwd", "a/b", "..", ".", "\\x", "\x00", "\x1b[31m", "\ud800", "a" * 300, "ü😀",
         "${oc.env:HOME}", "{{ 7 * 7 }}", "<script>", "nan", "1e400", "None", "-1"]  # fmt: skip
NUMBERS = [0, 1, -1, 2, 3, 7, 8, 127, 2**31, 2**53, 2**63, 2**64, -(2**63), 10**40, 10**400, 0.5, 1e300, -1e300, float("nan"), float("inf"), True, False]
SHAPES: list[Any] = [None, [], {}, [[]], [None], [0], {"a": 1}, [1] * 3, [[1, 2]], {"": ""}, ["x"], [{}], {"a": {"b": []}}]


def odd(chance: random.Random) -> Any:
    """A value that nobody expects."""
    return copy.deepcopy(chance.choice(chance.choice([TEXTS, NUMBERS, SHAPES])))


def nested(depth: int) -> str:
    """What as_bytes makes lists within lists of, deeper than Python's own writer goes."""
    return f"nested {depth} deep"


def places(value: Any, place: tuple = ()) -> list[tuple]:
    """Every place in a value, its own included."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place] + [found for key, one in list(inner)[:40] for found in places(one, (*place, key))]


def mutated_value(value: Any, chance: random.Random) -> Any:
    """A value with a few places changed: another value, gone, doubled, under another name."""
    value = copy.deepcopy(value)
    for _ in range(chance.choice([1, 1, 1, 1, 1, 2, 4])):
        place = chance.choice(places(value))
        if not place:
            if chance.random() < 0.1:
                return nested(chance.choice([3, 90, 3000, 100_000])) if chance.random() < 0.3 else odd(chance)
            continue
        holder = value
        for key in place[:-1]:
            holder = holder[key]
        _change(holder, place[-1], chance)
    return value


def _change(holder: Any, key: Any, chance: random.Random) -> None:
    one = holder[key]
    match chance.randrange(8):
        case 0:
            del holder[key]
        case 1 if isinstance(holder, dict) and isinstance(key, str):
            holder[chance.choice([key.upper(), key + "x", chance.choice(TEXTS)])] = holder.pop(key)
        case 2 if isinstance(holder, list):
            holder.insert(key, copy.deepcopy(chance.choice(holder)))
        case 3 if isinstance(one, int) and not isinstance(one, bool):
            holder[key] = chance.choice([one + 1, one - 1, one * 2, one // 2, -one, one * 10**12, float(max(-(10**300), min(one, 10**300))), [one]])
        case 4 if isinstance(one, str):
            holder[key] = chance.choice([one[1:], one * 2, one + "x", [one], one.upper(), one[::-1]])
        case _:
            holder[key] = odd(chance)


def as_bytes(value: Any, chance: random.Random) -> bytes:
    """JSON of a value, now and then damaged as bytes are."""
    written = json.dumps(value, ensure_ascii=chance.random() < 0.7).encode("utf-8", "surrogatepass")
    written = re.sub(rb'"nested (\d+) deep"', lambda found: b"[" * int(found[1]) + b"]" * int(found[1]), written)
    return mutated_bytes(written, chance) if chance.random() < 0.1 else written


def mutated_text(text: str, chance: random.Random, bits: list[str]) -> str:
    """Text with a part of it gone, moved or exchanged, or one of `bits` put in."""
    for _ in range(chance.choice([1, 1, 1, 2, 3])):
        at, other, length = chance.randrange(len(text) + 1), chance.randrange(len(text) + 1), chance.choice([1, 1, 2, 5, 20])
        match chance.randrange(5):
            case 0:
                text = text[:at] + text[at + length :]
            case 1:
                text = text[:at] + text[other : other + length] + text[at + length :]
            case 2:
                text = text[:at] + chance.choice(TEXTS) + text[at:]
            case _:
                text = text[:at] + chance.choice(bits) + text[at:]
    return text


def mutated_bytes(data: bytes, chance: random.Random) -> bytes:
    """Bytes flipped, cut, doubled, put in, or exchanged for numbers that claim much."""
    changed = bytearray(data)
    for _ in range(chance.choice([1, 1, 2, 3, 8])):
        at = chance.randrange(len(changed) + 1)
        match chance.randrange(8):
            case 0:
                del changed[at:]
            case 1:
                del changed[at : at + chance.choice([1, 2, 8, 100])]
            case 2:
                changed[at:at] = chance.randbytes(chance.choice([1, 4, 40]))
            case 3:
                changed[at:at] = changed[max(0, at - chance.choice([1, 8, 64])) : at] * chance.choice([1, 2, 50])
            case 4:
                changed[at : at + 8] = chance.choice([2**64 - 1, 2**63, 2**40, 2**31, 0]).to_bytes(8, "little")
            case 5:
                changed[at : at + 4] = chance.choice([2**32 - 1, 2**31, 2**16, 0]).to_bytes(4, "little")
            case _ if at < len(changed):
                changed[at] ^= 1 << chance.randrange(8)
    return bytes(changed)
