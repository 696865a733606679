"""Experts of one layer read from disk when tokens are sent to them, one ahead of the one at work; those that no token is sent to are never read."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from copy import deepcopy

import torch

from minitron.checkpoints.files import Checkpoint, PlannedWeights
from minitron.checkpoints.forward_memory import KEPT_BYTES
from minitron.checkpoints.stored_linear import load_to_compute
from minitron.families.experts import Expert, Experts
from minitron.families.table import expert_of


class StreamedExperts:
    """A `Source` (families/experts.py). `names` gives the names in the checkpoint by those in the layer, "mixer.experts.5.up_proj.weight"; all that is read
    is kept on `device`, to compute in `dtype`. `read` says which experts were."""

    def __init__(self, empty: Experts, names: Mapping[str, str], checkpoint: Checkpoint | PlannedWeights, dtype: torch.dtype, device: torch.device):
        self._empty, self._checkpoint, self._dtype, self._device = empty, checkpoint, dtype, device
        self._names: dict[int, dict[str, str]] = defaultdict(dict)
        for name, file_name in names.items():
            number = expert_of(name)
            self._names[number][name.partition(f"experts.{number}.")[2]] = file_name
        self._kept: dict[int, Expert] = {}
        self._kept_bytes, self.read = 0, set()

    def open(self, numbers: Sequence[int]) -> Iterator[tuple[int, Expert]]:
        """These experts in this order; memory of one that is not kept is the next one's."""
        missing = [number for number in numbers if number not in self._kept]
        following = dict(zip(missing, [*missing[1:], None], strict=False))
        with ThreadPoolExecutor(max_workers=1) as reader:
            begun = self._begin(reader, missing[0]) if missing else None
            for number in numbers:
                if number in self._kept:
                    yield number, self._kept[number]
                    continue
                stored = begun.result()
                begun = None if following[number] is None else self._begin(reader, following[number])
                expert = load_to_compute(deepcopy(self._empty[number]), stored, self._dtype)
                self.read.add(number)
                size = sum(tensor.nbytes for tensor in stored.values())
                del stored
                if self._kept_bytes + size <= KEPT_BYTES:
                    self._kept[number], self._kept_bytes = expert, self._kept_bytes + size
                yield number, expert
                del expert

    def _begin(self, reader: ThreadPoolExecutor, number: int) -> Future[dict[str, torch.Tensor]]:
        """Memory is asked for in the thread that lets it go, as StreamedModel does."""
        empty = {name: self._checkpoint.empty(file_name) for name, file_name in self._names[number].items()}
        return reader.submit(self._fill, number, empty)

    def _fill(self, number: int, empty: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: self._checkpoint.read(self._names[number][name], into=tensor).to(self._device) for name, tensor in empty.items()}
