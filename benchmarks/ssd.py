"""A small NemotronH on CPU, from tokens to loss and gradients, by minitron's way against transformers' own, and the scan alone at the 12B's shape.

transformers' way is as it comes: float32, chunks of 128, its loss of whole logits. minitron's is what trains the tiny teacher: its functions
in transformers' place, and the cross-entropy a few tokens at a time. Both sides run the same model on the same tokens in turns; medians. The
floor of a step is its matrix products at the rate measured in this run.
Run: .venv/bin/python benchmarks/ssd.py [--repeats N]
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from distill.objectives import next_token_objective  # noqa: E402
from memory_budget.architecture import Architecture  # noqa: E402
from memory_budget.parameters import count_parameters  # noqa: E402
from minitron.families.nemotron_h import FAMILY  # noqa: E402
from minitron.mamba import dispatch  # noqa: E402
from minitron.training.tiny_teacher import TINY_CONFIG  # noqa: E402

ARCHITECTURE = Architecture(
    model_type="nemotron_h", pattern="M-M-M*-M-M*-", hidden=256, vocab=4096, ffn=1024, num_attention_heads=8, num_key_value_heads=2,
    attention_head_dim=32, mamba_num_heads=16, mamba_head_dim=32, mamba_num_groups=4, mamba_state_size=64, mamba_conv_kernel=4,
)  # fmt: skip
ROWS, TOKENS, CHUNK = 8, 256, 128
SCAN_ROWS, SCAN_TOKENS, HEADS, HEAD_DIM, GROUPS, STATE = 4, 1024, 128, 80, 8, 128  # a mixer of the 12B
OWN = [(owner, name, getattr(owner, name)) for owner, name, _ in dispatch.replacements()]


def put_back() -> None:
    """transformers' functions, as they come."""
    for owner, name, function in OWN:
        setattr(owner, name, function)


def timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def matrix_rate() -> float:
    """FLOP/s of float32 products of the FFN's shape, all threads."""
    a, b = torch.randn(ROWS * TOKENS, ARCHITECTURE.hidden), torch.randn(ARCHITECTURE.ffn, ARCHITECTURE.hidden)
    rates = [2 * a.numel() * len(b) / timed(lambda: torch.nn.functional.linear(a, b)) for _ in range(200)]
    return statistics.median(rates)


def measure_model(repeats: int) -> dict[str, float]:
    """Medians in seconds by side and work, and the losses."""
    torch.manual_seed(0)
    model = FAMILY.build(FAMILY.hf_config(TINY_CONFIG, ARCHITECTURE) | {"chunk_size": CHUNK}).eval()
    ids = torch.randint(ARCHITECTURE.vocab, (ROWS, TOKENS))

    def their_loss() -> torch.Tensor:
        return model(ids, labels=ids, use_cache=False).loss

    def own_loss() -> torch.Tensor:
        return next_token_objective(model, ids)

    def own_loss_in_bf16() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return own_loss()

    def forward(loss: Callable[[], torch.Tensor]) -> float:
        with torch.no_grad():
            return loss().item()

    def forward_backward(loss: Callable[[], torch.Tensor]) -> None:
        model.zero_grad(set_to_none=True)
        loss().backward()

    sides = {"transformers": (put_back, their_loss), "minitron": (dispatch.install, own_loss), "minitron bf16": (dispatch.install, own_loss_in_bf16)}
    times: dict[str, list[float]] = {}
    losses = {}
    for name, (choose, loss) in sides.items():  # once unmeasured: threads, caches and libraries come up
        choose()
        losses[name] = forward(loss)
        forward_backward(loss)
    for _ in range(repeats):
        for name, (choose, loss) in sides.items():
            choose()
            for what, work in (("forward", forward), ("forward + backward", forward_backward)):
                times.setdefault(f"{name}: {what}", []).append(timed(lambda loss=loss, work=work: work(loss)))
    return {name: statistics.median(values) for name, values in times.items()} | {f"loss {name}": value for name, value in losses.items()}


