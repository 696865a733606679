"""The curve of memory against context as a PNG. matplotlib is imported when it is drawn, not before."""

import os
from pathlib import Path

from memory_budget.command.answer import Answer
from memory_budget.command.questions import as_text, curve
from memory_budget.units import GIB

PARTS = {"weights": ("weights", "#0072B2"), "kv_cache": ("KV cache", "#E69F00"), "ssm_state": ("SSM state", "#009E73"),
         "conv_state": ("convolution state", "#CC79A7"), "activations": ("activations", "#56B4E9"),
         "lora": ("LoRA slots", "#D55E00"), "draft": ("draft model", "#F0E442"), "mtp": ("token prediction", "#999999")}  # fmt: skip


def write_plot(answer: Answer, path: str) -> str:
    """Draws into the file, as text where it ends in .txt or there is no matplotlib; gives a line that says what was written where.

    Raises ValueError where the file's name ends otherwise, or it cannot be written.
    """
    file = Path(path)
    if file.suffix not in (".png", ".txt"):
        raise ValueError(f"--plot ({path[:80]}) must end in .png or .txt")
    try:
        if file.suffix == ".txt":
            file.write_text(as_text(answer) + "\n", encoding="utf-8")
            return f"memory against context is written in {path}"
        return _draw(answer, file)
    except OSError as error:
        raise ValueError(f"--plot ({path[:80]}) cannot be written: {error.strerror}") from None


def _draw(answer: Answer, file: Path) -> str:
    points = curve(answer)
    try:
        os.environ.setdefault("MPLBACKEND", "Agg")
        from matplotlib.figure import Figure
        from matplotlib.ticker import FuncFormatter
    except ImportError:
        return f"matplotlib is not installed, so {file} is not drawn; memory against context as text:\n{as_text(answer)}"
    contexts = [context for context, _ in points]
    shown = [name for name in PARTS if any(parts.get(name) for _, parts in points)]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    axes.stackplot(contexts, [[parts[name] / GIB for _, parts in points] for name in shown], labels=[PARTS[name][0] for name in shown],
                   colors=[PARTS[name][1] for name in shown])  # fmt: skip
    axes.axhline(answer.budget.bytes / GIB, color="black", linestyle="--", linewidth=1, label=f"budget {answer.budget.name}")
    if answer.model.positions:
        axes.axvline(answer.model.positions, color="grey", linestyle=":", linewidth=1, label="the config's positions")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{int(value):,}"))
    axes.tick_params(axis="x", rotation=30)
    axes.set(xlabel=f"context (tokens), {answer.workload.batch:,} at once", ylabel="memory (GiB)", xlim=(contexts[0], contexts[-1]), ylim=(0, None))
    weights, cache = (answer.workload.weights_dtype, answer.workload.kv_dtype) if answer.gguf is None else (answer.gguf.quant, answer.gguf.kv)
    axes.set_title(f"{answer.model.model_type}, weights {weights}, cache {cache}")
    axes.legend(loc="upper left")
    figure.savefig(file, dpi=120)
    return f"memory against context is drawn in {file}"
