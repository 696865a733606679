"""A checkpoint out of a GGUF: a tiny Llama written as llama.cpp would, converted, and held against the model it was made of."""

import io
import json
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from memory_budget.hf_config import architecture_from_config, read_config
from memory_budget.parameters import count_total_parameters
from minitron.checkpoints.files import Checkpoint
from minitron.settings.run import Settings, TeacherSettings
from minitron.settings.teachers import teacher_architecture
from minitron.text.own_tokenizer import train_tokenizer
from minitron.text.tokenise import tokenizer_folder
from minitron.walk.console import Console
from minitron.walk.stage import StageContext
from minitron.walk.store import Result
from minitron.walk.table import stages

VOCABULARY, HEADS, KV_HEADS, HEAD_DIM = 320, 4, 2, 8
NAMES = {"input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
         "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
         "mlp.down_proj": "ffn_down"}  # fmt: skip
TEXTS = ["the year 1984 and  the year 2024", "a list of numbers: 12 345 6789", "def f(x): return x ** 2\n\n\tthe end", "the the the year year"]
TEMPLATE = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"


@pytest.fixture(scope="module")
def tokens(tmp_path_factory) -> dict:
    """tokenizer.json of a byte-level BPE."""
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(iter(TEXTS * 3), VOCABULARY, folder)
    return json.loads((folder / "tokenizer.json").read_text())


def llama(*, tied: bool) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=HEADS,
                         num_key_value_heads=KV_HEADS, head_dim=HEAD_DIM, max_position_embeddings=128, rms_norm_eps=1e-5, tie_word_embeddings=tied,
                         rope_parameters={"rope_theta": 5000.0, "rope_type": "default"}, initializer_range=0.3)  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:  # 1 everywhere would hide one that was exchanged
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q and k as llama.cpp has them: halves of a head interleaved."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path: Path, model: LlamaForCausalLM, tokens: dict, *, permute: bool = True, quantised: bool = False, pre: str = "smollm", **more) -> Path:
    """The model as a GGUF; `more` are further tensors."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_block_count(2)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_rope_freq_base(5000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCABULARY)
    writer.add_string("general.license", "apache-2.0")
    vocabulary, added = tokens["model"]["vocab"], {token["content"]: token["special"] for token in tokens["added_tokens"]}
    by_id = sorted(vocabulary, key=vocabulary.get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(by_id)
    writer.add_token_types([1 if token not in added else 3 if added[token] else 4 for token in by_id])
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in tokens["model"]["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_pad_token_id(1)
    writer.add_chat_template(TEMPLATE)
    for name, tensor in model.state_dict().items():
        value, (start, _, last) = tensor.numpy(), name.rpartition(".")
        if start.startswith("model.layers."):
            _, _, layer, part = start.split(".", 3)
            heads = {"self_attn.q_proj": HEADS, "self_attn.k_proj": KV_HEADS}.get(part)
            value = permuted(value, heads) if heads and permute else value
            start = f"blk.{layer}.{NAMES[part]}"
        elif start == "lm_head" and model.config.tie_word_embeddings:
            continue
        else:
            start = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}[start]
        _add(writer, f"{start}.{last}", value, quantised=quantised and value.ndim == 2)
    for name, value in more.items():
        _add(writer, name, value, quantised=False)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: gguf.GGUFWriter, name: str, value: np.ndarray, *, quantised: bool) -> None:
    kind = gguf.GGMLQuantizationType.Q8_0
    if quantised:
        writer.add_tensor(name, gguf.quants.quantize(value, kind), raw_dtype=kind)
    else:
        writer.add_tensor(name, np.ascontiguousarray(value))


def convert(file: Path, folder: Path) -> dict:
    folder.mkdir()
    return stages()["teacher"].run(StageContext(Settings(teacher=TeacherSettings(gguf=str(file))), folder, {}, Console(quiet=True)))


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(torch.arange(2, 90)[None] * 3 % VOCABULARY, use_cache=False).logits


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "own head"])
def converted(request, tokens, tmp_path_factory):
    """The model, the converted folder, the stage's facts."""
    folder, model = tmp_path_factory.mktemp("converted"), llama(tied=request.param)
    facts = convert(write_gguf(folder / "tiny.gguf", model, tokens), folder / "stage")
    return model, folder / "stage" / "checkpoint", facts


def test_the_checkpoint_computes_what_the_model_did(converted):
    model, folder, facts = converted
    found = AutoModelForCausalLM.from_pretrained(folder)
    assert found.dtype is torch.float32 and torch.equal(logits(found.eval()), logits(model)) and facts["reload_difference"] == 0.0


def test_rows_that_llama_cpp_has_not_permuted_would_be_noticed(tokens, tmp_path):
    """The control of the test above."""
    model = llama(tied=True)
    convert(write_gguf(tmp_path / "tiny.gguf", model, tokens, permute=False), tmp_path / "stage")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "stage" / "checkpoint").eval()
    assert (logits(found) - logits(model)).abs().max() > 0.01


