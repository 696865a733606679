"""The whole walk on a pretended CUDA device: nothing mixes devices, a killed run ends where an undisturbed one does, and the host seldom waits."""

import json
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
stand_in = pytest.mark.gpu_stand_in
KILLS = 5
SAME_LOSS = 1e-5
SYNCS_PER_MICRO_STEP, SYNCS_PER_SCORING_BATCH = 4, 2  # of the project's own lines

# Fewer tokens than the tests' small settings have: what is looked for is the device's, not what a model learns.
FEWER = {
    "data.max_train_tokens": "20000", "data.max_heldout_tokens": "3000", "teacher.train.tokens": "2000", "scoring.samples": "4", "scoring.layer_samples": "2",
    "search.screen_samples": "2", "screen.train.tokens": "512", "distill.train.tokens": "1024", "evaluate.samples": "2",
}  # fmt: skip
LAPS = ("depth_lap.enabled=true", "depth_lap.tokens=512", "depth_lap.screen_tokens=512")
REASONING = (
    "experiment=tiny_reasoning", "data.arithmetic.problems=800", "data.arithmetic.most_operands=3", "data.sequence_length=16",
    "teacher.tiny={pattern: 'M*-', hidden: 32, ffn: 64, num_attention_heads: 2, num_key_value_heads: 1, mamba_num_heads: 8}",
    "teacher.train.tokens=3000", "distill.train.tokens=2000", "scoring.samples=8", "scoring.layer_samples=4", "search.fixed={hidden: 24, ffn: 64}",
    "evaluate.samples=4", "evaluate.speed=[{input_tokens: 8, output_tokens: 4, batch: 1}]", "reasoning.problems=8", "reasoning.budgets=[0, 1, 2]",
)  # fmt: skip
WALKS = {
    "slice": ("prune.method=slice",),
    "compensated": ("prune.method=compensated",),
    "two laps, compensated": ("prune.method=compensated", *LAPS),
    "streamed": ("prune.method=slice", "scoring.placement=stream"),
    "reasoning": None,
}


@dataclass(frozen=True)
class Ended:
    """A command on the pretended device that has ended; `counts` is what pretended_run.py writes."""

    folder: Path
    arguments: tuple[str, ...]
    returncode: int
    output: str
    seconds: float
    counts: dict

    def check(self) -> None:
        told = "\n".join(self.output.splitlines()[-8:])
        assert self.returncode == 0 and "same device" not in self.output, f"exit {self.returncode}, output in {self.folder}:\n{told}"

    @property
    def summary(self) -> dict:
        (path,) = self.folder.glob("runs/*/summary.json")
        return json.loads(path.read_text())


@pytest.fixture(scope="session")
def start_pretended(environment) -> Callable[..., subprocess.Popen]:
    """Starts the door on the pretended device in a folder, a process of its own, its output in `output`."""

    def started(folder: Path, *arguments: str) -> subprocess.Popen:
        folder.mkdir(parents=True, exist_ok=True)
        own = environment | {"PRETENDED_COUNTS": str(folder / "counts.json"), "OMP_WAIT_POLICY": "PASSIVE"}
        with open(folder / "output", "w") as output:
            command = [sys.executable, str(HERE / "pretended_run.py"), "device=cuda", "runs_folder=runs", *arguments]
            return subprocess.Popen(command, cwd=folder, env=own, stdout=output, stderr=subprocess.STDOUT)

    return started


@pytest.fixture(scope="session")
def run_pretended(start_pretended) -> Callable[..., Ended]:
    """Runs it to its end."""

    def run(folder: Path, *arguments: str) -> Ended:
        before = time.monotonic()
        code = start_pretended(folder, *arguments).wait(timeout=600)
        counts = folder / "counts.json"
        return Ended(folder, arguments, code, (folder / "output").read_text(), time.monotonic() - before,
                     json.loads(counts.read_text()) if counts.exists() else {})  # fmt: skip

    return run


