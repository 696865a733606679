"""The report's plots, drawn from summary.json alone. matplotlib is imported when one is drawn, not before.

Colours are Okabe and Ito's, and viridis: both can be told apart by colour-blind readers.
"""

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from memory_budget.units import format_gib, to_gib

Summary = Mapping[str, Any]

PARTS = {
    "weights": ("weights", "#0072B2"),
    "kv_cache": ("KV cache", "#E69F00"),
    "ssm_state": ("SSM state", "#009E73"),
    "conv_state": ("convolution state", "#CC79A7"),
    "activations": ("activations", "#56B4E9"),
}
KINDS = {"M": ("Mamba-2", "#0072B2"), "*": ("attention", "#D55E00"), "-": ("FFN", "#009E73"), "E": ("MoE", "#CC79A7")}
MODELS = {"teacher": "#0072B2", "pruned": "#E69F00", "student": "#009E73"}
AXES = {"hidden": "hidden channels", "ffn": "FFN neurons", "mamba_head": "Mamba-2 heads", "attention_head": "attention heads"}
CRITERIA = {
    "mse": "squared change of the logits\nover their square (ratio)",
    "kl": "KL from the full model\n(nats/token)",
    "loss": "loss without it\n(nats/token)",
    "block_influence": "1 − cosine of the residual\nbefore and after (ratio)",
}
RED, GREY = "#B22222", "#555555"
PIXELS_PER_INCH = 120


def draw_plots(summary: Summary, folder: Path) -> list[str]:
    """Writes a PNG for each plot whose data the summary has, removes those it has none for; names of the files there are.

    A file that was drawn from the same data stays, so that a run with nothing to do does not wait for matplotlib.
    """
    fingerprint, drawn = _fingerprint(summary), []
    for name, plot in PLOTS.items():
        path = folder / name
        if not (path.exists() and fingerprint.encode() in path.read_bytes()):
            figure = plot(summary)
            if figure is None:
                path.unlink(missing_ok=True)
                continue
            partial = path.with_name(name + ".partial")
            figure.savefig(partial, format="png", dpi=PIXELS_PER_INCH, metadata={"Comment": fingerprint})
            partial.rename(path)
        drawn.append(name)
    return drawn


def _fingerprint(summary: Summary) -> str:
    """Changes with what is plotted and with how: this file's own text goes in."""
    plotted = [summary[name] for name in ("budget", "models", "candidates", "importance", "curves")]
    return hashlib.sha256(Path(__file__).read_bytes() + json.dumps(plotted).encode()).hexdigest()


def _compared_models(summary: Summary) -> dict[str, Mapping[str, Any]]:
    """What memory is compared between, by a name to show: the teacher and the student, or what there is of one."""
    models = summary["models"]
    shown = {"teacher": models["teacher"]}
    for name in ("student", "pruned"):
        if name in models:
            return {**shown, name: models[name]}
    chosen = chosen_candidate(summary)
    return {**shown, f"chosen\n{chosen['id']}": chosen} if chosen else shown


def chosen_candidate(summary: Summary) -> Mapping[str, Any] | None:
    """The candidate that the search chose; None before the search."""
    return next((candidate for candidate in summary["candidates"] if candidate["chosen"]), None)


def sequences_text(workload: Mapping[str, Any]) -> str:
    """What is served at once, e.g. 1 sequence of 4,096 tokens."""
    sequences = "1 sequence" if workload["batch"] == 1 else f"{workload['batch']:,} sequences"
    return f"{sequences} of {workload['context_tokens']:,} tokens"


def removed_layers(summary: Summary) -> list[int]:
    """The teacher's layers that the chosen candidate does without; empty before the search."""
    chosen = chosen_candidate(summary)
    layers = range(len(summary["models"]["teacher"]["architecture"]["pattern"]))
    return sorted(set(layers) - set(chosen["kept_layers"])) if chosen else []


def _figure(width: float, height: float):
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _axes(figure, *position: int, title: str, x: str, y: str):
    axes = figure.add_subplot(*position)
    axes.set_title(title, fontsize=11, loc="left")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    return axes


