"""What only a long run shows. `make test-slow`."""

import pytest


def resident_kib() -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmRSS"))


@pytest.mark.slow
def test_ten_thousand_steps_do_not_grow_in_memory(worker, tmp_path):
    seen = {}

    def on_step(record):
        if record.step % 1000 == 999:
            seen[record.step + 1] = resident_kib()

    record = worker.run(tmp_path, {"tokens": 10_000 * 40, "save_every_steps": 1000, "keep_states": 2}, on_step=on_step)
    assert record.step >= 9_999
    growth = seen[10_000] / seen[1_000] - 1
    print(f"resident memory after 1,000 and 10,000 steps: {seen[1_000]:,} and {seen[10_000]:,} KiB, {growth:+.2%}")
    assert growth < 0.02
    ballast = b"1" * (seen[10_000] // 40 * 1024)  # the control: 2.5 % more would be seen
    assert resident_kib() / seen[10_000] - 1 > 0.02 and ballast