def test_a_tied_head_is_stored_once(converted):
    model, folder, facts = converted
    checkpoint, architecture = Checkpoint(folder), architecture_from_config(read_config(folder))
    assert ("lm_head.weight" in checkpoint.entries) is not model.config.tie_word_embeddings
    assert checkpoint.num_parameters == count_total_parameters(architecture) == facts["parameters"]


def test_the_config_is_the_one_that_was_known_before(converted):
    _, folder, _ = converted
    config = read_config(folder)
    assert architecture_from_config(config) == teacher_architecture(Settings(teacher=TeacherSettings(gguf=str(folder.parent.parent / "tiny.gguf"))))
    assert "quantization_config" not in config and config["head_dim"] == HEAD_DIM and config["rope_parameters"]["rope_theta"] == 5000.0


def test_the_folder_has_all_that_belongs_to_it(converted):
    _, folder, facts = converted
    names = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "generation_config.json", "README.md")
    assert all((folder / name).exists() for name in names) and read_config(folder / "tokenizer_config.json")["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert 'license: "apache-2.0"' in (folder / "README.md").read_text() and read_config(folder / "generation_config.json")["eos_token_id"] == 0
    assert facts["goes_on"]["prompt"] == "The capital of France is" and isinstance(facts["goes_on"]["text"], str)


def test_the_tokenizer_gives_text_back_and_has_its_template(converted):
    tokenizer = AutoTokenizer.from_pretrained(converted[1])
    assert all(tokenizer.decode(tokenizer(text)["input_ids"]) == text for text in TEXTS)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}], tokenize=False) == "user: Hello\n"


def test_digits_stand_alone_as_the_models_own_tokenizer_has_them(converted, tokens, tmp_path):
    """Two blanks before a digit are one token then; without the step, the second one goes with the digit."""
    convert(write_gguf(tmp_path / "tiny.gguf", llama(tied=True), tokens, pre="gpt-2"), tmp_path / "stage")
    apart, together = (AutoTokenizer.from_pretrained(folder).backend_tokenizer.pre_tokenizer for folder in (converted[1], tmp_path / "stage" / "checkpoint"))
    assert [part for part, _ in apart.pre_tokenize_str("a  19")] == ["a", "ĠĠ", "1", "9"]
    assert [part for part, _ in together.pre_tokenize_str("a  19")] == ["a", "Ġ", "Ġ19"]


def test_blocks_are_written_out_as_they_are(tokens, tmp_path):
    model = llama(tied=True)
    facts = convert(write_gguf(tmp_path / "tiny.gguf", model, tokens, quantised=True), tmp_path / "stage")
    weights, name = Checkpoint(tmp_path / "stage" / "checkpoint"), "model.layers.1.mlp.down_proj.weight"
    kind = gguf.GGMLQuantizationType.Q8_0
    stored = gguf.quants.dequantize(gguf.quants.quantize(model.state_dict()[name].numpy(), kind), kind)
    assert facts["number_formats"] == ["Q8_0"] and np.array_equal(weights.read(name).numpy(), stored)
    assert not np.array_equal(weights.read(name).numpy(), model.state_dict()[name].numpy())


def test_a_tensor_that_would_be_left_out_is_refused(tokens, tmp_path):
    file = write_gguf(tmp_path / "tiny.gguf", llama(tied=True), tokens, **{"blk.0.attn_q.bias": np.zeros(32, np.float32)})
    with pytest.raises(ValueError, match="tiny.gguf has 21 tensors of .* numbers in all, but LlamaForCausalLM of its sizes has 20"):
        convert(file, tmp_path / "stage")


def test_without_the_package_gguf_it_says_what_to_install(tokens, tmp_path, monkeypatch):
    file = write_gguf(tmp_path / "tiny.gguf", llama(tied=True), tokens)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"the package gguf, which is not installed: pip install 'minitron\[real\]'"):
        convert(file, tmp_path / "stage")


def test_a_conversion_prints_no_bar(tokens, tmp_path, monkeypatch):
    heard = io.StringIO()
    monkeypatch.setattr(sys, "stderr", heard)
    convert(write_gguf(tmp_path / "tiny.gguf", llama(tied=True), tokens), tmp_path / "stage")
    assert heard.getvalue() == ""


def test_rows_are_made_with_the_converted_tokenizer(converted, tmp_path):
    _, folder, facts = converted
    teacher = Result(folder.parent, {"facts": facts, "key": "0123456789ab"})
    context = StageContext(Settings(teacher=TeacherSettings(gguf="tiny.gguf")), tmp_path, {"teacher": teacher}, Console(quiet=True))
    assert tokenizer_folder(context) == folder and stages()["data"].needs(context.settings) == ("teacher",)