@pytest.fixture(scope="session")
def settings_of(small_settings) -> Callable[[str], tuple[str, ...]]:
    """Settings of a walk by its name; states and shards are small and many, so that a kill finds some."""
    fewer = [setting for setting in small_settings if setting.split("=")[0] not in {"device", *FEWER}] + [f"{name}={value}" for name, value in FEWER.items()]

    def settings(name: str) -> tuple[str, ...]:
        saving = ("teacher.train.save_every_steps=3", "distill.train.save_every_steps=1", "prune.max_shard_gib=0.00002")
        return (*saving, *(REASONING if WALKS[name] is None else (*fewer, *WALKS[name])))

    return settings


@pytest.fixture(scope="session")
def walk_of(run_pretended, settings_of, tmp_path_factory) -> Callable[[str], Ended]:
    """The undisturbed walk of a name, run where it is first asked for."""
    ended: dict[str, Ended] = {}

    def walk(name: str) -> Ended:
        if name not in ended:
            ended[name] = run_pretended(tmp_path_factory.mktemp("pretended"), *settings_of(name))
        return ended[name]

    return walk


def losses(value, name: str = "") -> Iterator[tuple[str, float]]:
    """Everything in a summary that is called a loss, a divergence or an accuracy, with the way to it."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from losses(inner, f"{name}.{key}")
    last = [part for part in name.split(".") if not part.isdigit()][-1] if name else ""
    if isinstance(value, int | float) and any(word in last for word in ("loss", "kl_", "accuracy", "agreement")):
        yield name, value


def test_a_small_walk_ends_on_a_pretended_gpu(walk_of):
    """Unmarked, so that every test run has it: a tensor left on the CPU fails here, not on the first GPU."""
    walk_of("slice").check()
    assert dict(losses(walk_of("slice").summary)), "no loss in summary.json"


@stand_in
@pytest.mark.parametrize("name", [name for name in WALKS if name != "slice"])
def test_every_walk_ends_on_a_pretended_gpu(name, walk_of):
    walk_of(name).check()


@stand_in
def test_nothing_of_the_device_is_held_at_the_end(walk_of):
    walk_of("slice").check()
    assert walk_of("slice").counts["live_bytes"] == 0 < walk_of("slice").counts["peak_bytes"]


@stand_in
def test_a_finished_walk_is_exported_and_generates(walk_of, run_pretended, tmp_path):
    walk_of("slice").check()
    shutil.copytree(walk_of("slice").folder / "runs", tmp_path / "runs")
    for arguments in (("stage=export",), ("stage=generate", "prompt=def", "generate.new_tokens=4"),
                      ("stage=generate", "prompt=def", "generate.new_tokens=4", "generate.temperature=1")):  # fmt: skip
        run_pretended(tmp_path, *walk_of("slice").arguments, *arguments).check()


@stand_in
@pytest.mark.parametrize("name", list(WALKS))
def test_a_walk_killed_five_times_ends_where_an_undisturbed_one_does(name, walk_of, start_pretended, run_pretended, settings_of, tmp_path):
    undisturbed = walk_of(name)
    undisturbed.check()
    draw, killed_in = random.Random(name), []
    for folder, seconds in stages_to_kill_in(undisturbed, draw):
        process = start_pretended(tmp_path, *settings_of(name))
        while process.poll() is None and not (tmp_path / folder).exists():
            time.sleep(0.05)
        try:
            process.wait(timeout=draw.uniform(0, seconds))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            killed_in.append(folder.parts[-2])
        else:
            assert process.returncode == 0, (tmp_path / "output").read_text()[-1000:]
    print(f"{name}: killed in or right after {', '.join(killed_in)}")
    assert len(killed_in) == KILLS
    resumed = run_pretended(tmp_path, *settings_of(name))
    resumed.check()
    expected, found = dict(losses(undisturbed.summary)), dict(losses(resumed.summary))
    assert expected and found == pytest.approx(expected, abs=SAME_LOSS)


@stand_in
def test_a_compensated_cut_goes_on_behind_its_finished_shards(walk_of, run_pretended, tmp_path):
    """What a kill after the third shard leaves: a kill at random seldom comes just there."""
    walk_of("compensated").check()
    shutil.copytree(walk_of("compensated").folder / "runs", tmp_path / "runs", ignore=shutil.ignore_patterns("distill", "evaluate"))
    (done,) = tmp_path.glob("runs/store/prune/*/done.json")
    shards = sorted(done.parent.glob("**/model-*.safetensors"))
    assert len(shards) > 4
    for path in (done, *done.parent.glob("**/*.index.json"), *shards[3:]):
        path.unlink()
    resumed = run_pretended(tmp_path, *walk_of("compensated").arguments, "stage=prune")
    resumed.check()
    assert "going on behind them" in resumed.output


@stand_in
def test_a_slice_cut_alone_in_its_process_is_checked(walk_of, run_pretended, tmp_path):
    """What a kill before the cut leaves: nothing has computed on the GPU before, and the check reads the student back on the CPU."""
    walk_of("slice").check()
    shutil.copytree(walk_of("slice").folder / "runs", tmp_path / "runs", ignore=shutil.ignore_patterns("prune", "distill", "evaluate"))
    run_pretended(tmp_path, *walk_of("slice").arguments, "stage=prune").check()
    assert len(list(tmp_path.glob("runs/store/prune/*/done.json"))) == 1


def stages_to_kill_in(ended: Ended, draw: random.Random) -> list[tuple[Path, float]]:
    """Some stages of a walk, prune among them, in the order in which they ran: folder and seconds."""
    done = [(path, json.loads(path.read_text())) for path in sorted(ended.folder.glob("runs/store/*/*/done.json"), key=lambda path: path.stat().st_mtime_ns)]
    stages = [(path.parent.relative_to(ended.folder), facts["seconds"]) for path, facts in done]
    prune = next(number for number, (folder, _) in enumerate(stages) if folder.parts[-2] == "prune")
    others = [number for number, (_, seconds) in enumerate(stages) if seconds > 0.3 and number not in (prune, len(stages) - 1)]
    return [stages[number] for number in sorted([prune, *draw.sample(others, KILLS - 1)])]


def waits_by_place(counts: dict, *, owner: str) -> dict[str, int]:
    return {f"{row['place']} ({row['what']})": row["times"] for row in counts["syncs"] if row["owner"] == owner}


def more_waits(few: Ended, many: Ended, times: int, what: str) -> float:
    """The project's waits for the device that `times` repetitions more have brought, for each; printed by line, transformers' apart."""
    few.check(), many.check()
    per_repetition = {}
    for owner in ("project", "transformers", "other"):
        before, after = (waits_by_place(ended.counts, owner=owner) for ended in (few, many))
        each = {place: (count - before.get(place, 0)) / times for place, count in after.items() if count != before.get(place, 0)}
        per_repetition[owner] = sum(each.values())
        print(f"{what}: {per_repetition[owner]:.2f} waits of {owner}" + "".join(f"\n    {count:6.2f}  {place}" for place, count in each.items()))
    return per_repetition["project"]


@stand_in
def test_a_micro_step_of_distillation_seldom_waits(walk_of, run_pretended, tmp_path):
    """Four micro-steps a step against one, saving, logging and updating being the same."""
    walk_of("slice").check()
    ended = []
    for rows in (4, 1):
        folder = tmp_path / f"{rows} rows"
        shutil.copytree(walk_of("slice").folder / "runs", folder / "runs", ignore=shutil.ignore_patterns("distill", "evaluate"))
        ended.append(run_pretended(folder, *walk_of("slice").arguments, "stage=distill", "distill.train.batch=4", f"distill.train.micro_batch={rows}"))
    steps = 1024 // (4 * 64)
    assert more_waits(*ended, times=3 * steps, what="a micro-step of distillation") <= SYNCS_PER_MICRO_STEP


@stand_in
def test_a_batch_of_scoring_seldom_waits(walk_of, run_pretended, tmp_path):
    """Twelve batches of a row against four, the layers' own scores being the same."""
    walk_of("slice").check()
    ended = []
    for samples in (4, 12):
        folder = tmp_path / f"{samples} samples"
        shutil.copytree(walk_of("slice").folder / "runs", folder / "runs", ignore=shutil.ignore_patterns("score"))
        ended.append(run_pretended(folder, *walk_of("slice").arguments, "stage=score", "scoring.batch=1", f"scoring.samples={samples}"))
    assert more_waits(*ended, times=8, what="a batch of scoring") <= SYNCS_PER_SCORING_BATCH


