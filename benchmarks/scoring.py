"""Width scoring against a plain forward pass; iterative layer scoring against the naive loop and against its own floor.

The floor counts the tokens that the sweep sends through every layer, the norm and the head, and prices them at what
the same modules take per token in a plain forward pass at the same batch, measured in the same run.
Run: .venv/bin/python benchmarks/scoring.py [--repeats N]
"""

import argparse
import json
import resource
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from memory_budget.architecture import Architecture  # noqa: E402
from minitron.checkpoints.placement import WholeModel  # noqa: E402
from minitron.families.nemotron_h import FAMILY  # noqa: E402
from minitron.importance.activations import measure_width  # noqa: E402
from minitron.importance.layers import Block, SweepLimits, measure_round  # noqa: E402
from minitron.importance.removal import LayerRules, rank_iteratively  # noqa: E402
from minitron.mamba import dispatch  # noqa: E402
from minitron.training.tiny_teacher import TINY_CONFIG  # noqa: E402

ARCHITECTURE = Architecture(
    model_type="nemotron_h", pattern="M-M-M*-M-M-M*-M-M*-M-M*-", hidden=256, vocab=4096, ffn=1024, num_attention_heads=8, num_key_value_heads=2,
    attention_head_dim=32, mamba_num_heads=16, mamba_head_dim=32, mamba_num_groups=4, mamba_state_size=64, mamba_conv_kernel=4,
)  # fmt: skip
ROWS, TOKENS, ROUNDS = 8, 256, 3
RULES = LayerRules({"*": 1}, {})


def timed(work) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def logits_of(parts, ids: torch.Tensor, layers) -> torch.Tensor:
    hidden = parts.embed(ids)
    for layer in layers:
        hidden = parts.layers[layer](hidden)
    return parts.head(parts.norm(hidden)).float()


@torch.no_grad()
def naive_rounds(model, ids: torch.Tensor) -> list[int]:
    """The obvious loop: for every layer that could go a full forward pass without it, its logits against the full model's."""
    parts, pattern, kept, order = FAMILY.parts(model), ARCHITECTURE.pattern, list(range(ARCHITECTURE.num_layers)), []
    full = logits_of(parts, ids, kept)
    scale = full.square().sum(dtype=torch.float64)
    for _ in range(ROUNDS):
        removable = [layer for layer in kept if pattern[layer] != "*" or sum(pattern[other] == "*" for other in kept) > 1]
        scores = {}
        for layer in removable:
            ablated = logits_of(parts, ids, [other for other in kept if other != layer])
            scores[layer] = ((ablated - full).square().sum(dtype=torch.float64) / scale).item()
        order.append(min(scores, key=scores.get))
        kept.remove(order[-1])
    return order


def swept_rounds(model, ids: torch.Tensor) -> list[int]:
    block, placed = Block([ids]), WholeModel(FAMILY, model, ARCHITECTURE)

    def ask(kept, removable):
        return measure_round(placed, block, kept, removable, "mse", SweepLimits(branch_tokens=ROWS * TOKENS)).scores("mse", normalised=True)

    removals = rank_iteratively(ARCHITECTURE.pattern, ARCHITECTURE.num_layers - ROUNDS, RULES, ask)
    return [removal.layer for removal in removals]


def modules_of(model) -> dict[str, torch.nn.Module]:
    parts = FAMILY.parts(model)
    return {**{f"layer {number}": module for number, module in enumerate(parts.layers)}, "norm": parts.norm, "head": parts.head}


def count_tokens(model, work) -> dict[str, int]:
    """Tokens that pass through each module while `work` runs."""
    counts = dict.fromkeys(modules_of(model), 0)

    def counter(name):
        def count(_module, args):
            counts[name] += args[0].shape[:-1].numel()

        return count

    handles = [module.register_forward_pre_hook(counter(name)) for name, module in modules_of(model).items()]
    work()
    for handle in handles:
        handle.remove()
    return counts


def seconds_per_token(model, ids: torch.Tensor) -> dict[str, float]:
    """Seconds that each module takes per token in a plain forward pass."""
    started, taken, handles = {}, {}, []
    for name, module in modules_of(model).items():
        handles.append(module.register_forward_pre_hook(lambda _m, _a, name=name: started.__setitem__(name, time.perf_counter())))
        handles.append(module.register_forward_hook(lambda _m, _a, _o, name=name: taken.__setitem__(name, time.perf_counter() - started[name])))
    logits_of(FAMILY.parts(model), ids, range(ARCHITECTURE.num_layers))
    for handle in handles:
        handle.remove()
    return {name: seconds / ids.numel() for name, seconds in taken.items()}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5, help="interleaved repeats of every side; medians are reported")
    repeats = parser.parse_args().repeats
    dispatch.install()
    torch.manual_seed(0)
    model = FAMILY.build(FAMILY.hf_config(TINY_CONFIG, ARCHITECTURE)).eval().requires_grad_(False)
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, ARCHITECTURE.vocab, (ROWS, TOKENS)))
    placed = WholeModel(FAMILY, model, ARCHITECTURE)
    sides = {
        "plain forward": lambda: logits_of(FAMILY.parts(model), ids, range(ARCHITECTURE.num_layers)),
        "width scoring": lambda: measure_width(placed, [ids]),
        "naive layer scoring": lambda: naive_rounds(model, ids),
        "layer scoring": lambda: swept_rounds(model, ids),
    }
    assert naive_rounds(model, ids) == swept_rounds(model, ids), "both sides must remove the same layers"
    tokens = count_tokens(model, sides["layer scoring"])
    times, floors = {name: [] for name in sides}, []
    for _ in range(repeats):
        for _ in range(10):
            for name in ("plain forward", "width scoring"):
                times[name].append(timed(sides[name]))
        for name in ("naive layer scoring", "layer scoring"):
            times[name].append(timed(sides[name]))
        prices = [seconds_per_token(model, ids) for _ in range(3)]
        floors.append(sum(tokens[name] * statistics.median(price[name] for price in prices) for name in tokens))
    report(times, floors, repeats)


def report(times: dict[str, list[float]], floors: list[float], repeats: int) -> None:
    median = {name: statistics.median(values) for name, values in times.items()} | {"floor of layer scoring": statistics.median(floors)}
    ratios = {
        "width_overhead": median["width scoring"] / median["plain forward"],
        "depth_speedup": median["naive layer scoring"] / median["layer scoring"],
        "depth_over_floor": median["layer scoring"] / median["floor of layer scoring"],
    }
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{ARCHITECTURE.num_layers} layers, hidden {ARCHITECTURE.hidden}, {ROWS} × {TOKENS} tokens, {ROUNDS} removals, {torch.get_num_threads()} threads")
    for name, seconds in median.items():
        print(f"  {name:<24} {seconds:9.3f} s")
    for name, ratio in ratios.items():
        print(f"  {name:<24} {ratio:9.3f}")
    print(f"  peak resident memory     {peak:9.2f} GiB")
    print(json.dumps({"benchmark": "scoring", "ratios": ratios, "seconds": median, "peak_rss_gib": peak, "repeats": repeats}))


if __name__ == "__main__":
    main()
