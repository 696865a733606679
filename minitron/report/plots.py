"""The report's plots, drawn from summary.json alone. matplotlib is imported when one is drawn, not before."""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from memory_budget.architecture import BLOCK, MAMBA_BLOCK, MAMBA_MOE_BLOCK, MOE_BLOCK, WINDOWED_BLOCK, WINDOWED_MOE_BLOCK
from memory_budget.units import format_gib, to_gib
from minitron.report import plot_style, plots_data, plots_evaluation, plots_search
from minitron.report.plot_style import GREY, MODELS, RED, draw_curve, new_axes, new_figure, viridis, viridis_map
from minitron.report.plots_search import candidates, depths, pareto
from minitron.report.summary import KIND_NAMES, REASONERS, chosen_candidate, kinds_of, removed_layers, sequences_text

Summary = Mapping[str, Any]

PARTS = {
    "weights": ("weights", "#0072B2"),
    "kv_cache": ("KV cache", "#E69F00"),
    "ssm_state": ("SSM state", "#009E73"),
    "conv_state": ("convolution state", "#CC79A7"),
    "activations": ("activations", "#56B4E9"),
}
KIND_COLOURS = {"M": "#0072B2", "*": "#D55E00", "-": "#009E73", "E": "#CC79A7", BLOCK: "#56B4E9", WINDOWED_BLOCK: "#E69F00", MOE_BLOCK: "#CC79A7",
                WINDOWED_MOE_BLOCK: "#882255", MAMBA_BLOCK: "#009E73", MAMBA_MOE_BLOCK: "#009E73"}  # fmt: skip
AXES = {"hidden": "hidden channels", "ffn": "FFN neurons", "mamba_head": "Mamba-2 heads", "attention_head": "attention heads",
        "expert": "routed experts", "expert_ffn": "experts' neurons", "shared_ffn": "shared neurons"}  # fmt: skip
CRITERIA = {
    "mse": "squared change of the logits\nover their square (ratio)",
    "kl": "KL from the full model\n(nats/token)",
    "loss": "loss without it\n(nats/token)",
    "block_influence": "1 − cosine of the residual\nbefore and after (ratio)",
}
BUDGET_CURVES = {"teacher": (MODELS["teacher"], "o"), "student": (MODELS["student"], "s"), "student_whole": ("#CC79A7", "^")}
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
    """Changes with what is plotted and with how: the text of the drawing modules goes in."""
    plotted = [summary[name] for name in ("budget", "throughput", "base", "models", "candidates", "removed_layers", "importance", "curves", "reasoning")]
    plotted += [summary["depth_lap"].get(name) for name in ("candidates", "curves")]
    plotted += [summary["data"].get("sequence_length"), {name: split["lengths"] for name, split in summary["data"].get("splits", {}).items()}]
    modules = (plot_style, plots_data, plots_search, plots_evaluation)
    drawing = b"".join(Path(file).read_bytes() for file in (__file__, *(module.__file__ for module in modules)))
    return hashlib.sha256(drawing + json.dumps(plotted).encode()).hexdigest()


def _compared_models(summary: Summary) -> dict[str, Mapping[str, Any]]:
    """What memory is compared between, by a name to show: the teacher and the student, or what there is of one."""
    models = summary["models"]
    shown = {"teacher": models["teacher"]}
    for name in ("student", "pruned"):
        if name in models:
            return {**shown, name: models[name]}
    chosen = chosen_candidate(summary)
    return {**shown, f"chosen\n{chosen['id']}": chosen} if chosen else shown


