"""A source becomes rows: in one pass the held-out documents, in the next the others, without those that a held-out one equals.

What is made grows on disk, and beside it stands how far it is, so that an interrupted pass goes on where it stopped and ends in the same rows, however many
processes tokenise.
"""

import errno
import json
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from minitron.settings.data import DataSettings
from minitron.settings.data import Refused as WhenRefused
from minitron.sources.document import HELD_OUT_SHARE
from minitron.sources.pieces import Piece
from minitron.sources.source import open_source, source_title
from minitron.text.encoding import REFUSED, Encoded, Encoding
from minitron.text.split_rows import SplitCounts, SplitRows
from minitron.text.workers import Workers
from minitron.walk.console import Console
from minitron.walk.integrity import synced
from minitron.walk.store import write_json

SAVE_SECONDS = 3.0
MOST_NAMED = 5  # refused documents that are named
ALL_REFUSED = 1000  # documents, one after another from the first: then there is something wrong with the settings
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
MB = 1e6


@dataclass(slots=True)
class Tally:
    """Of a pass: documents read, those of its split, those of them in no row by reason, some that were refused (document, why), conversations that lost their
    reasoning, and what records were taken for (with the first file of each). Plain values."""

    read: int = 0
    seen: int = 0
    left_out: dict[str, int] = field(default_factory=dict)
    refused: list[list[str]] = field(default_factory=list)
    without_reasoning: int = 0
    forms: dict[str, str] = field(default_factory=dict)

    def add(self, piece: Piece, encoded: Encoded) -> None:
        self.read, self.seen = self.read + len(piece.names), self.seen + encoded.seen
        self.without_reasoning += encoded.without_reasoning
        self.left_out = dict(Counter(self.left_out) + encoded.left_out)
        self.refused += [list(one) for one in encoded.refused[: MOST_NAMED - len(self.refused)]]


