"""Surfaces that are a model's files: config.json, the headers of safetensors, an index, GGUF, an export_config, a tokenizer and its chat template."""

import json
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

from fuzz_mutations import as_bytes, mutated_bytes, mutated_value, odd

from memory_budget.sources.safetensors import tensors_of_folder
from minitron.checkpoints.files import Checkpoint
from minitron.checkpoints.folder import content_digest, files_that_count, fingerprint
from minitron.checkpoints.given import given_checkpoint
from minitron.families.config_json import kept_config, transformers_config
from minitron.settings.follow import Model, followed
from minitron.settings.run import Settings, TeacherSettings
from minitron.settings.teachers import base_architecture, max_positions, teacher_config

CONFIGS = Path(__file__).resolve().parent.parent / "memory_budget" / "configs"
Case = Callable[[random.Random], None]


def _configs() -> list[dict]:
    """Of families that can be cut, small: a tiny model's sizes in place of a large one's."""
    found = [json.loads(path.read_text()) for path in sorted(CONFIGS.glob("*.json"))]
    return [config for config in found if isinstance(config, dict) and isinstance(config.get("model_type"), str)]


def config_json(folder: Path) -> Case:
    """Everything that is made of a config.json before any weight is read."""
    from memory_budget.budget import parse_budget
    from memory_budget.workload import Workload
    from minitron.settings.derived import floors

    configs, path = _configs(), folder / "config.json"
    settings = Settings(teacher=TeacherSettings(path=str(folder)))
    transformers_config(next(config for config in configs if config["model_type"] == "llama"))  # loads transformers

    def case(chance: random.Random) -> None:
        path.write_bytes(as_bytes(mutated_value(chance.choice(configs), chance), chance))
        architecture, positions = base_architecture(settings), max_positions(settings)
        followed(Model(architecture, positions, Workload(), parse_budget("l4")), ["search.hidden.low", "distill.train.tokens", "data.sequence_length"])
        floors(settings, architecture)
        json.dumps(kept_config(teacher_config(settings)))
        if chance.random() < 0.1:
            transformers_config(teacher_config(settings))

    return case


