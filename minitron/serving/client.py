"""A thinking budget for any OpenAI-compatible server: so many tokens of reasoning are asked for, closed if need be, and the answer follows.

Only the completions endpoint is used, text in and text out, which every such server has: the chat template is written out here, by the
model's own tokenizer. Needs the openai package (extra `serve`), no torch.
"""

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
from transformers import PreTrainedTokenizerBase

from memory_budget.json_files import read_json
from minitron.generation.prompts import Prompt, Tags, make_prompt
from minitron.generation.tokenizers import load_tokenizer
from minitron.serving.bounds import bounding
from minitron.serving.errors import in_one_line
from minitron.serving.made import Ending, Made, read_pieces
from minitron.walk.shown import without_secrets

Asked = str | Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Reply:
    """What came of a prompt. `text` is all that follows it, closing tag included; reasoning and answer are its parts, without the tag.

    reasoning_tokens: at most the budget, not counting tags · closed_here: the client closed the reasoning, not the model ·
    ended: the model came to its end by itself; False where max_tokens cut it off, or the server stopped it for a reason of its own, which
    `stopped` then names (content_filter, abort, …) · note: what is odd about the server, in one line; "" where nothing is.
    """

    text: str
    reasoning: str
    answer: str
    reasoning_tokens: int
    closed_here: bool
    ended: bool
    stopped: str = ""
    note: str = ""


class ThinkingBudgetClient:
    """`ThinkingBudgetClient(url, model, tokenizer).ask("What is 3 plus 4?", thinking_budget=32).answer`."""

    def __init__(self, base_url: str, model: str, *, tokenizer: str | Path, tags: Tags = Tags(), context_tokens: int | None = None,  # noqa: B008
                 api_key: str = "none", timeout_seconds: float = 60.0, longest_seconds: float = 3600.0, max_retries: int = 2,
                 extra_body: Mapping[str, Any] | None = None):  # fmt: skip
        """`base_url` ends in /v1 · `model` as the server names it · `tokenizer`: the model's folder, or its Hub id.

        context_tokens: the longest text that the server takes; None reads max_position_embeddings beside the tokenizer, where that is a
        folder · timeout_seconds: without a word from the server · longest_seconds: of one request, however much the server says ·
        max_retries: of a request that failed before it gave anything, after the wait that a busy server asks for (at most a minute) ·
        extra_body: further fields of every request, e.g. {"skip_special_tokens": False} for vLLM.
        Raises ValueError for a tokenizer that is not there, or whose tags a client cannot see.
        """
        self._base_url, self._model, self._tags, self._timeout_seconds = base_url, model, tags, timeout_seconds
        self._extra_body = dict(extra_body or {})
        self._tokenizer = load_tokenizer(tokenizer)
        _check_tags(self._tokenizer, tags, hidden=self._extra_body.get("skip_special_tokens", True))
        self._context_tokens = _positions(Path(tokenizer)) if context_tokens is None else context_tokens
        plain = openai.DefaultHttpxClient(event_hooks={"response": [bounding(longest_seconds)]}, headers={"Accept-Encoding": "identity"})
        self._server = openai.OpenAI(base_url=base_url, api_key=api_key, timeout=timeout_seconds, max_retries=max_retries, http_client=plain)

    def ask(self, prompt: Asked, *, thinking_budget: int | None = None, thinking: bool | None = None, max_tokens: int = 512,
            temperature: float = 0.0, top_p: float = 1.0) -> Reply:  # fmt: skip
        """The whole reply to a user's message, or to a conversation [{role, content}, …]; greedy at temperature 0.

        thinking_budget: most tokens of reasoning; then it is closed and the answer goes on; None: no limit. Under a budget, reasoning that
        the template leaves to the model to open is opened here · thinking: through the template's switch · max_tokens: of the whole reply.
        Raises ValueError for what the caller can mend, ConnectionError where no server answers or it fails, TimeoutError.
        """
        request = {"temperature": temperature, "top_p": top_p, "stream": False}
        pieces = self._reply(prompt, thinking_budget, thinking, max_tokens, request)
        while True:
            try:
                next(pieces)
            except StopIteration as end:
                return end.value

    def stream(self, prompt: Asked, *, thinking_budget: int | None = None, thinking: bool | None = None, max_tokens: int = 512,
               temperature: float = 0.0, top_p: float = 1.0) -> Generator[str, None, Reply]:  # fmt: skip
        """The reply's text as it comes, piece by piece; the generator returns the Reply (`reply = yield from client.stream(…)`)."""
        request = {"temperature": temperature, "top_p": top_p, "stream": True, "stream_options": {"include_usage": True}}
        return self._reply(prompt, thinking_budget, thinking, max_tokens, request)

    def _reply(self, prompt: Asked, budget: int | None, thinking: bool | None, max_tokens: int, request: Mapping[str, Any]) -> Generator[str, None, Reply]:
        begun = self._begin(prompt, budget, thinking, max_tokens)
        before, reasons = begun.text, begun.is_open
        first = max_tokens if budget is None or not reasons else min(budget, max_tokens)
        made = (yield from self._go_on(before, first, request)) if first else Made("", 0, Ending.cut)
        text, last, left, closed_here, started, closing = made.text, made, max_tokens - made.tokens, False, 0, ""
        if first < max_tokens and made.ending is Ending.cut:
            if self._tags.closing not in text:
                started, closing = self._rest_of_closing(text)
                closed_here, text, left = True, text + closing, left - self._count(closing)
                yield closing
            if left > 0:
                last = yield from self._go_on(before + text, left, request)
                text += last.text
        reasoning, answer = _parts(text, self._tags, is_open=reasons)
        tokens = made.tokens - started if closed_here else self._count(reasoning)
        note = self._prompt_note(before, made) if first else self._prompt_note(before + closing, last)
        return Reply(text, reasoning, answer, tokens, closed_here, last.ending is Ending.ended, last.stopped, note)

    def _begin(self, prompt: Asked, budget: int | None, thinking: bool | None, max_tokens: int) -> Prompt:
        """What the model is to go on from. Raises ValueError."""
        if budget is not None and budget < 0:
            raise ValueError(f"thinking_budget is {budget}; it must be at least 0 (None: no limit)")
        if max_tokens < 1:
            raise ValueError(f"max_tokens is {max_tokens}; it must be at least 1")
        written = make_prompt(self._tokenizer, prompt, thinking, self._tags)
        if budget is not None and thinking is not False and not written.is_open and not written.is_closed:
            written = Prompt(written.text + self._tags.opening, is_open=True)
        length = self._count(written.text)
        if self._context_tokens is not None and length + max_tokens > self._context_tokens:
            raise ValueError(f"the prompt has {length:,} tokens and max_tokens is {max_tokens:,}; together they must be at most {self._context_tokens:,}")
        return written

    def _go_on(self, text: str, max_tokens: int, request: Mapping[str, Any]) -> Generator[str, None, Made]:
        """One request; yields what comes, piece by piece where it is streamed."""
        with in_one_line(self._base_url, self._timeout_seconds):
            got = self._ask({"prompt": self._sent(text), "max_tokens": max_tokens, **request})
            return (yield from read_pieces(got if request["stream"] else [got], max_tokens, self._count))

    def _ask(self, request: Mapping[str, Any]) -> Any:
        """What the server answers; a server that knows no `stream_options` is asked without, and gives no token counts then."""
        try:
            return self._server.completions.create(model=self._model, extra_body=self._extra_body, **request)
        except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
            if "stream_options" not in request or "stream_options" not in str(error.body):
                raise
        without = {name: value for name, value in request.items() if name != "stream_options"}
        return self._server.completions.create(model=self._model, extra_body=self._extra_body, **without)

    def _prompt_note(self, prompt: str, made: Made) -> str:
        """Whether the server read more of a prompt than was sent: most likely it put it into the chat template once more."""
        ours = len(self._tokenizer(self._sent(prompt))["input_ids"])
        if made.prompt_tokens is None or made.prompt_tokens <= ours + 1:  # one: a beginning of the text that the tokenizer here does not add
            return ""
        return (f"the server at {without_secrets(self._base_url)} counts {made.prompt_tokens:,} tokens in a prompt of {ours:,}: it seems to apply a chat "
                "template to what has been through one; serve the completions endpoint without a template")  # fmt: skip

    def _sent(self, text: str) -> str:
        """Without a beginning-of-text token that the server's tokenizer will put in front by itself."""
        bos = self._tokenizer.bos_token
        adds = bool(bos) and self._tokenizer("")["input_ids"][:1] == [self._tokenizer.bos_token_id]
        return text.removeprefix(bos) if adds else text

    def _rest_of_closing(self, text: str) -> tuple[int, str]:
        """How many tokens of the closing tag a text ends in already, and the rest of the tag."""
        _, ids = self._tags.ids(self._tokenizer)
        for begun in range(len(ids) - 1, 0, -1):
            part = self._tokenizer.decode(ids[:begun])
            if text.endswith(part):
                return begun, self._tags.closing[len(part) :]
        return 0, self._tags.closing

    def _count(self, text: str) -> int:
        return len(self._tokenizer(text, add_special_tokens=False)["input_ids"])


