"""The plots of the search: candidates by memory, by speed, and the depths of a first lap."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from memory_budget.units import format_gib, to_gib
from minitron.report.plot_style import GREY, RED, draw_curve, new_axes, new_figure, viridis, viridis_map
from minitron.report.summary import best_first, highest_rung

Summary = Mapping[str, Any]
Candidate = Mapping[str, Any]

MEASURED = {"short_distill_loss": "after a short distillation", "zero_shot_loss": "zero-shot, as cut"}
CORNERS = ((-14, -10), (14, -10), (14, 10), (-14, 10))  # where the number of a candidate may stand, in points from its marker
RING = {"s": 300, "facecolor": "none", "edgecolor": "black", "linewidth": 1.6}


def candidates(summary: Summary):
    """Memory against loss, hollow as cut and filled after the short distillation; by depth, or by width where all are equally deep."""
    shown = _numbered(summary["candidates"])
    if not shown:
        return None
    figure, budget = new_figure(8, 4.2), summary["budget"]
    done = "cut, some distilled briefly" if highest_rung(summary["candidates"]) == "short_distill_loss" else "cut but not distilled"
    axes = new_axes(figure, title=_of_lap(summary, f"shortlisted architectures, {done}"), x="memory (GiB)", y="held-out loss (nats/token)")
    for label, colour, group in _coloured(shown):
        axes.scatter([], [], s=60, color=colour, label=label)
        for _, candidate in group:
            _draw_rungs(axes, to_gib(candidate["memory_bytes"]["total"]), candidate, colour)
    _label_rungs(axes, [candidate for _, candidate in shown])
    axes.axvline(to_gib(budget["bytes"]), color=RED, linestyle="--", linewidth=2, label=f"budget,\n{format_gib(budget['bytes'])}")
    _number_all(axes, [(number, to_gib(one["memory_bytes"]["total"]), _measured_losses(one)) for number, one in shown])
    _finish(figure, axes)
    return figure


def depths(summary: Summary):
    """The first of two laps: each depth's loss, and the distillation of the one chosen."""
    shown = _numbered(summary["depth_lap"].get("candidates", []))
    if not shown:
        return None
    from matplotlib.ticker import MaxNLocator

    curve = summary["depth_lap"]["curves"].get("distillation")
    figure = new_figure(8, 3.6)
    place = (1, 2, 1) if curve else (1, 1, 1)
    axes = new_axes(figure, *place, title="First lap: which depth", x="layers", y="held-out loss (nats/token)")
    for _, candidate in shown:
        _draw_rungs(axes, len(candidate["kept_layers"]), candidate, viridis(0.4))
    _label_rungs(axes, [candidate for _, candidate in shown])
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    _finish(figure, axes, place="outside lower center")
    if curve:
        right = new_axes(figure, 1, 2, 2, title="First lap: distillation of the depth chosen", x="tokens trained on", y="KL to the teacher (nats/token)")
        draw_curve(right, curve, "kl_nats_per_token", log=True)
    return figure


def pareto(summary: Summary):
    """Modelled speed against the loss that decided, memory as colour; the front of all three marked, that of the two drawn joined."""
    rung = highest_rung(summary["candidates"])
    shown = [pair for pair in _numbered(summary["candidates"]) if pair[1][rung] is not None and pair[1]["modelled_tokens_per_second"]]
    if not shown:
        return None
    import matplotlib

    figure, load = new_figure(8, 4.2), summary["throughput"]
    x = f"modelled speed on {load['device']} (tokens/s)"
    axes = new_axes(figure, title=_of_lap(summary, "loss against speed; better is lower and further right"), x=x, y=f"loss {MEASURED[rung]}\n(nats/token)")
    memory = [to_gib(candidate["memory_bytes"]["total"]) for _, candidate in shown]
    scale = matplotlib.colors.Normalize(min(memory), max(memory))
    for (_, candidate), gib in zip(shown, memory, strict=True):
        front, colour = candidate["on_pareto_front"], viridis(scale(gib))
        point = (candidate["modelled_tokens_per_second"], candidate[rung])
        axes.scatter(*point, s=90, marker="D" if front else "o", color=colour, edgecolor="black" if front else "none", linewidth=1.2, zorder=3)
        _ring(axes, *point, candidate)
    _number_all(axes, [(number, one["modelled_tokens_per_second"], [one[rung]]) for number, one in shown])
    steps = non_dominated([(candidate["modelled_tokens_per_second"], candidate[rung]) for _, candidate in shown])
    axes.plot(*zip(*steps, strict=True), color=GREY, linewidth=1, linestyle=":", zorder=2)
    figure.colorbar(matplotlib.cm.ScalarMappable(scale, viridis_map()), ax=axes, label="memory (GiB)")
    axes.xaxis.set_major_formatter(lambda speed, _: f"{speed:,.10g}")
    axes.scatter([], [], s=90, marker="D", color="white", edgecolor="black", linewidth=1.2, label="on the Pareto front of loss, memory and speed")
    if not all(candidate["on_pareto_front"] for _, candidate in shown):
        axes.scatter([], [], s=90, color=GREY, label="not on it")
    axes.plot([], [], color=GREY, linewidth=1, linestyle=":", label="front of loss and speed alone")
    _finish(figure, axes, place="outside lower center")
    return figure


