"""Text into rows: tokens a second against `datasets.map(num_proc=2)` with the same tokenizer and files, memory from a small corpus to a large one, and a large
one killed at random against one that was left alone.

Run: .venv/bin/python benchmarks/text.py [--megabytes 100] [--repeats N] [--large-gigabytes 2] [--kills N] [FOLDER]. A corpus is made of the Python standard
library's text, its sentences and lines in random order, as jsonl. Of the other side its map alone is timed, not the reading into its cache before.
The large corpus is tokenised once for its memory and, with --kills, once more, killed at random so many times: every file must come out the same, bit for bit.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))
FLOORS = {"tokens_per_second_ratio": 1.0, "rss_growth": 1.10, "peak_rss_gib": 1.5}

OURS = """
import json, sys, time
from pathlib import Path
from minitron.settings.data import DataSettings
from minitron.text.encoding import Encoding
from minitron.text.passes import Place, run_passes
from minitron.walk.console import Console

if __name__ == "__main__":
    corpus, tokenizer, folder = sys.argv[1:]
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    data = DataSettings(files=[corpus], sequence_length=1024, processes=2)
    began = time.perf_counter()
    splits = run_passes(Place(folder=folder, scratch=folder / "source", console=Console(), goes_on=print), data,
                        Encoding(Path(tokenizer), data, 10**6, folder / "heldout_hashes.npy"), {"heldout": "heldout", "train": "train"})
    print(json.dumps({"tokens": sum(split.counts.tokens for split in splits.values()), "seconds": time.perf_counter() - began}))
"""
THEIRS = """
import json, sys, time
import datasets
from transformers import AutoTokenizer

if __name__ == "__main__":
    corpus, tokenizer, folder = sys.argv[1:]
    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(tokenizer)
    texts = datasets.load_dataset("json", data_files=corpus, split="train", cache_dir=folder)
    encode = lambda batch: {"input_ids": tokenizer(batch["text"], add_special_tokens=False)["input_ids"]}
    began = time.perf_counter()
    ids = texts.map(encode, batched=True, num_proc=2, remove_columns=texts.column_names)
    seconds = time.perf_counter() - began
    print(json.dumps({"tokens": sum(map(len, ids.select(range(200))["input_ids"])), "seconds": seconds}))
"""


def make_corpus(path: Path, megabytes: float) -> None:
    """Lines of the embedded text in random order, some hundred to a document of a few kilobytes."""
    if path.exists():
        return
    from minitron.sources.embedded import embedded_documents
    from minitron.sources.prose import prose_documents

    lines = [line for document in [*prose_documents(), *embedded_documents()] for line in document.text.splitlines() if line.strip()]
    numbers, written, partial = random.Random(0), 0, path.with_suffix(".partial")
    with partial.open("w") as file:
        while written < megabytes * 1e6:
            text = "\n".join(numbers.choices(lines, k=numbers.randint(20, 200)))
            written += file.write(json.dumps({"id": numbers.getrandbits(40), "text": text, "note": None}) + "\n")
    partial.rename(path)


def tokenizer_folder(folder: Path) -> Path:
    """The tiny teacher's, or one that is there."""
    from minitron.checkpoints.tiny import unpack_tiny_teacher

    if not (folder / "teacher").exists():
        unpack_tiny_teacher(folder / "teacher")
    return next((folder / "teacher").rglob("tokenizer.json")).parent


class Watched:
    """A process, and the most memory that it and its children held at one moment: the sum of what is resident in each."""

    def __init__(self, script: str, *arguments: object):
        environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1"}
        self.script = Path(tempfile.mkdtemp()) / "side.py"  # a file: the processes that it starts look for it
        self.script.write_text(script)
        command = [sys.executable, str(self.script), *map(str, arguments)]
        self.process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True)
        self.peak_gib = 0.0
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        import psutil

        while self.process.poll() is None:
            try:
                one = psutil.Process(self.process.pid)
                held = sum(process.memory_info().rss for process in [one, *one.children(recursive=True)])
                self.peak_gib = max(self.peak_gib, held / 2**30)
            except psutil.Error:
                pass
            time.sleep(0.1)

    def kill(self) -> None:
        """The first process alone: the others must end by themselves."""
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def result(self) -> dict:
        out, _ = self.process.communicate()
        shutil.rmtree(self.script.parent)
        if self.process.returncode != 0:
            sys.exit(f"error: {self.script} ended with {self.process.returncode}")
        return json.loads(out.splitlines()[-1]) | {"peak_rss_gib": self.peak_gib}


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.file_digest(path.open("rb"), "sha256").hexdigest() for path in sorted(folder.glob("*.npy"))}


