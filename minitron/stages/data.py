"""Documents as rows of tokens, with the teacher's tokenizer or one trained on them."""

from typing import Any

from minitron.settings.run import Settings
from minitron.text.blends import rows_identity
from minitron.text.documents import check_source
from minitron.walk.stage import StageContext, StoredStage


def needs(settings: Settings) -> tuple[str, ...]:
    # The tiny teacher is trained on the data; a given one brings the tokenizer that the data needs.
    return () if settings.teacher.path is None else ("teacher",)


def what(settings: Settings) -> Any:
    own = settings.teacher.path is None
    return {**rows_identity(settings.data), "vocab": settings.data.vocab if own else None}


def check(settings: Settings) -> None:
    check_source(settings.data)


def run(context: StageContext) -> dict:
    from minitron.text.tokenise import make_rows

    return make_rows(context)


STAGE = StoredStage(version=2, needs=needs, what=what, check=check, run=run, ends_first_lap=True)
