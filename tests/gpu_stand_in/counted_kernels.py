"""How many bytes mamba-ssm's own Python asks for while its kernels run in the interpreter: what a GPU's allocator would be asked for beside the inputs."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from pretended_memory import Allocator
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Counting(TorchDispatchMode):
    """Counts the storages of all tensors that are made while it is entered, but for those inside the convolution, whose compiled part makes none."""

    def __init__(self) -> None:
        super().__init__()
        self.allocator, self.paused = Allocator(2**40), False

    def __torch_dispatch__(self, function, _types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        return made if self.paused else self.take(made)

    def take(self, values):
        """Count what the values are in, once."""
        for value in tree_leaves(values):
            if isinstance(value, torch.Tensor):
                self.allocator.hold(value)
        return values

    def uncounted(self, function: Callable) -> Callable:
        """The function, of which only the results count."""

        def called(*args):
            self.paused = True
            try:
                made = function(*args)
            finally:
                self.paused = False
            return self.take(made)

        return called

    def peak_of(self, call: Callable[[], object]) -> tuple[int, object]:
        """Most bytes at once beside those that were there before, and the result."""
        gc.collect()
        before = self.allocator.allocated
        self.allocator.reset_peak()
        with self:
            result = call()
        return self.allocator.peak - before, result


@contextmanager
def counting() -> Iterator[Counting]:
    """The counter, with the convolution left out, and what the interpreter itself leaves lying after each kernel gone."""
    from mamba_ssm.ops.triton import ssd_combined
    from triton.runtime import interpreter

    mode, launch = Counting(), interpreter.GridExecutor.__call__
    names = ("causal_conv1d_fwd_function", "causal_conv1d_bwd_function")
    convolutions = {name: getattr(ssd_combined, name) for name in names}

    def launched(self, *args, **kwargs):
        launch(self, *args, **kwargs)
        gc.collect()

    interpreter.GridExecutor.__call__ = launched
    for name, function in convolutions.items():
        setattr(ssd_combined, name, mode.uncounted(function))
    try:
        yield mode
    finally:
        interpreter.GridExecutor.__call__ = launch
        for name, function in convolutions.items():
            setattr(ssd_combined, name, function)
