"""A step of our distillation against one of TRL's GKD trainer: tokens per second, and peak memory.

Both train the same student against the same frozen teacher on the same rows by forward KL (of GKD: lmbda = 0, given text alone;
beta = 0, KL(teacher ‖ student)) with AdamW, gradients clipped, at a constant rate, float32. Both models run our scan, so what
differs is the training step. Seconds are those of the trainers' own loops, a step each, saving left out. Peak memory is a child
process's largest resident set above what it held with both models built, after a training of two toys has loaded what a
trainer loads late.
Needs TRL: pip install --no-deps --target FOLDER trl==1.16.0, and FOLDER on PYTHONPATH.
Run: .venv/bin/python benchmarks/distill_step.py [--repeats N] [--steps N]
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import NemotronHConfig, NemotronHForCausalLM, PreTrainedTokenizerFast, PrinterCallback, TrainerCallback
from transformers.utils import logging as transformers_logging

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from distill.batches import RowBatches  # noqa: E402
from distill.chunked_loss import Head, chunked_loss  # noqa: E402
from distill.objectives import head_of  # noqa: E402
from distill.plan import StepRecord, TrainPlan  # noqa: E402
from distill.trainer import distill  # noqa: E402
from minitron.mamba import dispatch  # noqa: E402

SIDES = ("trl", "ours")
BATCH, LENGTH, RATE, CLIP = 4, 256, 1e-4, 1.0
BLOCKS = {"M": "linear_attention", "-": "mlp", "*": "full_attention"}
GIB = 2**30
SCRATCH = tempfile.TemporaryDirectory()

# Trains for so many steps; gives the seconds of each.
Side = Callable[[int], list[float]]


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of the models that are compared, or of the toys."""

    vocabulary: int = 32768
    teacher_hidden: int = 256
    student_hidden: int = 192
    pattern: str = "M-M*-M-M*-M-"


TOYS = Sizes(vocabulary=64, teacher_hidden=32, student_hidden=32, pattern="M-*")


def build_model(hidden: int, sizes: Sizes, seed: int) -> NemotronHForCausalLM:
    torch.manual_seed(seed)
    config = NemotronHConfig(
        vocab_size=sizes.vocabulary, hidden_size=hidden, layers_block_type=[BLOCKS[letter] for letter in sizes.pattern], intermediate_size=4 * hidden,
        num_attention_heads=8, num_key_value_heads=2, head_dim=32, mamba_num_heads=hidden // 16, mamba_head_dim=32, n_groups=2, ssm_state_size=32,
        chunk_size=32, tie_word_embeddings=False,
    )  # fmt: skip
    return NemotronHForCausalLM(config).float()


def build_models(sizes: Sizes) -> tuple[NemotronHForCausalLM, NemotronHForCausalLM]:
    """(teacher, student); the teacher's logits are of size 3, so that there is something to learn."""
    teacher = build_model(sizes.teacher_hidden, sizes, 0).requires_grad_(False)
    teacher.lm_head.weight.mul_(3 / (0.02 * sizes.teacher_hidden**0.5))
    return teacher, build_model(sizes.student_hidden, sizes, 1)


def build_rows(sizes: Sizes) -> np.ndarray:
    return np.random.default_rng(0).integers(sizes.vocabulary, size=(64, LENGTH), dtype=np.int32)


def build_side(name: str, sizes: Sizes, teacher: NemotronHForCausalLM, student: NemotronHForCausalLM) -> Side:
    return {"trl": trl_side, "ours": our_side}[name](build_rows(sizes), teacher, student)


def our_side(rows: np.ndarray, teacher: NemotronHForCausalLM, student: NemotronHForCausalLM) -> Side:
    batches = RowBatches(rows, BATCH, seed=0)

    def run(steps: int) -> list[float]:
        plan = TrainPlan(tokens=steps * BATCH * LENGTH, optimizer="adamw", learning_rate=RATE, final_learning_rate_share=1.0, warmup_share=0.0,
                         weight_decay=0.0, clip_norm=CLIP, save_every_seconds=float("inf"))  # fmt: skip
        ends = [time.perf_counter()]

        def on_step(record: StepRecord) -> None:
            ends.append(time.perf_counter())

        with tempfile.TemporaryDirectory(dir=SCRATCH.name) as folder:
            distill(teacher, student, batches, plan, folder=Path(folder), on_step=on_step)
        return list(np.diff(ends))

    return run


class StepTimes(TrainerCallback):
    """The seconds of a Trainer's steps, from getting a batch on."""

    def on_train_begin(self, *_arguments, **_settings) -> None:
        self.ends = [time.perf_counter()]

    def on_step_end(self, *_arguments, **_settings) -> None:
        self.ends.append(time.perf_counter())


def trl_side(rows: np.ndarray, teacher: NemotronHForCausalLM, student: NemotronHForCausalLM) -> Side:
    times = StepTimes()
    trainer = build_gkd(rows, teacher, student, times)

    def run(steps: int) -> list[float]:
        trainer.args.max_steps = steps
        trainer.train()
        return list(np.diff(times.ends))

    return run


