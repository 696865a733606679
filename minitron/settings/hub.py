"""The Hugging Face Hub: files of a model through its own cache, what is waited for said while it takes long, and failures in one line."""

import logging
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+$")
SILENT_SECONDS = 2.0
NOT_FETCHED = ["*.bin", "*.pth", "*.pt", "*.pkl", "*.pickle", "*.py", "*.gguf"]  # weights in other forms, pickles, and code, which nothing here reads


def from_hub(path: str, file: str | None, *, revision: str | None) -> Path:
    """One file of the model `path`, or all of it with None. Raises ValueError, naming teacher.path, where there is none."""
    if Path(path).is_file():
        raise ValueError(f"teacher.path is {path!r}, which is a file; its folder is meant{_folder_of(Path(path))}")
    if not HUB_ID.match(path):
        raise ValueError(f"teacher.path is {path!r}: no folder is there, and it is no Hub id of the form owner/name")
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        with said_while_waiting(path):
            if file is not None:
                return Path(hf_hub_download(path, file, revision=revision))
            return Path(snapshot_download(path, revision=revision, ignore_patterns=NOT_FETCHED))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        raise ValueError(f"teacher.path is {path!r}: no folder is there, {_reason(error, revision)}") from None


def _folder_of(file: Path) -> str:
    """For a path that is a file: what would work."""
    if file.suffix == ".gguf":
        return f", or teacher.gguf={file}"
    return f": teacher.path={file.parent}" if (file.parent / "config.json").is_file() else ", one that holds config.json and the weights"


def _reason(error: Exception, revision: str | None) -> str:
    from huggingface_hub import constants, errors

    if isinstance(error, errors.LocalEntryNotFoundError):
        return f"{'HF_HUB_OFFLINE is set' if constants.HF_HUB_OFFLINE else 'the Hub cannot be reached'}, and its cache on this machine does not have it"
    if isinstance(error, errors.GatedRepoError):
        return "and the Hub gives it only to those who accepted its terms there and are logged in (`hf auth login`)"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "and the Hub has no such model, or not for you (`hf auth login`)"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"and the Hub's has no revision {revision!r} (teacher.revision)"
    return f"and the Hub gave nothing ({type(error).__name__}: {str(error).splitlines()[0]})"


@contextmanager
def said_while_waiting(what: str) -> Iterator[None]:
    """Says, once, that the Hub is waited for where it takes seconds; of the library's own lines about it there are none."""
    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)
    timer = threading.Timer(SILENT_SECONDS, lambda: print(f"waiting for the Hub to give {what}", flush=True))
    timer.daemon = True
    if os.environ.get("RANK", "0") == "0":  # of several processes the first speaks
        timer.start()
    try:
        yield
    finally:
        timer.cancel()
