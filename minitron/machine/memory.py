"""Main memory that is free. Loads no torch."""

import os


def available_memory_bytes() -> int:
    """Memory that new work can take without swapping, in bytes."""
    try:
        with open("/proc/meminfo") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):  # no Linux
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def process_share_bytes() -> tuple[int, str]:
    """Main memory that this process may take beside the others of its run on this machine, and what to call the place."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return available_memory_bytes() // processes, "this machine, by what is free now," + (f" for each of {processes} processes" if processes > 1 else "")