def test_more_processes_than_gpus_are_refused_before_any_work(environment, tmp_path):
    """The first of two, as accelerate starts them, on a machine of one GPU."""
    launched = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "ACCELERATE_MIXED_PRECISION": "no"}
    command = [sys.executable, str(HERE / "pretended_run.py"), "runs_folder=runs", "stage=data"]
    finished = subprocess.run(command, env=environment | launched, cwd=tmp_path, text=True, capture_output=True, timeout=120)
    told = "error: num_processes puts 2 processes on this machine, where torch sees 1 GPU; it must be at most one a GPU, or device=cpu\n"
    assert (finished.returncode, finished.stderr, finished.stdout) == (2, told, "") and not (tmp_path / "runs").exists()


@stand_in
def test_the_pretended_device_is_as_strict_as_a_real_one(environment, tmp_path):
    finished = subprocess.run([sys.executable, str(HERE / "pretended_checks.py")], env=environment, cwd=tmp_path, text=True, capture_output=True)
    assert finished.returncode == 0, finished.stderr
    assert len(finished.stdout.splitlines()) == (HERE / "pretended_checks.py").read_text().count("\ndef check_")


@stand_in
def test_the_projects_own_gpu_tests_pass_on_the_pretended_device(environment, repository):
    """They run on no machine of the project's otherwise."""
    command = [sys.executable, str(HERE / "pretended_pytest.py"), "-q", "-p", "no:cacheprovider", "-m", "gpu", "tests/minitron/test_gpu.py"]
    finished = subprocess.run(command, env=environment | {"OMP_WAIT_POLICY": "PASSIVE"}, cwd=repository, text=True, capture_output=True)
    assert finished.returncode == 0, finished.stdout[-4000:]
    assert " skipped" not in finished.stdout and " passed" in finished.stdout


