"""How a batch's rows are shared out to processes and micro-batches. Imports no torch, so that settings can be checked early."""


def idle_rows(batch: int, world_size: int) -> int:
    """Places that a batch of single rows leaves empty in its last round through the processes."""
    return -batch % world_size


def check_sharing(batch: int, micro_batch: int | None, world_size: int, *, cached: bool = False) -> None:
    """Raises ValueError where a batch's rows do not fall evenly on processes and micro-batches.

    With micro_batch 1, which long rows want, they need not, unless they are numbers of a cache's rows: the empty places of the last round are
    rows of padding (distill.batches.micro_batches).
    """
    unit = world_size * (micro_batch or 1)
    if batch % unit and (cached or micro_batch != 1):
        nearest = max(1, round(batch / unit)) * unit
        rows = f" × {micro_batch} rows at once (train.micro_batch)" if micro_batch else ""
        raise ValueError(f"train.batch is {batch}; it must be a multiple of {world_size} processes{rows}; nearest: {nearest}")