def _memory(summary: Summary):
    models, budget = _compared_models(summary), summary["budget"]
    figure = _figure(8, 1.5 + 0.65 * len(models))
    workload = budget["workload"]
    title = f"Memory to serve {sequences_text(workload)}"
    axes = _axes(figure, title=title, x="memory (GiB)", y="")
    names = list(models)
    left = [0.0] * len(names)
    for part, (label, colour) in PARTS.items():
        sizes = [to_gib(models[name]["memory_bytes"][part]) for name in names]
        if any(sizes):
            axes.barh(names, sizes, left=left, color=colour, label=label, height=0.6)
            left = [start + size for start, size in zip(left, sizes, strict=True)]
    limit = to_gib(budget["bytes"])
    axes.axvline(limit, color=RED, linestyle="--", linewidth=2, label=f"budget: {budget['name']}, {format_gib(budget['bytes'])}")
    widest = max(*left, limit)
    for row, name in enumerate(names):
        # Beside the bar, but never on the budget's line.
        near = left[row] <= limit < left[row] + 0.02 * widest
        axes.text((limit if near else left[row]) + 0.01 * widest, row, format_gib(models[name]["memory_bytes"]["total"]), va="center", fontsize=9)
    axes.set_xlim(0, widest * 1.18)
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    handles, labels = axes.get_legend_handles_labels()
    order = sorted(range(len(labels)), key=lambda entry: labels[entry].startswith("budget"))
    figure.legend([handles[entry] for entry in order], [labels[entry] for entry in order], loc="outside lower center", ncols=3, fontsize=9, frameon=False)
    return figure


def _layer_importance(summary: Summary):
    importance = summary["importance"]
    scores = {layer: score for layer, score in enumerate(importance.get("first_round_scores", [])) if score is not None and score > 0}
    if not scores:
        return None
    from matplotlib.patches import Patch
    from matplotlib.ticker import MaxNLocator

    pattern, removed = importance["pattern"], set(removed_layers(summary))
    figure = _figure(8, 3.4)
    criterion = importance["criterion"].removeprefix("iterative_")
    scale = "mean squared change\n(logits²)" if criterion == "mse" and not importance["normalised"] else CRITERIA[criterion]
    axes = _axes(figure, title="What leaving out one layer does", x="layer (0 is next to the input)", y=scale)
    for layer, score in scores.items():
        gone = layer in removed
        colour = KINDS[pattern[layer]][1]
        axes.bar(layer, score, width=0.8, color="white" if gone else colour, edgecolor=colour, hatch="////" if gone else None, linewidth=1.0)
    axes.set_yscale("log")
    axes.set_ylim(min(scores.values()) / 2, max(scores.values()) * 2)
    axes.set_xlim(-0.8, len(pattern) - 0.2)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=16, integer=True))
    axes.grid(axis="y", alpha=0.3)
    keys = [Patch(color=colour, label=label) for letter, (label, colour) in KINDS.items() if letter in pattern]
    if removed:
        keys.append(Patch(facecolor="white", edgecolor=GREY, hatch="////", label="removed"))
    figure.legend(handles=keys, loc="outside lower center", ncols=len(keys), fontsize=9, frameon=False)
    return figure


def _width_importance(summary: Summary):
    curves = {axis: layers for axis, layers in summary["importance"].get("width_curves", {}).items() if axis in AXES}
    if not curves:
        return None
    import matplotlib

    figure, viridis = _figure(8, 2.9), matplotlib.colormaps["viridis"]
    depth = len(summary["importance"]["pattern"])
    for position, axis in enumerate([axis for axis in AXES if axis in curves], start=1):
        axes = _axes(figure, 1, len(curves), position, title=AXES[axis], x="rank (share of units)", y="score (share of the highest)" if position == 1 else "")
        for layer, curve in curves[axis].items():
            axes.plot([rank / (len(curve) - 1) for rank in range(len(curve))], curve, color=viridis(0.92 * int(layer) / depth), linewidth=1.0)
        axes.set_ylim(0, 1.02)
        axes.grid(alpha=0.3)
    scale = matplotlib.cm.ScalarMappable(matplotlib.colors.Normalize(0, depth), matplotlib.colors.ListedColormap(viridis([0.92 * k / 255 for k in range(256)])))
    figure.colorbar(scale, ax=figure.axes, label="layer", shrink=0.8)
    return figure


