"""The door as users have it: processes, real or forked, the smallest settings that walk every stage, and one finished walk."""

import fcntl
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType

import pytest

# Before torch is imported: waiting threads of several processes on two cores cost minutes, one thread each none.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

REPOSITORY = Path(__file__).resolve().parent.parent


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


forks = _load(Path(__file__).with_name("forks.py"))  # tests/ is no package

# The teacher needs 343,488 bytes at this workload, the budget is 246,960: with two attention layers all the smallest of hidden
# 24 and none of 32 fit, whichever layers go, so the cut always hurts. The learning rate is high: a tiny teacher must learn something in 78 steps.
# The cut is the plain one, which can be compared with the teacher's weights and hurts enough to be repaired in 39 steps.
SMALL = (
    "device=cpu",
    "data.vocab=512", "data.sequence_length=64", "data.max_train_tokens=60000", "data.max_heldout_tokens=8000",
    "teacher.train_anew=true", "teacher.tiny.pattern='M-M*-M-*-M-'", "teacher.tiny.hidden=32", "teacher.tiny.ffn=64", "teacher.tiny.num_attention_heads=4",
    "teacher.tiny.num_key_value_heads=2", "teacher.tiny.attention_head_dim=8", "teacher.tiny.mamba_num_heads=8", "teacher.tiny.mamba_head_dim=8",
    "teacher.tiny.mamba_num_groups=2", "teacher.tiny.mamba_state_size=16", "teacher.train.tokens=20000", "teacher.train.learning_rate=0.1",
    "scoring.samples=8", "scoring.layer_samples=4",
    "workload.context_tokens=1024", "budget.device_gib=0.00023", "budget.cushion_fraction=0", "budget.set_aside_gib=0",
    "search.layers={low: 8, high: 11, step: 1}", "search.hidden={low: 24, high: 32, step: 8}", "search.ffn={low: 48, high: 64, step: 16}",
    "search.mamba_heads={low: 4, high: 8, step: 2}", "search.floors={attention: 2}", "search.shortlist_size=3", "search.screen_samples=4",
    "search.finalists=2", "screen.train.tokens=2000", "screen.train.learning_rate=0.005", "screen.new_tokens=4", "depth_lap.enabled=false",
    "prune.method=slice", "prune.against_slice=false", "distill.train.tokens=10000", "distill.train.learning_rate=0.005",
    "screen.prompt_tokens=8", "evaluate.samples=8", "evaluate.speed=[{input_tokens: 8, output_tokens: 4, batch: 1}]",
    "evaluate.needle={lengths: [64], depths: 2, samples: 2, alternatives: 4}", "evaluate.held_out_prompts=0",
)  # fmt: skip

# A walk of a teacher of blocks of write_teacher: 0.00238 GiB as a tied Llama, and of the students only the smaller ones fit.
SMALL_BLOCKS = (
    "~experiment", "device=cpu", "data.sequence_length=64", "data.max_train_tokens=30000", "data.max_heldout_tokens=4000",
    "scoring.samples=8", "scoring.layer_samples=4", "workload.context_tokens=1024", "budget.name=small", "budget.device_gib=0.0017",
    "budget.cushion_fraction=0", "budget.set_aside_gib=0", "depth_lap.enabled=false",
    "search.fixed={layers: 3, hidden: 96, ffn: 128, key_value_heads: 1}", "prune.samples=8", "prune.against_slice=false",
    "distill.train.tokens=2048", "evaluate.samples=8", "evaluate.speed=[]", "evaluate.needle={lengths: [64], depths: 2, samples: 2, alternatives: 4}",
)  # fmt: skip

