"""A checkpoint out of a GGUF file, as any other folder of transformers': weights, config.json, tokenizer, card. docs/real_teacher.md

Weights are written in float32: a GGUF's blocks (4 to 8 bits a number and a scale) are more exact than bf16 holds, every processor computes quickly in
it, and a student is stored in its teacher's precision.
"""

import gc
import importlib.util
import io
import json
from contextlib import redirect_stderr
from math import isclose
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from memory_budget.hf_config import architecture_from_config, read_config
from memory_budget.parameters import count_total_parameters
from minitron.checkpoints.files import Checkpoint
from minitron.checkpoints.publish import CHECK_TOKENS, model_card
from minitron.checkpoints.shards import save_model_weights
from minitron.machine.panics import panics_caught
from minitron.settings.gguf_header import GGUFHeader
from minitron.walk.console import Console
from minitron.walk.store import write_json

MAX_SHARD_BYTES = 2**32
TOLERANCE = 1e-5  # of the largest logit: the weights are the same, bit for bit
SENTENCE, SENTENCE_TOKENS = "The capital of France is", 12
PROBE = "Is 1984  a year?\n\tdef f(x): return x**2  # «ünï» 日本語 don't 12 345"  # for two tokenizers to differ on
DIGITS_APART = ("smollm", "starcoder")  # pre-tokenizers of llama.cpp that split digits off first, which transformers does not read from a GGUF
TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")


def check_gguf_installed() -> None:
    """Raises ValueError where the package that transformers reads a GGUF with is not there."""
    if importlib.util.find_spec("gguf") is None:
        raise ValueError("a teacher is converted from a GGUF with the package gguf, which is not installed: pip install 'minitron[real]'")


def convert_gguf(header: GGUFHeader, config: dict[str, Any], folder: Path, console: Console) -> dict:
    """Writes folder/checkpoint, reads it back, and gives the stage's facts. `config` is what the header says.

    Raises ValueError for a file that transformers cannot convert, or of which it would leave something out; RuntimeError where what was written
    is not what was read.
    """
    check_gguf_installed()
    name, checkpoint = header.path.stem, folder / "checkpoint"
    console.say(f"  teacher  converting {header.path.name} ({', '.join(header.number_formats)})")
    model, tokenizer = _read(header)
    weights = _weights(model, config, header)
    config |= {"architectures": [type(model).__name__], "dtype": "float32"}
    _check_config(config, model)
    checkpoint.mkdir(parents=True, exist_ok=True)
    save_model_weights(weights, checkpoint, max_shard_bytes=MAX_SHARD_BYTES)
    write_json(checkpoint / "config.json", config)
    write_json(checkpoint / "generation_config.json", {key: value for key, value in config.items() if key.endswith("_token_id")})
    _write_tokenizer(tokenizer, checkpoint, config["max_position_embeddings"])
    (checkpoint / "README.md").write_text(_card(name, header, config))
    del weights
    text = _goes_on(model, tokenizer)
    expected, ids = tokenizer(PROBE)["input_ids"], _probe_ids(config["vocab_size"])
    logits = _logits(model, ids)
    del model, tokenizer
    gc.collect()  # before the other model is there
    difference = _check_reload(checkpoint, expected, ids, logits)
    parameters = Checkpoint(checkpoint).num_parameters
    headline = f"{name}: {parameters:,} parameters, {config['model_type']}, out of {' and '.join(header.number_formats)}; {SENTENCE!r} goes on {text!r}"
    return {"headline": headline, "path": "checkpoint", "name": name, "parameters": parameters, "number_formats": header.number_formats,
            "goes_on": {"prompt": SENTENCE, "text": text}, "reload_difference": difference}  # fmt: skip


def _read(header: GGUFHeader) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """Model, float32 on the CPU in eval mode, and tokenizer. Raises ValueError where transformers cannot."""
    import transformers
    from transformers.utils import logging

    logging.disable_progress_bar()
    where = {"pretrained_model_name_or_path": header.path.parent, "gguf_file": header.path.name, "local_files_only": True, "trust_remote_code": False}
    try:
        with panics_caught(), redirect_stderr(io.StringIO()):  # a bar that has no switch
            model = transformers.AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
            tokenizer = transformers.AutoTokenizer.from_pretrained(**where)
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, NotImplementedError, RuntimeError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{header.path.name} cannot be converted by transformers {transformers.__version__} ({type(error).__name__}: {reason})") from None
    if header.metadata.get("tokenizer.ggml.pre") in DIGITS_APART:
        from tokenizers import pre_tokenizers

        backend = tokenizer.backend_tokenizer
        backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), backend.pre_tokenizer])
    return model.eval(), tokenizer