def read_so_far(folder: Path) -> int:
    """Bytes that the second pass has read, as its saved state says."""
    try:
        return json.loads((folder / "train.state.json").read_text()).get("bytes", 0)
    except (OSError, ValueError):
        return 0


def compared(corpus: Path, tokenizer: Path, folder: Path, repeats: int) -> tuple[float, float, list[float]]:
    """Tokens a second of both sides, medians, and our peaks; one after the other, in turns."""
    rates: dict[str, list[float]] = {"ours": [], "theirs": []}
    peaks, tokens = [], 0
    for number in range(repeats):
        for name, script in (("ours", OURS), ("theirs", THEIRS)):
            place = folder / f"{name}-{number}"
            found = Watched(script, corpus, tokenizer, place).result()
            tokens = found["tokens"] if name == "ours" else tokens  # of the same documents
            rates[name].append(tokens / found["seconds"])
            peaks += [found["peak_rss_gib"]] if name == "ours" else []
            print(f"{name:<8} {rates[name][-1]:12,.0f} tokens/s  {found['seconds']:7.1f} s  peak {found['peak_rss_gib']:.2f} GiB", flush=True)
            shutil.rmtree(place)
    return statistics.median(rates["ours"]), statistics.median(rates["theirs"]), peaks


def killed_and_whole(corpus: Path, tokenizer: Path, folder: Path, kills: int) -> tuple[float, bool]:
    """The peak of the large corpus's run in GiB, and whether one that is killed at random places ends the same."""
    whole = Watched(OURS, corpus, tokenizer, folder / "whole")
    found = whole.result()
    print(f"large    {found['tokens'] / found['seconds']:12,.0f} tokens/s  {found['seconds']:7.1f} s  peak {found['peak_rss_gib']:.2f} GiB", flush=True)
    if not kills:
        return found["peak_rss_gib"], True
    numbers = random.Random(1)
    for share in sorted(numbers.random() for _ in range(kills)):
        run = Watched(OURS, corpus, tokenizer, folder / "killed")
        while read_so_far(folder / "killed") < share * corpus.stat().st_size:
            time.sleep(0.05)
        time.sleep(numbers.random() * 4)  # somewhere between two states that are saved
        run.kill()
        print(f"killed   at {share:.0%} and a little", flush=True)
    Watched(OURS, corpus, tokenizer, folder / "killed").result()
    return found["peak_rss_gib"], digests(folder / "whole") == digests(folder / "killed")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--megabytes", type=float, default=100)
    parser.add_argument("--large-gigabytes", type=float, default=0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--kills", type=int, default=0)
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer, corpus = tokenizer_folder(folder), folder / f"{options.megabytes:g}MB.jsonl"
    make_corpus(corpus, options.megabytes)
    ours, theirs, peaks = compared(corpus, tokenizer, folder, options.repeats)
    figures = {"tokens_per_second_ratio": round(ours / theirs, 3), "peak_rss_gib": round(max(peaks), 3), "rss_growth": None}
    same = True
    if options.large_gigabytes:
        large = folder / f"{options.large_gigabytes:g}GB.jsonl"
        make_corpus(large, options.large_gigabytes * 1000)
        peak, same = killed_and_whole(large, tokenizer, folder, options.kills)
        figures |= {"peak_rss_gib": round(max(peak, *peaks), 3), "rss_growth": round(peak / statistics.median(peaks), 3)}
    if options.folder is None:
        shutil.rmtree(folder)
    ratios = {name: figures[name] for name in ("tokens_per_second_ratio", "rss_growth")}
    print(json.dumps({"benchmark": "text", "ratios": ratios, **figures, "tokens_per_second": round(ours), "killed_is_the_same": same, "kills": options.kills}))
    is_kept = figures["tokens_per_second_ratio"] >= FLOORS["tokens_per_second_ratio"] and figures["peak_rss_gib"] <= FLOORS["peak_rss_gib"]
    return 0 if is_kept and same and (figures["rss_growth"] or 1) <= FLOORS["rss_growth"] else 1


if __name__ == "__main__":
    sys.exit(main())
