"""What stages plan to hold against the bytes that are counted on the pretended device, to within 5 %, and plans that forget something, which are off."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
pytestmark = pytest.mark.gpu_stand_in
CLOSE = 0.05


@pytest.fixture(scope="module")
def measured(environment, tmp_path_factory):
    """What pretended_plans.py prints of "training" or "scoring", run where it is first asked for."""
    found: dict[str, dict] = {}

    def of(what: str) -> dict:
        if what not in found:
            command = [sys.executable, str(HERE / "pretended_plans.py"), what]
            finished = subprocess.run(command, cwd=tmp_path_factory.mktemp("plans"), env=environment, text=True, capture_output=True)
            assert finished.returncode == 0, finished.stderr[-3000:]
            found[what] = json.loads(finished.stdout.splitlines()[-1])
        return found[what]

    return of


def told(title: str, parts: dict[str, int], counted: int) -> float:
    """Planned over counted bytes, both printed with the parts."""
    planned = sum(parts.values())
    named = ", ".join(f"{name} {part:,}" for name, part in parts.items() if part)
    print(f"{title}: planned {planned:,}, counted {counted:,} bytes, {planned / counted:.3f}; {named}")
    return planned / counted


def test_a_micro_step_of_distillation_holds_what_is_planned(measured):
    for title, found in measured("training").items():
        assert told(title, found["parts"], found["peak"]) == pytest.approx(1, abs=CLOSE), title


def test_what_comes_and_goes_with_a_micro_step_is_planned_as_closely(measured):
    """The same without weights, gradients, optimiser and teacher, which are most where rows are short."""
    for title, found in measured("training").items():
        planned = sum(found["parts"].values()) - found["planned_fixed"]
        assert planned / (found["peak"] - found["fixed"]) == pytest.approx(1, abs=CLOSE), title


@pytest.mark.parametrize("part", ["optimizer", "activations", "loss", "layer"])
def test_a_plan_of_a_micro_step_that_forgets_a_part_is_off(part, measured):
    """The control."""
    found = measured("training").values()
    assert max(abs((sum(one["parts"].values()) - one["parts"][part]) / one["peak"] - 1) for one in found) > CLOSE


def test_both_walks_of_scoring_hold_what_is_planned(measured):
    for title, moments in measured("scoring").items():
        for name, found in moments.items():
            assert told(f"{title}, {name}", found["parts"], found["peak"]) == pytest.approx(1, abs=CLOSE), (title, name)


@pytest.mark.parametrize("part", ["weights", "states", "full states", "branches", "a layer's own", "logits"])
def test_a_plan_of_scoring_that_forgets_a_part_is_off(part, measured):
    """The control."""
    found = [moment for moments in measured("scoring").values() for moment in moments.values() if part in moment["parts"]]
    assert max(abs((sum(one["parts"].values()) - one["parts"][part]) / one["peak"] - 1) for one in found) > CLOSE
