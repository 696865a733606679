"""The tokens that end a model's text: a chat model ends its turn with one and its text with another."""

from collections.abc import Sequence

from torch import nn
from transformers import PreTrainedTokenizerBase

from minitron.generation.templates import StandIns, render


def end_ids(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every id that ends a text of this model, each once: of generation_config.json, of config.json, the tokenizer's, its chat template's end of a turn."""
    places = (getattr(model, "generation_config", None), getattr(model, "config", None), tokenizer)
    found = [id_ for place in places for id_ in _listed(getattr(place, "eos_token_id", None))]
    return list(dict.fromkeys([*found, *_end_of_turn(tokenizer)]))


def until_end(ids: Sequence[int], ends: Sequence[int]) -> list[int]:
    """The ids up to the first that ends the text, that one included; all of them where none does."""
    place = next((place for place, id_ in enumerate(ids) if id_ in ends), len(ids))
    return list(ids[: place + 1])


def without_end(ids: Sequence[int], ends: Sequence[int]) -> list[int]:
    """The ids before the first that ends the text."""
    whole = until_end(ids, ends)
    return whole[:-1] if whole and whole[-1] in ends else whole


def _listed(ids: int | Sequence[int] | None) -> list[int]:
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)


def _end_of_turn(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token that the chat template puts after an assistant's last message, if it is one of the tokenizer's added tokens."""
    if not tokenizer.chat_template:
        return []
    answer = StandIns([]).of("")
    try:
        text = render(tokenizer, [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}])
    except ValueError:  # of no conversation that this template knows, then
        return []
    after = text.rpartition(answer)[2].lstrip()
    added = sorted(tokenizer.get_added_vocab().items(), key=lambda one: -len(one[0]))
    return next(([id_] for token, id_ in added if answer in text and after.startswith(token)), [])