@dataclass(frozen=True, slots=True)
class Split:
    """What a pass left: what went into the rows, how many they are, and what went into none."""

    counts: SplitCounts
    num_rows: int
    tally: Tally


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where passes work and whom they tell: the folder of the rows, a folder in which a source may keep what comes once, the terminal, and who is told that an
    interrupted pass goes on."""

    folder: Path
    scratch: Path
    console: Console
    goes_on: Callable[[str], None]


def run_passes(place: Place, data: DataSettings, encoding: Encoding, wanted: Mapping[str, str]) -> dict[str, Split]:
    """Rows int32 [R, T] of splits: `wanted` says of heldout, train or both what the file is called, <file>.npy. The held-out pass comes first and writes
    `encoding.hashes`, of what its documents hold; without it they are there already, or none is left out.

    Raises ValueError naming file and document for what cannot be read, for a split without a row, and where the disk is full.
    """
    source, title, said = open_source(data, place.scratch), source_title(data), set()
    with Workers(encoding, source.num_bytes) as workers, _room_for(place.folder):
        found = {split: _Pass(place, data, encoding, split, file, said).run(source, workers, title) for split, file in wanted.items()}
    shutil.rmtree(place.scratch, ignore_errors=True)
    return found


def forget_passes(folder: Path) -> None:
    """Delete what only an interrupted pass needs: all are done."""
    for path in (*folder.glob("*.state.json"), *folder.glob("*_hashes.bin")):
        path.unlink()


class _Pass:
    """One pass; <file>.state.json says how far it is. `said` are the ways of reading records that the terminal knows of."""

    def __init__(self, place: Place, data: DataSettings, encoding: Encoding, split: str, file: str, said: set[str]):
        self.place, self.data, self.encoding, self.split, self.said = place, data, encoding, split, said
        self.path, self.state_path = place.folder / f"{file}.npy", place.folder / f"{file}.state.json"
        self.hashes_path = encoding.hashes.with_suffix(".bin") if split == "heldout" else None
        self.state = json.loads(self.state_path.read_text()) if self.state_path.exists() else {}
        self.tally = Tally(**self.state.get("tally", {}))
        self.saved, self.keep_again = time.monotonic(), 0.0

    def run(self, source, workers: Workers, title: str) -> Split:
        if self.state.get("is_done"):
            return Split(SplitCounts(**self.state["rows"]["counts"]), self.state["rows"]["rows"], self.tally)
        if self.state:
            self.place.goes_on(f"document {self.tally.read:,} ({self._described})")
        rows = SplitRows(self.split, self.data, self.path, workers.encoder.beginning, limit=getattr(self.data, f"max_{self.split}_tokens"),
                         state=self.state.get("rows"))  # fmt: skip
        try:
            with self._hashes() as add_hashes:
                self._go_through(source, workers, rows, add_hashes)
            self._check(rows, title)
            rows.finish()
            self._done(rows)
        finally:
            with suppress(OSError):  # of a full disk, which has been told
                rows.close()
        return Split(rows.counts, rows.num_rows, self.tally)

    def _go_through(self, source, workers: Workers, rows: SplitRows, add_hashes: Callable[[np.ndarray], None]) -> None:
        place, done = self.state.get("place"), self.state.get("bytes", 0)
        total = None if source.num_bytes is None else source.num_bytes / MB
        started, before = time.monotonic(), rows.counts.tokens
        with self.place.console.track(self._described, total, "MB", done / MB) as advance:
            if rows.is_full:
                return
            try:
                for piece, encoded in workers.encode(source.pieces(place), self.split == "heldout"):
                    self._say_form(piece)
                    self._refuse(encoded)
                    for name, documents in encoded.documents():
                        rows.add(documents, name)
                    add_hashes(encoded.hashes)
                    self.tally.add(piece, encoded)
                    done += piece.block.num_bytes
                    self._keep(rows, piece.place, done)
                    speed = (rows.counts.tokens - before) / max(time.monotonic() - started, 1e-9)
                    advance(piece.block.num_bytes / MB, f"{self.tally.read:,} documents, {speed:,.0f} tokens/s")
                    self._check_refused(rows, ALL_REFUSED)
                    if time.monotonic() - self.saved > SAVE_SECONDS:
                        self._save(rows)
                    if rows.is_full:
                        break
            finally:
                self._save(rows)

    @property
    def _described(self) -> str:
        return "held-out text" if self.split == "heldout" else "text"

    @contextmanager
    def _hashes(self) -> Iterator[Callable[[np.ndarray], None]]:
        """Gives what adds to the hashes of held-out documents; at the end of the pass they are written, sorted."""
        if self.hashes_path is None:
            yield lambda hashes: None
            return
        with self.hashes_path.open("r+b" if self.state else "w+b") as self.hashes:
            self.hashes.seek(self.state.get("hashes", 0))
            self.hashes.truncate()
            yield lambda hashes: self.hashes.write(hashes.tobytes())
            self.hashes.seek(0)
            found = np.unique(np.frombuffer(self.hashes.read(), np.uint64))
        np.save(partial := self.encoding.hashes.with_suffix(".partial.npy"), found)
        synced(partial)
        partial.rename(self.encoding.hashes)

    def _keep(self, rows: SplitRows, place: Mapping, done: int) -> None:
        """Remember how far it is: between pieces, so that what interrupts in the middle of one leaves a state that was whole. It takes a twentieth of the
        time at most: pieces may be many and small."""
        began = time.monotonic()
        if began < self.keep_again:
            return
        hashes = {"hashes": self.hashes.tell()} if self.hashes_path else {}
        self.state = {"rows": rows.state(), "tally": asdict(self.tally), "place": place, "bytes": done, "is_done": False} | hashes
        self.keep_again = time.monotonic() + 20 * (time.monotonic() - began)

    def _save(self, rows: SplitRows) -> None:
        """What is remembered to disk, behind all that it counts."""
        self.saved = time.monotonic()
        if not self.state:
            return
        try:
            rows.flush()
            if self.hashes_path:
                self.hashes.flush()
        finally:  # of a full disk what has room still counts
            if rows.has(self.state["rows"]) and (not self.hashes_path or self.hashes_path.stat().st_size >= self.state["hashes"]):
                write_json(self.state_path, self.state)

    def _done(self, rows: SplitRows) -> None:
        """Say that the pass is over."""
        counts = {"rows": rows.num_rows, "counts": asdict(rows.counts)}
        write_json(self.state_path, {"rows": counts, "tally": asdict(self.tally), "is_done": True})

    def _say_form(self, piece: Piece) -> None:
        """What records are taken for; each way once."""
        if piece.reading is None:
            return
        self.tally.forms.setdefault(piece.reading.described, piece.block.file)
        if piece.reading.described not in self.said:
            self.said.add(piece.reading.described)
            self.place.console.say(f"     data  {piece.block.file}: {piece.reading.described}")

    def _refuse(self, encoded: Encoded) -> None:
        if encoded.refused and self.data.refused is WhenRefused.stop:
            document, why = encoded.refused[0]
            raise ValueError(f"data: {document} cannot be taken: {why} (data.refused=leave_out leaves such out)")

    def _check_refused(self, rows: SplitRows, least: int) -> None:
        """Refuse to go on where every document so far was refused, of at least so many."""
        if (number := self.tally.left_out.get(REFUSED, 0)) >= least and rows.counts.documents == 0 and self.tally.refused:
            document, why = self.tally.refused[0]
            raise ValueError(f"data: of the {self.split} documents so far, {number:,}, none can be taken; {document}: {why}")

    def _check(self, rows: SplitRows, title: str) -> None:
        """Raises ValueError where the split got no document."""
        if rows.counts.documents:
            return
        self._check_refused(rows, 1)
        number, why = self.tally.read, ", ".join(f"{count:,} {reason}" for reason, count in self.tally.left_out.items())
        if number == 0:
            raise ValueError(f"data: {title} has no document; at least one for training and one held out are needed")
        if self.tally.seen:
            raise ValueError(f"data: {title} has {number:,} documents and none with text for {self._described} (left out: {why})")
        none = "to hold out" if self.split == "heldout" else "for training: all are held out"
        documents = f"{number:,} document{'s' if number > 1 else ''}"
        raise ValueError(f"data: {title} has {documents} and none {none}; about 1 in {HELD_OUT_SHARE} is held out, by a hash of its name: "
                         f"{5 * HELD_OUT_SHARE} documents are nearly always enough (data.cut_kib cuts text files into documents)")  # fmt: skip


@contextmanager
def _room_for(folder: Path) -> Iterator[None]:
    """Says in one line that the disk is full; what was done stays."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise ValueError(f"data: there is no room left on the disk of {folder} ({error.strerror}); what is done is kept: make room and run it again") from None
