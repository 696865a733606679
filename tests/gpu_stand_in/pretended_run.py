"""The door on the pretended device: `python pretended_run.py stage=… key=value …` is `python -m minitron.run stage=… key=value …` there.

PRETENDED_COUNTS in the environment names a file that gets, at the end, how often the host waited for the device and where, and the device's peak.
"""

import json
import os
import sys
from pathlib import Path

import torch
from pretended_cuda import ALLOCATOR, SYNCS, TRANSFERS
from pretended_torch import install


def counts() -> dict:
    """Everything counted so far, as JSON has it."""
    tables = {"syncs": SYNCS, "transfers": TRANSFERS}
    lists = {name: [{"what": what, "owner": owner, "place": place, "times": times} for (what, owner, place), times in table.most_common()]
             for name, table in tables.items()}  # fmt: skip
    return lists | {"peak_bytes": ALLOCATOR.peak, "live_bytes": ALLOCATOR.allocated}


def main() -> int:
    torch.set_num_threads(1)
    install()
    import minitron.run

    sys.argv[0] = "run.py"
    try:
        return minitron.run.main()
    finally:
        if path := os.environ.get("PRETENDED_COUNTS"):
            Path(path).write_text(json.dumps(counts()))


if __name__ == "__main__":
    sys.exit(main())
