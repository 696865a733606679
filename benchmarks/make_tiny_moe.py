"""A tiny mixture of experts to prune, benchmarks/tiny_moe/: a NemotronH with expert layers, trained as the tiny teacher is, on its text in its tokens.

Run: make tiny-moe       (half an hour of one thread; interrupted, it goes on where it was)
     .venv/bin/python benchmarks/make_tiny_moe.py [--out DIR] [--runs DIR] [--now]

The experts' load is kept even by their correction biases alone (`balance_rate`).
"""

import argparse
import json
import math
import platform
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
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
from minitron.settings.rules import key_settings  # noqa: E402
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
PLAN = TrainPlan(tokens=8_000_000, optimizer="muon", learning_rate=0.006, final_learning_rate_share=0.02, warmup_share=0.02, weight_decay=0.1, clip_norm=1.0,
                 schedule="wsd", decay_share=0.5, balance_rate=0.0005, save_every_seconds=120, keep_states=2)  # fmt: skip
OFTEN = 10  # so that a token's own shares of the experts are known
DRAWS = 3  # of experts to drop
METRICS_FILE = "metrics.jsonl"


class Heard:
    """How many tokens of each kind every layer has sent to each of its experts, by layer: `counts`, int64 [V, E] of V tokens of the vocabulary, E experts."""

    def __init__(self, model: nn.Module):
        lists = {layer: experts for layer, block in enumerate(model.base_model.layers) if (experts := experts_of(block)) is not None}
        self.counts = {layer: torch.zeros(ARCHITECTURE.vocab, len(experts), dtype=torch.int64) for layer, experts in lists.items()}
        self.ids_N = torch.empty(0, dtype=torch.int64)
        model.base_model.embeddings.register_forward_pre_hook(self._hear_ids)
        for layer, experts in lists.items():
            experts.watch = partial(self._hear, self.counts[layer])

    def _hear_ids(self, _embeddings: nn.Module, given: tuple[torch.Tensor]) -> None:
        self.ids_N = given[0].flatten()

    def _hear(self, counts_VE: torch.Tensor, routed: Routed) -> None:
        counts_VE[:, routed.expert] += torch.bincount(self.ids_N[routed.tokens_n], minlength=len(counts_VE))

    def shares(self) -> dict[int, torch.Tensor]:
        """By layer the share of each expert in what is sent, float64 [E]; uniform is 1/E."""
        return {layer: counts_VE.sum(0).double() / counts_VE.sum() for layer, counts_VE in self.counts.items()}


def entropy_share(shares_E: torch.Tensor) -> float:
    """The entropy of a layer's load over that of a uniform one, in [0, 1]."""
    return (torch.special.entr(shares_E).sum() / math.log(len(shares_E))).item()


def entropy_within_tokens(counts_VE: torch.Tensor, often: int = OFTEN) -> float:
    """The same where the token is known: the mean over tokens of the text, those alone that were sent `often` times as many experts as there are."""
    often_VE = counts_VE[counts_VE.sum(1) >= often * counts_VE.shape[1]].double()
    sent_V = often_VE.sum(1)
    entropies_V = torch.tensor([entropy_share(counts_E / counts_E.sum()) for counts_E in often_VE], dtype=torch.float64)
    return (entropies_V * sent_V).sum().item() / sent_V.sum().item()


def train(folder: Path, rows_RT: np.ndarray, held_out_RT: np.ndarray, num_tokens: int) -> None:
    """Trains from the newest state in the folder on; its last state has the weights, metrics.jsonl every step."""
    torch.manual_seed(SEED)
    model = FAMILY.build(tiny_config("float32"))
    folder.mkdir(parents=True, exist_ok=True)
    path, state = folder / METRICS_FILE, newest_state(folder)
    done = state.facts["record"]["step"] if state else -1
    kept = [line for line in (path.read_text().splitlines() if path.exists() else []) if line.endswith("}") and json.loads(line)["step"] <= done]
    path.write_text("".join(f"{line}\n" for line in kept))

    def on_step(record: StepRecord) -> None:
        line = {name: value for name, value in asdict(record).items() if name != "watched"} | record.watched
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


def loss_without(model: nn.Module, batches: list[torch.Tensor], dropped: dict[int, torch.Tensor]) -> float:
    """Held-out loss where the router of each layer chooses among the experts that are not dropped."""
    biases = {layer: model.base_model.layers[layer].mixer.gate.e_score_correction_bias for layer in dropped}
    before = {layer: bias_E.clone() for layer, bias_E in biases.items()}
    for layer, numbers in dropped.items():
        biases[layer][numbers] = -math.inf
    loss = held_out_loss(model, batches)
    for layer, bias_E in biases.items():
        bias_E.copy_(before[layer])
    return loss


def losses_without(model: nn.Module, batches: list[torch.Tensor], shares: dict[int, torch.Tensor], number: int) -> dict[str, Any]:
    """The same without `number` experts of each layer: those that are used least, and the mean of some draws."""
    draws = [{layer: torch.randperm(len(shares_E), generator=torch.Generator().manual_seed(100 * seed + layer))[:number] for layer, shares_E in shares.items()}
             for seed in range(DRAWS)]  # fmt: skip
    least_used = loss_without(model, batches, {layer: shares_E.argsort()[:number] for layer, shares_E in shares.items()})
    return {"experts": number, "least_used": least_used, "drawn": sum(loss_without(model, batches, draw) for draw in draws) / DRAWS}


def measured(folder: Path, held_out_RT: np.ndarray) -> dict[str, Any]:
    """What a checkpoint does on the held-out rows that grade students: loss by position, how it routes, and the loss where it cannot."""
    model = FAMILY.load(folder, dtype=torch.float32, device="cpu")
    heard = Heard(model)
    batches = batches_of(spread_rows(evaluation_rows(held_out_RT), HELD_OUT_ROWS), BATCH, "cpu")
    sums = token_sums(model, model, batches)
    held_out = {"loss_nats_per_token": sums.means().loss_nats_per_token, "tokens": sums.means().tokens, "row_tokens": held_out_RT.shape[1],
                "by_position": [{name: place[name] for name in ("from", "to", "loss_nats_per_token")} for place in by_position(sums)]}  # fmt: skip
    layers = [{"layer": layer, "least": shares_E.min().item(), "median": shares_E.median().item(), "most": shares_E.max().item(),
               "entropy_of_uniform": entropy_share(shares_E), "entropy_within_tokens": entropy_within_tokens(heard.counts[layer])}
              for layer, shares_E in heard.shares().items()]  # fmt: skip
    shares = heard.shares()
    without = [losses_without(model, batches, shares, ARCHITECTURE.moe_num_experts // part) for part in (4, 2)]
    with random_routing(model):
        at_random = held_out_loss(model, batches)
    return {"held_out": held_out, "routing": {"uniform_share": 1 / ARCHITECTURE.moe_num_experts, "layers": layers, "loss_with_random_experts": at_random,
                                              "loss_without": without}}  # fmt: skip


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
        "settings": {"data": key_settings(settings.data), "train": asdict(PLAN), "rows": ROWS, "seed": SEED},
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