def build_gkd(rows: np.ndarray, teacher: NemotronHForCausalLM, student: NemotronHForCausalLM, times: StepTimes):
    """TRL's trainer with its own defaults but for what is said above."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    # It wants a tokenizer, and asks it for the ids of padding and end alone.
    words = Tokenizer(models.WordLevel({"<pad>": 0, "<end>": 1}, unk_token="<end>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<end>")
    config = GKDConfig(
        output_dir=SCRATCH.name, per_device_train_batch_size=BATCH, max_steps=1, lmbda=0.0, beta=0.0, temperature=1.0, learning_rate=RATE,
        lr_scheduler_type="constant", weight_decay=0.0, max_grad_norm=CLIP, use_cpu=not torch.cuda.is_available(), bf16=False, report_to=[],
        activation_checkpointing=False, save_strategy="no", logging_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    dataset = Dataset.from_dict({"input_ids": rows.tolist()})
    trainer = GKDTrainer(model=student, teacher_model=teacher, args=config, data_collator=gkd_batch, train_dataset=dataset, processing_class=tokenizer,
                         callbacks=[times])  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    return trainer


def gkd_batch(examples: list[dict]) -> dict[str, torch.Tensor]:
    ids_BT = torch.tensor([example["input_ids"] for example in examples])
    return {"input_ids": ids_BT, "attention_mask": torch.ones_like(ids_BT), "labels": ids_BT.clone()}


def check_agreement(sizes: Sizes) -> None:
    """The two losses of one batch; GKD leaves out the last position of a row."""
    teacher, student = build_models(sizes)
    trainer = build_gkd(build_rows(sizes), teacher, student, StepTimes())
    batch = gkd_batch([{"input_ids": row} for row in build_rows(sizes)[:BATCH]])
    with torch.no_grad():
        heads = (head_of(model, batch["input_ids"]) for model in (student, teacher))
        ours = chunked_loss(*(Head(head.hidden_BTD[:, :-1], head.weight_VD) for head in heads)).loss.item()
        theirs = trainer.compute_loss(student, batch).item()
    assert ours > 0.1 and abs(ours - theirs) < 1e-5 * ours, f"the losses differ: ours {ours}, theirs {theirs}"


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def print_memory(name: str, steps: int) -> None:
    """What a child process does: prints the bytes that its side took above the models."""
    build_side(name, TOYS, *build_models(TOYS))(2)
    teacher, student = build_models(Sizes())
    before = peak_bytes()
    build_side(name, Sizes(), teacher, student)(steps)
    print(peak_bytes() - before)


def measured_memory(name: str, steps: int) -> int:
    command = [sys.executable, str(Path(__file__).resolve()), "--memory-of", name, "--steps", str(steps)]
    return int(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3, help="interleaved repeats of every side; the steps' medians are reported")
    parser.add_argument("--steps", type=int, default=4, help="steps of a repeat; the first of a repeat is not counted")
    parser.add_argument("--memory-of", choices=SIDES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore"), transformers_logging.set_verbosity_error(), os.environ.update(TRL_EXPERIMENTAL_SILENCE="1")
    dispatch.install()
    try:
        import trl.experimental.gkd  # noqa: F401
    except ImportError as error:
        sys.exit(f"error: {error}; this benchmark compares with TRL: pip install --no-deps --target FOLDER trl==1.16.0, and FOLDER on PYTHONPATH")
    if arguments.memory_of:
        return print_memory(arguments.memory_of, arguments.steps)
    memory = {name: measured_memory(name, arguments.steps) for name in SIDES}
    check_agreement(Sizes())
    sides = {name: build_side(name, Sizes(), *build_models(Sizes())) for name in SIDES}
    seconds: dict[str, list[float]] = {name: [] for name in SIDES}
    for _ in range(arguments.repeats):
        for name, side in sides.items():
            seconds[name] += side(arguments.steps)[1:]
    return report(seconds, memory)


def report(seconds: dict[str, list[float]], memory: dict[str, int]) -> None:
    speed = {name: BATCH * LENGTH / statistics.median(values) for name, values in seconds.items()}
    print(f"{BATCH} x {LENGTH} tokens a step, {Sizes()}, {torch.get_num_threads()} threads, {len(seconds['ours'])} steps each")
    print(f"{'':6}{'tokens/s':>10}{'peak GiB':>10}   seconds of the steps")
    for name in SIDES:
        print(f"{name:6}{speed[name]:10,.0f}{memory[name] / GIB:10.2f}   {' '.join(f'{value:.2f}' for value in seconds[name])}")
    ratios = {"tokens_per_second_ratio": speed["ours"] / speed["trl"], "peak_memory_ratio": memory["ours"] / memory["trl"]}
    print(json.dumps({"benchmark": "distill_step", "ratios": ratios, "tokens_per_second": speed, "peak_bytes": memory, "steps": len(seconds["ours"])}))


if __name__ == "__main__":
    main()
