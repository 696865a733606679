"""What can go wrong between a client and its server, in one line each."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import openai

from minitron.walk.shown import without_secrets

MOST_CHARACTERS = 300  # of what a server says
BUSY = (408, 409, 425, 429)  # statuses of a request that is right, at a wrong time


class NoCompletion(Exception):
    """What a server sent is no completion; says what it did."""


class TooLong(NoCompletion):
    """A server has not come to an end."""


@contextmanager
def in_one_line(url: str, timeout_seconds: float) -> Iterator[None]:
    """The openai package's errors as Python's own: ValueError where the request is at fault, else ConnectionError or TimeoutError.

    What a server sends may be anything: what cannot be read of it is its fault too.
    """
    url = without_secrets(url)
    try:
        yield
    except openai.APITimeoutError:
        raise TimeoutError(f"the server at {url} said nothing for {timeout_seconds:g} s; timeout_seconds gives it longer") from None
    except openai.APIConnectionError as error:
        raise ConnectionError(f"no answer from {url}: {said(error.__cause__ or error)}") from None
    except openai.APIStatusError as error:
        reason = f"({error.status_code}): {said(error.body) or said(error.message)}"
        if error.status_code in BUSY:
            raise ConnectionError(f"the server at {url} takes no request now {reason}{_asked_to_wait(error)}") from None
        if 400 <= error.status_code < 500:
            raise ValueError(f"the server at {url} refuses the request {reason}") from None
        raise ConnectionError(f"the server at {url} failed {reason}") from None
    except openai.APIError as error:  # it came in the middle of a stream
        raise ConnectionError(f"the server at {url} broke off: {said(error.body) or said(error)}") from None
    except TooLong as error:
        raise TimeoutError(f"the server at {url} {error}") from None
    except NoCompletion as error:
        raise ConnectionError(f"the server at {url} {error}") from None
    except json.JSONDecodeError as error:
        raise ConnectionError(f"the server at {url} sent what is no JSON: {said(error.doc[:MOST_CHARACTERS]) or 'nothing'}") from None
    except UnicodeDecodeError as error:
        raise ConnectionError(f"the server at {url} sent bytes that are no UTF-8 ({error.reason})") from None
    except RecursionError:
        raise ConnectionError(f"the server at {url} sent JSON that is nested too deeply") from None
    except (ValueError, TypeError, AttributeError, LookupError) as error:
        raise ConnectionError(f"the server at {url} sent what cannot be read: {said(error)}") from None


def _asked_to_wait(error: openai.APIStatusError) -> str:
    """What a server says of when to come again; the openai package has waited for it already where it is at most a minute."""
    wait = error.response.headers.get("retry-after", "").strip()[:40]
    return f"; it asks to come again {f'in {wait} s' if wait.isdigit() else f'at {wait}'}" if wait.isprintable() and wait else ""


def said(body: object) -> str:
    """The sentence in what a server sent, in one line; "" where there is none. Servers put it in error, message, detail, msg, title or errors, in any depth."""
    if isinstance(body, Mapping):
        for name in ("error", "message", "detail", "msg", "title", "errors", "reason"):
            if sentence := said(body.get(name)):
                return sentence
        return without_secrets(json.dumps(body, default=str)[:MOST_CHARACTERS]) if body else ""
    if isinstance(body, list | tuple):
        return "; ".join(filter(None, map(said, body)))[:MOST_CHARACTERS]
    lines = [] if body is None else str(body).strip().splitlines()
    first = without_secrets(lines[0].strip()[:MOST_CHARACTERS]) if lines else ""  # a server may repeat the key that it refuses
    return first or (type(body).__name__ if isinstance(body, BaseException) else "")