def _candidates(summary: Summary):
    measured = [candidate for candidate in summary["candidates"] if candidate["zero_shot_loss"] is not None and math.isfinite(candidate["zero_shot_loss"])]
    if not measured:
        return None
    import matplotlib

    figure, budget = _figure(8, 3.6), summary["budget"]
    axes = _axes(figure, title="Shortlisted architectures, cut but not distilled", x="memory (GiB)", y="zero-shot loss (nats/token)")
    depths = sorted({len(candidate["kept_layers"]) for candidate in measured})
    viridis = matplotlib.colormaps["viridis"]
    for rank, depth in enumerate(depths):
        points = [candidate for candidate in measured if len(candidate["kept_layers"]) == depth]
        colour = viridis(0.92 * rank / max(1, len(depths) - 1))
        _scatter(axes, points, s=60, color=colour, edgecolor=GREY, linewidth=0.5, label=f"{depth} layers")
    _scatter(axes, [candidate for candidate in measured if candidate["chosen"]], s=230, facecolor="none", edgecolor="black", linewidth=1.6, label="chosen")
    axes.axvline(to_gib(budget["bytes"]), color=RED, linestyle="--", linewidth=2, label=f"budget,\n{format_gib(budget['bytes'])}")
    axes.margins(0.08)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right center", fontsize=9, frameon=False, labelspacing=0.8)
    return figure


def _scatter(axes, candidates: list[Mapping[str, Any]], **style: Any) -> None:
    memory = [to_gib(candidate["memory_bytes"]["total"]) for candidate in candidates]
    axes.scatter(memory, [candidate["zero_shot_loss"] for candidate in candidates], **style)


def _distillation(summary: Summary):
    curve = summary["curves"].get("distillation")
    losses = {name: model["evaluation"]["loss_nats_per_token"] for name, model in summary["models"].items() if model["evaluation"]}
    if not curve or not curve["tokens"]:
        return None
    figure = _figure(8, 3.2)
    first = (1, 2, 1) if losses else (1, 1, 1)
    _draw_curve(_axes(figure, *first, title="Distillation", x="tokens trained on", y="KL to the teacher (nats/token)"), curve, "kl_nats_per_token", log=True)
    if losses:
        axes = _axes(figure, 1, 2, 2, title="Held-out loss, lower is better", x="", y="loss (nats/token)")
        bars = axes.bar(list(losses), list(losses.values()), color=[MODELS[name] for name in losses], width=0.6)
        axes.bar_label(bars, fmt="%.3f", fontsize=9, padding=2)
        axes.set_ylim(0, 1.15 * max(losses.values()))
        axes.grid(axis="y", alpha=0.3)
    return figure


def _teacher_training(summary: Summary):
    curve = summary["curves"].get("teacher")
    if not curve or not curve["tokens"]:
        return None
    figure = _figure(8, 2.6)
    axes = _axes(figure, title="Training of the teacher", x="tokens trained on", y="loss (nats/token)")
    _draw_curve(axes, curve, "loss_nats_per_token", log=False)
    return figure


def _draw_curve(axes, curve: Mapping[str, list], value: str, *, log: bool) -> None:
    from matplotlib.ticker import EngFormatter

    axes.plot(curve["tokens"], curve[value], color=MODELS["teacher"], linewidth=1.5, marker="." if len(curve["tokens"]) < 40 else None)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    if log:
        axes.set_yscale("log", nonpositive="mask")
    axes.grid(alpha=0.3)


PLOTS: Mapping[str, Callable[[Summary], Any]] = {
    "memory.png": _memory,
    "layer_importance.png": _layer_importance,
    "width_importance.png": _width_importance,
    "candidates.png": _candidates,
    "distillation.png": _distillation,
    "teacher_training.png": _teacher_training,
}
