"""Plots of the evaluation: by position, and the long-context probe."""

from collections.abc import Mapping
from typing import Any

from minitron.report.plot_style import MODELS, new_axes, new_figure

Summary = Mapping[str, Any]


def positions(summary: Summary):
    """Loss, and KL to the teacher, by how many tokens stand before the predicted one."""
    found = _measured(summary, "by_position")
    if not found:
        return None
    figure = new_figure(8, 3.2)
    columns = [("loss_nats_per_token", "Held-out loss by position", "loss (nats/token)"),
               ("kl_to_teacher_nats_per_token", "Distance to the teacher by position", "KL (nats/token)")]  # fmt: skip
    for column, (value, title, unit) in enumerate(columns, start=1):
        axes = new_axes(figure, 1, 2, column, title=title, x="tokens before the predicted one", y=unit)
        for name, buckets in found.items():
            if value.startswith("kl") and name == "teacher":
                continue  # itself
            axes.plot([bucket["from"] for bucket in buckets], [bucket[value] for bucket in buckets], color=MODELS[name], marker="o", markersize=3.5, label=name)
        axes.set_xscale("log", base=2)
        starts = [bucket["from"] for bucket in next(iter(found.values()))]
        axes.set_xticks(starts, [f"{start:,}" for start in starts], fontsize=8)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        if value.startswith("kl"):
            axes.set_ylim(bottom=0)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(found), fontsize=9, frameon=False)
    return figure


def needle(summary: Summary):
    """A table in colours a model: context length along, depth down."""
    found = _measured(summary, "needle")
    if not found:
        return None
    import matplotlib

    probe = next(iter(found.values()))
    depths, lengths = probe["depths"], [at["length"] for at in probe["by_length"]]
    figure = new_figure(8, 1.6 + 0.35 * len(depths))
    colours = matplotlib.colormaps["viridis"]
    for column, (name, one) in enumerate(found.items(), start=1):
        axes = new_axes(figure, 1, len(found), column, title=name, x="context (tokens)", y="depth of the fact" if column == 1 else "")
        shares = [[100 * at["by_depth"][row] for at in one["by_length"]] for row in range(len(depths))]
        picture = axes.imshow(shares, vmin=0, vmax=100, cmap=colours, aspect="auto")
        for row, line in enumerate(shares):
            for place, share in enumerate(line):
                axes.text(place, row, f"{share:.0f}", ha="center", va="center", fontsize=8, color="white" if share < 60 else "black")
        axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths], fontsize=8)
        axes.set_yticks(range(len(depths)), [f"{100 * depth:.0f} %" for depth in depths] if column == 1 else [""] * len(depths), fontsize=8)
    figure.colorbar(picture, ax=figure.axes, label=f"found (%; chance {100 * probe['chance']:.3g})", shrink=0.9)
    return figure


def _measured(summary: Summary, name: str) -> dict[str, Any]:
    """What every model has under `name`, where there is something."""
    return {model: facts["evaluation"][name] for model, facts in summary["models"].items() if facts["evaluation"] and facts["evaluation"].get(name)}
