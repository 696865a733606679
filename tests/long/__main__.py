"""`make long`: tiny trainings of 20,000 steps under every engine, with saved states, held-out measures and metrics on disk; what must stay level is watched.

Of every process resident memory, open files and threads, of the folder its bytes, once a second. Level means: of the last tenth of the steps at most GROWTH
above the second tenth. metrics.jsonl grows by a line a step; how much is said. Exit code 1 where anything else grew. Hours; not in CI. docs/distillation.md
"""

import argparse
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from statistics import median

HERE = Path(__file__).resolve()
TESTS, REPOSITORY = HERE.parent.parent, HERE.parent.parent.parent
DEEPSPEED = {"ACCELERATE_USE_DEEPSPEED": "true"}
ENGINES = {
    "single": {},
    "ddp": {"ACCELERATE_MIXED_PRECISION": "no"},
    "fsdp2": {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"},
    "zero2": {"ACCELERATE_MIXED_PRECISION": "no", **DEEPSPEED, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"},
    "zero3": {"ACCELERATE_MIXED_PRECISION": "no", **DEEPSPEED, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"},
}
GROWTH = {"memory (MiB)": 0.02, "open files": 0.0, "threads": 0.0, "disk (KiB)": 0.02}
TOKENS_PER_STEP, METRICS = 40, "metrics.jsonl"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--engine", action="append", choices=list(ENGINES), help="this one alone; may be given again")
    parser.add_argument("--rank", nargs=2, metavar=("FOLDER", "STEPS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank:
        train(Path(options.rank[0]), int(options.rank[1]))
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # which ends the processes too
    grown = []
    print("| engine | processes | steps | seconds | what | in the second tenth | in the last tenth |\n|---|---:|---:|---:|---|---:|---:|", flush=True)
    for engine in options.engine or ENGINES:
        grown += watched(engine, options.steps)
    print("all level" if not grown else f"grew: {', '.join(grown)}")
    return 1 if grown else 0


def train(folder: Path, steps: int) -> None:
    """One process's part, as the pipeline trains: its own record of steps, 40 states, 100 held-out measures."""
    import torch

    spec = importlib.util.spec_from_file_location("worker", TESTS / "distill" / "worker.py")
    worker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(worker)
    from distill.batches import RowBatches
    from distill.engines.launch import read_launch
    from distill.plan import Phase, TrainPlan
    from distill.trainer import HeldOut, distillation_loss, train_phases
    from minitron.settings.run import Settings
    from minitron.training.steps import tracked_steps
    from minitron.walk.console import Console
    from minitron.walk.stage import StageContext

    torch.set_num_threads(1)
    launch, rows = read_launch(), worker.padded_rows()
    plan = TrainPlan(**worker.PLAN | {"tokens": steps * TOKENS_PER_STEP, "learning_rate": 1e-3, "save_every_steps": max(steps // 40, 1), "keep_states": 2})
    phases = [Phase(RowBatches(rows, 4, seed=1), plan)]
    context = StageContext(Settings(), folder, {}, Console(quiet=True))
    held_out = HeldOut(batches=[torch.from_numpy(rows[:4].astype("int64"))], every_steps=max(steps // 100, 1))
    with tracked_steps(context, "long", plan.tokens, loss_name="KL") as on_step:
        train_phases(worker.build_model(2), phases, distillation_loss(worker.build_teacher(), launch=launch), folder=folder, on_step=on_step, launch=launch,
                     held_out=held_out)  # fmt: skip


def watched(engine: str, steps: int) -> list[str]:
    """Runs an engine to its end, and gives what grew. A row is printed for everything that is watched."""
    world = 1 if engine == "single" else 2
    with tempfile.TemporaryDirectory(prefix="long-") as name, socket.socket() as free:
        folder = Path(name)
        free.bind(("127.0.0.1", 0))
        shared = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", **ENGINES[engine]}
        if world > 1:
            shared |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        free.close()
        command, begun = [sys.executable, str(HERE.parent), "--rank", name, str(steps)], time.monotonic()
        with open(folder / "said.txt", "w") as said:
            each = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} if world > 1 else {} for rank in range(world)]
            processes = [subprocess.Popen(command, env=shared | own, stdout=said, stderr=said) for own in each]
            seen = []
            try:
                while all(process.poll() is None for process in processes):
                    seen.append(look(folder, processes))
                    time.sleep(1)
                failed = any(process.wait() for process in processes)
            finally:
                for process in processes:
                    process.kill()
            if failed:
                print(f"{engine}: a process failed:\n{(folder / 'said.txt').read_text()[-3000:]}")
                return [f"{engine}: failed"]
        lines = (folder / METRICS).read_text().count("\n")
        per_step = (folder / METRICS).stat().st_size / lines
    last = max(one["step"] for one in seen)
    early, late = ([one for one in seen if low * last <= one["step"] < high * last] for low, high in ((0.1, 0.2), (0.9, 1.01)))
    grown = []
    for what, most in GROWTH.items():
        before, after = (median(one[what] for one in part) for part in (early, late))
        print(f"| {engine} | {world} | {lines:,} | {time.monotonic() - begun:,.0f} | {what} | {before:,.1f} | {after:,.1f} |", flush=True)
        grown += [f"{engine}: {what}"] if after > before * (1 + most) else []
    print(f"| {engine} | {world} | {lines:,} | | {METRICS} (bytes a step) | {per_step:,.0f} | |", flush=True)
    return grown


def look(folder: Path, processes: list[subprocess.Popen]) -> dict[str, float]:
    """The step, and of all processes together what they hold; of the folder all but the metrics, which grow, and states that are being written."""
    found = {"step": 0.0, "memory (MiB)": 0.0, "open files": 0.0, "threads": 0.0, "disk (KiB)": 0.0}
    for process in processes:
        try:
            status = dict(line.split(":", 1) for line in Path(f"/proc/{process.pid}/status").read_text().splitlines())
            found["memory (MiB)"] += int(status.get("VmRSS", "0").split()[0]) / 1024
            found["threads"] += int(status["Threads"])
            found["open files"] += len(os.listdir(f"/proc/{process.pid}/fd"))
        except (OSError, KeyError):  # it has just ended
            continue
    for root, _, names in os.walk(folder):  # which passes over what has just gone
        for path in (Path(root, name) for name in names if name not in (METRICS, "said.txt") and ".partial" not in root + name):
            with suppress(OSError):
                found["disk (KiB)"] += path.stat().st_size / 1024
    if (folder / METRICS).exists():
        with open(folder / METRICS, "rb") as file:
            file.seek(max(0, file.seek(0, 2) - 4000))
            whole = [line for line in file.read().split(b"\n") if line.startswith(b'{"step": ')]
        found["step"] = float(whole[-2].split(b",")[0].split()[1]) if len(whole) > 1 else 0.0
    return found


if __name__ == "__main__":
    sys.exit(main())
