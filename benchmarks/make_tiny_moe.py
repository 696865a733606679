"""A tiny mixture of experts to prune, benchmarks/tiny_moe/: a NemotronH with expert layers, trained as the tiny teacher is, on its text in its tokens.

Run: make tiny-moe       (forty minutes of one thread; interrupted, it goes on where it was)
     .venv/bin/python benchmarks/make_tiny_moe.py [--out DIR] [--runs DIR] [--now]

While it is trained the load of the experts is balanced without a loss of its own (DeepSeek-V3, arXiv 2412.19437, §2.1.2; arXiv 2408.15664): after every step
the correction bias of each expert that was sent more tokens than the mean falls by BIAS_STEP, that of the others rises. It falls to 0 with the learning rate.
"""

import argparse
import json
import math
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.make_tiny_teacher import BATCH, HELD_OUT_ROWS, curve_of  # noqa: E402
from distill.batches import RowBatches  # noqa: E402
from distill.objectives import next_token_objective  # noqa: E402
from distill.plan import Phase, StepRecord, TrainPlan  # noqa: E402
from distill.states import TENSORS_FILE, newest_state  # noqa: E402
from distill.trainer import HeldOut, train_phases  # noqa: E402
from memory_budget.architecture import Architecture  # noqa: E402
from minitron.checkpoints.files import Checkpoint  # noqa: E402
from minitron.checkpoints.publish import model_card, write_planned  # noqa: E402
from minitron.door.composed import compose_settings  # noqa: E402
from minitron.families.experts import Routed, experts_of  # noqa: E402
from minitron.families.nemotron_h import FAMILY  # noqa: E402
from minitron.families.table import BUFFER  # noqa: E402
from minitron.machine.device import pick_device  # noqa: E402
from minitron.measures.held_out import by_position, held_out_loss, token_sums  # noqa: E402
from minitron.settings.run import Stage  # noqa: E402
from minitron.settings.teachers import STORED_FOLDER, TRAINING_FILE, digest_of  # noqa: E402
from minitron.sources.embedded import text_fingerprint  # noqa: E402
from minitron.text.samples import batches_of, evaluation_rows, screening_rows, spread_rows  # noqa: E402
from minitron.training.tiny_teacher import HELD_OUT_ROWS as SCREENING_ROWS  # noqa: E402
from minitron.training.tiny_teacher import TINY_CONFIG  # noqa: E402
from minitron.walk.console import Console  # noqa: E402
from minitron.walk.pipeline import run_stages  # noqa: E402
from minitron.walk.store import make_runs_folder, write_json  # noqa: E402

OUT = Path(__file__).resolve().parent / "tiny_moe"
ARCHITECTURE = Architecture(
    model_type="nemotron_h", pattern="M-M*EMEM*EME", vocab=2048, hidden=128, ffn=256,
    num_attention_heads=8, num_key_value_heads=2, attention_head_dim=16,
    mamba_num_heads=16, mamba_head_dim=16, mamba_num_groups=2, mamba_state_size=32, mamba_conv_kernel=4,
    moe_num_experts=32, moe_experts_per_token=3, moe_ffn=64, moe_shared_ffn=128,
)  # fmt: skip
ROUTER = {"n_shared_experts": 1, "norm_topk_prob": True, "routed_scaling_factor": 2.5}
SEED, ROWS, HELD_OUT_EVERY = 0, 16, 100  # rows of 256 tokens a step; steps between measurements
PLAN = TrainPlan(tokens=3_400_000, optimizer="muon", learning_rate=0.006, final_learning_rate_share=0.02, warmup_share=0.025, weight_decay=0.1, clip_norm=1.0,
                 schedule="wsd", decay_share=0.5, save_every_seconds=120, keep_states=2)  # fmt: skip
BIAS_STEP = 0.001
METRICS_FILE = "metrics.jsonl"


