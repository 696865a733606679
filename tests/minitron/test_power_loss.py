"""What is left of a stage's folder when the power goes: every state that a file system may keep of the writes so far.

Bytes of a file, and a name in a folder (made or changed), may each be lost or kept by themselves until an fsync of that file or folder has returned.
"""

import itertools
import os
from pathlib import Path

import pytest

from minitron.walk import integrity, store
from minitron.walk.store import DONE, finish


@pytest.fixture
def writes(tmp_path, monkeypatch):
    """A stage's folder with two files, finished; gives what was written in order: ("bytes" | "name", path) and ("sync", path)."""
    folder, events = tmp_path / "0123456789ab", []
    (folder / "checkpoint").mkdir(parents=True)
    for name in ("checkpoint/model.safetensors", "plan.json"):
        (folder / name).write_text(name)
        events += [("bytes", folder / name), ("name", folder / name)]
    real_fsync, real_rename, real_open = os.fsync, Path.rename, open

    def fsync(handle):
        real_fsync(handle)
        events.append(("sync", Path(os.readlink(f"/proc/self/fd/{handle}"))))

    def opened(path, mode="r", **how):
        if "w" in mode:
            events.extend([("bytes", Path(path)), ("name", Path(path))])
        return real_open(path, mode, **how)

    def rename(path, target):
        events.append(("renamed", (path, Path(target))))
        return real_rename(path, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "rename", rename)
    monkeypatch.setattr(store, "open", opened, raising=False)
    return folder, events


def states(events):
    """After every write all that may be on the disk: the names there are, each with whether its bytes are, as {path: bool}."""
    for end in range(1, len(events) + 1):
        kept, loose = set(), []
        for number, (kind, what) in enumerate(events[:end]):
            if kind == "sync":
                synced = {one for one in loose if _is_of(events[one], what)}
                kept, loose = kept | synced, [one for one in loose if one not in synced]
            else:
                loose.append(number)
        for size in range(len(loose) + 1):
            for lucky in itertools.combinations(loose, size):
                yield _on_disk(events[:end], kept | set(lucky))


def _is_of(event, path: Path) -> bool:
    """Whether a sync of that file or folder keeps this write."""
    kind, what = event
    if kind == "bytes":
        return what == path
    return (what[1] if kind == "renamed" else what).parent == path


def _on_disk(events, kept):
    whole = {what for number, (kind, what) in enumerate(events) if kind == "bytes" and number in kept}
    names = {what: what in whole for number, (kind, what) in enumerate(events) if kind == "name" and number in kept}
    for number, (kind, what) in enumerate(events):
        if kind == "renamed" and number in kept:
            names.pop(what[0], None)
            names[what[1]] = what[0] in whole
    return names


def broken(folder, events):
    """States in which done.json is there and something that it vouches for is not, or it is not whole itself."""
    return [state for state in states(events) if folder / DONE in state
            and not all(state.get(folder / name) for name in (DONE, "plan.json", "checkpoint/model.safetensors"))]  # fmt: skip


def test_no_state_of_the_disk_has_a_record_without_what_it_vouches_for(writes):
    folder, events = writes
    finish(folder, {"key": folder.name, "facts": {}})
    assert broken(folder, events) == [] and any(folder / DONE in state for state in states(events))


def test_without_the_order_some_states_have(writes, monkeypatch):
    folder, events = writes
    monkeypatch.setattr(integrity, "synced", lambda _path: None)
    finish(folder, {"key": folder.name, "facts": {}})
    assert broken(folder, events)
