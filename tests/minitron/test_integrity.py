"""What a finished stage wrote is known by its bytes: a result that is something else is named and not used."""

import json

import pytest

from minitron.walk.integrity import damage, vouch_for
from minitron.walk.store import DONE, damaged, find_result, finish


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
