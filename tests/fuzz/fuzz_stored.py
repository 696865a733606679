"""Surfaces that this pipeline wrote itself, after somebody or something else has been at them: results in the store, and saved states of a training."""

import json
import random
import struct
from collections.abc import Callable
from pathlib import Path

from fuzz_mutations import as_bytes, mutated_bytes, mutated_value

from minitron.walk.console import Console
from minitron.walk.store import (
    DONE,
    FORMAT_FILE,
    check_format,
    damaged,
    digest_of,
    find_result,
    finish,
    mark_damage,
    measurement_damage,
    read_measurement,  # fmt: skip
    write_json,
)

Case = Callable[[random.Random], None]


def store(folder: Path) -> Case:
    """done.json, the store's mark, a measurement, the whole of a store looked through."""
    from minitron.walk.housekeeping import verify

    result, measurement = folder / "runs" / "store" / "data" / "0123456789ab", folder / "runs" / "store" / "measurements" / "data-0123" / "speed-1.json"
    result.mkdir(parents=True, exist_ok=True)
    measurement.parent.mkdir(parents=True, exist_ok=True)
    (result / "train.npy").write_bytes(b"x" * 100)
    finish(result, {"format": 2, "stage": "data", "key": "0123456789ab", "version": 1, "settings": {}, "seconds": 1.0, "facts": {"headline": "x", "path": "."}})
    record = json.loads((result / DONE).read_text())
    measured = {"of": {"a": 1}, "measured": {"loss": 1.0}}
    mark, quiet = result.parent.parent / FORMAT_FILE, Console(quiet=True)

    def case(chance: random.Random) -> None:
        changed = mutated_value(record, chance)
        if chance.random() < 0.4 and isinstance(changed, dict):  # as an earlier version left it, or one that nobody vouches for
            changed.pop("digest", None)
        (result / DONE).write_bytes(as_bytes(changed, chance) if chance.random() < 0.95 else mutated_bytes(as_bytes(record, chance), chance))
        measurement.write_bytes(as_bytes(mutated_value(measured | {"digest": digest_of(measured)}, chance), chance))
        mark.write_bytes(as_bytes(mutated_value({"format": 2, "digest": digest_of({"format": 2})}, chance), chance))
        found = find_result(result)
        if found is not None:
            assert isinstance(found.identity, str) and isinstance(found.key, str)
        assert found is None or damaged(result) is None
        mark_damage(mark.parent)
        measurement_damage(measurement)
        read_measurement(measurement)
        if chance.random() < 0.05:
            verify(mark.parent, quiet)
        check_format(str(folder / "runs"), lambda _: None)
        write_json(mark, {"format": 2})

    return case


def states(folder: Path) -> Case:
    """state.json and tensors.safetensors of a saved state, as a training finds them when it goes on, and an export reads them."""
    import torch
    import xxhash

    from distill.states import FACTS_FILE, TENSORS_FILE, best_state, drop_damaged, load_weights, newest_state

    header = {"model.weight": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}
    header["model.bias"] = {"dtype": "F32", "shape": [2], "data_offsets": [24, 32]}
    model, states = torch.nn.Linear(3, 2), folder / "states"

    def write(name: str, chance: random.Random, *, vouched: bool) -> None:
        place = states / name
        place.mkdir(parents=True, exist_ok=True)
        written = as_bytes(mutated_value(header, chance) if chance.random() < 0.5 else header, chance)
        content = struct.pack("<Q", len(written)) + written + bytes(32)
        content = content if chance.random() < 0.7 else mutated_bytes(content, chance)
        facts = {"record": {"step": 3, "total_steps": 9, "tokens": 99}, "best": 1.0}
        facts["tensors"] = [len(content), xxhash.xxh3_64_hexdigest(content)]
        facts = facts if vouched else mutated_value(facts, chance)
        (place / TENSORS_FILE).write_bytes(content)
        (place / FACTS_FILE).write_bytes(as_bytes(facts, chance))

    def case(chance: random.Random) -> None:
        for name in chance.sample(["step-00000003", "step-00000004", "best"], chance.choice([1, 2])):
            write(name, chance, vouched=chance.random() < 0.5)
        drop_damaged(folder)
        for state in filter(None, (newest_state(folder), best_state(folder))):
            load_weights(state, model)

    return case
