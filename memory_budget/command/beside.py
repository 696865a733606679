"""What is served beside the model itself: slots for LoRA adapters, a draft model, layers of multi-token prediction."""

import argparse
from dataclasses import dataclass, replace

from memory_budget.architecture import Architecture
from memory_budget.calculator import MemoryReport, memory_report, weight_bytes
from memory_budget.command.llamacpp import Gguf
from memory_budget.configs.prediction import prediction_model
from memory_budget.configs.quantisation import stored_format
from memory_budget.configs.registry import language_config, model_from_config
from memory_budget.configs.values import Config, shown
from memory_budget.hf_config import FAMILIES, architecture_from_config
from memory_budget.model import Model
from memory_budget.parts.part import Part
from memory_budget.sources.source import open_source
from memory_budget.vllm.lora import DEFAULT_RANK, check_lora, lora_bytes
from memory_budget.vllm.shards import shard
from memory_budget.workload import Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """A draft model: whole, what one device holds of it, its weights' format, and what llama.cpp's rules are told of it."""

    model: Model
    held: Model
    weights: str
    counted: Architecture | Model


@dataclass(frozen=True, slots=True, kw_only=True)
class Beside:
    """What was asked for: slots and their rank with the model and what a device holds of it, the draft model, the prediction layers."""

    model: Model
    held: Model
    tp: int = 1
    slots: int | None = None
    rank: int = DEFAULT_RANK
    draft: Draft | None = None
    mtp: Model | None = None

    @property
    def is_there(self) -> bool:
        return self.slots is not None or self.draft is not None or self.mtp is not None

    @property
    def layers(self) -> tuple[tuple[int, Part], ...]:
        """What the draft model and the prediction layers keep caches in: in vLLM they share the model's pool and its groups of layers."""
        others = (self.draft.model if self.draft else None, self.mtp)
        return tuple(layer for model in others if model is not None for layer in model.layers)

    def added_to(self, report: MemoryReport, workload: Workload, gguf: Gguf | None) -> MemoryReport:
        """The report with a part more for each: of draft and prediction layers the weights and, for the same contexts and batch, the caches.

        Activations are the larger model's alone, but in llama.cpp, where each has a compute buffer.
        """
        if not self.is_there:
            return report
        return replace(report, lora=self._lora_bytes(workload), draft=self._draft_bytes(workload, gguf), mtp=self._mtp_bytes(workload))

    def fixed_bytes(self, workload: Workload) -> int:
        """What of it vLLM holds before it makes its pool: all but the caches; vocabularies are padded there."""
        draft = weight_bytes(shard(self.draft.model, self.tp), self.draft.weights) if self.draft else 0
        return (self._lora_bytes(workload) or 0) + draft + (weight_bytes(shard(self.mtp, self.tp), workload.weights_dtype) if self.mtp else 0)

    def _lora_bytes(self, workload: Workload) -> int | None:
        return lora_bytes(self.model, self.held, slots=self.slots, rank=self.rank, dtype=workload.compute_dtype) if self.slots is not None else None

    def _draft_bytes(self, workload: Workload, gguf: Gguf | None) -> int | None:
        if self.draft is None:
            return None
        if gguf is not None:
            return gguf.report(self.draft.counted, workload).total
        return memory_report(self.draft.held, replace(workload, weights_dtype=self.draft.weights, activation_tokens=0)).total

    def _mtp_bytes(self, workload: Workload) -> int | None:
        return memory_report(_on_each(self.mtp, self.tp), replace(workload, activation_tokens=0)).total if self.mtp else None

    def notes(self, workload: Workload, engine: str) -> list[str]:
        """What a person should know of them, a sentence each."""
        said = []
        if self.draft is not None:
            model, positions = self.draft.model, self.draft.model.positions
            said += [f"draft model: {note}" for note in model.notes]
            if model.vocab != self.model.vocab:
                said.append(f"the draft model's vocabulary ({model.vocab:,}) is not the model's ({self.model.vocab:,}): vLLM refuses the pair")
            if positions is not None and positions < workload.context_tokens:
                said.append(f"context ({workload.context_tokens:,} tokens) is more than the draft model's positions ({positions:,})")
        if engine == "vllm" and self.layers and self.model.count_of("mamba"):
            said.append("vLLM keeps one more state of each recurrent layer for every token that is guessed ahead: its blocks per request are without them")
        return said


def beside_of(options: argparse.Namespace, config: Config, model: Model, held: Model) -> Beside:
    """What the options ask for. Raises ValueError where vLLM or llama.cpp has it not, or it is not known."""
    if options.lora is None and options.lora_rank is not None:
        raise ValueError(f"--lora-rank ({options.lora_rank}) must come with --lora N")
    rank = DEFAULT_RANK if options.lora_rank is None else options.lora_rank
    if options.lora is not None:
        check_lora(options.lora, rank)
    if options.engine == "llamacpp" and (options.lora is not None or options.mtp):
        raise ValueError(f"--{'mtp' if options.lora is None else 'lora'} must not come with --engine llamacpp: what it allots for that is not known")
    mtp = prediction_model(config, model, shared_tables=options.engine == "vllm") if options.mtp else None
    return Beside(model=model, held=held, tp=options.tp, slots=options.lora, rank=rank, draft=_draft_of(options), mtp=mtp)


def _draft_of(options: argparse.Namespace) -> Draft | None:
    if options.draft is None:
        return None
    source = open_source(options.draft)
    config, model = language_config(source.config), model_from_config(source.config, source.tensors)
    if not model.cache_known:
        raise ValueError(f"--draft ({shown(options.draft)}): the cache of model_type {model.model_type} is not known")
    held = _on_each(model, options.tp)
    architecture = architecture_from_config(config) if config.get("model_type") in FAMILIES else None
    return Draft(model=model, held=held, weights=stored_format(config)[0] or "bf16", counted=architecture or held)


def _on_each(model: Model, tp: int) -> Model:
    return model if tp == 1 else shard(model, tp)
