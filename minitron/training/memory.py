"""What distillation will hold in each process, counted from the two architectures before anything is loaded.

Weights, gradients, optimiser and teacher are exact counts of numbers. What a micro-step holds beside them is counted tensor by tensor on a GPU
(gpu_memory.py); on a CPU, where layers go by blocks, activations and loss are estimates: the tensors that the modules' backward passes keep and those of
the chunked loss, named below. Not counted: the allocator's own share, and buffers of communication.
"""

import importlib.util
import os
from dataclasses import dataclass, fields, replace

from distill.chunk_sizes import chunk_tokens
from distill.engines.launch import Launch
from memory_budget.architecture import WINDOWED, Architecture
from memory_budget.parameters import count_parameters, count_total_parameters, layer_parameters
from memory_budget.units import format_gib
from minitron.checkpoints.forward_work import has_mask, layer_numbers
from minitron.families.known import FAMILIES
from minitron.machine.memory import available_memory_bytes
from minitron.settings.training import Optimizer, Precision, Router, TrainSettings
from minitron.training.gpu_memory import BF16, FLOAT32, MicroStep, Moment

SPARE_SHARE = 0.1  # of a device's memory: left to the allocator's rounding and to communication, which are not counted


@dataclass(frozen=True, slots=True)
class TrainingMemory:
    """Bytes in each process. `gathered` is what a sharded engine holds whole for a while: what is outside the layers, and the
    largest layer twice, since the next one is fetched while one runs. `mask` is attention's own on a GPU: of windows, and of
    packed rows without flash attention. `activations`, `loss` and `layer`, on a GPU the one at work, are those of the moment of
    a micro-step that has most of them.
    """

    weights: int
    gradients: int
    optimizer: int
    teacher: int
    gathered: int
    activations: int
    loss: int
    layer: int = 0
    mask: int = 0

    @property
    def total(self) -> int:
        return sum(getattr(self, f.name) for f in fields(self))

    @property
    def micro_step(self) -> int:
        """What of it comes and goes with a micro-step."""
        return self.activations + self.loss + self.layer + self.mask

    def describe(self) -> str:
        """One line for the terminal."""
        parts = ", ".join(f"{f.name} {format_gib(getattr(self, f.name))}" for f in fields(self) if getattr(self, f.name))
        return f"each process will hold about {format_gib(self.total)}: {parts}"


def training_memory(student: Architecture, teacher: Architecture, train: TrainSettings, launch: Launch, *, sequence_length: int,
                    teacher_bytes_per_number: int, on_gpu: bool, masked: bool = False) -> TrainingMemory:  # fmt: skip
    """The plan of one phase under a launch; `masked` where attention goes by a mask of [T, T] a row, as bool and as what is added to the scores.

    DeepSpeed keeps, beside the weights that compute, a float32 copy of its slice of them (ZeRO, arXiv 1910.02054, §5).
    """
    numbers, trained, processes = count_total_parameters(student), _trained_numbers(student, train), launch.world_size
    zero = launch.engine.startswith("zero")
    computing = BF16 if zero and train.precision is Precision.bf16 else FLOAT32
    optimizer_slices = processes if zero or launch.is_sharded else 1
    weight_slices = processes if launch.is_sharded else 1
    master = FLOAT32 * trained // processes if zero else 0
    rows = train.micro_batch or train.batch // processes
    if on_gpu:
        moment = MicroStep(
            student, teacher, train, rows, sequence_length, teacher_bytes_per_number, casts=_casts(launch), by_heads=launch.engine != "zero3"
        ).largest
    else:
        tokens = rows * sequence_length
        moment = Moment(activations=tokens * activation_bytes_per_token(student, train, sequence_length), loss=loss_bytes(student, teacher, tokens))
    return TrainingMemory(
        weights=computing * numbers // weight_slices + master,
        gradients=FLOAT32 * trained // optimizer_slices,  # of micro-steps they add up in float32 under every engine
        optimizer=_moment_bytes(student, train) // optimizer_slices,
        teacher=teacher_bytes_per_number * count_total_parameters(teacher) // weight_slices,
        gathered=computing * _gathered(student) + teacher_bytes_per_number * _gathered(teacher) if launch.is_sharded else 0,
        activations=moment.activations,
        loss=moment.loss,
        layer=moment.layer,
        mask=rows * sequence_length**2 * _mask_width(student, train, sequence_length, on_gpu=on_gpu, masked=masked),
    )


def _mask_width(student: Architecture, train: TrainSettings, length: int, *, on_gpu: bool, masked: bool) -> int:
    """Bytes of a number of attention's masks that no layer's own are: of windows, whose layers keep what they add, the bool alone."""
    if masked:
        return 1 + (BF16 if train.precision is Precision.bf16 else FLOAT32)
    return int(on_gpu and has_mask(student, WINDOWED, length))


def _casts(launch: Launch) -> bool:
    """Whether parameters and the residual stream stay float32 under bf16: where autocast alone sees to it."""
    return launch.engine in ("single", "ddp")


def _router_numbers(student: Architecture) -> int:
    return student.num_layers_of("E") * student.moe_num_experts * student.hidden


def _trained_numbers(student: Architecture, train: TrainSettings) -> int:
    return count_total_parameters(student) - (_router_numbers(student) if train.router is Router.frozen else 0)


def _moment_bytes(student: Architecture, train: TrainSettings) -> int:
    """AdamW keeps two float32 a parameter, Muon one for each of the layers' matrices; with 8 bits two bytes, and two float32 for every 256."""
    numbers = 2 * _trained_numbers(student, train)
    if train.optimizer is Optimizer.adamw_8bit:
        return numbers + numbers * FLOAT32 // 256
    if train.optimizer is Optimizer.muon:
        numbers -= sum(copies * out * into for letter in student.pattern for copies, out, into in layer_parameters(student, letter).matrices)
        numbers -= _router_numbers(student) if train.router is Router.trained else 0  # which are in no format that packs
    return numbers * FLOAT32


