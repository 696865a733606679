"""The rows of benchmarks/gpu.py: what each measures, and the models and sizes that it measures with."""

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

from distill.chunked_loss import Head, chunked_loss
from distill.engines.launch import Launch
from distill.engines.opening import open_engine
from distill.objectives import distillation_loss
from memory_budget.architecture import Architecture
from memory_budget.calculator import memory_report
from memory_budget.hf_config import architecture_from_config, read_config
from memory_budget.parameters import count_total_parameters
from memory_budget.units import GIB
from memory_budget.workload import Workload
from minitron.checkpoints.placement import WholeModel
from minitron.families.nemotron_h import FAMILY
from minitron.importance.activations import measure_width
from minitron.importance.layers import Block, SweepLimits, measure_round
from minitron.importance.removal import LayerRules, rank_iteratively
from minitron.importance.scores import ImportanceScores, aggregate
from minitron.machine.device import process_memory_bytes
from minitron.pruning.views import SortedTeacher
from minitron.search.distances import measure_batch
from minitron.settings.teachers import CONF_FOLDER
from minitron.settings.training import Precision, TrainSettings
from minitron.training.memory import training_memory
from minitron.training.steps import train_plan
from minitron.training.time import training_flops
from nas.depth import subsequence_layers

CONFIG = read_config(CONF_FOLDER / "architectures" / "nemotron-nano-12b-v2-base.json")
NANO_12B = architecture_from_config(CONFIG)
NANO_9B = replace(NANO_12B, pattern="M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-", hidden=4480, ffn=15680)
# Mamba-2's sizes are the 12B's: its kernels are tuned for head dim, state, chunk, heads and number formats, which takes minutes, and so once for all rows.
ONE_B = replace(NANO_12B, pattern="M-M-M*-M-M*-", hidden=2048, ffn=8192, num_attention_heads=16, num_key_value_heads=4)
TOY = replace(NANO_12B, pattern="M-M*-M-*-", hidden=32, vocab=97, ffn=48, num_attention_heads=4, num_key_value_heads=2, attention_head_dim=8,
              mamba_num_heads=16, mamba_head_dim=4, mamba_state_size=6)  # fmt: skip
TOY_STUDENT = replace(TOY, pattern="M-M*M-*-", hidden=24, ffn=40)
# Dense, by what a board's name holds; the first that fits. NVIDIA's data sheets, whose figures of Hopper are with sparsity, twice these.
BF16_FLOPS = (("H100 PCIe", 756e12), ("H100 NVL", 835e12), ("H200 NVL", 835e12), ("H100", 989e12), ("H200", 989e12), ("A100", 312e12))
MEMORY_SHARE = 0.85  # of the free memory that the plan of the largest pair may take: its estimate leaves the allocator's own share out
Figures = dict[str, float]