def _parts(text: str, tags: Tags, *, is_open: bool) -> tuple[str, str]:
    """Reasoning and answer of a reply; a model may have opened its reasoning itself."""
    own = text.lstrip()
    if not is_open and not own.startswith(tags.opening):
        return "", text
    reasoning, _, answer = (text if is_open else own.removeprefix(tags.opening)).partition(tags.closing)
    return reasoning, answer


def _check_tags(tokenizer: PreTrainedTokenizerBase, tags: Tags, *, hidden: bool) -> None:
    """Refuse tags that the tokenizer does not have, or that a server leaves out of its text. Raises ValueError."""
    for tag, ids in zip((tags.opening, tags.closing), tags.ids(tokenizer), strict=True):
        if not tag or tokenizer.decode(ids) != tag:
            raise ValueError(f"the tokenizer has no tokens for the thinking tag {tag!r}; name the tags that it knows, e.g. tags=Tags('<think>', '</think>')")
        if hidden and tokenizer.decode(ids, skip_special_tokens=True) != tag:
            raise ValueError(f"the thinking tag {tag!r} is a special token, which servers leave out of their text; "
                             "vLLM shows it with extra_body={'skip_special_tokens': False}")  # fmt: skip


def _positions(folder: Path) -> int | None:
    path = folder / "config.json"
    try:
        found = read_json(path).get("max_position_embeddings") if path.is_file() else None
    except (OSError, ValueError, AttributeError):
        raise ValueError(f"tokenizer is {str(folder)!r}, but its config.json is no JSON object") from None
    return found if isinstance(found, int) and found > 0 else None