# What accelerate's launcher tells the processes of the configs in conf/accelerate, as distill/test_engines.py checks.
ENGINES = {
    "ddp": {"ACCELERATE_MIXED_PRECISION": "no"},
    "fsdp2": {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"},
    "zero2": {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"},
    "zero3": {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"},
}


# The files whose tests take longest begin first, so that both workers end together; the first needs the walk, the second not while it is made.
LONGEST = ("test_walk", "test_engines", "test_distill_stage", "test_sweep", "test_bad_input", "test_compensated_cut", "test_ladder", "test_states",
           "test_evaluate_stage", "test_budget_curve", "test_merge", "test_export", "test_score_stage", "test_compensate", "test_serving",
           "test_documents")  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


@dataclass(frozen=True, slots=True)
class Finished:
    """A command that has ended."""

    returncode: int
    stdout: str
    stderr: str
    seconds: float

    @property
    def error_lines(self) -> list[str]:
        return [line for line in self.stderr.splitlines() if line.strip()]


@dataclass(frozen=True, slots=True)
class Walk:
    """A finished `stage=all`: where its runs folder is and how the command ended."""

    runs: Path
    settings: tuple[str, ...]
    finished: Finished

    @property
    def summary(self) -> dict:
        return json.loads((self.runs / "tiny" / "summary.json").read_text())

    def stage_folder(self, stage: str) -> Path:
        return Path(self.summary["stages"][stage]["path"])

    def checkpoint(self, model: str) -> Path:
        return Path(self.summary["models"][model]["path"])


@pytest.fixture(scope="session", autouse=True)
def interrupts_are_heard() -> None:
    """A suite that a shell has started in the background has SIGINT ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def repository() -> Path:
    return REPOSITORY


@pytest.fixture(scope="session")
def environment() -> dict[str, str]:
    """What child processes get: one thread each, offline, this checkout's code and nothing that changes a run."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(("HYDRA", "MINITRON", "WANDB", "TRANSFORMERS", "FORCE_COLOR"))}
    return own | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "NO_COLOR": "1"}


@pytest.fixture(scope="session")
def small_settings() -> tuple[str, ...]:
    return SMALL


@pytest.fixture(scope="session")
def small_block_settings() -> tuple[str, ...]:
    return SMALL_BLOCKS


# What a tiny teacher's configuration class in transformers is called by and has beside the sizes. Windows are far shorter than the texts of tests.
POSITIONS = {"rope_type": "default", "rope_theta": 50000.0}
LLAMA3_POSITIONS = POSITIONS | {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 256}
WINDOW = {"sliding_window": 64}
OF_FAMILY = {
    "llama": ("Llama", {"rope_parameters": LLAMA3_POSITIONS}),
    "qwen3": ("Qwen3", {"rope_parameters": POSITIONS}),
    "mistral": ("Mistral", {"rope_parameters": POSITIONS, **WINDOW}),
    "qwen2": ("Qwen2", {"rope_parameters": POSITIONS, "use_sliding_window": True, "max_window_layers": 0, **WINDOW}),
    "gemma3_text": ("Gemma3", {
        "rope_parameters": {"full_attention": POSITIONS | {"rope_type": "linear", "factor": 4.0}, "sliding_attention": POSITIONS | {"rope_theta": 1e4}},
        "layer_types": ["sliding_attention", "full_attention"] * 2, "query_pre_attn_scalar": 48, **WINDOW}),
    "qwen3_moe": ("Qwen3Moe", {
        "rope_parameters": POSITIONS, "use_sliding_window": True, "norm_topk_prob": True, "decoder_sparse_step": 2, "num_experts": 8, "num_experts_per_tok": 2,
        "moe_intermediate_size": 64, **WINDOW}),
    "nemotron_h": ("NemotronH", {
        "layers_block_type": ["linear_attention", "moe", "full_attention", "moe"], "mamba_num_heads": 16, "mamba_head_dim": 16, "ssm_state_size": 16,
        "n_groups": 2, "chunk_size": 64, "n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 2, "moe_intermediate_size": 64,
        "moe_shared_expert_intermediate_size": 96, "routed_scaling_factor": 2.5}),
    "mamba2": ("Mamba2", {"num_heads": 16, "head_dim": 16, "n_groups": 2, "state_size": 16, "expand": 2, "chunk_size": 64}),
    "granitemoehybrid": ("GraniteMoeHybrid", {
        "layer_types": ["linear_attention", "full_attention"] * 2, "mamba_n_heads": 16, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1,
        "mamba_expand": 2, "mamba_chunk_size": 64, "shared_intermediate_size": 96, "num_local_experts": 8, "num_experts_per_tok": 2,
        "embedding_multiplier": 12.0, "residual_multiplier": 0.4, "attention_multiplier": 0.3, "logits_scaling": 1.5}),
}  # fmt: skip
BLOCK_SIZES = {"intermediate_size": 192, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 4096}
CENTRES = {"A_log": 0.0, "dt_bias": -2.0, "bias": 0.0}  # of vectors; of norms' weights what multiplies by 1


@pytest.fixture(scope="session")
def write_teacher() -> Callable[..., Path]:
    """Writes a random tiny model of a family as transformers saves one, with the tokenizer of the tiny teacher: 4 layers, hidden 128, 2,048 tokens; of
    blocks FFN 192 and 4 query heads of 32 channels on 2 KV heads, of Mamba-2 16 heads of 16 channels in 2 groups, 8 experts of 64 neurons; weights large enough
    for attention to matter, norms apart from 1, Llama's positions scaled, windows where a family has them, routers that prefer some experts."""

    def write(folder: Path, family: str, *, tied: bool) -> Path:
        import torch
        import transformers

        from minitron.settings.teachers import STORED_FOLDER

        prefix, own = OF_FAMILY[family]
        config = getattr(transformers, f"{prefix}{'Text' if family == 'gemma3_text' else ''}Config")(
            vocab_size=2048, hidden_size=128, num_hidden_layers=4, tie_word_embeddings=tied, initializer_range=0.08, bos_token_id=0, eos_token_id=0,
            pad_token_id=1, **(BLOCK_SIZES if family != "mamba2" else {}), **own,
        )  # fmt: skip
        random = torch.Generator().manual_seed(0)
        model = getattr(transformers, f"{prefix}ForCausalLM")(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                noise = torch.randn(parameter.shape, generator=random)
                centre = CENTRES.get(name.split(".")[-1], 0.0 if family == "gemma3_text" else 1.0)
                parameter.copy_(centre + 0.3 * noise if parameter.ndim == 1 else (0.3 if name.endswith("conv1d.weight") else 0.08) * noise)
            for name, buffer in model.named_buffers():
                if name.endswith("e_score_correction_bias"):
                    buffer.copy_(0.1 * torch.randn(buffer.shape, generator=random))
        model.save_pretrained(folder)
        for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"):
            shutil.copyfile(STORED_FOLDER / name, folder / name)
        return folder

    return write


@pytest.fixture(scope="session")
def run_process(environment) -> Callable[..., Finished]:
    """Runs `python -m minitron.run …` in a folder to its end, as a process of its own: seconds of imports, and everything as users have it."""

    def run(folder: Path, *arguments: str) -> Finished:
        before = time.monotonic()
        finished = subprocess.run([sys.executable, "-m", "minitron.run", *arguments], cwd=folder, env=environment, text=True, capture_output=True, timeout=900)
        return Finished(finished.returncode, finished.stdout, finished.stderr, time.monotonic() - before)

    return run


@pytest.fixture(scope="session")
def fork_server(environment) -> Iterator:
    """One for all tests of a worker; forks.py says what a fork is good for."""
    server = forks.ForkServer(environment)
    yield server
    server.close()


@pytest.fixture(scope="session")
def start(fork_server) -> Callable:
    """Starts `python -m minitron.run …` in a folder, and returns at once."""

    def started(folder: Path, *arguments: str, environment: dict[str, str] | None = None):
        return fork_server.start("door", arguments, folder=folder, environment=environment)

    return started


@pytest.fixture(scope="session")
def door(start) -> Callable[..., Finished]:
    """Runs `python -m minitron.run …` in a folder to its end without the seconds of imports."""

    def run(folder: Path, *arguments: str, environment: dict[str, str] | None = None) -> Finished:
        before = time.monotonic()
        process = start(folder, *arguments, environment=environment)
        stdout, stderr = process.communicate(timeout=900)
        return Finished(process.returncode, stdout, stderr, time.monotonic() - before)

    return run


@pytest.fixture(scope="session")
def door_of_two(fork_server) -> Callable[..., Finished]:
    """The same in two processes, told what accelerate's launcher would tell those of an engine."""

    def run(engine: str, folder: Path, *arguments: str) -> Finished:
        before = time.monotonic()
        process = fork_server.start("door", arguments, folder=folder, environment=ENGINES[engine], ranks=2)
        stdout, stderr = process.communicate(timeout=900)
        return Finished(process.returncode, stdout, stderr, time.monotonic() - before)

    return run


@pytest.fixture(scope="session")
def engine_environments() -> dict[str, dict[str, str]]:
    return ENGINES


@pytest.fixture(scope="session")
def snippet(fork_server) -> Callable[..., Finished]:
    """Runs `python -c …` to its end without the seconds of imports."""

    def run(folder: Path, *arguments: str) -> Finished:
        before = time.monotonic()
        process = fork_server.start("snippet", arguments, folder=folder)
        stdout, stderr = process.communicate(timeout=900)
        return Finished(process.returncode, stdout, stderr, time.monotonic() - before)

    return run


@pytest.fixture(scope="session")
def own_copy_of(tmp_path_factory) -> Callable[[str, Callable[[Path], Finished]], tuple[Path, Finished]]:
    """Makes a folder once for all workers of pytest-xdist; every worker gets a copy, whose files say the copy's place where they said the first."""

    def copy(name: str, make: Callable[[Path], Finished]) -> tuple[Path, Finished]:
        base = tmp_path_factory.getbasetemp()
        if "PYTEST_XDIST_WORKER" not in os.environ:
            folder = tmp_path_factory.mktemp(name)
            return folder, make(folder)
        first, own = base.parent / f"first-{name}", tmp_path_factory.mktemp(name)
        with open(base.parent / f"{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (first / "finished.json").exists():
                shutil.rmtree(first, ignore_errors=True)
                first.mkdir()
                (first / "finished.json").write_text(json.dumps(asdict(make(first))))
        finished = Finished(**json.loads((first / "finished.json").read_text()))
        shutil.copytree(first, own, symlinks=True, dirs_exist_ok=True, ignore=shutil.ignore_patterns("finished.json"))
        for path in own.rglob("*"):
            if path.suffix in (".json", ".jsonl", ".md", ".html", ".yaml") and not path.is_symlink() and str(first) in (text := path.read_text()):
                path.write_text(text.replace(str(first), str(own)))
        return own, finished

    return copy


@pytest.fixture(scope="session")
def walk(run_process, own_copy_of) -> Walk:
    """One walk from nothing to the report by the real command."""
    folder, finished = own_copy_of("walk", lambda folder: run_process(folder, f"runs_folder={folder / 'runs'}", *SMALL))
    return Walk(folder / "runs", (f"runs_folder={folder / 'runs'}", *SMALL), finished)


@pytest.fixture(scope="session")
def done_folders() -> Callable[[Path], set[Path]]:
    """The stage folders of a runs folder that say they are whole."""

    def folders(runs: Path) -> set[Path]:
        return {path.parent for path in runs.glob("store/*/*/done.json")}

    return folders


@pytest.fixture(scope="session")
def published_patterns() -> tuple[str, str]:
    """Patterns of NVIDIA's 12B teacher and 9B student (arXiv 2508.14444)."""
    return (
        "M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M-",
        "M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-",
    )


@pytest.fixture(scope="session")
def published_order() -> Sequence[int]:
    """An order of removal that gives the published student at 56 layers with 4 attention layers, and reaches 52."""
    return (7, 52, 16, 8, 23, 24, 48, 3, 10, 31, 32)
