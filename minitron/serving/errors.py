"""What can go wrong between a client and its server, in one line each."""

from collections.abc import Iterator
from contextlib import contextmanager

import openai


@contextmanager
def in_one_line(url: str, timeout_seconds: float) -> Iterator[None]:
    """The openai package's errors as Python's own: ValueError where the request is at fault, else ConnectionError or TimeoutError."""
    try:
        yield
    except openai.APITimeoutError:
        raise TimeoutError(f"the server at {url} said nothing for {timeout_seconds:g} s; timeout_seconds gives it longer") from None
    except openai.APIConnectionError as error:
        raise ConnectionError(f"no answer from {url}: {_first_line(error.__cause__ or error)}") from None
    except openai.APIStatusError as error:
        said = f"({error.status_code}): {_first_line(_detail(error))}"
        if 400 <= error.status_code < 500:
            raise ValueError(f"the server at {url} refuses the request {said}") from None
        raise ConnectionError(f"the server at {url} failed {said}") from None
    except openai.APIError as error:  # it came in the middle of a stream
        raise ConnectionError(f"the server at {url} broke off: {_first_line(error.body or error)}") from None


def _detail(error: openai.APIStatusError) -> object:
    """The server's own words: vLLM and OpenAI say message, FastAPI detail."""
    body = error.body if isinstance(error.body, dict) else {}
    return body.get("message") or body.get("detail") or error.message


def _first_line(said: object) -> str:
    return (str(said).strip() or type(said).__name__).splitlines()[0]
