"""Pieces encoded by several processes, their results in the pieces' order. Little text is encoded in this one: others take seconds to start."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager
from multiprocessing.connection import wait

from minitron.settings.data import ALONE_BYTES
from minitron.sources.pieces import Piece
from minitron.text.encoding import Encoded, Encoder, Encoding

PIECES_AHEAD = 2  # of each process: what waits is in memory

_encoder: Encoder | None = None  # a process's own


class Workers(AbstractContextManager):
    """Encodes pieces; `num_bytes` of text are to come, None where nobody knows: then others join in once this process has done its part."""

    def __init__(self, encoding: Encoding, num_bytes: int | None):
        self.encoding, self.encoder = encoding, Encoder(encoding)
        self.processes = encoding.data.num_processes(ALONE_BYTES if num_bytes is None else num_bytes)
        self._alone_bytes = ALONE_BYTES if num_bytes is None and encoding.data.processes is None else 0
        self._pool: ProcessPoolExecutor | None = None
        self._first_tasks: list[Future] = []

    def encode(self, pieces: Iterable[Piece], held_out: bool) -> Iterator[tuple[Piece, Encoded]]:
        """Every piece and its documents of that split. Raises ValueError as an Encoder does, and where a process ends that should not."""
        pieces = iter(pieces)
        for piece in pieces:
            self._alone_bytes -= piece.block.num_bytes
            if self.processes > 1 and self._alone_bytes < 0 and self._others_are_there:
                yield from self._by_others(piece, pieces, held_out)
                return
            yield piece, self.encoder(piece, held_out)

    def _by_others(self, first: Piece, pieces: Iterator[Piece], held_out: bool) -> Iterator[tuple[Piece, Encoded]]:
        pool, waiting = self._pool, deque()
        try:
            waiting.append((first, pool.submit(_encode, first, held_out)))
            while waiting:
                while len(waiting) < PIECES_AHEAD * self.processes and (piece := next(pieces, None)) is not None:
                    waiting.append((piece, pool.submit(_encode, piece, held_out)))
                piece, future = waiting.popleft()
                yield piece, future.result()
        except BrokenProcessPool:
            raise ValueError(f"data.processes: one of {self.processes} processes that tokenise was killed, for want of memory as a rule; what is done is kept, "
                             f"go on with fewer (data.processes={max(1, self.processes // 2)})") from None  # fmt: skip

    @property
    def _others_are_there(self) -> bool:
        """Whether the other processes are ready; asked for the first time, starts them. Until then this one works."""
        if self._pool is None:
            context = multiprocessing.get_context("forkserver")  # one process imports what all need; a fork of this one, which has threads, may hang
            context.set_forkserver_preload([__name__])
            self._pool = ProcessPoolExecutor(self.processes, context, _begin, (self.encoding,))
            self._first_tasks = [self._pool.submit(int) for _ in range(self.processes)]
        return any(task.done() for task in self._first_tasks)

    def __exit__(self, *_raised: object) -> None:
        if self._pool:
            self._pool.shutdown(cancel_futures=True)


def _begin(encoding: Encoding) -> None:
    """What a process does first."""
    global _encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process hears it, and ends this one
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _encoder = Encoder(encoding)


def _end_with_parent() -> None:
    """A process whose parent was killed would wait for work for ever."""
    wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def _encode(piece: Piece, held_out: bool) -> Encoded:
    return _encoder(piece, held_out)