def _memory(summary: Summary):
    models, budget = _compared_models(summary), summary["budget"]
    figure = new_figure(8, 1.5 + 0.65 * len(models))
    workload = budget["workload"]
    title = f"Memory to serve {sequences_text(workload)}"
    axes = new_axes(figure, title=title, x="memory (GiB)", y="")
    names = list(models)
    left = [0.0] * len(names)
    for part, (label, colour) in PARTS.items():
        sizes = [to_gib(models[name]["memory_bytes"][part]) for name in names]
        if any(sizes):
            axes.barh(names, sizes, left=left, color=colour, label=label, height=0.6)
            left = [start + size for start, size in zip(left, sizes, strict=True)]
    limit = to_gib(budget["bytes"])
    named = "" if budget["name"].endswith(" GiB") else f"{budget['name']}, "
    axes.axvline(limit, color=RED, linestyle="--", linewidth=2, label=f"budget: {named}{format_gib(budget['bytes'])}")
    widest = max(*left, limit)
    for row, name in enumerate(names):
        # Beside the bar, but never on the budget's line.
        near = left[row] <= limit < left[row] + 0.16 * widest  # a label is about as long
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

    kinds, removed = kinds_of(summary, importance["pattern"]), set(removed_layers(summary))
    figure = new_figure(8, 3.4)
    criterion = importance["criterion"].removeprefix("iterative_")
    scale = "mean squared change\n(logits²)" if criterion == "mse" and not importance["normalised"] else CRITERIA[criterion]
    axes = new_axes(figure, title="What leaving out one layer does", x="layer (0 is next to the input)", y=scale)
    for layer, score in scores.items():
        gone = layer in removed
        colour = KIND_COLOURS[kinds[layer]]
        axes.bar(layer, score, width=0.8, color="white" if gone else colour, edgecolor=colour, hatch="////" if gone else None, linewidth=1.0)
    axes.set_yscale("log")
    axes.set_ylim(min(scores.values()) / 2, max(scores.values()) * 2)
    axes.set_xlim(-0.8, len(kinds) - 0.2)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=16, integer=True))
    axes.grid(axis="y", alpha=0.3)
    keys = [Patch(color=colour, label=KIND_NAMES[kind]) for kind, colour in KIND_COLOURS.items() if kind in kinds]
    if removed:
        keys.append(Patch(facecolor="white", edgecolor=GREY, hatch="////", label="removed"))
    figure.legend(handles=keys, loc="outside lower center", ncols=len(keys), fontsize=9, frameon=False)
    return figure