def _safetensors(header: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def _tiny_model(folder: Path) -> tuple[dict, bytes, dict]:
    """config.json, the bytes and the header of the tiny teacher that comes with the package, of its first tensors."""
    from minitron.settings.teachers import STORED_FOLDER

    whole = (STORED_FOLDER / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    return json.loads((STORED_FOLDER / "config.json").read_text()), whole[8 + length :], json.loads(whole[8 : 8 + length])


def safetensors(folder: Path) -> Case:
    """A file's header; once in a while a whole model is held against its config."""
    config, data, header = _tiny_model(folder)
    (folder / "config.json").write_text(json.dumps(config))
    small = dict(list(header.items())[:6])
    transformers_config(config)  # loads transformers
    rest = data[: max(one["data_offsets"][1] for one in small.values() if "data_offsets" in one)]

    def case(chance: random.Random) -> None:
        whole = chance.random() < 0.001
        given = small | ({"__metadata__": odd(chance), "more": odd(chance)} if chance.random() < 0.2 else {})
        written = as_bytes(mutated_value(header if whole else given, chance) if chance.random() < 0.7 else given, chance)
        content = _safetensors(written, data if whole else rest)
        (folder / "model.safetensors").write_bytes(content if whole or chance.random() < 0.7 else mutated_bytes(content[:4000], chance))
        fingerprint(folder)
        if whole:
            given_checkpoint(folder, "x")
        tensors_of_folder(folder)
        for name in (checkpoint := Checkpoint(folder, direct=False)).entries:
            checkpoint.read(name)

    return case


def index(folder: Path) -> Case:
    """model.safetensors.index.json, with shards beside it, a link as the Hub's cache has them, and a file outside."""
    config, _, _ = _tiny_model(folder)
    inside = folder / "snapshot"
    inside.mkdir(exist_ok=True)
    names = [f"model-{number:05d}-of-00003.safetensors" for number in (1, 2, 3)]
    for number, name in enumerate(names):
        one = {f"t{number}": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
        (folder / f"blob{number}").write_bytes(_safetensors(json.dumps(one).encode(), bytes(8)))
        (inside / name).unlink(missing_ok=True)
        (inside / name).symlink_to(f"../blob{number}")
    shutil.copyfile(folder / "blob0", folder / "elsewhere.safetensors")
    weight_map = {f"t{number}": name for number, name in enumerate(names)}

    def case(chance: random.Random) -> None:
        found = {"metadata": {"total_size": 24}, "weight_map": dict(weight_map)}
        if chance.random() < 0.5:
            found["weight_map"]["t1"] = chance.choice(["../elsewhere.safetensors", str(folder / "elsewhere.safetensors"), "./" + names[1], odd(chance)])
        named = chance.choice([None, None, "model.safetensors.index.json", odd(chance)])
        (inside / "config.json").write_bytes(as_bytes(config | {"transformers_weights": named}, random.Random(0)))
        (inside / "model.safetensors.index.json").write_bytes(as_bytes(mutated_value(found, chance) if chance.random() < 0.8 else found, chance))
        assert all(path.parent == inside for path in files_that_count(inside)), "a file outside counts"
        content_digest(inside) if chance.random() < 0.02 else fingerprint(inside)
        checkpoint = Checkpoint(inside)
        assert all(path.parent == inside for path in checkpoint.files), "a file outside is read"
        tensors_of_folder(inside)

    return case


def gguf(folder: Path) -> Case:
    """A GGUF's metadata and table of tensors, and the config.json that is made of them."""
    from minitron.settings.gguf_header import gguf_config, gguf_fingerprint, read_gguf_header

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value.encode())) + value.encode()

    sizes = {"embedding_length": 32, "feed_forward_length": 64, "block_count": 2, "context_length": 128, "vocab_size": 320}
    values = [text("general.architecture") + struct.pack("<I", 8) + text("llama")]
    values += [text(f"llama.{name}") + struct.pack("<II", 4, size) for name, size in sizes.items()]
    values += [text("llama.attention.head_count") + struct.pack("<II", 4, 4), text("llama.attention.layer_norm_rms_epsilon") + struct.pack("<If", 6, 1e-5)]
    values += [text("tokenizer.ggml.tokens") + struct.pack("<IIQ", 9, 8, 3) + text("a") + text("b") + text("c")]
    tensors = [text(f"blk.{number}.attn_q.weight") + struct.pack("<IQQIQ", 2, 32, 32, 0, 4096 * number) for number in range(3)]
    whole = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(values)) + b"".join(values + tensors)

    def case(chance: random.Random) -> None:
        path = folder / f"{chance.randrange(2)}.gguf"
        content = mutated_bytes(whole, chance) if chance.random() < 0.95 else whole[:16] + (struct.pack("<IIQ", 9, 9, 1) * 5000)
        path.write_bytes(content + bytes(chance.choice([0, 3 * 4096 + 64])))
        gguf_fingerprint(path)
        gguf_config(read_gguf_header(path))

    return case


def export_config(folder: Path) -> Case:
    """Sizes by NVIDIA's names, against teachers of several families, and orders of layers."""
    from memory_budget.hf_config import architecture_from_config
    from minitron.search.layer_order import given_layer_order
    from nas.exchange import read_export_config, to_export_config

    teachers = []
    for config in _configs():
        try:
            teachers.append(architecture_from_config(config))
        except ValueError:  # of a model that is only measured
            continue
    path = folder / "export_config.json"

    def case(chance: random.Random) -> None:
        teacher = chance.choice(teachers)
        if chance.random() < 0.2:
            path.write_bytes(as_bytes(mutated_value(chance.choice([[1, 2, 3], {"removal_order": [3, 1]}]), chance), chance))
            given_layer_order(path, teacher)
            return
        path.write_bytes(as_bytes(mutated_value(to_export_config(teacher), chance), chance))
        read_export_config(path, teacher)

    return case