class Loads:
    """How many tokens each layer has sent to each of its experts: with `training` in passes of which gradients are wanted, else in the others."""

    def __init__(self, model: nn.Module, num_experts: int, *, training: bool):
        self.gates = {layer: block.mixer.gate for layer, block in enumerate(model.base_model.layers) if experts_of(block) is not None}
        self.counts = {layer: torch.zeros(num_experts, dtype=torch.int64) for layer in self.gates}
        self.training = training
        for layer, counts_E in self.counts.items():
            experts_of(model.base_model.layers[layer]).watch = self._counter(counts_E)

    def _counter(self, counts_E: torch.Tensor) -> Callable[[Routed], None]:
        def heard(routed: Routed) -> None:
            if torch.is_grad_enabled() == self.training:  # the held-out rows of a training leave its counts alone
                counts_E[routed.expert] += len(routed.tokens_n)

        return heard

    def balance(self, step: float) -> None:
        """Moves each correction bias by a step against the load since the last time, all of a layer by as much together that their mean stays 0."""
        for layer, counts_E in self.counts.items():
            bias_E = self.gates[layer].e_score_correction_bias
            bias_E += step * torch.sign(counts_E.float().mean() - counts_E)
            bias_E -= bias_E.mean()

    def clear(self) -> None:
        for counts_E in self.counts.values():
            counts_E.zero_()

    def shares(self) -> dict[int, torch.Tensor]:
        """By layer the share of each expert in what is sent, float64 [E]; uniform is 1/E."""
        return {layer: counts_E.double() / counts_E.sum() for layer, counts_E in self.counts.items()}


def entropy_share(shares_E: torch.Tensor) -> float:
    """The entropy of a layer's load over that of a uniform one, in [0, 1]."""
    return (torch.special.entr(shares_E).sum() / math.log(len(shares_E))).item()


def train(folder: Path, rows_RT: np.ndarray, held_out_RT: np.ndarray, num_tokens: int) -> None:
    """Trains from the newest state in the folder on; its last state has the weights, metrics.jsonl every step."""
    torch.manual_seed(SEED)
    model = FAMILY.build(tiny_config("float32"))
    loads, path = Loads(model, ARCHITECTURE.moe_num_experts, training=True), folder / METRICS_FILE
    folder.mkdir(parents=True, exist_ok=True)
    state = newest_state(folder)
    done = state.facts["record"]["step"] if state else -1
    kept = [line for line in (path.read_text().splitlines() if path.exists() else []) if line.endswith("}") and json.loads(line)["step"] <= done]
    path.write_text("".join(f"{line}\n" for line in kept))

    def on_step(record: StepRecord) -> None:
        loads.balance(BIAS_STEP * record.learning_rate / PLAN.learning_rate)
        entropies = {f"entropy_{layer}": round(entropy_share(shares_E), 4) for layer, shares_E in loads.shares().items()}
        least = {f"least_{layer}": round(shares_E.min().item(), 5) for layer, shares_E in loads.shares().items()}
        loads.clear()
        line = {name: value for name, value in asdict(record).items() if name != "watched"} | record.watched | entropies | least
        with path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        if record.step % 50 == 0:
            print(f"step {record.step} of {record.total_steps}: {record.recent_loss:.3f} nats/token, {record.seconds_left:,.0f} s left", flush=True)

    batches = RowBatches(rows_RT, ROWS, SEED, num_tokens=num_tokens)
    screening = HeldOut(batches=batches_of(spread_rows(screening_rows(held_out_RT), SCREENING_ROWS), BATCH, "cpu"), every_steps=HELD_OUT_EVERY)
    train_phases(model, [Phase(batches, PLAN)], next_token_objective, folder=folder, on_step=on_step, held_out=screening)


def tiny_config(dtype: str) -> dict[str, Any]:
    """config.json of the model, its weights in a number format of torch's."""
    return FAMILY.hf_config(TINY_CONFIG | ROUTER | {"dtype": dtype}, ARCHITECTURE)


def write_checkpoint(state: Path, folder: Path, tokens: int) -> None:
    """A saved state as a checkpoint in bf16, its correction biases in float32 as published ones are; read back."""
    stored = Checkpoint(state, file=TENSORS_FILE)
    names = {name: FAMILY.canonical_name(name.removeprefix("model.")) for name in stored.entries if name.startswith("model.")}
    dtypes = {name: "F32" if BUFFER.search(name) else "BF16" for name in names}
    planned = [stored.planned(name, new_name=FAMILY.file_name(canonical), dtype=dtypes[name]) for name, canonical in names.items()]
    lines = [f"Trained on {tokens:,} tokens of the Python standard library's sources; docs/tiny_teacher.md of minitron says how."]
    card = model_card("Tiny NemotronH mixture of experts", lines=lines, architecture=ARCHITECTURE, base=None)
    write_planned(folder, FAMILY, planned, config=tiny_config("bfloat16"), companions=STORED_FOLDER, card=card, max_shard_bytes=2**32)