def _width_importance(summary: Summary):
    curves = {axis: layers for axis, layers in summary["importance"].get("width_curves", {}).items() if axis in AXES}
    if not curves:
        return None
    import matplotlib

    rows = -(-len(curves) // 4)
    columns = -(-len(curves) // rows)
    figure = new_figure(8, 2.9 * rows)
    pattern = summary["importance"]["pattern"]
    depth = len(kinds_of(summary, pattern))
    per_layer = len(pattern) // depth
    for position, axis in enumerate([axis for axis in AXES if axis in curves], start=1):
        y = "score (share of the highest)" if (position - 1) % columns == 0 else ""
        axes = new_axes(figure, rows, columns, position, title=AXES[axis], x="rank (share of units)", y=y)
        for sublayer, curve in curves[axis].items():
            axes.plot([rank / (len(curve) - 1) for rank in range(len(curve))], curve, color=viridis(int(sublayer) // per_layer / depth), linewidth=1.0)
        axes.set_ylim(0, 1.02)
        axes.grid(alpha=0.3)
    scale = matplotlib.cm.ScalarMappable(matplotlib.colors.Normalize(0, depth), viridis_map())
    figure.colorbar(scale, ax=figure.axes, label="layer", shrink=0.8)
    return figure


def _experts(summary: Summary):
    """Where tokens went, expert by expert, and how fast scores fall from a layer's best expert on."""
    layers = summary["importance"].get("experts")
    if not layers:
        return None
    from matplotlib.colors import LogNorm, Normalize
    from matplotlib.ticker import MaxNLocator

    figure, number = new_figure(8, 2.2 + 0.13 * max(8, len(layers))), len(next(iter(layers.values()))["tokens"])
    times = [[tokens * number / sum(one["tokens"]) if tokens else float("nan") for tokens in one["tokens"]] for one in layers.values()]
    scores = [[score / max(*one["reap"], 1e-300) for score in sorted(one["reap"], reverse=True)] for one in layers.values()]
    colours = viridis_map().with_extremes(bad=RED)
    none, kept = any(0 in one["tokens"] for one in layers.values()), _kept_experts(summary)
    panels = ((times, LogNorm(1 / 8, 8), "Tokens sent to each expert" + " (red: none)" * none, "expert", "times an even share"),
              (scores, Normalize(0, 1), "Scores, best expert first" + f"; {kept} stay" * (kept < number), "rank", "share of the layer's best"))  # fmt: skip
    for position, (values, norm, title, x, label) in enumerate(panels, start=1):
        axes = new_axes(figure, 1, 2, position, title=title, x=x, y="layer" if position == 1 else "")
        drawn = axes.imshow(values, norm=norm, cmap=colours, aspect="auto", interpolation="nearest", extent=(-0.5, number - 0.5, len(layers) - 0.5, -0.5))
        step = -(-len(layers) // 12)
        axes.set_yticks(range(0, len(layers), step), list(layers)[::step])
        axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
        bar = figure.colorbar(drawn, ax=axes, label=label, orientation="horizontal", shrink=0.9, aspect=30)
        if position == 1:
            bar.set_ticks([1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8], labels=["⅛", "¼", "½", "1", "2", "4", "8"])
            bar.minorticks_off()
    if kept < number:
        axes.axvline(kept - 0.5, color=RED, linestyle="--", linewidth=2)
    return figure


def _kept_experts(summary: Summary) -> int:
    """Experts that each layer keeps; before there is a student those that the chosen candidate will, before the choice all."""
    models = summary["models"]
    shown = next((models[name] for name in ("student", "pruned") if name in models), chosen_candidate(summary) or models["teacher"])
    return shown["architecture"]["moe_num_experts"]


def _distillation(summary: Summary):
    curve = summary["curves"].get("distillation")
    losses = {name: model["evaluation"]["loss_nats_per_token"] for name, model in summary["models"].items() if model["evaluation"]}
    if not curve or not curve["tokens"]:
        return None
    figure = new_figure(8, 3.2)
    first = (1, 2, 1) if losses else (1, 1, 1)
    draw_curve(new_axes(figure, *first, title="Distillation", x="tokens trained on", y="KL to the teacher (nats/token)"), curve, "kl_nats_per_token", log=True)
    if losses:
        axes = new_axes(figure, 1, 2, 2, title="Held-out loss, lower is better", x="", y="loss (nats/token)")
        bars = axes.bar(list(losses), list(losses.values()), color=[MODELS[name] for name in losses], width=0.6)
        axes.bar_label(bars, fmt="%.3f", fontsize=9, padding=2)
        axes.set_ylim(0, 1.15 * max(losses.values()))
        axes.grid(axis="y", alpha=0.3)
    return figure


def _teacher_training(summary: Summary):
    curve = summary["curves"].get("teacher")
    if not curve or not curve["tokens"]:
        return None
    figure = new_figure(8, 2.6)
    axes = new_axes(figure, title="Training of the teacher", x="tokens trained on", y="loss (nats/token)")
    draw_curve(axes, curve, "loss_nats_per_token", log=False)
    return figure


def _thinking_budget(summary: Summary):
    curves = summary["reasoning"].get("curves")
    if not curves:
        return None
    figure = new_figure(8, 3.6)
    title = f"{summary['reasoning']['problems']} held-out problems, greedy; bars are the standard error"
    axes = new_axes(figure, title=title, x="thinking budget (tokens of reasoning)", y="right answers (%)")
    budgets = [point["budget"] for point in curves["teacher"]]
    for name, (colour, marker) in BUDGET_CURVES.items():
        accuracies, errors = ([100 * point[value] for point in curves[name]] for value in ("accuracy", "standard_error"))
        axes.errorbar(range(len(budgets)), accuracies, yerr=errors, label=REASONERS[name], color=colour, marker=marker, linewidth=1.5, capsize=3)
    axes.set_xticks(range(len(budgets)), budgets)  # evenly: the small ones are where something happens
    axes.set_ylim(0, 102)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=len(BUDGET_CURVES), fontsize=9, frameon=False)
    return figure


PLOTS: Mapping[str, Callable[[Summary], Any]] = {
    "memory.png": _memory,
    "lengths.png": plots_data.lengths,
    "layer_importance.png": _layer_importance,
    "width_importance.png": _width_importance,
    "experts.png": _experts,
    "depth_lap.png": depths,
    "candidates.png": candidates,
    "pareto.png": pareto,
    "distillation.png": _distillation,
    "positions.png": plots_evaluation.positions,
    "needle.png": plots_evaluation.needle,
    "teacher_training.png": _teacher_training,
    "thinking_budget.png": _thinking_budget,
}
