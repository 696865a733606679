"""wandb, and nothing else knows of it. Off by default; offline needs no account."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from minitron.pipeline import StageContext
from minitron.settings import Tracking, key_settings


@contextmanager
def open_tracker(context: StageContext, name: str) -> Iterator[Callable[[dict], None]]:
    """Yields track(values), one call per step; a no-op when tracking is disabled."""
    settings = context.settings
    if settings.tracking is Tracking.disabled:
        yield lambda values: None
        return
    import wandb

    run = wandb.init(
        project="minitron", group=settings.run_name, name=f"{settings.run_name}: {name}", config=key_settings(settings),
        mode=settings.tracking.value, dir=settings.runs_folder,
    )  # fmt: skip
    try:
        yield run.log
    finally:
        run.finish()
