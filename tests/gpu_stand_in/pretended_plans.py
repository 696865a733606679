"""Micro-steps of distillation and scoring at small shapes on the pretended device: what was planned, by part, and the peak that was counted. Prints JSON.

python pretended_plans.py training gives {case: {"parts": planned bytes by part, "fixed": what of them is there before a micro-step, "planned_fixed",
"peak": counted bytes}}; python pretended_plans.py scoring gives {case: {moment: {"parts", "peak"}}}.
"""

import gc
import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from pretended_cuda import ALLOCATOR
from pretended_torch import install

TOKENS, ROWS, VOCABULARY = 512, 2, 128
KINDS = {"M": "linear_attention", "-": "mlp", "*": "full_attention", "E": "moe"}
EXPERTS = {"n_routed_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 64, "moe_shared_expert_intermediate_size": 96, "n_group": 1,
           "topk_group": 1, "norm_topk_prob": True, "routed_scaling_factor": 2.5, "moe_latent_size": None}  # fmt: skip
DEVICE = "cuda:0"
FIXED = ("weights", "gradients", "optimizer", "teacher")


@dataclass(frozen=True)
class Training:
    """A case: the layers of student and teacher, how the student keeps its activations, the precision, and attention's key-value heads, of 4."""

    pattern: str
    way: bool | str
    precision: str
    keys: int = 2
    every: int = 1
    long: bool = False

    @property
    def title(self) -> str:
        every = (f", every {self.every}" if self.every > 1 else "") + ", in parts" * self.long
        return f"{self.pattern} {self.precision} {self.keys} key-value heads, checkpointing {self.way}{every}"


TRAININGS = [
    *(Training("M-*M-", way, "bf16") for way in (False, True, "host")),
    *(Training("M-*M-", way, "float32", keys=4) for way in (False, True, "host")),
    *(Training(pattern, way, "bf16") for pattern in ("MMM", "---", "***", "EEE") for way in (False, "host")),
    *(Training("M-E*E", way, precision) for way, precision in ((True, "bf16"), (False, "float32"))),
    Training("M-*M-", False, "float32"),
    Training("M-*M-", True, "bf16", every=2),
    *(Training(pattern, way, "bf16", long=True) for pattern in ("MMM", "---", "***", "M-*M-") for way in (True, "host")),
]


def model_config(pattern: str, hidden: int, ffn: int, heads: int, vocabulary: int, dtype: torch.dtype, *, keys: int = 2) -> dict:
    """config.json of a small NemotronH, with the chunks of the published ones."""
    from minitron.training.tiny_teacher import TINY_CONFIG

    return TINY_CONFIG | {
        "vocab_size": vocabulary, "hidden_size": hidden, "layers_block_type": [KINDS[letter] for letter in pattern], "intermediate_size": ffn,
        "num_attention_heads": 4, "num_key_value_heads": keys, "head_dim": 16, "mamba_num_heads": heads, "mamba_head_dim": 16, "n_groups": 2,
        "ssm_state_size": 16, "conv_kernel": 4, "tie_word_embeddings": False, "chunk_size": 128, "dtype": str(dtype).removeprefix("torch."),
    } | (EXPERTS if "E" in pattern else {})  # fmt: skip


def trained(case: Training) -> dict:
    """The second micro-step of the second step, when gradients and moments are there, and its plan."""
    from distill.engines.launch import Launch
    from distill.engines.opening import open_engine
    from distill.objectives import distillation_loss
    from memory_budget.hf_config import architecture_from_config
    from minitron.families.nemotron_h import FAMILY
    from minitron.mamba import block_sizes
    from minitron.settings.training import Precision, TrainSettings
    from minitron.training.memory import training_memory
    from minitron.training.steps import train_plan

    block_sizes.LONG_TOKENS, block_sizes.BLOCK_TOKENS = (512, 256) if case.long else (65_536, 32_768)
    dtype = torch.bfloat16 if case.precision == "bf16" else torch.float32
    configs = [model_config(case.pattern, 64, 192, 8, VOCABULARY, torch.float32, keys=case.keys),
               model_config(case.pattern, 96, 256, 16, VOCABULARY, dtype, keys=case.keys)]  # fmt: skip
    if case.long:  # wide layers, so that they are most of what a micro-step holds
        configs[0] |= {"intermediate_size": 768, "mamba_num_heads": 32, "head_dim": 128}
    student, teacher = FAMILY.build(configs[0]).to(DEVICE), FAMILY.build(configs[1]).to(dtype).to(DEVICE)
    train = TrainSettings(batch=2 * ROWS, micro_batch=ROWS, precision=Precision[case.precision], gradient_checkpointing=case.way, checkpoint_every=case.every)
    engine, loss = open_engine(Launch(), student.train(), train_plan(train)), distillation_loss(teacher)
    tokens = 2 * TOKENS if case.long else TOKENS
    rows = torch.randint(VOCABULARY, (ROWS, tokens), generator=torch.Generator().manual_seed(1))
    for _ in range(2):
        for last in (False, True):
            fixed = ALLOCATOR.allocated
            ALLOCATOR.reset_peak()
            with engine.micro_step(last=last):
                engine.backward(engine.measure(loss, rows)["loss"])
            peak = ALLOCATOR.peak
        engine.update(1e-3)
    plan = training_memory(*map(architecture_from_config, configs), train, Launch(), sequence_length=tokens, teacher_bytes_per_number=dtype.itemsize,
                           on_gpu=True)  # fmt: skip
    parts = asdict(plan)
    return {"parts": parts, "planned_fixed": sum(parts[name] for name in FIXED), "fixed": fixed, "peak": peak}