def bf16_flops(board: str) -> float | None:
    """The vendor's dense bf16 rate of a board with this name, FLOP/s; None where it is not known here, or the board is one slice of many (MIG)."""
    return None if "MIG" in board else next((rate for name, rate in BF16_FLOPS if name in board), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Of what is measured: models, and rows x tokens of each kind of work."""

    teacher: Architecture = NANO_12B
    student: Architecture = NANO_9B
    small_teacher: Architecture = ONE_B
    small_student: Architecture = replace(ONE_B, pattern="M-M*M-M-", hidden=1536, ffn=6144)
    fewer_heads: int = 112
    scored: tuple[int, int] = (8, 2048)
    swept: tuple[int, int] = (4, 1024)
    rounds: int = 2
    screened: tuple[int, int] = (4, 2048)
    loss_tokens: int = 4096
    trained: tuple[int, int] = (4, 4096)
    trained_large: tuple[int, int] = (2, 4096)
    served: tuple[int, int] = (2, 8192)


TINY = Sizes(teacher=TOY, student=TOY_STUDENT, small_teacher=TOY, small_student=TOY_STUDENT, fewer_heads=8, scored=(2, 32), swept=(2, 16), rounds=1,
             screened=(2, 32), loss_tokens=64, trained=(2, 32), trained_large=(2, 32), served=(2, 32))  # fmt: skip


@torch.no_grad()
def random_model(architecture: Architecture, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A model of seeded random weights made on the device, of sizes that keep activations near 1."""
    with torch.device("meta"):
        model = FAMILY.build(FAMILY.hf_config(CONFIG, architecture))
    model = model.to(dtype).to_empty(device=device)
    assert not list(model.buffers()), "to_empty leaves buffers without a value"
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in model.named_parameters():
        last = name.removesuffix(".weight").split(".")[-1]
        if last == "A_log":
            parameter.uniform_(1, 16, generator=generator).log_()
        elif last == "dt_bias":
            parameter.uniform_(-6.9, -2.3, generator=generator)  # log of time steps of 0.001 to 0.1; softplus hardly moves them
        elif parameter.ndim == 1:
            parameter.normal_(1, 0.1, generator=generator)
        else:
            parameter.normal_(0, 1.0 if last == "embeddings" else parameter[0].numel() ** -0.5, generator=generator)
    return model.eval().requires_grad_(False)


def random_ids(architecture: Architecture, shape: tuple[int, int], device: torch.device) -> torch.Tensor:
    return torch.randint(architecture.vocab, shape, generator=torch.Generator().manual_seed(0)).to(device)


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def medians(sides: dict[str, Callable[[], object]], device: torch.device, *, repeats: int = 3) -> dict[str, float]:
    """Seconds of every side, in turns, after one turn that is not counted (kernels are compiled then)."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(repeats + 1):
        for name, work in sides.items():
            synchronise(device)
            started = time.perf_counter()
            work()
            synchronise(device)
            if turn:
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def peak_bytes(work: Callable[[], object], device: torch.device) -> int:
    """The most that torch's allocator held while `work` ran, what was there before included; 0 on a CPU, which nobody counts."""
    if device.type == "cpu":
        return 0
    free_memory(device)
    torch.cuda.reset_peak_memory_stats(device)
    work()
    return torch.cuda.max_memory_allocated(device)


def width_scores(model: nn.Module, sizes: Sizes, device: torch.device) -> ImportanceScores:
    return aggregate(measure_width(WholeModel(FAMILY, model, sizes.teacher), [random_ids(sizes.teacher, sizes.scored, device)]))


def width_scoring(model: nn.Module, sizes: Sizes, device: torch.device) -> Figures:
    """Scores of every width against a forward pass to the last hidden state."""
    ids, placed = random_ids(sizes.teacher, sizes.scored, device), WholeModel(FAMILY, model, sizes.teacher)
    with torch.no_grad():
        seconds = medians({"plain": lambda: model.base_model(ids, use_cache=False), "scoring": lambda: measure_width(placed, [ids])}, device)
    return {"overhead": seconds["scoring"] / seconds["plain"], "tokens_per_second": ids.numel() / seconds["scoring"],
            "plain_tokens_per_second": ids.numel() / seconds["plain"]}  # fmt: skip


@torch.no_grad()
def depth_scoring(model: nn.Module, sizes: Sizes, device: torch.device) -> Figures:
    """Iterative removal of layers, against as many whole forward passes as the obvious loop makes."""
    ids, placed = random_ids(sizes.teacher, sizes.swept, device), WholeModel(FAMILY, model, sizes.teacher)
    passes = 0

    def sweep() -> None:
        nonlocal passes
        block, passes = Block([ids]), 0

        def ask(kept, removable):
            nonlocal passes
            passes += len(removable)
            return measure_round(placed, block, kept, removable, "mse", SweepLimits()).scores("mse", normalised=True)

        rank_iteratively(sizes.teacher.pattern, sizes.teacher.num_layers - sizes.rounds, LayerRules({"*": 1}, {}), ask)

    seconds = medians({"plain": lambda: model(ids, use_cache=False), "sweep": sweep}, device, repeats=1)
    return {"speedup_over_naive": passes * seconds["plain"] / seconds["sweep"], "seconds_per_removal": seconds["sweep"] / sizes.rounds,
            "naive_forward_passes": passes}  # fmt: skip


def screening(model: nn.Module, scores: ImportanceScores, sizes: Sizes, device: torch.device) -> Figures:
    """Zero-shot loss of three candidates, views of the teacher, against the forward passes it needs. Sorts the model's weights."""
    config, ids = FAMILY.hf_config(CONFIG, sizes.teacher), random_ids(sizes.teacher, sizes.screened, device)
    students = (sizes.student, replace(sizes.student, mamba_num_heads=sizes.fewer_heads), replace(sizes.teacher, pattern=sizes.student.pattern))
    teacher = SortedTeacher(FAMILY, model, config, sizes.teacher, scores)
    kept = tuple(subsequence_layers(sizes.teacher.pattern, sizes.student.pattern))
    views = {str(number): teacher.view(student, kept).model for number, student in enumerate(students)}

    @torch.no_grad()
    def forward() -> None:
        for one in (teacher.model, *views.values()):
            one.base_model(ids, use_cache=False)

    seconds = medians({"forward": forward, "screening": lambda: measure_batch(teacher.model, views, ids)}, device)
    return {"over_forward": seconds["screening"] / seconds["forward"], "tokens_per_second": len(students) * ids.numel() / seconds["screening"]}


def memory(model: nn.Module, sizes: Sizes, device: torch.device) -> Figures:
    """The memory report against what the model and its cache hold, and on a GPU against the peak of the prompt's pass."""
    batch, tokens = sizes.served
    dtype = {torch.bfloat16: "bf16", torch.float32: "float32"}[model.dtype]
    report = memory_report(sizes.teacher, Workload(tokens, batch, weights_dtype=dtype, kv_dtype=dtype, activation_tokens=batch * tokens))
    ids, outputs = random_ids(sizes.teacher, sizes.served, device), []

    @torch.no_grad()
    def prompt() -> None:
        outputs[:] = [model(ids, use_cache=True, logits_to_keep=1)]

    peak = peak_bytes(prompt, device) or (prompt(), 0)[1]
    layers = outputs[0].past_key_values.layers
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in layers if getattr(layer, "keys", None) is not None)
    held += sum(state.nbytes for layer in layers for state in getattr(layer, "recurrent_states", {}).values())
    weights = sum(parameter.nbytes for parameter in model.parameters())
    figures = {"weights_over_report": weights / report.weights, "kv_and_ssm_over_report": held / (report.kv_cache + report.ssm_state)}
    return figures | ({"peak_over_report": peak / report.total, "peak_gib": peak / GIB} if peak else {})


