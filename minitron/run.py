"""The door: `python -m minitron.run stage=prune key=value …`, and what must be settled before anything else is imported.

Exit codes: 0 done · 2 the user's mistake, one line on stderr · 1 anything else that failed · 130 interrupted.
"""

import os
import sys

# Said before what an older Python cannot read is imported; this file itself it can.
if sys.version_info < (3, 11):  # noqa: UP036
    sys.stderr.write("error: Python is %d.%d; minitron needs 3.11 or later\n" % sys.version_info[:2])  # noqa: UP031
    sys.exit(2)

# One line and exit code 2 instead of Hydra's own several lines and 1; set by the user, it gives full traces as always (of the processes of a sweep too).
os.environ.setdefault("MINITRON_FULL_ERROR", os.environ.get("HYDRA_FULL_ERROR", ""))
os.environ["HYDRA_FULL_ERROR"] = "1"

# What matters of its warnings (the slow reference kernels) is dealt with in families/ssd.py.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

# Threads of OpenMP that wait for each other spin for milliseconds: on a machine that has other work too, in place of who they wait for. A spin of
# about 0.1 ms costs a step 6 to 9 % where nothing else runs (benchmarks/README.md). Read when torch is loaded.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

# Read when torch and Triton are loaded, and by GPUs alone: buffers of the loss come and go without leaving holes; what autotuning chose stays on disk.
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
os.environ.setdefault("TRITON_CACHE_AUTOTUNING", "1")


def main() -> int:
    """The command; gives the exit code."""
    from minitron.machine import interrupts

    code = 1
    try:
        interrupts.hear()
        code = _command()
    except KeyboardInterrupt:
        code = interrupts.INTERRUPTED
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        raise
    except BaseException:  # some libraries' panics are no Exception
        if not interrupts.heard():
            raise
        code = interrupts.INTERRUPTED
    finally:
        interrupts.nothing_left(code)
    if code == interrupts.INTERRUPTED:
        exec("")  # an interrupt inside exec of text, as dataclasses do it, makes Python end by SIGINT whatever is caught, unless some text goes well after it
        interrupts.say()
    return code


def _command() -> int:
    try:
        from minitron.door.command import command  # seconds, in which an interrupt is heard too
    except ModuleNotFoundError as error:
        if error.name not in ("hydra", "omegaconf", "numpy", "torch", "rich"):
            raise
        print(f"error: {error.name} is not installed for {sys.executable}; `make install` makes .venv with all of it: .venv/bin/python", file=sys.stderr)
        return 2
    return command(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
else:
    import minitron.door.command  # noqa: F401 registers the settings with Hydra, for who composes them without the door