@dataclass(frozen=True)
class Scoring:
    """A case: the layers, the model's dtype, whether it is streamed, and what is measured of branches."""

    pattern: str
    dtype: torch.dtype
    stream: bool = False
    criterion: str = "mse"
    tokens: int = TOKENS
    vocabulary: int = VOCABULARY
    logits_tokens: int = 256

    @property
    def title(self) -> str:
        return f"{self.pattern} {str(self.dtype).removeprefix('torch.')} {self.criterion}" + (" streamed" if self.stream else "")


SCORINGS = [
    *(Scoring(pattern, dtype) for pattern in ("M-*M-", "MMM", "---", "***") for dtype in (torch.float32, torch.bfloat16)),
    *(Scoring("M-*M-", torch.bfloat16, criterion=criterion, tokens=256, vocabulary=2048) for criterion in ("kl", "loss")),
    Scoring("M-*M-", torch.bfloat16, stream=True, tokens=256, vocabulary=2048),
]


def scored(case: Scoring) -> dict:
    """Both walks over four batches of two rows as one block, and their plans: width, the depth sweep's layers, its comparison of logits."""
    from memory_budget.hf_config import architecture_from_config
    from minitron.checkpoints.placement import StreamedModel, WholeModel
    from minitron.families.nemotron_h import FAMILY
    from minitron.importance import layers
    from minitron.importance.activations import measure_width
    from minitron.importance.memory import ScoringNeeds
    from minitron.settings.run import Criterion, Placement, ScoringSettings

    config = model_config(case.pattern, 64, 192, 8, case.vocabulary, case.dtype)
    architecture, model = architecture_from_config(config), FAMILY.build(config).to(case.dtype)
    if case.stream:
        folder = Path(tempfile.mkdtemp(dir="."))
        model.save_pretrained(folder)
        placed = StreamedModel(FAMILY, folder, config, architecture, torch.device(DEVICE))
    else:
        placed = WholeModel(FAMILY, model.to(DEVICE).requires_grad_(False), architecture)
    rows = torch.randint(case.vocabulary, (4 * ROWS, case.tokens), generator=torch.Generator().manual_seed(1))
    scoring = ScoringSettings(
        samples=len(rows), layer_samples=len(rows), batch=ROWS, block_tokens=rows.numel(), branch_tokens=2 * case.tokens, logits_tokens=case.logits_tokens,
        reuse_gib=0, placement=Placement.stream if case.stream else Placement.device, criterion=Criterion[case.criterion],
    )  # fmt: skip
    batches, peaks, everything = [batch.to(DEVICE) for batch in rows.split(ROWS)], {}, range(len(case.pattern))
    peaks["width"] = _peak(lambda: measure_width(placed, batches))
    compare = layers._compare

    def compared(*arguments):
        peaks["sweep"] = ALLOCATOR.peak
        ALLOCATOR.reset_peak()
        return compare(*arguments)

    layers._compare = compared
    limits = layers.SweepLimits(scoring.branch_tokens, scoring.logits_tokens, 0)
    peaks["logits"] = _peak(lambda: layers.measure_round(placed, layers.Block(batches), everything, everything, case.criterion, limits))
    layers._compare = compare
    moments = ScoringNeeds(architecture, case.tokens, case.dtype.itemsize).moments(scoring, rows.numel())
    return {name: {"parts": parts, "peak": peaks[name]} for name, parts in moments.items()}


def _peak(call: Callable[[], object]) -> int:
    ALLOCATOR.reset_peak()
    call()
    return ALLOCATOR.peak


def main() -> None:
    torch.set_num_threads(1)
    install()
    from minitron.mamba import dispatch

    dispatch.install()
    measure, cases = {"training": (trained, TRAININGS), "scoring": (scored, SCORINGS)}[sys.argv[1]]
    found = {}
    for case in cases:
        gc.collect()
        assert ALLOCATOR.allocated == 0, "a case has left something on the device"
        torch.manual_seed(0)
        found[case.title] = measure(case)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
