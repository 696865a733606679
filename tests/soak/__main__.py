"""`make soak`: the small walk under faults drawn from a seed; prints each life, the faults by kind and, as its last line, one JSON object.

Exit code 1 where anything was wrong; the folder of such a life stays, and `--only NUMBER` lives it again.
"""

import argparse
import importlib.util
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import soak_faults
import soak_lives
import soak_standin
from soak_lives import Soak, Told
from soak_runs import Run
from soak_stores import Reference, read_reference

TESTS = Path(__file__).resolve().parent.parent
REPOSITORY = TESTS.parent
NAME = "tiny"
Life = Callable[[Path, random.Random], list[Told]]
MOST_LEFT = 4  # files outside the runs folder, whatever befell how many runs


def loaded(path: Path):
    spec = importlib.util.spec_from_file_location(f"soak_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def in_a_world_of_its_own() -> None:
    """Goes on, where it may, where nobody else sees what it mounts: whatever ends it, no disk stays."""
    if os.environ.get("SOAK_WORLD") or os.geteuid() != 0 or not (unshare := shutil.which("unshare")):
        return
    os.environ["SOAK_WORLD"] = "own"
    os.execv(unshare, [unshare, "--mount", sys.executable, *sys.argv])


def environment_of(folder: Path, library: Path | None) -> dict[str, str]:
    """What runs get: one thread each, offline, this checkout's code, a cache folder of their own, and the library."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(("HYDRA", "MINITRON", "WANDB", "TRANSFORMERS", "FORCE_COLOR", "SOAK"))}
    own |= {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1", "NO_COLOR": "1",
            "XDG_CACHE_HOME": str(folder / "cache"), "TMPDIR": str(folder / "temporary")}  # fmt: skip
    return own | ({"LD_PRELOAD": str(library)} if library else {})


def lives(soak: Soak, launch: Callable, alone: Callable, options: argparse.Namespace, *, mounts: bool) -> Iterator[tuple[int, Life]]:
    """Every life by its number."""
    reference, number = soak.reference, 0

    def numbered(live: Callable) -> tuple[int, Callable]:
        nonlocal number
        number += 1
        return number - 1, live

    def one(live: Callable, **how) -> Callable:
        return lambda folder, chance: [live(soak, folder, chance, **{name: value(chance) if callable(value) else value for name, value in how.items()})]

    def late(chance: random.Random) -> int:
        """A result to begin at, later ones, which cost less, more often."""
        return reference.report - min(int(chance.expovariate(1) * len(reference.places) / 3), reference.report)

    for _ in range(options.threes):
        yield numbered(one(soak_lives.several_runs, first=late, number=3))
    for _ in range(options.twos):
        yield numbered(one(soak_lives.several_runs, first=late, number=2))
    for _ in range(options.processes):
        yield numbered(one(soak_lives.other_processes, first=lambda chance: chance.randrange(reference.report), launch=lambda _: launch))
    for _ in range(options.beginnings // 5):
        yield numbered(one(soak_lives.beginnings, first=lambda chance: chance.randrange(reference.report), times=5, launch=lambda _: alone))
    for _ in range(options.flips // 10):
        yield numbered(lambda folder, chance: list(soak_lives.flips(soak, folder, chance, number=10)))
    for number_ in range(options.states):
        yield numbered(one(soak_lives.flipped_state, stage=("teacher", "distill")[number_ % 2]))
    for _ in range(options.disks if mounts else 0):
        yield numbered(one(soak_lives.full_disk, first=late))
    for _ in range(options.disks // 2 if mounts else 0):
        yield numbered(one(soak_lives.read_only_disk, first=late))
    for _ in range(options.lives):
        yield numbered(one(soak_lives.one_run, first=late, faults=5, alone=lambda chance: chance.random() < 0.3))


def live(number: int, life: Callable, folder: Path, seed: int, until: float) -> tuple[int, list[Told], float]:
    """Lives one life in a folder of its own, which goes if all was well; none that would begin after `until` (time.monotonic())."""
    began, own = time.monotonic(), folder / f"life-{number}"
    if began > until:
        return number, [], 0.0
    own.mkdir()
    try:
        told = life(own, random.Random(f"{seed}/{number}"))
    except Exception:  # the soak's own: the other lives go on
        told = [Told(f"life {number}", wrong=traceback.format_exc().splitlines())]
    if not any(one.wrong for one in told):
        shutil.rmtree(own)
    return number, told, time.monotonic() - began


def make_reference(start: Callable, folder: Path, settings: tuple[str, ...], *, preloaded: bool) -> Reference:
    """The walk that nothing befalls, made in a folder or found there."""
    own, log = folder / "reference", folder / "log"
    runs = own / "runs"
    if (runs / NAME / "report.html").exists() and log.exists():
        return read_reference(runs, NAME, log.read_text())
    own.mkdir(parents=True)
    ended = Run(start, own, (f"runs_folder={runs}", *settings), runs, log=log if preloaded else None).end()
    if ended.code or ended.error_lines:
        sys.exit(f"the undisturbed walk ended in {ended.code}: {ended.stderr}")
    return read_reference(runs, NAME, log.read_text() if preloaded else "")


def main() -> int:
    options = read_options()
    in_a_world_of_its_own()
    began, folder = time.monotonic(), Path(tempfile.mkdtemp(prefix="soak-", dir=options.folder)).resolve()
    (folder / "temporary").mkdir()
    library, walk = soak_faults.compiled(folder), loaded(TESTS / "conftest.py")
    server_environment = environment_of(folder, library)
    server, turn = walk.forks.ForkServer(server_environment), threading.Lock()

    def start(arguments, **how):
        with turn:
            if library:
                return server.start("door", list(arguments), **how)
            return server.start("snippet", [soak_standin.SNIPPET, *arguments], **how)

    def launch(arguments, *, environment, **how):
        with turn:
            return server.start("door", list(arguments), environment=environment | walk.ENGINES["ddp"], ranks=2, **how)

    def alone(arguments, *, folder, environment):
        return subprocess.Popen([sys.executable, "-m", "minitron.run", *arguments], cwd=folder, env=server_environment | environment, text=True,
                                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip

    reference = make_reference(start, options.reference or folder, walk.SMALL, preloaded=library is not None)
    mounts = soak_lives.can_mount(reference.runs / "store")
    print(f"undisturbed in {time.monotonic() - began:.0f} s: {', '.join(reference.places)}", flush=True)
    print(f"faults of calls by {'a preloaded library' if library else 'a stand-in in Python (no C compiler, or no Linux)'}; "
          f"disks of their own: {'yes' if mounts else 'no (mounting needs root)'}", flush=True)  # fmt: skip
    soak = Soak(start, walk.SMALL, reference, library is not None)
    faults, wrong, done = Counter(), 0, 0
    chosen = [one for one in lives(soak, launch, alone, options, mounts=mounts) if options.only is None or one[0] == options.only]
    random.Random(options.seed).shuffle(chosen)  # some of every kind, however soon the time is up
    with ThreadPoolExecutor(options.workers) as workers:
        for future in as_completed([workers.submit(live, number, life, folder, options.seed, began + 60 * options.minutes) for number, life in chosen]):
            number, told, seconds = future.result()
            if not told:
                continue
            done += 1
            for one in told:
                faults += one.faults
                wrong += len(one.wrong)
                show(one, options.verbose)
            print(f"life {number}: {seconds:.0f} s, {sum(faults.values())} faults so far, {done} of {len(chosen)} lives, {wrong} wrong", flush=True)
    server.close()
    left = sorted(str(path.relative_to(folder)) for own in ("cache", "temporary") for path in (folder / own).rglob("*") if path.is_file())
    if done < len(chosen):
        print(f"{len(chosen) - done} of {len(chosen)} lives were not begun: the time was up")
    return say(faults, wrong, time.monotonic() - began, folder, left)


def show(told: Told, verbose: bool) -> None:
    if verbose or told.wrong:
        print(told.title, *(f"    {step}" for step in told.steps), *(f"    WRONG: {one}" for one in told.wrong), sep="\n")


def say(faults: Counter, wrong: int, seconds: float, folder: Path, left: list[str]) -> int:
    if len(left) > MOST_LEFT:
        print(f"WRONG: files left in folders for caches and temporary files: {left}")
        wrong += 1
    for kind, number in sorted(faults.items()):
        print(f"{number:6d}  {kind}")
    end = f"{wrong} wrong, kept in {folder}" if wrong else "every student equal bit for bit"
    print(f"{sum(faults.values()):6d}  faults in {seconds / 60:.1f} minutes; {end}")
    print(json.dumps({"soak": {"faults": sum(faults.values()), "kinds": faults, "wrong": wrong, "minutes": round(seconds / 60, 1)}}))
    if not wrong:
        shutil.rmtree(folder)
    return int(wrong > 0)


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="soak", description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lives", type=int, default=24, help="walks of five faults each")
    parser.add_argument("--threes", type=int, default=20, help="three runs on one store, some of them killed")
    parser.add_argument("--twos", type=int, default=6, help="the same with two")
    parser.add_argument("--processes", type=int, default=3, help="walks in one process and in two by turns")
    parser.add_argument("--beginnings", type=int, default=20, help="interrupts while libraries are imported")
    parser.add_argument("--flips", type=int, default=100, help="bits flipped in a finished store")
    parser.add_argument("--states", type=int, default=6, help="bits flipped in what an interrupted training has saved")
    parser.add_argument("--disks", type=int, default=6, help="walks on a disk that is too small; half as many on one that is read-only")
    parser.add_argument("--minutes", type=float, default=50, help="after which no further life begins")
    parser.add_argument("--workers", type=int, default=2, help="lives at a time")
    parser.add_argument("--only", type=int, help="the number of the one life to live")
    parser.add_argument("--reference", type=Path, help="a folder to keep the undisturbed walk in, and to take it from the next time")
    parser.add_argument("--folder", type=Path, help="where to work; as a rule the system's folder for temporary files")
    parser.add_argument("--verbose", action="store_true", help="show every fault")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
