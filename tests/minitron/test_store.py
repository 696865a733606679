"""Keys and folders of the store: what gives another folder, what says whole, and two runs on one key."""

import json
import shutil
import subprocess
import sys
import textwrap

import pytest

from minitron.walk.store import DONE, FORMAT, Result, check_format, find_result, finish, locked, mark_damage, stage_key, unwritable, write_json

BASE = {"stage": "score", "version": 1, "settings": {"samples": 8, "seed": 0}, "inputs": {"data": "aaa", "teacher": "bbb"}}


def test_a_key_is_12_hex_digits_and_always_the_same():
    assert stage_key(**BASE) == "e49831af88fc"


@pytest.mark.parametrize(
    "change",
    [
        {"stage": "search"},
        {"version": 2},
        {"settings": {"samples": 9, "seed": 0}},
        {"settings": {"samples": 8}},
        {"settings": {"samples": "8", "seed": 0}},
        {"inputs": {"data": "aaa", "teacher": "ccc"}},
        {"inputs": {"data": "bbb", "teacher": "aaa"}},
        {"inputs": {"data": "aaa"}},
    ],
    ids=str,
)
def test_another_stage_version_setting_or_input_gives_another_key(change):
    assert stage_key(**BASE | change) != stage_key(**BASE)


def test_the_order_of_settings_and_inputs_does_not_change_the_key():
    reversed_order = {"settings": {"seed": 0, "samples": 8}, "inputs": {"teacher": "bbb", "data": "aaa"}}
    assert stage_key(**BASE | reversed_order) == stage_key(**BASE)


def test_a_folder_without_done_json_is_no_result(tmp_path):
    assert find_result(tmp_path / "absent") is None
    (tmp_path / "scores.safetensors").write_bytes(b"half")
    (tmp_path / f"{DONE}.partial").write_text('{"key": "x"')
    assert find_result(tmp_path) is None


@pytest.mark.parametrize("text", ["", '{"key": "x", "facts": {"tok', "[]", "{}", "null"])
def test_a_damaged_record_is_no_result(tmp_path, text):
    (tmp_path / DONE).write_text(text)
    assert find_result(tmp_path) is None


def test_a_finished_folder_gives_back_what_was_recorded(tmp_path):
    finish(tmp_path, {"key": "0123456789ab", "facts": {"tokens": 7}})
    assert (find_result(tmp_path).key, find_result(tmp_path).facts) == ("0123456789ab", {"tokens": 7})
    assert [path.name for path in tmp_path.iterdir()] == [DONE]


