"""The plot of the data: how long documents are."""

from collections.abc import Mapping
from typing import Any

from minitron.report.plot_style import RED, new_axes, new_figure

Summary = Mapping[str, Any]

SPLITS = {"train": ("train", "#0072B2"), "heldout": ("held out", "#E69F00")}
MOST_LABELS = 11  # that fit side by side


def lengths(summary: Summary):
    """The share of documents between one power of two and the next, of both splits side by side, and a row's length."""
    card = summary["data"]
    counts = {name: {int(length).bit_length() - 1: number for length, number in split["lengths"].items()} for name, split in card.get("splits", {}).items()}
    powers = sorted({power for split in counts.values() for power in split})
    if not powers:
        return None
    import math

    figure = new_figure(8, 3.2)
    axes = new_axes(figure, title="How long documents are", x="length (tokens, in steps of powers of two)", y="documents (% of the split)")
    width = 0.42
    for place, (name, (label, colour)) in enumerate((name, shown) for name, shown in SPLITS.items() if counts.get(name)):
        total = sum(counts[name].values())
        shares = [100 * counts[name].get(power, 0) / total for power in powers]
        key = f"{label}: {total:,} document{'' if total == 1 else 's'}"
        axes.bar([power - 1 + 0.08 + width * place for power in powers], shares, width=width, align="edge", color=colour, label=key)
    row = math.log2(card["sequence_length"])
    axes.axvline(row, color=RED, linestyle="--", linewidth=2, label=f"a row: {card['sequence_length']:,} tokens")
    first, last = min(powers[0] - 1, math.floor(row)), max(powers[-1], math.ceil(row))
    step = -(-(last - first + 1) // MOST_LABELS)
    edges = range(first, last + 1, step)
    axes.set_xticks(edges, [f"{2**edge:,}" for edge in edges])
    axes.set_xticks(range(first, last + 1), minor=True)
    axes.set_xlim(first - 0.15, last + 0.15)
    axes.grid(axis="y", alpha=0.3)
    handles, labels = axes.get_legend_handles_labels()
    order = sorted(range(len(labels)), key=lambda entry: labels[entry].startswith("a row"))
    figure.legend([handles[entry] for entry in order], [labels[entry] for entry in order], loc="outside lower center", ncols=3, fontsize=9, frameon=False)
    return figure