@contextmanager
def random_routing(model: nn.Module) -> Iterator[None]:
    """Within it each token goes to experts drawn at random, as many as before, with the weights that its own ones would have had."""
    generator = torch.Generator().manual_seed(SEED)

    def drawn(_gate: nn.Module, _given: Any, output: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        logits_NE, weights_NK, experts_NK = output
        return logits_NE, weights_NK, torch.rand(logits_NE.shape, generator=generator).topk(experts_NK.shape[1]).indices

    hooks = [block.mixer.gate.register_forward_hook(drawn) for block in model.base_model.layers if experts_of(block) is not None]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def measured(folder: Path, held_out_RT: np.ndarray) -> dict[str, Any]:
    """What a checkpoint does on the held-out rows that grade students: loss by position, how it routes, and the loss with experts drawn at random."""
    model = FAMILY.load(folder, dtype=torch.float32, device="cpu")
    loads = Loads(model, ARCHITECTURE.moe_num_experts, training=False)
    batches = batches_of(spread_rows(evaluation_rows(held_out_RT), HELD_OUT_ROWS), BATCH, "cpu")
    sums = token_sums(model, model, batches)
    shares = loads.shares()
    with random_routing(model):
        at_random = held_out_loss(model, batches)
    held_out = {"loss_nats_per_token": sums.means().loss_nats_per_token, "tokens": sums.means().tokens, "row_tokens": held_out_RT.shape[1],
                "by_position": [{name: place[name] for name in ("from", "to", "loss_nats_per_token")} for place in by_position(sums)]}  # fmt: skip
    layers = [{"layer": layer, "least": shares_E.min().item(), "median": shares_E.median().item(), "most": shares_E.max().item(),
               "entropy_of_uniform": entropy_share(shares_E)} for layer, shares_E in shares.items()]  # fmt: skip
    return {"held_out": held_out, "routing": {"uniform_share": 1 / ARCHITECTURE.moe_num_experts, "layers": layers, "loss_with_random_experts": at_random}}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=OUT, help="folder to write")
    parser.add_argument("--runs", default="runs", help="folder of runs, which has the text's rows and the states")
    parser.add_argument("--now", action="store_true", help="train no further: write and measure the newest state, as far as it is")
    options = parser.parse_args()
    settings = replace(compose_settings("experiment=tiny", "device=cpu", "depth_lap.enabled=false", f"runs_folder={options.runs}"), stage=Stage.data)
    pick_device(settings)
    make_runs_folder(settings.runs_folder)
    data = run_stages(settings, Console()).results["data"]
    held_out_RT = np.load(data.folder / "heldout.npy", mmap_mode="r")
    folder = Path(options.runs) / "tiny_moe"
    if not options.now:
        train(folder, np.load(data.folder / "train.npy", mmap_mode="r"), held_out_RT, data.facts["train_tokens"])
    state = newest_state(folder)
    record = state.facts["record"]
    made = options.out.with_name(f"{options.out.name}.partial")
    shutil.rmtree(made, ignore_errors=True)
    write_checkpoint(state.folder, made, record["tokens"])
    lines = [json.loads(line) for line in (folder / METRICS_FILE).read_text().splitlines() if line.endswith("}")]
    training = {
        "digest": digest_of(made), "tokens": record["tokens"], "steps": record["step"] + 1, "of_steps": record["total_steps"],
        "seconds": round(record["seconds"]),
        "machine": f"{torch.get_num_threads()} thread, {torch.backends.cpu.get_cpu_capability()}", "torch": torch.__version__,
        "text": {"python": platform.python_version(), "fingerprint": text_fingerprint(), "train_tokens": data.facts["train_tokens"]},
        "settings": {"train": asdict(PLAN), "rows": ROWS, "bias_step": BIAS_STEP, "seed": SEED},
        **measured(made, held_out_RT),
        "curve": curve_of(lines),
    }  # fmt: skip
    write_json(made / TRAINING_FILE, training)
    shutil.rmtree(options.out, ignore_errors=True)
    made.rename(options.out)
    print(json.dumps({"benchmark": "make_tiny_moe"} | {name: training[name] for name in ("digest", "tokens", "seconds", "held_out", "routing")}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
