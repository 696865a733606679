"""The data card, of rows that are made here: what it counts, and its rows as text."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.decoders import Metaspace as MetaspaceDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import Metaspace
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from minitron.settings.data import DataSettings
from minitron.settings.run import Settings, TeacherSettings
from minitron.settings.training import DistillSettings, PhaseSettings, Rows, SourceSettings
from minitron.text.card import EXAMPLE_TOKENS, data_card
from minitron.text.encoding import Encoding
from minitron.text.passes import Place, run_passes
from minitron.text.phase_rows import make_phase_rows
from minitron.walk.console import Console
from minitron.walk.stage import StageContext
from minitron.walk.store import Result

TINY_TEACHER = Path(__file__).parents[2] / "minitron" / "tiny_teacher"
SPLITS = {"heldout": "heldout", "train": "train"}


def written(path: Path, records: list) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def chat(number: int, *, asked: str = "What is it, Grüße 🎉?") -> dict:
    return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": f"It is 世 {number}."}, {"role": "user", "content": "Thanks"}]}


def card_of(folder: Path, tokenizer: Path = TINY_TEACHER, **settings) -> dict:
    """The card of the rows that a tokenizer makes."""
    data = DataSettings(**{"sequence_length": 64, "rows": Rows.documents, "processes": 1, **settings})
    encoding = Encoding(tokenizer, data, 2048, folder / "heldout_hashes.npy")
    place = Place(folder=folder, scratch=folder / "source", console=Console(quiet=True), goes_on=lambda _: None)
    return json.loads(json.dumps(data_card(folder, encoding, run_passes(place, data, encoding, SPLITS))))


@pytest.mark.parametrize("answers_only", [True, False])
def test_the_parts_of_a_row_are_its_text_and_only_answers_count(answers_only, tmp_path):
    card = card_of(tmp_path, files=[written(tmp_path / "chat.jsonl", [chat(number) for number in range(100)])], answers_only=answers_only)
    for one in card["examples"]:
        number = "".join(text for text, _ in one["parts"]).partition("世 ")[2].partition(".")[0]
        answer, asked = f" It is 世 {number}.\n", "user: What is it, Grüße 🎉?\nassistant:"
        parts = [[asked, False], [answer, True], ["user: Thanks\n<|endoftext|>", False]]
        assert one["parts"] == (parts if answers_only else [["".join(text for text, _ in parts), True]])
    assert ("counted_share" in card) == answers_only


def test_a_space_at_the_beginning_of_a_part_is_kept(tmp_path):
    """Of a tokenizer that writes spaces as SentencePiece does: what it makes of the answer's tokens alone has none, the control."""
    inner = Tokenizer(BPE(unk_token="<unk>"))
    inner.pre_tokenizer, inner.decoder = Metaspace(), MetaspaceDecoder()
    inner.train_from_iterator(["user: Why? assistant: It is 0 1 2 3 4 5 6 7 8 9."] * 9, BpeTrainer(special_tokens=["<unk>", "</s>"], show_progress=False))
    made = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", unk_token="<unk>")
    made.chat_template = "{% for message in messages %}{{ message.role }}: {{ message.content }}{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    made.save_pretrained(tmp_path / "tokenizer")
    records = [{"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": f"It is {number}."}]} for number in range(100)]
    card = card_of(tmp_path, tmp_path / "tokenizer", files=[written(tmp_path / "chat.jsonl", records)], answers_only=True)
    (answer,) = [text for text, is_learned in card["examples"][0]["parts"] if is_learned]
    assert answer.startswith(" It is") and not made.decode(made(answer)["input_ids"]).startswith(" ")


@pytest.mark.parametrize(("length", "counted"), [(4, (0.25, 0.6)), (40, (0.0, 0.15))])
def test_the_share_that_counts_falls_with_the_length_of_questions(length, counted, tmp_path):
    path = written(tmp_path / "chat.jsonl", [chat(number, asked="why " * length) for number in range(100)])
    share = card_of(tmp_path, files=[path], answers_only=True, sequence_length=256)["counted_share"]
    assert counted[0] < share < counted[1]


def test_an_answer_far_behind_in_a_row_is_shown(tmp_path):
    records = [chat(number, asked="and so on " * 300) for number in range(100)]
    card = card_of(tmp_path, files=[written(tmp_path / "chat.jsonl", records)], answers_only=True, sequence_length=2048)
    (one, *_) = card["examples"]
    assert one["first_token"] > EXAMPLE_TOKENS and one["shown_tokens"] < EXAMPLE_TOKENS < one["tokens"]
    assert [is_learned for _, is_learned in one["parts"]] == [False, True, False] and "It is 世" in one["parts"][1][0]


def test_reading_that_stopped_at_a_limit_says_so(tmp_path):
    path = written(tmp_path / "texts.jsonl", [{"text": f"{number} words of it"} for number in range(200)])
    card = card_of(tmp_path, files=[path], max_train_tokens=300)
    assert card["splits"]["train"]["limit_tokens"] == 300 and "limit_tokens" not in card["splits"]["heldout"]
    assert "limit_tokens" not in card_of(tmp_path, files=[path], max_train_tokens=10**6)["splits"]["train"]


def test_rows_of_a_phase_say_what_they_left_out(tmp_path):
    records = [{"text": f"{number} words"} for number in range(90)] + [{"text": " "}] * 10
    source = SourceSettings(files=[written(tmp_path / "notes.jsonl", records)])
    phases = [PhaseSettings(tokens=10**6, blend=[source])]
    settings = Settings(data=DataSettings(processes=1, rows=Rows.documents), teacher=TeacherSettings(path=str(TINY_TEACHER)),
                        distill=DistillSettings(phases=phases))  # fmt: skip
    inputs = {name: Result(tmp_path / name, {"key": "0", "facts": {"path": str(TINY_TEACHER)}}) for name in ("data", "teacher")}
    context = StageContext(settings, tmp_path, inputs, Console(quiet=True))
    (made,) = make_phase_rows(context)["rows"].values()
    assert made["refused"] == [] and set(made["left_out"]) == {"without text"}
    assert 80 < made["documents"] <= 90 and 5 < made["left_out"]["without text"] <= 10  # but for the ones held out
