"""A budget for reasoning: after so many tokens of it the reasoning is closed, and the answer goes on.

Tags are sequences of tokens, so any tokenizer's will do. B rows of a batch, T tokens.
"""

from collections.abc import Sequence

import torch
from transformers import LogitsProcessor


class ThinkingBudget(LogitsProcessor):
    """For `generate`: once a row has `budget` reasoning tokens, the closing tag's tokens are the only ones it may take.

    Reasoning is what follows the last opening tag, in the prompt or generated, and no closing tag has ended. Generated tokens of it count; the tags do
    not, nor what the prompt has of it already (often a line's end). A row without an opening tag, or one that closes by itself in time, is left alone,
    to the bit.
    """

    def __init__(self, budget: int, open_ids: Sequence[int], close_ids: Sequence[int], prompt_tokens: int | None = None,
                 opened: Sequence[bool] | None = None):  # fmt: skip
        """`prompt_tokens` is the width of the prompts, padding on their left included, None that of the first call; `opened` says of each row whether its
        prompt leaves reasoning open, None leaves that to the tags in it. Raises ValueError for a negative budget or an empty tag."""
        if budget < 0:
            raise ValueError(f"thinking_budget is {budget}; it must be at least 0")
        if not open_ids or not close_ids:
            raise ValueError("thinking_tags have no tokens in this tokenizer; name the tags that it knows, e.g. thinking_tags='[<think>, </think>]'")
        self.budget, self.open_ids, self.close_ids, self.prompt_tokens, self.opened = budget, list(open_ids), list(close_ids), prompt_tokens, opened

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Scores [B, V] of the next token, all but the closing tag's next one −∞ in rows whose budget is spent."""
        if self.prompt_tokens is None:
            self.prompt_tokens = input_ids.shape[1]
        if self.opened is None:
            self.opened = [self._reasoning(row) is not None for row in input_ids[:, : self.prompt_tokens].tolist()]
        for row, (is_open, generated) in enumerate(zip(self.opened, input_ids[:, self.prompt_tokens :].tolist(), strict=True)):
            reasoning = self._reasoning([*self.open_ids, *generated] if is_open else generated)
            if reasoning is not None and (forced := self._forced(reasoning)) is not None:
                allowed = scores[row, forced].item()
                scores[row] = float("-inf")
                scores[row, forced] = allowed if allowed > float("-inf") else 0.0
        return scores

    def _reasoning(self, ids: list[int]) -> list[int] | None:
        """The tokens of the reasoning that is open at the end of `ids`; None where none is."""
        start = _last(ids, self.open_ids)
        if start is None:
            return None
        after = ids[start + len(self.open_ids) :]
        return None if _last(after, self.close_ids) is not None else after

    def _forced(self, reasoning: list[int]) -> int | None:
        """The token that must come next where the budget is spent: of the closing tag, the one after as much of it as stands already."""
        if len(reasoning) < self.budget:
            return None
        begun = next(length for length in range(len(self.close_ids) - 1, -1, -1) if reasoning[len(reasoning) - length :] == self.close_ids[:length])
        return self.close_ids[begun]


def _last(ids: list[int], wanted: list[int]) -> int | None:
    """Where a sequence begins for the last time."""
    starts = range(len(ids) - len(wanted), -1, -1)
    return next((start for start in starts if ids[start : start + len(wanted)] == wanted), None)


def count_reasoning(ids: Sequence[int], open_ids: Sequence[int], close_ids: Sequence[int]) -> int:
    """Tokens between the last opening tag and the closing one after it, or the end."""
    ids, open_ids, close_ids = list(ids), list(open_ids), list(close_ids)
    start = _last(ids, open_ids)
    if start is None:
        return 0
    after = ids[start + len(open_ids) :]
    ends = (end for end in range(len(after) - len(close_ids) + 1) if after[end : end + len(close_ids)] == close_ids)
    return next(ends, len(after))
