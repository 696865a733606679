"""What benchmarks that compare students share: the pipeline's walk to a base, students cut from it, and a distillation of each in this process."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import nn

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from distill.batches import RowBatches  # noqa: E402
from distill.objectives import LossFunction, distillation_loss  # noqa: E402
from distill.plan import TrainPlan  # noqa: E402
from distill.trainer import train  # noqa: E402
from memory_budget.hf_config import architecture_from_config, read_config  # noqa: E402
from minitron.checkpoints.placement import WholeModel  # noqa: E402
from minitron.families.nemotron_h import FAMILY  # noqa: E402
from minitron.measures.held_out import held_out_loss  # noqa: E402
from minitron.pruning.compensate import Recipe, build_compensated  # noqa: E402
from minitron.pruning.cut import build_pruned  # noqa: E402
from minitron.pruning.plan import PruningPlan  # noqa: E402
from minitron.text.samples import batches_of, evaluation_rows, spread_rows  # noqa: E402

BATCH, FORWARD_BATCH, HELD_OUT_ROWS, CALIBRATION_ROWS = 4, 8, 96, 128


def walk_pipeline(runs: Path, run_name: str, *settings: str) -> dict:
    """`python -m minitron.run` in this folder's store, which goes on where it was; gives the run's summary."""
    command = [sys.executable, "-m", "minitron.run", f"runs_folder={runs}", f"run_name={run_name}", *settings]
    if subprocess.run(command, env=os.environ | {"PYTHONPATH": str(REPOSITORY)}, stdout=subprocess.DEVNULL).returncode != 0:
        sys.exit(f"error: {' '.join(command)} failed")
    return json.loads((runs / run_name / "summary.json").read_text())


class Measured:
    """Numbers by name in a file that grows by a line each: an interrupted run goes on, and runs side by side share what they find."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path

    def get(self, name: str, measure: Callable[[], object]) -> object:
        known = self.all()
        if name not in known:
            known[name] = measure()
            with self.path.open("a") as file:
                file.write(json.dumps([name, known[name]]) + "\n")
        return known[name]

    def all(self) -> dict[str, object]:
        return dict(json.loads(line) for line in self.path.read_text().splitlines()) if self.path.exists() else {}


class RememberingTeacher(nn.Module):
    """A frozen teacher that computes a row's last hidden states once: the same rows come again with every student and in every epoch."""

    def __init__(self, teacher: nn.Module):
        super().__init__()
        self.teacher = teacher
        self.known: dict[bytes, torch.Tensor] = {}  # [T, D] by ids, and by where documents begin

    def get_output_embeddings(self) -> nn.Module:
        return self.teacher.get_output_embeddings()

    def base_model(self, ids_BT: torch.Tensor, *, use_cache: bool, **packed_BT: torch.Tensor) -> SimpleNamespace:
        rows = [b"".join(tensor.numpy().tobytes() for tensor in row) for row in zip(ids_BT, *packed_BT.values(), strict=True)]
        if new := [place for place, row in enumerate(rows) if row not in self.known]:
            packed = {name: tensor_BT[new] for name, tensor_BT in packed_BT.items()}
            hidden = self.teacher.base_model(ids_BT[new], use_cache=use_cache, **packed).last_hidden_state
            self.known |= {rows[place]: hidden_TD for place, hidden_TD in zip(new, hidden, strict=True)}
        return SimpleNamespace(last_hidden_state=torch.stack([self.known[row] for row in rows]))


class Sides:
    """A base and the students that are cut from it; all losses are of the same held-out rows."""

    def __init__(self, base: Path, teacher: Path, data: Path, *, held_out_rows: int = HELD_OUT_ROWS):
        self.config = read_config(base)
        self.architecture = architecture_from_config(self.config)
        self.model, self.teacher = (FAMILY.load(folder, dtype=torch.float32) for folder in (base, teacher))
        self.rows = np.load(data / "train.npy")
        self.calibration = batches_of(spread_rows(self.rows, CALIBRATION_ROWS), FORWARD_BATCH, "cpu")
        self.held_out = batches_of(spread_rows(evaluation_rows(np.load(data / "heldout.npy")), held_out_rows), FORWARD_BATCH, "cpu")
        self.from_teacher = distillation_loss(RememberingTeacher(self.teacher))

    @property
    def placed(self) -> WholeModel:
        """The base, to be walked layer by layer."""
        return WholeModel(FAMILY, self.model, self.architecture)

    def sliced(self, plan: PruningPlan) -> nn.Module:
        return build_pruned(FAMILY, self.model, plan, self.config)

    def compensated(self, plan: PruningPlan, recipe: Recipe, calibration: Sequence[torch.Tensor] | None = None) -> nn.Module:
        return build_compensated(self.placed, plan, calibration or self.calibration, recipe, config=self.config)

    def loss(self, model: nn.Module) -> float:
        """Held-out nats per token."""
        return held_out_loss(model, self.held_out)

    def trained(self, student: nn.Module, tokens: int, rate: float, seed: int, objective: LossFunction | None = None) -> float:
        """The held-out loss after so many tokens, by the tiny experiment's own settings but for the rate; learned from the teacher unless told otherwise."""
        if tokens >= BATCH * self.rows.shape[1]:
            plan = TrainPlan(tokens=tokens, optimizer="muon", learning_rate=rate, final_learning_rate_share=0.05, warmup_share=0.05, weight_decay=0.0,
                             clip_norm=1.0, save_every_seconds=float("inf"))  # fmt: skip
            with tempfile.TemporaryDirectory() as folder:
                train(student, RowBatches(self.rows, BATCH, seed), plan, objective or self.from_teacher, folder=Path(folder), on_step=lambda _: None)
        return self.loss(student)
