"""What a finished stage wrote is known by its bytes: a result that is something else is named and not used."""

import json
import shutil
from pathlib import Path

import pytest

from minitron.walk.integrity import damage, vouch_for
from minitron.walk.store import DONE, damaged, discard, find_result, finish, still_there


@pytest.fixture
def result(tmp_path):
    """A finished result with a file in a folder of its own, and one that nobody vouches for."""
    folder = tmp_path / "0123456789ab"
    (folder / "checkpoint").mkdir(parents=True)
    (folder / "checkpoint" / "model.safetensors").write_bytes(bytes(range(256)) * 64)
    (folder / "half.partial").write_text("half")
    finish(folder, {"key": folder.name, "facts": {"tokens": 7}})
    return folder


def test_what_was_written_is_found_as_it_was(result):
    assert damaged(result, float("inf")) is None and find_result(result).facts == {"tokens": 7}
    (result / "half.partial").unlink()
    assert damaged(result) is None


@pytest.mark.parametrize(("change", "said"), [
    (lambda path: path.write_bytes(path.read_bytes()[:-1]), "has 16,383 bytes, 16,384 were written"),
    (lambda path: path.unlink(), "is missing"),
    (lambda path: path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:]), "holds other bytes than were written"),
])  # fmt: skip
def test_a_file_that_is_another_one_is_named_and_its_result_not_used(result, change, said):
    change(result / "checkpoint" / "model.safetensors")
    assert damaged(result) == f"checkpoint/model.safetensors {said}" and find_result(result) is None


def test_a_flipped_bit_in_what_is_too_large_is_seen_by_who_asks_for_all_bytes(result):
    files = json.loads((result / DONE).read_text())["files"]
    path = result / "checkpoint" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    assert damage(result, files, 100) is None and "other bytes" in damage(result, files, 2**20)


@pytest.mark.parametrize("change", [lambda text: "", lambda text: text[:-30], lambda text: text.replace('"tokens": 7', '"tokens": 8'), lambda _text: "[]"])
def test_a_record_that_is_another_one_is_named_and_not_used(result, change):
    (result / DONE).write_text(change((result / DONE).read_text()))
    assert DONE in damaged(result) and find_result(result) is None


def test_a_record_of_before_digests_is_still_a_result(result):
    record = json.loads((result / DONE).read_text())
    (result / DONE).write_text(json.dumps({name: value for name, value in record.items() if name not in ("files", "digest")}))
    assert damaged(result) is None and find_result(result).key == result.name


def test_nothing_is_vouched_for_that_is_half_written_or_a_link(result):
    (result / "link").symlink_to(result / "checkpoint")
    assert set(vouch_for(result)) == {"checkpoint/model.safetensors", DONE}


@pytest.mark.parametrize("name", ["checkpoint/model.safetensors", DONE])
def test_what_cannot_be_read_is_not_taken_for_damaged(result, name):
    """A link to itself: the system refuses to read it, and says of which file."""
    (result / name).unlink()
    (result / name).symlink_to(result / name)
    for look in (find_result, damaged):
        with pytest.raises(OSError) as refused:
            look(result)
        assert refused.value.filename == str(result / name)


def interrupted_after(monkeypatch, calls: int) -> None:
    """Lets so many files and folders be removed, and the next one raise."""
    left, unlink, rmtree = [calls], Path.unlink, shutil.rmtree

    def counted(real):
        def remove(path, *more, **how):
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
            return real(path, *more, **how)

        return remove

    monkeypatch.setattr(Path, "unlink", counted(unlink))
    monkeypatch.setattr(shutil, "rmtree", counted(rmtree))


@pytest.mark.parametrize("calls", range(4))
def test_what_is_left_of_a_result_that_was_being_taken_away_is_no_half_made_one(result, monkeypatch, calls):
    """However much is gone: a stage would go on from files without a record, damaged ones among them."""
    with monkeypatch.context() as patched:
        interrupted_after(patched, calls)
        try:
            discard(result)
        except KeyboardInterrupt:
            assert find_result(result) is not None if calls == 0 else damaged(result)
        else:
            assert calls == 3 and not result.exists()  # a folder, a file, and the rest
    if result.exists():
        discard(result)
        assert not result.exists()


def test_a_folder_that_was_made_anew_under_a_stage_is_not_the_one_it_worked_in(result):
    with still_there(result):
        pass
    with pytest.raises(FileNotFoundError, match="moved or removed"), still_there(result):
        result.rename(result.with_name("away"))
        result.mkdir()
