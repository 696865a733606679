"""The teacher's likeliest tokens at every position of some train rows, once for all who learn from them."""

import math

import numpy as np
import torch

from distill.batches import split_padding
from distill.teacher_cache import TeacherCache, rows_written, write_teacher_cache
from distill.top_k import TopK, top_k_of_hidden
from memory_budget.hf_config import read_config
from memory_budget.units import format_gib
from minitron.checkpoints.files import stored_bytes
from minitron.checkpoints.forward_memory import forward_memory
from minitron.families.known import family_of
from minitron.machine.device import check_on_gpu, pick_device
from minitron.settings.teachers import teacher_architecture
from minitron.text.samples import spread_rows
from minitron.walk.stage import StageContext
from minitron.walk.store import Result

CACHE_FOLDER = "cache"


def cached_rows(context: StageContext, tokens: int) -> np.ndarray:
    """The rows of a cache, [R, T]: train rows, evenly spread, as many as hold `tokens` tokens."""
    data = context.inputs["data"]
    train = np.load(data.folder / "train.npy", mmap_mode="r")
    return np.ascontiguousarray(spread_rows(train, max(1, math.ceil(tokens * len(train) / data.facts["train_tokens"]))))


def open_cache(result: Result, rows_RT: np.ndarray) -> TeacherCache:
    """A finished stage's cache of these rows."""
    return TeacherCache(result.folder / CACHE_FOLDER, rows_RT=rows_RT)


def write_cache(context: StageContext, rows: np.ndarray) -> dict:
    """Writes cache/ of rows [R, T]; returns the stage's facts."""
    settings, device = context.settings, pick_device(context.settings)
    folder = context.inputs["teacher"].model_folder
    models = [(teacher_architecture(settings), stored_bytes(folder))]
    tokens = settings.screen.cache_batch * rows.shape[1]
    check_on_gpu(forward_memory(context.folder.parent.name, models, tokens=tokens, logits_tokens=128, advice="Lower screen.cache_batch"), device)
    teacher = family_of(read_config(folder)).load(folder, device=str(device)).requires_grad_(False)
    head = teacher.get_output_embeddings().weight
    k = min(settings.screen.top_k, len(head))

    @torch.no_grad()
    def top_k_of_rows(rows_BT: torch.Tensor) -> TopK:
        ids_BT, _ = split_padding(rows_BT.to(device))
        return top_k_of_hidden(teacher.base_model(ids_BT, use_cache=False).last_hidden_state, head, k).to("cpu")

    seen = rows_written(context.folder / CACHE_FOLDER)
    if seen:
        context.goes_on(f"row {seen:,} of {len(rows):,}")
    with context.console.track("teacher outputs", len(rows), "rows", done=seen) as advance:

        def on_block(written: int, _total: int) -> None:
            nonlocal seen
            advance(written - seen)
            seen = written

        write_teacher_cache(context.folder / CACHE_FOLDER, rows, teacher=context.inputs["teacher"].identity, vocabulary=len(head), k=k,
                            top_k_of_rows=top_k_of_rows, block_rows=settings.screen.cache_batch, on_block=on_block)  # fmt: skip
    size = (context.folder / CACHE_FOLDER / "codes.bin").stat().st_size
    headline = f"top {k} of {len(head):,} tokens at {rows.size:,} positions, {format_gib(size)}, {size / rows.size:.0f} bytes a position"
    return {"headline": headline, "rows": len(rows), "k": k, "bytes": size}
