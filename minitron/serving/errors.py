"""What can go wrong between a client and its server, in one line each."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import openai

MOST_CHARACTERS = 300  # of what a server says


class NoCompletion(Exception):
    """What a server sent is no completion; says what it did."""


@contextmanager
def in_one_line(url: str, timeout_seconds: float) -> Iterator[None]:
    """The openai package's errors as Python's own: ValueError where the request is at fault, else ConnectionError or TimeoutError."""
    try:
        yield
    except openai.APITimeoutError:
        raise TimeoutError(f"the server at {url} said nothing for {timeout_seconds:g} s; timeout_seconds gives it longer") from None
    except openai.APIConnectionError as error:
        raise ConnectionError(f"no answer from {url}: {said(error.__cause__ or error)}") from None
    except openai.APIStatusError as error:
        reason = f"({error.status_code}): {said(error.body) or said(error.message)}"
        if 400 <= error.status_code < 500:
            raise ValueError(f"the server at {url} refuses the request {reason}") from None
        raise ConnectionError(f"the server at {url} failed {reason}") from None
    except openai.APIError as error:  # it came in the middle of a stream
        raise ConnectionError(f"the server at {url} broke off: {said(error.body) or said(error)}") from None
    except NoCompletion as error:
        raise ConnectionError(f"the server at {url} {error}") from None
    except json.JSONDecodeError as error:
        raise ConnectionError(f"the server at {url} sent what is no JSON: {said(error.doc) or 'nothing'}") from None


def said(body: object) -> str:
    """The sentence in what a server sent, in one line; "" where there is none. Servers put it in error, message, detail, msg, title or errors, in any depth."""
    if isinstance(body, Mapping):
        for name in ("error", "message", "detail", "msg", "title", "errors", "reason"):
            if sentence := said(body.get(name)):
                return sentence
        return json.dumps(body, default=str)[:MOST_CHARACTERS] if body else ""
    if isinstance(body, list | tuple):
        return "; ".join(filter(None, map(said, body)))[:MOST_CHARACTERS]
    lines = [] if body is None else str(body).strip().splitlines()
    first = lines[0].strip()[:MOST_CHARACTERS] if lines else ""
    return first or (type(body).__name__ if isinstance(body, BaseException) else "")
