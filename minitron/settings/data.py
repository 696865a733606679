"""The settings of the text: where documents come from, what a record is, and the rows they are cut into. What each means stands in conf/run.yaml."""

import os
from dataclasses import dataclass, field

from minitron.settings.reasoning import ArithmeticSettings
from minitron.settings.rules import Choice, added, at_least, check_share, how
from minitron.settings.training import Form, Rows, TrainSettings


class Embedded(Choice):
    code = "code"
    prose = "prose"


class Refused(Choice):
    leave_out = "leave_out"
    stop = "stop"


ALONE_BYTES = 2**25  # of text that one process tokenises by itself, as others take seconds to start
MOST_PROCESSES = 8  # where nothing is said: more than one process can feed and write for stand idle
# Fields that only some forms have.
FIELDS_OF = {
    "messages_field": (Form.messages, Form.sharegpt),
    "prompt_field": (Form.prompt_answer, Form.alpaca, Form.preference),
    "answer_field": (Form.prompt_answer, Form.alpaca, Form.preference),
    "system_field": (Form.messages, Form.sharegpt, Form.prompt_answer, Form.alpaca, Form.preference),
}


@dataclass(kw_only=True, slots=True)
class DataSettings:
    files: list[str] | None = None
    dataset: str | None = None
    embedded: Embedded = Embedded.code
    arithmetic: ArithmeticSettings = field(default_factory=ArithmeticSettings)
    dataset_config: str | None = None
    dataset_revision: str | None = None
    dataset_split: str = "train"
    text_field: str = "text"
    messages_field: str | None = None
    form: Form = added(Form.auto)
    prompt_field: str | None = added(None)
    answer_field: str | None = added(None)
    system_field: str | None = added(None)
    answers_only: bool = added(False)
    refused: Refused = how(Refused.leave_out)
    cut_kib: int | None = added(None)
    processes: int | None = how(None)
    truncated_share: float = 0.0
    key_value_share: float = 0.0
    max_documents: int | None = None
    rows: Rows = Rows.windows
    sequence_length: int = 256
    vocab: int = 2048
    max_train_tokens: int | None = None
    max_heldout_tokens: int | None = None

    def __post_init__(self) -> None:
        at_least(self, "data", 2, "sequence_length")
        at_least(self, "data", 300, "vocab")  # 256 bytes and the special tokens come first
        at_least(self, "data", 1, "max_documents")
        at_least(self, "data", self.sequence_length, "max_train_tokens", "max_heldout_tokens")  # of one row
        at_least(self, "data", 1, "processes")
        at_least(self, "data", 0, "cut_kib")
        check_share("data.truncated_share", self.truncated_share)
        check_share("data.key_value_share", self.key_value_share)
        if self.files and self.dataset:
            raise ValueError(f"data.files and data.dataset ({self.dataset!r}) are both given; one of them must be null")
        if self.arithmetic.problems and (self.files or self.dataset):
            raise ValueError(f"data.arithmetic.problems is {self.arithmetic.problems}, but data.files or data.dataset is given; it must then be 0")
        if self.embedded is Embedded.prose and (self.files or self.dataset or self.arithmetic.problems):
            raise ValueError("data.embedded is prose, but data.files, data.dataset or data.arithmetic.problems is given, which takes its place; "
                             "it must then be code")  # fmt: skip
        self._check_form()
        for name in ("dataset_config", "dataset_revision"):
            if getattr(self, name) is not None and not self.dataset:
                raise ValueError(f"data.{name} is {getattr(self, name)!r}, but data.dataset is not given; both must be, or neither")

    def _check_form(self) -> None:
        """Refuse fields that the form does not have, and answers where there can be none."""
        given = [name for name, forms in FIELDS_OF.items() if getattr(self, name) is not None and self.form not in (Form.auto, *forms)]
        if given:
            raise ValueError(f"data.{given[0]} is {getattr(self, given[0])!r}, but data.form is {self.form}, which has no such field; "
                             f"data.form must be auto or {' or '.join(map(str, FIELDS_OF[given[0]]))}")  # fmt: skip
        conversations = {Form.messages: "messages_field", Form.prompt_answer: "prompt_field or answer_field"}
        asked = [form for form, names in conversations.items() if any(getattr(self, name) is not None for name in names.split(" or "))]
        if len(asked) > 1:
            raise ValueError(f"data.messages_field is {self.messages_field!r}, and data.prompt_field or answer_field is given; a document is read one way")
        if self.answers_only and self.form is Form.text:
            raise ValueError("data.answers_only is true, but data.form is text, in which nobody answers; one of them must be another")
        if self.answers_only and not self.files and not self.dataset:
            raise ValueError("data.answers_only is true, but neither data.files nor data.dataset is given; one must be, nobody answers in the embedded text")
        if self.answers_only and self.key_value_share:
            raise ValueError(f"data.answers_only is true and data.key_value_share {self.key_value_share}; it must be 0, lines are hidden in plain text alone")

    def num_processes(self, num_bytes: int) -> int:
        """How many processes tokenise so much text on this machine."""
        if self.processes is not None:
            return self.processes
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return 1 if num_bytes < ALONE_BYTES else min(MOST_PROCESSES, cores)

    def check_rows(self, name: str, train: TrainSettings, rows: int, told: str) -> None:
        """Refuse batches of more rows than the data has; `told` is "only", or "at most" where that is not known. Raises ValueError."""
        if train.batch > rows:
            raise ValueError(f"{name}.batch is {train.batch:,}, but the data has {told} {rows:,} train rows of data.sequence_length ({self.sequence_length:,}) "
                             f"tokens; it must be at most {rows:,}, or the rows shorter, or the text more")  # fmt: skip

    def check_tokens(self, name: str, train: TrainSettings) -> None:
        """Refuse to train on less than one batch. Raises ValueError."""
        least = train.batch * self.sequence_length
        if self.rows is Rows.windows and train.tokens < least:
            raise ValueError(f"{name}.tokens is {train.tokens}; it must be at least one batch, {train.batch} rows of data.sequence_length: {least}")