@torch.no_grad()
def measure_scan(repeats: int) -> tuple[float, float, float]:
    """Seconds of transformers' scan and of ours on bf16 inputs, and the relative error of ours against transformers' on float32 inputs."""
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=random)

    x, dt = normal(SCAN_ROWS, SCAN_TOKENS, HEADS, HEAD_DIM), normal(SCAN_ROWS, SCAN_TOKENS, HEADS) - 2
    B, C = (normal(SCAN_ROWS, SCAN_TOKENS, GROUPS, STATE) for _ in range(2))
    A, D, dt_bias = -torch.rand(HEADS, generator=random) - 0.1, normal(HEADS), normal(HEADS)
    settings = {"chunk_size": CHUNK, "D": D, "dt_bias": dt_bias, "dt_softplus": True}
    functions = {"transformers": OWN[0][2], "minitron": dispatch.replacements()[0][2]}
    halves = [tensor.bfloat16() for tensor in (x, B, C)]
    exact = functions["transformers"](halves[0].float(), dt, A, halves[1].float(), halves[2].float(), **settings)
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            started = time.perf_counter()
            result = function(halves[0], dt, A, halves[1], halves[2], **settings)
            times[name].append(time.perf_counter() - started)
    error = ((result - exact).norm() / exact.norm()).item()
    return *(statistics.median(times[name]) for name in functions), error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15, help="interleaved repeats of every side; medians are reported")
    parser.add_argument("--scan-repeats", type=int, default=3)
    options = parser.parse_args()
    seconds = measure_model(options.repeats)
    theirs, ours, error = measure_scan(options.scan_repeats)
    rate = matrix_rate()
    counts = count_parameters(ARCHITECTURE)
    floor = 2 * ROWS * TOKENS * (counts["mamba"] + counts["attention"] + counts["ffn"] + counts["head"]) / rate
    differences = [abs(seconds[f"loss {name}"] / seconds["loss transformers"] - 1) for name in ("minitron", "minitron bf16")]
    ratios = {
        "forward_speedup": seconds["transformers: forward"] / seconds["minitron: forward"],
        "forward_backward_speedup": seconds["transformers: forward + backward"] / seconds["minitron: forward + backward"],
        "scan_12b_speedup": theirs / ours,
        "max_loss_difference": differences[0],
    }
    print(f"hidden {ARCHITECTURE.hidden}, {ARCHITECTURE.num_layers} layers, {ROWS} × {TOKENS} tokens, {torch.get_num_threads()} threads")
    for name, value in seconds.items():
        if not name.startswith("loss"):
            print(f"{name:40s} {1000 * value:7.0f} ms")
    print(f"{'floor (matrix products)':40s} {1000 * floor:7.0f} ms forward, {3000 * floor:.0f} ms with backward, at {rate / 1e9:.0f} GFLOP/s")
    print(f"loss differs by {differences[0]:.1e} (float32), {differences[1]:.1e} (bf16)")
    print(f"scan alone, {SCAN_ROWS} × {SCAN_TOKENS} tokens, {HEADS} heads × {HEAD_DIM}, bf16: {theirs:.2f} s → {ours:.2f} s, relative error {error:.1e}")
    bf16 = {"bf16_loss_difference": differences[1], "bf16_forward_speedup": seconds["transformers: forward"] / seconds["minitron bf16: forward"],
            "bf16_forward_backward_speedup": seconds["transformers: forward + backward"] / seconds["minitron bf16: forward + backward"]}  # fmt: skip
    print(json.dumps({"benchmark": "ssd", "ratios": ratios, **ratios, **bf16, "scan_relative_error": error, "threads": torch.get_num_threads(),
                      "over_floor": seconds["minitron: forward + backward"] / (3 * floor)}))  # fmt: skip


if __name__ == "__main__":
    main()
