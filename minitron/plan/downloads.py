"""What has to be downloaded, as far as this machine's own files say: the network is not asked."""

import os
from pathlib import Path

from minitron.settings.hub import HUB_ID
from minitron.settings.run import Settings


def download_bytes(settings: Settings, weights_bytes: int) -> int:
    """Bytes of a teacher on the Hub, about as many as its weights take, where the Hub's cache on this machine has none of them; 0 for any other teacher."""
    path = settings.teacher.path
    if path is None or Path(path).is_dir() or not HUB_ID.match(path):
        return 0
    kept = hub_cache() / f"models--{path.replace('/', '--')}" / "snapshots"
    return 0 if any(kept.glob("*/*.safetensors")) else weights_bytes


def hub_cache() -> Path:
    """Where huggingface_hub keeps what it downloads: its own variables first."""
    if given := os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE"):
        return Path(given)
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "huggingface"
    return Path(home) / "hub"