def test_a_reader_never_sees_half_a_json_file(tmp_path):
    write_json(tmp_path / "x.json", {"a": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "x.json", {"a": object()})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": 1}


def test_what_later_keys_hold_of_a_result_is_its_contents_where_it_says_them(tmp_path):
    assert [Result(tmp_path, {"key": "k", "facts": facts}).identity for facts in ({}, {"identity": "weights"})] == ["k", "weights"]


def stored(runs, stage: str, key: str, **record) -> None:
    folder = runs / "store" / stage / key
    folder.mkdir(parents=True)
    finish(folder, {"key": key, "facts": {}, **record})


def said(runs) -> list[str]:
    lines = []
    check_format(str(runs), lines.append)
    return lines


def test_results_of_an_earlier_format_are_said_to_be_so_in_one_line_until_they_are_deleted(tmp_path):
    runs = tmp_path / "my runs"
    stored(runs, "score", "aaa")
    stored(runs, "distill", "bbb")
    stored(runs, "distill", "ccc", format=FORMAT)
    (runs / "store" / "measurements" / "distill-bbb").mkdir(parents=True)
    (runs / "store" / "measurements" / "distill-ccc").mkdir()
    for _ in range(2):
        (line,) = said(runs)
        assert line.startswith(f"{runs}/store: 3 results are of an earlier version and are not used; to delete them: ")
    subprocess.run(line.split("delete them: ")[1], shell=True, check=True)
    assert said(runs) == []
    assert sorted(str(path.relative_to(runs / "store")) for path in (runs / "store").glob("*/*")) == ["distill/ccc", "measurements/distill-ccc"]


def test_a_store_of_this_format_and_a_new_one_are_said_nothing_of(tmp_path):
    """The control; results of this format that were copied from elsewhere, without the store's mark, are this format's too."""
    assert said(tmp_path / "new") == [] and json.loads((tmp_path / "new" / "store" / "format.json").read_text())["format"] == FORMAT
    stored(tmp_path / "copied", "score", "aaa", format=FORMAT)
    assert said(tmp_path / "copied") == []


def test_a_store_of_a_later_format_is_refused(tmp_path):
    said(tmp_path)
    write_json(tmp_path / "store" / "format.json", {"format": FORMAT + 1})
    with pytest.raises(ValueError, match=f"format {FORMAT + 1}, this one reads {FORMAT}"):
        said(tmp_path)


@pytest.mark.parametrize("change", [lambda text: text.replace(f": {FORMAT}", f": {FORMAT + 1}"), lambda text: text.replace("digest", "digesu"),
                                    lambda text: text[:9]])  # fmt: skip
def test_a_mark_that_is_not_what_was_written_is_named_and_written_again(tmp_path, change):
    said(tmp_path)
    mark = tmp_path / "store" / "format.json"
    whole = mark.read_text()
    mark.write_text(change(whole))
    assert mark_damage(tmp_path / "store") and said(tmp_path) == []
    assert mark.read_text() == whole and mark_damage(tmp_path / "store") is None


def test_a_mark_of_before_digests_is_as_good(tmp_path):
    said(tmp_path)
    write_json(tmp_path / "store" / "format.json", {"format": FORMAT})
    assert mark_damage(tmp_path / "store") is None and said(tmp_path) == []


def test_of_a_folder_that_can_be_written_into_it_is_said_so(tmp_path):
    """The control of test_soak.py's read-only disk; and what is wrong otherwise is another matter."""
    assert unwritable(tmp_path / "new" / "run") is None and (tmp_path / "new" / "run").is_dir()
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        unwritable(tmp_path / "file" / "run")


def arithmetic_search(folder, runs: str) -> tuple[str, ...]:
    """Arguments of a search that needs no weights: the quickest real stage."""
    (folder / "order.json").write_text("[7, 52]")
    return (f"runs_folder={runs}", "experiment=nano2", "stage=search", f"search.layer_order={folder / 'order.json'}", "search.layers={values: [60]}")


@pytest.fixture
def search_done(tmp_path, door):
    """(arguments, folder of the search's result) of a search that has been run once, in runs/."""
    arguments = arithmetic_search(tmp_path, "runs")
    assert door(tmp_path, *arguments).returncode == 0
    return arguments, next((tmp_path / "runs" / "store" / "search").glob("*/done.json")).parent


def wait_until_waiting(process: subprocess.Popen) -> str:
    """The first line that is neither of the plan nor of a stage that is done."""
    return next((line for line in process.stdout if "(already done)" not in line and line.split()[:1] != ["plan"]), "")


def test_a_second_process_on_a_key_waits_and_takes_the_first_ones_result(search_done, tmp_path, start):
    arguments, folder = search_done
    record = json.loads((folder / DONE).read_text())
    (folder / DONE).unlink()
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    with locked(folder, print):
        second = start(tmp_path, *arguments)
        assert "waiting for another run" in wait_until_waiting(second)
        finish(folder, record)
    output, _ = second.communicate(timeout=60)
    assert second.returncode == 0 and "(done by another run)" in output
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir() if path.name != DONE} == before


def test_a_second_process_does_the_work_if_the_first_left_it_undone(search_done, tmp_path, start):
    arguments, folder = search_done
    shutil.rmtree(folder)
    with locked(folder, print):
        second = start(tmp_path, *arguments)
        assert "waiting for another run" in wait_until_waiting(second)
        assert not folder.exists()
    output, _ = second.communicate(timeout=60)
    assert second.returncode == 0 and "(done by another run)" not in output and (folder / DONE).exists()


def test_two_processes_of_a_run_wait_and_take_another_runs_result_too(search_done, tmp_path, fork_server, engine_environments):
    arguments, folder = search_done
    record = json.loads((folder / DONE).read_text())
    (folder / DONE).unlink()
    with locked(folder, print):
        second = fork_server.start("door", arguments, folder=tmp_path, environment=engine_environments["ddp"], ranks=2)
        assert "waiting for another run" in wait_until_waiting(second)
        finish(folder, record)
    output, errors = second.communicate(timeout=120)
    assert second.codes == [0, 0] and output.count("(done by another run)") == 1, errors


def test_a_lock_ends_with_its_process(tmp_path, environment):
    folder = tmp_path / "score" / "0123456789ab"
    holds = """
        import sys, time
        from pathlib import Path
        from minitron.walk.store import locked
        with locked(Path(sys.argv[1]), print):
            print("held", flush=True)
            time.sleep(60)
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(holds), str(folder)], env=environment, text=True, stdout=subprocess.PIPE)
    assert process.stdout.readline() == "held\n"
    process.kill()
    process.wait()
    said = []
    with locked(folder, said.append):
        assert said == []
