"""Run by an interpreter that has llm-compressor, see make reap-check: its REAP scores of a mixture of experts on given tokens, in float32.

reap_theirs.py MODEL TOKENS.safetensors PIPELINE SPARSITY OUT.safetensors: of TOKENS `ids` [batches, B, T] and `mask` the same, 1 where a token is real;
PIPELINE is "basic", which scores the whole model as it is, or "sequential", its default, which scores a layer on what those before it give when they have
lost their experts. OUT has the score of every expert, float64 [E], under the name of the layer's module.
"""

import sys

import torch
from llmcompressor import oneshot
from llmcompressor.modifiers.pruning import REAPPruningModifier
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast


class Told(REAPPruningModifier):
    """Their modifier, which keeps what it has found before it drops experts by it and forgets."""

    def on_sequential_epoch_end(self, state, event, **kwargs) -> None:
        for name, tracker in self._saliency_trackers.items():
            if tracker.total_count:
                scores[name] = tracker.mean_saliency
        super().on_sequential_epoch_end(state, event, **kwargs)


folder, tokens, pipeline, sparsity, out = sys.argv[1:]
scores: dict[str, torch.Tensor] = {}
given = load_file(tokens)
batches = [{"input_ids": ids_BT, "attention_mask": mask_BT} for ids_BT, mask_BT in zip(given["ids"], given["mask"], strict=True)]
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
oneshot(model=model, processor=PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE())), recipe=Told(sparsity=float(sparsity)),
        dataset=DataLoader(batches, batch_size=None), pipeline=pipeline, moe_calibrate_all_experts=False)  # fmt: skip
save_file(scores, out)