def loss(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Figures:
    """The chunked loss against whole logits, forward and backward, from the student's and the teacher's last hidden states."""
    random = torch.Generator(device).manual_seed(0)

    def head(architecture: Architecture) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = torch.randn(sizes.loss_tokens, architecture.hidden, device=device, dtype=dtype, generator=random)
        weight = torch.randn(architecture.vocab, architecture.hidden, device=device, dtype=dtype, generator=random)
        return hidden, weight.mul_(3 / architecture.hidden**0.5)

    student, teacher = tuple(tensor.requires_grad_() for tensor in head(sizes.student)), head(sizes.teacher)

    def whole() -> None:
        mine, theirs = (F.log_softmax((hidden @ weight.T).float(), dim=-1) for hidden, weight in (student, teacher))
        backward(F.kl_div(mine, theirs, log_target=True, reduction="sum") / sizes.loss_tokens)

    def backward(value: torch.Tensor) -> None:
        for tensor in student:
            tensor.grad = None
        value.backward()

    def chunked() -> None:
        backward(chunked_loss(Head(*student), Head(*teacher)).loss)

    seconds = medians({"whole": whole, "chunked": chunked}, device)
    before = sum(tensor.nbytes for tensor in (*student, *teacher))
    for tensor in student:
        tensor.grad = None
    peaks = {name: peak_bytes(work, device) - before for name, work in (("whole", whole), ("chunked", chunked))}
    figures = {"time_over_whole": seconds["chunked"] / seconds["whole"], "tokens_per_second": sizes.loss_tokens / seconds["chunked"]}
    return figures | ({"memory_over_whole": peaks["chunked"] / peaks["whole"], "memory_gib": peaks["chunked"] / GIB} if device.type == "cuda" else {})


def largest_pair(sizes: Sizes, train: TrainSettings, length: int, device: torch.device) -> tuple[Architecture, Architecture]:
    """Teacher and student of the published widths with as many layers, from the first on, as the device holds while it trains."""
    free, _ = process_memory_bytes(device)
    for layers in range(sizes.teacher.num_layers, 0, -1):
        teacher = replace(sizes.teacher, pattern=sizes.teacher.pattern[:layers])
        depth = max(1, layers * sizes.student.num_layers // sizes.teacher.num_layers)
        student = replace(sizes.student, pattern=sizes.student.pattern[:depth])
        plan = training_memory(student, teacher, train, Launch(), sequence_length=length, teacher_bytes_per_number=2, on_gpu=True)
        if plan.total <= MEMORY_SHARE * free:
            return teacher, student
    raise ValueError(f"device {device} has {free / GIB:.1f} GiB free; distillation of one layer at these widths needs more")


def train_settings(sizes: Sizes, *, large: bool) -> TrainSettings:
    return TrainSettings(batch=(sizes.trained_large if large else sizes.trained)[0], precision=Precision.bf16, gradient_checkpointing=large)


def distillation(teacher: Architecture, student: Architecture, train: TrainSettings, length: int, device: torch.device) -> Figures:
    """Whole steps of the trainer's engine: bf16, AdamW, the teacher in bf16 beside it; no states are saved."""
    models = random_model(teacher, device, torch.bfloat16), random_model(student, device, torch.float32).requires_grad_(True).train()
    engine, loss_function = open_engine(Launch(), models[1], train_plan(train)), distillation_loss(models[0])
    rows = random_ids(student, (train.batch, length), device)

    def step() -> None:
        with engine.micro_step(last=True):
            engine.backward(engine.measure(loss_function, rows)["loss"])
        engine.update(1e-5)

    seconds = medians({"step": step}, device)["step"]
    plan = training_memory(student, teacher, train, Launch(), sequence_length=length, teacher_bytes_per_number=2, on_gpu=device.type == "cuda")
    flops = training_flops(student, teacher, [(replace(train, tokens=rows.numel()), length)]) / seconds
    figures = {"tokens_per_second": rows.numel() / seconds, "tflops": flops / 1e12, "teacher_billions": count_total_parameters(teacher) / 1e9,
               "student_billions": count_total_parameters(student) / 1e9}  # fmt: skip
    rate = bf16_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    figures |= {"mfu": flops / rate} if rate else {}
    peak = peak_bytes(step, device)
    return figures | ({"peak_over_plan": peak / plan.total, "peak_gib": peak / GIB} if peak else {})


def free_memory(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
