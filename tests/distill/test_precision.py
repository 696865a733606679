"""bf16 over many steps: gradients of micro-steps add up in float32, so that every engine stays near float32's curve."""

import json

import numpy as np
import pytest

STEPS = 200
PLAN = {"tokens": STEPS * 39, "learning_rate": 1e-3, "micro_batch": 1}  # rows are padded: 38 tokens a step
MEAN_OF = 20  # steps: one step's loss of a few tokens is rounding's noise


@pytest.fixture(scope="module")
def float32_losses(worker, tmp_path_factory):
    records = []
    worker.run(tmp_path_factory.mktemp("float32"), PLAN, on_step=records.append)
    return np.array([record.loss for record in records])


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "zero2", "zero3"])
def test_bf16_stays_within_a_hundredth_of_float32_over_200_steps(engine, float32_losses, launch, tmp_path):
    codes, printed = launch(engine, tmp_path, plan={**PLAN, "precision": "bf16"}, seed=2)
    assert codes == [0, 0], printed
    losses = np.array([json.loads(line)["loss"] for line in (tmp_path / "steps.jsonl").read_text().splitlines()])
    curve, expected = (np.convolve(values, np.full(MEAN_OF, 1 / MEAN_OF), "valid") for values in (losses, float32_losses))
    difference = np.abs(curve / expected - 1)
    print(f"{engine}: {len(losses)} steps, {expected[0]:.3f} to {expected[-1]:.3f} nats, at most {difference.max():.2%} apart")
    assert len(losses) >= STEPS and 0 < difference.max() < 0.01