@stand_in
def test_a_long_row_takes_as_much_of_a_gpu_whatever_the_number_of_layers_if_inputs_are_in_main_memory(environment, tmp_path):
    printed = subprocess.run([sys.executable, str(HERE / "pretended_long_rows.py")], cwd=tmp_path, env=environment, text=True, capture_output=True, check=True)
    found = json.loads(printed.stdout.splitlines()[-1])
    peaks = {way: [peak for peak, _ in layers.values()] for way, layers in found.items()}
    print("\n".join(f"{way}: {', '.join(f'{layers} layers {peak:,} bytes' for layers, (peak, _) in measured.items())}" for way, measured in found.items()))
    assert max(peaks["inputs in main memory"]) < 1.02 * min(peaks["inputs in main memory"])
    few, *_, many = peaks["inputs on the device"]
    assert many - few > 18 * 2048 * 32 * 4  # the control: 20 layers more, and of each the input, float32 [2048, 32]
    by_blocks = found.pop("by blocks")
    for gradients in zip(*([digest for _, digest in layers.values()] for layers in found.values()), strict=True):
        assert len(set(gradients)) == 1  # to the bit
    assert max(peaks["by blocks"]) < min(0.5 * min(peaks["inputs in main memory"]), 1.02 * min(peaks["by blocks"]))
    assert max(difference for _, difference in by_blocks.values()) < 1e-5