def _weights(model: nn.Module, config: dict[str, Any], header: GGUFHeader) -> dict[str, torch.Tensor]:
    """What is written: a tied head once. Raises ValueError where the file's tensors are not as many and as large, so that one was left out or made up."""
    weights = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight" or not config["tie_word_embeddings"]}
    found, taken = sorted(tensor.num_elements for tensor in header.tensors), sorted(tensor.numel() for tensor in weights.values())
    if found != taken:
        raise ValueError(f"{header.path.name} has {len(found)} tensors of {sum(found):,} numbers in all, but {type(model).__name__} of its sizes has "
                         f"{len(taken)} of {sum(taken):,}; they must be the same ones")  # fmt: skip
    return weights


def _check_config(config: dict[str, Any], model: nn.Module) -> None:
    """Hold what was read from the header against what transformers read. Raises RuntimeError."""
    for name, value in config.items():
        found = getattr(model.config, name, value)  # head_dim is not all of theirs
        found = str(found).removeprefix("torch.") if name == "dtype" else found
        pairs = [(found[key], value[key]) for key in value] if isinstance(value, dict) else [(found, value)]
        # transformers keeps a float32 with all its digits in float64.
        if name != "architectures" and not all(isclose(a, b, rel_tol=1e-6) if isinstance(b, float) else a == b for a, b in pairs):
            raise RuntimeError(f"{name} is {value!r} by the GGUF's header and {found!r} by transformers")


def _write_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path, positions: int) -> None:
    """The files of a Hugging Face tokenizer folder, by hand: transformers 5 would name a class that older versions and other programs do not have."""
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    special = {name: value for name in TOKENS if (value := getattr(tokenizer, name)) is not None}
    template = {"chat_template": tokenizer.chat_template} if tokenizer.chat_template else {}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **special, "add_bos_token": bool(getattr(tokenizer, "add_bos_token", False)),
              "clean_up_tokenization_spaces": False, "model_max_length": positions}  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config | template, indent=2, ensure_ascii=False) + "\n")
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2, ensure_ascii=False) + "\n")
    if template:
        (folder / "chat_template.jinja").write_text(tokenizer.chat_template)


def _card(name: str, header: GGUFHeader, config: dict[str, Any]) -> str:
    lines = [f"Converted from `{header.path.name}` ({' and '.join(header.number_formats)}), whose blocks are written out in float32."]
    titles = [str(header.metadata[key]) for key in ("general.organization", "general.name") if header.metadata.get(key)]
    lines += [f"The file calls itself {', '.join(titles)}."] if titles else []
    licence = header.metadata.get("general.license")
    return model_card(name, lines=lines, architecture=architecture_from_config(config), base=None, metadata={"license": str(licence)} if licence else {})


@torch.inference_mode()
def _goes_on(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> str:
    """What the model says after a sentence's beginning, the likeliest token each time: of a conversion gone wrong a person sees it here."""
    prompt = tokenizer(SENTENCE, return_tensors="pt")
    ids = model.generate(prompt["input_ids"], attention_mask=prompt["attention_mask"], max_new_tokens=SENTENCE_TOKENS, do_sample=False)
    return tokenizer.decode(ids[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)


def _probe_ids(vocabulary: int) -> torch.Tensor:
    return torch.randint(vocabulary, (2, CHECK_TOKENS), generator=torch.Generator().manual_seed(0))


@torch.inference_mode()
def _logits(model: nn.Module, ids_BT: torch.Tensor) -> torch.Tensor:
    return model(ids_BT, use_cache=False).logits


def _check_reload(folder: Path, expected_ids: list[int], ids_BT: torch.Tensor, expected_BTV: torch.Tensor) -> float:
    """Load the folder as a user would; gives the largest difference of logits relative to the largest one. Raises RuntimeError."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    planned, written = count_total_parameters(architecture_from_config(read_config(folder))), Checkpoint(folder).num_parameters
    if planned != written:
        raise RuntimeError(f"{folder} holds {written:,} parameters, its config.json has {planned:,}")
    if not torch.isfinite(expected_BTV).all():
        raise RuntimeError("the converted model gives logits that are not finite")
    if AutoTokenizer.from_pretrained(folder)(PROBE)["input_ids"] != expected_ids:
        raise RuntimeError(f"the tokenizer of {folder}, read back, gives other tokens for {PROBE!r}")
    found_BTV = _logits(AutoModelForCausalLM.from_pretrained(folder, dtype="auto", local_files_only=True).eval(), ids_BT)
    difference = ((found_BTV - expected_BTV).abs().max() / expected_BTV.abs().max()).item()
    if not difference <= TOLERANCE:
        raise RuntimeError(f"{folder}, read back, gives logits that differ by {difference:.2e} of the largest; at most {TOLERANCE:.0e} is rounding")
    return difference
