"""Blends: the shares of the sources, rows that any step can be asked for, conversations and truncated reasoning."""

import json
import re

import numpy as np
import pytest
from transformers import AutoTokenizer

from distill.batches import BlendBatches
from minitron.settings.data import DataSettings
from minitron.settings.run import Settings
from minitron.settings.training import DistillSettings, PhaseSettings, SourceSettings
from minitron.text.blends import DATA_ROWS, phase_parts, rows_to_make, without_truncation
from minitron.text.tokenise import read_documents
from minitron.text.traces import truncated


def source(number: int, rows: int) -> np.ndarray:
    """Rows whose first id names the source and the row."""
    return (np.full((rows, 4), number * 1000, dtype=np.int32).T + np.arange(rows, dtype=np.int32)).T


def blend(batch=10, tokens=400 * 4, seed=3) -> BlendBatches:
    return BlendBatches([source(1, 300), source(2, 40)], [70, 30], tokens=tokens, batch=batch, seed=seed)


def drawn(batches: BlendBatches, steps) -> list[int]:
    return [first for step in steps for first in batches.at(step)[:, 0].tolist()]


def test_every_beginning_of_a_run_has_the_shares_to_within_a_row():
    ids = np.array(drawn(blend(), range(40)))
    for number in range(1, 401):
        assert abs((ids[:number] >= 2000).sum() - 0.3 * number) <= 1


def test_every_row_of_a_source_comes_once_before_any_comes_again():
    second = [row for row in drawn(blend(), range(40)) if row >= 2000]
    assert len(second) == 120
    rounds = [second[start : start + 40] for start in (0, 40, 80)]
    assert all(sorted(part) == list(range(2000, 2040)) for part in rounds) and rounds[0] != rounds[1] != rounds[2]


def test_a_step_of_a_blend_asked_for_directly_is_the_one_walked_to():
    walked = blend()
    batches = [walked.at(step).tolist() for step in range(40)]
    for step in (39, 0, 17, 16):
        assert blend().at(step).tolist() == batches[step] == walked.at(step).tolist()
    assert blend(seed=4).at(0).tolist() != batches[0]


TRACE = "user: hi\n<think>one two three four five six</think>The answer."
ANSWERS = ((9, 62), (9, 20), (51, 62), (0, 0))  # the assistant's words, and some others
PARTS = [TRACE[start:end] for start, end in ANSWERS]


def test_truncated_reasoning_is_closed_and_the_answer_stays():
    short, answers = truncated(TRACE, ANSWERS, "chat/1", 1.0)
    begin, _, rest = short.partition("<think>")
    thought, _, answer = rest.partition("</think>")
    assert (begin, answer) == ("user: hi\n", "The answer.") and "one two three four five six".startswith(thought) and len(thought) < 27
    assert [short[start:end] for start, end in answers] == [short[9:], f"<think>{thought[:4]}", PARTS[2], ""]
    assert truncated(TRACE, ANSWERS, "chat/1", 0.0) == (TRACE, ANSWERS) and truncated(TRACE, ANSWERS, "chat/1", 1.0) == (short, answers)


def test_the_share_of_documents_is_cut_and_always_the_same_ones():
    cut = [number for number in range(2000) if truncated(TRACE, (), f"chat/{number}", 0.05)[0] != TRACE]
    assert 70 < len(cut) < 130 and cut == [number for number in range(2000) if truncated(TRACE, (), f"chat/{number}", 0.05)[0] != TRACE]


def test_conversations_are_written_out_by_the_chat_template(tmp_path):
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "<think>a b</think>ho"}]
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    data = DataSettings(files=[str(tmp_path / "chat.jsonl")], messages_field="messages")
    assert [document.text for document in read_documents(data, tmp_path)] == ["user: hi\nassistant: <think>a b</think>ho\n"]
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": "hi"}) + "\n")
    with pytest.raises(ValueError, match="data.messages_field is 'messages'; it must hold a list of {role, content}"):
        list(read_documents(data, tmp_path))


def settings(*phases: PhaseSettings) -> Settings:
    return Settings(distill=DistillSettings(phases=list(phases)))


