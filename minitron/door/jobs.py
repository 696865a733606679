"""The jobs of one multirun, told apart by their runs' names, so that none writes over another's report."""

import hashlib
import re
from collections.abc import Collection, Sequence

MOST_LETTERS = 80  # of what is added to a name


def run_name_of_job(run_name: str, overrides: Sequence[str], left_out: Collection[str]) -> str:
    """The run's name with the values that this job tries, as a folder may be called: tiny-scoring.criterion=mse. `left_out` names other settings."""
    tried = [override for override in overrides if override.lstrip("+~").partition("=")[0] not in left_out]
    if not tried:
        return run_name
    said = "-".join(_said(override) for override in tried)
    if len(said) > MOST_LETTERS:
        said = f"{said[: MOST_LETTERS - 9]}-{hashlib.sha256(said.encode()).hexdigest()[:8]}"
    return f"{run_name}-{said}"


def _said(override: str) -> str:
    """key=value with nothing that a shell or a file system minds; of a group that has a name, like a budget, the name alone."""
    key, _, value = override.partition("=")
    named = re.match(r"\{name:\s*([^,}]+)", value)
    safe = re.sub(r"[^\w.+-]+", "_", named[1] if named else value).strip("_")
    return f"{key.removesuffix('.values')}={safe}"
