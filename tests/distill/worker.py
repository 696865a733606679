"""A tiny distillation, in this process or in those of `accelerate launch tests/distill/worker.py '{…}'`.

The rows end in padding of different lengths, so processes and micro-batches have different numbers of tokens.
"""

import json
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, NemotronHConfig, NemotronHForCausalLM

from distill.batches import PADDING, RowBatches, not_counted
from distill.engines.launch import Launch, read_launch
from distill.plan import Phase, StepRecord, TrainPlan
from distill.trainer import distillation_loss, train_phases
from minitron.families.nemotron_h import FAMILY as NEMOTRON_H

PLAN = {"tokens": 8 * 54, "optimizer": "adamw", "learning_rate": 1e-2, "final_learning_rate_share": 0.1, "warmup_share": 0.2, "weight_decay": 0.1,
        "clip_norm": 0.5}  # fmt: skip


def build_model(seed: int, hidden: int = 16) -> NemotronHForCausalLM:
    """A NemotronH of three layers; 7 heads of 3 channels make lengths that two processes cannot halve."""
    torch.manual_seed(seed)
    config = NemotronHConfig(
        vocab_size=65, hidden_size=hidden, layers_block_type=["linear_attention", "mlp", "full_attention"], intermediate_size=23,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, mamba_num_heads=7, mamba_head_dim=3, n_groups=1, ssm_state_size=8, chunk_size=8,
        tie_word_embeddings=False,
    )  # fmt: skip
    return NemotronHForCausalLM(config).float()


def build_llama(seed: int, *, tied: bool) -> LlamaForCausalLM:
    """A Llama of three blocks whose head is its table of embeddings, or begins as the same numbers."""
    torch.manual_seed(seed)
    config = LlamaConfig(vocab_size=65, hidden_size=18, num_hidden_layers=3, intermediate_size=23, num_attention_heads=6, num_key_value_heads=3, head_dim=4,
                         tie_word_embeddings=True)  # fmt: skip
    model = LlamaForCausalLM(config).float()
    if not tied:
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    return model


def build_moe(seed: int, hidden: int = 16) -> NemotronHForCausalLM:
    """A NemotronH whose FFN is nine experts, more than it has layers, of which a token goes to two; one has so low a bias that none goes to it."""
    torch.manual_seed(seed)
    config = NemotronHConfig(
        vocab_size=65, hidden_size=hidden, layers_block_type=["linear_attention", "moe", "full_attention"], n_routed_experts=9, num_experts_per_tok=2,
        moe_intermediate_size=11, moe_shared_expert_intermediate_size=13, routed_scaling_factor=2.5, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
        mamba_num_heads=7, mamba_head_dim=3, n_groups=1, ssm_state_size=8, chunk_size=8, tie_word_embeddings=False,
    )  # fmt: skip
    model = NEMOTRON_H.build(config.to_dict())
    torch.nn.init.normal_(model.model.layers[1].mixer.gate.weight)
    model.model.layers[1].mixer.gate.e_score_correction_bias[3] = -9.0
    return model


def build_teacher(model: str = "") -> NemotronHForCausalLM:
    """A model that is sure of itself: a KL near zero would be a difference of rounding errors."""
    teacher = (build_moe if model == "moe" else build_model)(1, hidden=32)
    teacher.lm_head.weight.data.mul_(20)
    return teacher


def padded_rows() -> np.ndarray:
    """12 rows of 16 ids, the last of which are padding in most."""
    random = np.random.default_rng(0)
    rows = random.integers(65, size=(12, 16), dtype=np.int32)
    for row, length in zip(rows, random.integers(4, 17, size=12), strict=True):
        row[length:] = PADDING
    return rows


def marked_rows() -> np.ndarray:
    """The same, but nothing is learned at most positions: of the rows of a batch some have all of them counted, and some none."""
    rows, counted = padded_rows(), np.zeros((12, 16), dtype=bool)
    counted[::4], counted[1::4, 2:3], counted[2::4, 3:9] = True, True, True
    return np.where(counted | (rows == PADDING), rows, not_counted(rows))


def run(folder: Path, plan: dict, *, seed: int = 2, launch: Launch | None = None, on_step: Callable[[StepRecord], None] = lambda record: None,
        poison_at: int | None = None, model: str = "", marked: bool = False) -> StepRecord:  # fmt: skip
    """Distils build_model(seed), where `model` is "moe" build_moe, or a "tied" or "untied" Llama, from a fixed teacher in `folder`, as part of a launch or
    alone, on marked_rows where those are wanted. In the last process the loss of the `poison_at`-th of its batches is nan."""
    launch, calls = launch or Launch(), []
    plan = dict(plan)
    phases = [Phase(RowBatches(marked_rows() if marked else padded_rows(), plan.pop("batch", 4), seed=1), TrainPlan(**PLAN | plan))]
    clean = distillation_loss(build_teacher(model), launch=launch)

    def loss(model, rows_BT):
        means = clean(model, rows_BT)
        calls.append(1)
        if len(calls) - 1 == poison_at and launch.rank == launch.world_size - 1:
            means["loss"] = means["loss"] * float("nan")
        return means

    students = {"": build_model, "moe": build_moe, **{name: partial(build_llama, tied=name == "tied") for name in ("tied", "untied")}}
    student = students[model](seed)
    return train_phases(student, phases, loss, folder=folder, on_step=on_step, launch=launch)


def kill_later(folder: Path, states: int, seconds: float) -> None:
    """kill −9 of this process so many seconds after it has saved so many states."""

    def saved() -> int:
        return max((int(path.name.removeprefix("step-")) for path in folder.glob("states/step-*") if path.name[5:].isdigit()), default=0)

    before = saved()
    while saved() < before + states:
        time.sleep(0.001)
    time.sleep(seconds)
    os.kill(os.getpid(), signal.SIGKILL)


def main(folder: str, plan: dict, stop_at: int | None = None, kill_at: int | None = None, kill_after: tuple[int, float] | None = None,
         full_at: int | None = None, poison_at: int | None = None, seed: int = 7, model: str = "", marked: bool = False) -> None:  # fmt: skip
    """Every record goes to folder/steps.jsonl. A SIGTERM comes to the first process in step `stop_at`, a SIGKILL in step `kill_at`, or
    `kill_after` so many states and seconds; from step `full_at` on no file may grow beyond 20,000 bytes, as on a disk that is nearly full.
    `seed` is another than alone, so that weights must come from a state, unless a run of its own is wanted.
    """
    torch.set_num_threads(1)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as minitron.run does

    launch = read_launch()
    if model == "moe" and launch.engine == "zero3":
        from distill.engines.zero import KEPT_WHOLE  # DeepSpeed is an extra

        # Else all of these tensors stay whole, and no process waits for another that calls other experts.
        KEPT_WHOLE["stage3_param_persistence_threshold"] = 0
    if kill_after is not None:
        threading.Thread(target=kill_later, args=(Path(folder), *kill_after), daemon=True).start()

    def on_step(record: StepRecord) -> None:
        if record.step == full_at:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        with (Path(folder) / "steps.jsonl").open("a") as file:
            file.write(json.dumps({"step": record.step, "loss": record.loss, "norm": record.gradient_norm}) + "\n")
        if record.step == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        if record.step == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    try:
        run(Path(folder), plan, seed=seed, launch=launch, on_step=on_step, poison_at=poison_at, model=model, marked=marked)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        os._exit(130)


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
