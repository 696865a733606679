"""Figures, axes and curves as every plot of the report has them.

Colours are Okabe and Ito's, and viridis: both can be told apart by colour-blind readers.
"""

from collections.abc import Mapping

MODELS = {"teacher": "#0072B2", "pruned": "#E69F00", "student": "#009E73"}
RED, GREY = "#B22222", "#555555"


def new_figure(width: float, height: float):
    """An empty figure, sizes in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def new_axes(figure, *position: int, title: str, x: str, y: str):
    """Axes with their title and the quantities, with units, along both sides."""
    axes = figure.add_subplot(*position)
    axes.set_title(title, fontsize=11, loc="left")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    return axes


def viridis(share: float):
    """A colour by a share from 0 to 1; the last, palest yellow is left out."""
    import matplotlib

    return matplotlib.colormaps["viridis"](0.92 * share)


def viridis_map():
    """The same colours for a colour bar."""
    import matplotlib

    return matplotlib.colors.ListedColormap([viridis(step / 255) for step in range(256)])


def draw_curve(axes, curve: Mapping[str, list], value: str, *, log: bool) -> None:
    """A loss or KL by the tokens trained on."""
    from matplotlib.ticker import EngFormatter

    axes.plot(curve["tokens"], curve[value], color=MODELS["teacher"], linewidth=1.5, marker="." if len(curve["tokens"]) < 40 else None)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    if log:
        axes.set_yscale("log", nonpositive="mask")
        _plain_numbers(axes.yaxis)
    axes.grid(alpha=0.3)


def _plain_numbers(axis) -> None:
    """0.06 and not 6 × 10⁻² along a logarithmic axis, at those of its ticks that matplotlib labels."""
    from matplotlib.ticker import LogFormatter

    class Plain(LogFormatter):
        def __call__(self, x, pos=None):
            return f"{x:g}" if super().__call__(x, pos) else ""

    axis.set_major_formatter(Plain())
    axis.set_minor_formatter(Plain())
