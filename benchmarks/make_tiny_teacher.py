"""The tiny teacher that comes with the package: what experiment=tiny_teacher has trained, rounded to bf16, measured and put into minitron/tiny_teacher/.

Run: make tiny-teacher   (two hours of one thread; interrupted, it goes on where it was)
     .venv/bin/python benchmarks/make_tiny_teacher.py [--out DIR] [key=value …]     the second half alone
"""

import argparse
import json
import platform
import shutil
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from memory_budget.hf_config import read_config  # noqa: E402
from minitron.checkpoints.tiny import card_lines, convert_checkpoint  # noqa: E402
from minitron.door.composed import compose_settings  # noqa: E402
from minitron.families.known import family_of  # noqa: E402
from minitron.machine.device import pick_device  # noqa: E402
from minitron.measures.held_out import by_position, token_sums  # noqa: E402
from minitron.measures.needle import measure_needle  # noqa: E402
from minitron.settings.evaluate import NeedleSettings  # noqa: E402
from minitron.settings.rules import key_settings  # noqa: E402
from minitron.settings.run import Settings, Stage  # noqa: E402
from minitron.settings.teachers import STORED_FOLDER, TRAINING_FILE, digest_of  # noqa: E402
from minitron.sources.embedded import text_fingerprint  # noqa: E402
from minitron.text.key_values import vocabulary_of  # noqa: E402
from minitron.text.samples import batches_of, evaluation_rows, spread_rows  # noqa: E402
from minitron.walk.console import Console  # noqa: E402
from minitron.walk.pipeline import finished_stages  # noqa: E402
from minitron.walk.store import write_json  # noqa: E402

HELD_OUT_ROWS, BATCH, ROW_TOKENS = 256, 8, 256  # rows of the demo's length
NEEDLE = NeedleSettings(lengths=[128, 256, 512], depths=3, samples=50, alternatives=8)
CURVE_EVERY = 25  # steps of which one is kept


def settings_of(overrides: list[str]) -> Settings:
    """experiment=tiny_teacher, with changes."""
    return replace(compose_settings("experiment=tiny_teacher", *overrides), stage=Stage.teacher)


def measured(folder: Path, held_out_RT: np.ndarray) -> dict[str, Any]:
    """What a checkpoint does on the held-out rows that grade students, in rows of the demo's length: loss by position, and the needle."""
    from transformers import AutoTokenizer

    rows = evaluation_rows(held_out_RT)
    rows = np.ascontiguousarray(rows).reshape(-1, ROW_TOKENS)
    model = family_of(read_config(folder)).load(folder, dtype=torch.float32, device="cpu")
    sums = token_sums(model, model, batches_of(spread_rows(rows, HELD_OUT_ROWS), BATCH, "cpu"))
    long = token_sums(model, model, batches_of(spread_rows(evaluation_rows(held_out_RT), HELD_OUT_ROWS // 2), BATCH, "cpu"))
    needle = measure_needle(model, vocabulary_of(AutoTokenizer.from_pretrained(folder)), rows, NEEDLE, batch_tokens=BATCH * 512)
    held_out = asdict(sums.means()) | {"row_tokens": ROW_TOKENS, "by_position": by_position(sums), "longer_rows_by_position": by_position(long)}
    return {"held_out": held_out, "needle": needle}


def curve_of(records: list[dict]) -> list[dict[str, float]]:
    """Loss by step: the running mean, and where it was measured the held-out one."""
    kept = [record for record in records if record["step"] % CURVE_EVERY == 0 or "held_out_loss" in record]
    return [{name: round(record[name], 4) for name in ("step", "loss", "recent_loss", "held_out_loss") if name in record} for record in kept]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=STORED_FOLDER, help="folder to write")
    parser.add_argument("overrides", nargs="*", help="settings, as for minitron.run")
    options = parser.parse_args()
    settings = settings_of(options.overrides)
    pick_device(settings)
    found = finished_stages(settings, Console(quiet=True)).results
    if "teacher" not in found:
        print("error: experiment=tiny_teacher stage=teacher is not done under these settings; run it first (make tiny-teacher)", file=sys.stderr)
        return 2
    teacher, data = found["teacher"], found["data"]
    records = [json.loads(line) for line in (teacher.folder / "metrics.jsonl").read_text().splitlines()]
    last = records[-1]
    made = options.out.with_name(f"{options.out.name}.partial")
    shutil.rmtree(made, ignore_errors=True)
    convert_checkpoint(teacher.model_folder, made, dtype="BF16", lines=card_lines(last["tokens"]))
    training = {
        "digest": digest_of(made), "tokens": last["tokens"], "steps": last["total_steps"], "seconds": round(last["seconds"]),
        "machine": f"{torch.get_num_threads()} thread, {torch.backends.cpu.get_cpu_capability()}", "torch": torch.__version__,
        "text": {"python": platform.python_version(), "fingerprint": text_fingerprint(), "train_tokens": data.facts["train_tokens"]},
        "settings": {"data": key_settings(settings.data), "tiny": key_settings(settings.teacher.tiny), "train": key_settings(settings.teacher.train),
                     "seed": settings.seed},
        **measured(made, np.load(data.folder / "heldout.npy", mmap_mode="r")),
        "curve": curve_of(records),
    }  # fmt: skip
    write_json(made / TRAINING_FILE, training)
    shutil.rmtree(options.out, ignore_errors=True)
    made.rename(options.out)
    print(json.dumps({"benchmark": "make_tiny_teacher"} | {name: training[name] for name in ("digest", "tokens", "seconds", "held_out", "needle")}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