def non_dominated(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Of (speed, loss) those that no other beats in one and equals in the other, fastest first."""
    kept: list[tuple[float, float]] = []
    for speed, loss in sorted(set(points), key=lambda point: (-point[0], point[1])):
        if not kept or loss < kept[-1][1]:
            kept.append((speed, loss))
    return kept


def _of_lap(summary: Summary, title: str) -> str:
    return f"Second lap: {title}" if summary["depth_lap"] else title[:1].upper() + title[1:]


def _numbered(shortlist: Sequence[Candidate]) -> list[tuple[int, Candidate]]:
    """Every candidate with a loss, and its number in the report's table."""
    pairs = list(enumerate(best_first(shortlist), start=1))
    return [(number, one) for number, one in pairs if one["zero_shot_loss"] is not None or one["short_distill_loss"] is not None]


def _coloured(shown: Sequence[tuple[int, Candidate]]) -> list[tuple[str, Any, list[tuple[int, Candidate]]]]:
    """Groups of one colour: label, colour, members."""

    def depth(candidate: Candidate) -> int:
        return len(candidate["kept_layers"])

    def hidden(candidate: Candidate) -> int:
        return candidate["architecture"]["hidden"]

    value, name = (depth, "{} layers") if len({depth(candidate) for _, candidate in shown}) > 1 else (hidden, "hidden {}")
    values = sorted({value(candidate) for _, candidate in shown})
    shares = [rank / max(1, len(values) - 1) for rank in range(len(values))]
    return [(name.format(f"{one:,}"), viridis(share), [pair for pair in shown if value(pair[1]) == one]) for one, share in zip(values, shares, strict=True)]


def _measured_losses(candidate: Candidate) -> list[float]:
    """A candidate's losses, the one that decided first."""
    return [candidate[rung] for rung in MEASURED if candidate[rung] is not None]


def _draw_rungs(axes, x: float, candidate: Candidate, colour: Any) -> None:
    """A candidate's losses: hollow as cut, filled after the short distillation, a thin line between them; the chosen one ringed."""
    losses = _measured_losses(candidate)
    axes.plot([x] * len(losses), losses, color=colour, linewidth=1.2, zorder=2)
    if candidate["zero_shot_loss"] is not None:
        axes.scatter(x, candidate["zero_shot_loss"], s=60, facecolor="white", edgecolor=colour, linewidth=1.6, zorder=3)
    if candidate["short_distill_loss"] is not None:
        axes.scatter(x, candidate["short_distill_loss"], s=60, color=colour, zorder=3)
    _ring(axes, x, losses[0], candidate)


def _ring(axes, x: float, y: float, candidate: Candidate) -> None:
    if candidate["chosen"]:
        axes.scatter(x, y, zorder=4, **RING)


def _number_all(axes, numbered: Sequence[tuple[int, float, Sequence[float]]]) -> None:
    """The number of each candidate (number, x, its losses) beside its first marker, in the corner that is farthest from all markers and earlier numbers."""
    axes.margins(0.1)  # as _finish has it: places are compared as they will be drawn
    axes.get_xlim(), axes.get_ylim()  # which has matplotlib work them out
    taken = [tuple(axes.transData.transform((x, y))) for _, x, losses in numbered for y in losses]
    reach = axes.figure.dpi / 72  # pixels of a point
    for number, x, losses in numbered:
        across, up = axes.transData.transform((x, losses[0]))

        def place(corner: tuple[int, int], across=across, up=up) -> tuple[float, float]:
            return across + reach * corner[0], up + reach * corner[1]

        best = max(CORNERS, key=lambda corner, place=place: min(math.dist(place(corner), other) for other in taken))
        taken.append(place(best))
        looks = {"textcoords": "offset points", "ha": "center", "va": "center", "fontsize": 9, "color": GREY, "zorder": 5}
        axes.annotate(str(number), (x, losses[0]), xytext=best, **looks)


def _label_rungs(axes, shown: Sequence[Candidate]) -> None:
    """The legend's rows for the markers, whatever their colour."""
    if any(candidate["zero_shot_loss"] is not None for candidate in shown):
        axes.scatter([], [], s=60, facecolor="white", edgecolor=GREY, linewidth=1.6, label="zero-shot, as cut")
    if any(candidate["short_distill_loss"] is not None for candidate in shown):
        axes.scatter([], [], s=60, color=GREY, label="after a short\ndistillation")
    if any(candidate["chosen"] for candidate in shown):
        axes.scatter([], [], label="chosen", **{**RING, "s": 120})


def _finish(figure, axes, *, place: str = "outside right center") -> None:
    axes.margins(0.1)
    axes.grid(alpha=0.3)
    for axis in (axes.xaxis, axes.yaxis):  # 4.53 and not +4.5 at the axis' end
        if hasattr(axis.get_major_formatter(), "set_useOffset"):
            axis.get_major_formatter().set_useOffset(False)
    figure.legend(loc=place, ncols=3 if "lower" in place else 1, fontsize=9, frameon=False, labelspacing=0.8)