def state_bytes(student: Architecture, train: TrainSettings) -> int:
    """Of a saved state: weights and moments, whole, whatever the engine."""
    return FLOAT32 * count_total_parameters(student) + _moment_bytes(student, train)


def _gathered(model: Architecture) -> int:
    kinds = count_parameters(model)
    largest = max((_layer_numbers(model, letter) for letter in set(model.pattern)), default=0)
    return kinds["embedding"] + kinds["head"] + model.hidden + 2 * largest


def _layer_numbers(model: Architecture, letter: str) -> int:
    layer = layer_parameters(model, letter)
    return layer.total + (1 + model.post_norms) * model.hidden


def activation_bytes_per_token(student: Architecture, train: TrainSettings, length: int) -> int:
    """What forward keeps for backward on a CPU of rows of `length`, up to the last hidden states."""
    width = BF16 if train.precision is Precision.bf16 else FLOAT32
    by_blocks = train.precision is Precision.float32  # mamba/blockwise.FeedForward and mixer
    kept = [sum(layer_numbers(student, letter, length, by_blocks=by_blocks) for letter in letters) for letters in student.layer_kinds]
    if not train.gradient_checkpointing:
        return sum(kept) * width
    again, whole = kept[:: train.checkpoint_every], sum(kept) - sum(kept[:: train.checkpoint_every])
    return (len(again) * student.hidden + max(again, default=0) + whole) * width


@dataclass(frozen=True, slots=True)
class PhaseMemory:
    """What a phase's memory follows from beside its training settings."""

    student: Architecture
    teacher: Architecture
    launch: Launch
    sequence_length: int
    teacher_bytes_per_number: int
    on_gpu: bool
    packed: bool = False

    def of(self, train: TrainSettings) -> TrainingMemory:
        """The plan of one process."""
        by_document, models = self.packed and self.on_gpu and "*" in self.teacher.mixers, (self.student, self.teacher)
        if by_document and has_flash_attention(self.teacher, train.precision):  # which needs no masks, of windows neither
            by_document, models = False, [replace(model, pattern=model.mixers) for model in models]
        return training_memory(*models, train, self.launch, sequence_length=self.sequence_length,
                               teacher_bytes_per_number=self.teacher_bytes_per_number, on_gpu=self.on_gpu, masked=by_document)  # fmt: skip

    def with_checkpointing(self, train: TrainSettings, available_bytes: int) -> TrainSettings:
        """`gradient_checkpointing: auto` as what computes least again and fits with something to spare, else what takes least memory."""
        if train.gradient_checkpointing != "auto":
            return train
        ways = [(False, 1), (True, 4), (True, 3), (True, 2), (True, 1), *([("host", 1)] if self.on_gpu else [])]
        tried = [replace(train, gradient_checkpointing=how, checkpoint_every=every) for how, every in ways]
        return next((one for one in tried if self.of(one).total <= (1 - SPARE_SHARE) * available_bytes), tried[-1])

    def host_bytes(self, train: TrainSettings) -> int:
        """What gradient_checkpointing=host keeps of each process in the host's memory: the layers' inputs of the rows at work."""
        if train.gradient_checkpointing != "host":
            return 0
        rows, width = train.micro_batch or train.batch // self.launch.world_size, FLOAT32
        if train.precision is Precision.bf16 and not _casts(self.launch):
            width = BF16
        return len(self.student.layer_kinds[:: train.checkpoint_every]) * self.student.hidden * width * rows * self.sequence_length


def loss_bytes(student: Architecture, teacher: Architecture, tokens: int) -> int:
    """What the chunked loss of so many tokens at once holds on a CPU, float32.

    Of one chunk the logits of student and teacher, of which what is made of them takes a few rows at a time. Of all tokens the hidden states of both and
    the student's gradient; the output matrix's gradient, beside the one it is added to.
    """
    chunk = min(tokens, chunk_tokens(student.vocab, on_cpu=True)) * student.vocab
    return FLOAT32 * (2 * chunk + tokens * (2 * student.hidden + teacher.hidden) + student.vocab * student.hidden)


def has_flash_attention(model: Architecture, precision: Precision) -> bool:
    """Whether a model's attention can go by documents without a mask: by the package flash-attn, which computes in bf16."""
    return precision is Precision.bf16 and not FAMILIES[model.model_type].documents_by_mask and importlib.util.find_spec("flash_attn") is not None


def check_host(needed_bytes: int, stage: str) -> None:
    """Raises ValueError where this machine's memory cannot hold what all its processes keep there."""
    processes, available = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), available_memory_bytes()
    if needed_bytes * processes > available:
        raise ValueError(
            f"{stage}: gradient_checkpointing=host keeps {format_gib(needed_bytes)} of each of {processes} processes in this machine's memory, which has "
            f"{format_gib(available)} free; {available // max(needed_bytes, 1)} processes on each machine would fit, on more machines, or shorter rows"
        )


def check_fits(memory: TrainingMemory, available_bytes: int, place: str, stage: str) -> None:
    """Raises ValueError where a process has less than the plan of a stage (distill, screen) wants."""
    if memory.total > available_bytes:
        raise ValueError(
            f"{stage}: {memory.describe()}; {place} has {format_gib(available_bytes)}. Lower {stage}.train.micro_batch, set {stage}.train.precision=bf16 or "
            f"{stage}.train.gradient_checkpointing=true, or launch more processes with conf/accelerate/fsdp2.yaml or zero3.yaml"
        )
