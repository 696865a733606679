"""Documents as rows of tokens, with the teacher's tokenizer or one trained on them."""

from typing import Any

from minitron.settings.run import Settings
from minitron.settings.teachers import is_trained
from minitron.sources.source import check_source
from minitron.text.blends import rows_identity
from minitron.walk.stage import StageContext, StoredStage


def needs(settings: Settings) -> tuple[str, ...]:
    # A teacher that is trained here is trained on the data; any other brings the tokenizer that the data needs.
    return () if is_trained(settings) else ("teacher",)


def what(settings: Settings) -> Any:
    return {**rows_identity(settings.data), "vocab": settings.data.vocab if is_trained(settings) else None}


def check(settings: Settings) -> None:
    check_source(settings.data)


def run(context: StageContext) -> dict:
    from minitron.text.tokenise import make_rows

    return make_rows(context)


STAGE = StoredStage(version=3, needs=needs, what=what, check=check, run=run, ends_first_lap=True)
