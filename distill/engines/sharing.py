"""How a batch's rows are shared out to processes and micro-batches. Imports no torch, so that settings can be checked early."""

from typing import Any


def micro_batches(batch_BT: Any, micro_batch: int | None, rank: int, world_size: int) -> tuple[Any, ...]:
    """One process's rows of a batch, split into what it computes at once; torch tensors both."""
    own = batch_BT.chunk(world_size)[rank]
    return own.split(micro_batch or len(own))


def check_sharing(batch: int, micro_batch: int | None, world_size: int) -> None:
    """Raises ValueError where a batch's rows do not fall evenly on processes and micro-batches."""
    unit = world_size * (micro_batch or 1)
    if batch % unit:
        nearest = max(1, round(batch / unit)) * unit
        rows = f" × {micro_batch} rows at once (train.micro_batch)" if micro_batch else ""
        raise ValueError(f"train.batch is {batch}; it must be a multiple of {world_size} processes{rows}; nearest: {nearest}")