def test_only_rows_that_the_data_stage_has_not_are_made(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    files = SourceSettings(weight=7, files=[str(tmp_path / "a.txt")])
    parts = phase_parts(settings(PhaseSettings(tokens=999), PhaseSettings(tokens=1000, sequence_length=128), PhaseSettings(tokens=1000, blend=[files, files])))
    assert [[part.name == DATA_ROWS for part in phase] for phase in parts] == [[True], [False], [False, False]]
    assert parts[1][0].data.sequence_length == 128 and [part.weight for part in parts[2]] == [0.5, 0.5]
    assert rows_to_make(Settings()) == {} and phase_parts(Settings())[0][0].name == DATA_ROWS


def test_the_rows_are_named_by_contents_and_not_by_where_the_files_lie(tmp_path):
    names = []
    for folder, text in (("one", "a"), ("two", "a"), ("three", "b")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.txt").write_text(text)
        phase = PhaseSettings(tokens=1000, blend=[SourceSettings(files=[str(tmp_path / folder / "a.txt")])])
        names.append(phase_parts(settings(phase))[0][0].name)
    assert names[0] == names[1] != names[2]


@pytest.mark.parametrize(
    ("phase", "says"),
    [
        ({"blend": [SourceSettings(weight=0, files=["a.txt"])]}, r"distill.phases\[0\].blend has a source of weight 0; it must be above 0"),
        ({"blend": [SourceSettings()]}, "exactly one of them must be given"),
        ({"blend": [SourceSettings(files=["a.txt"], truncated_share=1.5)]}, "truncated_share is 1.5; it must be at least 0 and at most 1"),
        ({"tokens": 0}, r"distill.phases\[0\].tokens is 0; it must be at least 1"),
        ({"batch": 0}, r"distill.phases\[0\].batch is 0; it must be at least 1"),
    ],
)
def test_phases_that_cannot_be_are_refused(phase, says):
    with pytest.raises(ValueError, match=says):
        DistillSettings(phases=[PhaseSettings(**{"tokens": 1000, **phase})])


def test_what_a_phase_leaves_out_is_that_of_train():
    trains = DistillSettings(phases=[PhaseSettings(tokens=5, learning_rate=0.5), PhaseSettings(tokens=6, batch=2)]).trains()
    assert [(train.tokens, train.learning_rate, train.batch) for train in trains] == [(5, 0.5, 8), (6, 1e-3, 2)]
    assert DistillSettings().trains() == [DistillSettings().train]


def test_a_phase_longer_than_the_models_positions_is_refused_before_any_work(door, tmp_path):
    finished = door(tmp_path, "stage=distill", "distill.phases=[{tokens: 1000000, sequence_length: 131073, batch: 1}]")
    assert finished.returncode == 2 and finished.stderr.startswith("error: distill.phases[0].sequence_length is 131073; it must be at most 131072")
    assert len(finished.stderr.splitlines()) == 1 and not list(tmp_path.glob("runs/store/*"))


def test_conversations_serve_the_tiny_teacher_too(door, tmp_path):
    """Its tokenizer, trained on them, writes them as they were written for the training."""
    said = [("user", "Number {0}?"), ("assistant", "<think>{0} is {0}</think>It is {0}.")]
    chat = [{"messages": [{"role": role, "content": content.format(number)} for role, content in said]} for number in range(300)]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(record) + "\n" for record in chat))
    finished = door(tmp_path, "device=cpu", "stage=data", "data.files=[chat.jsonl]", "data.messages_field=messages", "data.rows=documents",
                    "data.sequence_length=64", "data.vocab=300", "teacher.train_anew=true")  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    (folder,) = (path.parent for path in (tmp_path / "runs" / "store" / "data").glob("*/done.json"))
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    written = tokenizer.decode([one for one in np.load(folder / "train.npy")[0] if one >= 0])
    assert re.fullmatch(r"user: Number (\d+)\?\nassistant: <think>\1 is \1</think>It is \1\.\n<\|endoftext\|>", written)


def test_a_phase_with_another_share_of_cut_traces_has_rows_of_its_own():
    def parts(data: DataSettings, *phases: PhaseSettings) -> list:
        return phase_parts(Settings(data=data, distill=DistillSettings(phases=list(phases))))

    cut = DataSettings(truncated_share=0.3)
    same, whole = parts(cut, PhaseSettings(tokens=999, truncated_share=0.3), PhaseSettings(tokens=999, truncated_share=0.0))
    assert same[0].name == DATA_ROWS and whole[0].name != DATA_ROWS and whole[0].data.truncated_share == 0


def test_the_same_distillation_without_truncation_differs_in_nothing_else():
    blend = [SourceSettings(files=["a.txt"], weight=2.0, truncated_share=0.05), SourceSettings(files=["b.txt"])]
    settings = Settings(data=DataSettings(truncated_share=0.3), distill=DistillSettings(phases=[PhaseSettings(tokens=7, blend=blend), PhaseSettings(tokens=8)]))
    first, second = without_truncation(settings).distill.phases
    assert first == PhaseSettings(tokens=7, blend=[SourceSettings(files=["a.txt"], weight=2.0), SourceSettings(files=["b.txt"])])
    assert second == PhaseSettings(tokens=8, truncated_share=0.0)
    (only,) = without_truncation(Settings(data=DataSettings(truncated_share=0.3))).distill.trains()
    assert only == Settings().distill.train
