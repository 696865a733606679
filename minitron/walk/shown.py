"""What may be read in a terminal, a log, a card or a summary: no tokens and keys of the environment or in addresses, and nothing that a terminal obeys."""

import os
import re
from collections.abc import Mapping
from typing import Any

# Of environment variables that hold something secret, by the ends of their names: HF_TOKEN, WANDB_API_KEY, OPENAI_API_KEY, AWS_SECRET_ACCESS_KEY, …
SECRET_NAMES = re.compile(r"(TOKEN|API_?KEY|ACCESS_KEY|SECRET|PASSWORD|PASSWD)$", re.IGNORECASE)
LEAST_LETTERS = 8  # of a value that is told from a word by chance
IN_ADDRESS = re.compile(r"(?<=://)[^\s/@'\"]+@")  # user:password@
IN_QUERY = re.compile(r"([?&][\w.-]*(?:token|key|secret|signature|password|credential)[\w.-]*=)[^&\s'\"#]+", re.IGNORECASE)
KNOWN_FORMS = re.compile(r"\b(?:hf_[A-Za-z0-9]{30,}|sk-[A-Za-z0-9_-]{20,}|wandb_v1_[A-Za-z0-9_]{20,})")  # of the Hub, OpenAI, wandb
HIDDEN = "(hidden)"
# Control characters but newline and tab, what turns the direction of writing round, and halves of a character.
OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def shown(text: str) -> str:
    """A text for a terminal: without secrets, and with what a terminal would obey as signs: ␛, <U+202E>."""
    return OBEYED.sub(lambda found: sign_of(found[0]), without_secrets(text))


def sign_of(character: str) -> str:
    """What stands for a character that nobody would see."""
    if character < " ":
        return chr(0x2400 + ord(character))
    return "␡" if character == "\x7f" else f"<U+{ord(character):04X}>"


def without_secrets(text: str) -> str:
    """The text with the values of secret environment variables, and what looks like a token or a password in an address, hidden."""
    for name, value in os.environ.items():
        if SECRET_NAMES.search(name) and len(value) >= LEAST_LETTERS and value in text:
            text = text.replace(value, HIDDEN)
    text = IN_QUERY.sub(rf"\g<1>{HIDDEN}", IN_ADDRESS.sub(f"{HIDDEN}@", text))
    return KNOWN_FORMS.sub(HIDDEN, text)


def all_without_secrets(value: Any) -> Any:
    """The same of every text in a value as JSON has it, keys included."""
    if isinstance(value, str):
        return without_secrets(value)
    if isinstance(value, Mapping):
        return {all_without_secrets(key): all_without_secrets(one) for key, one in value.items()}
    return [all_without_secrets(one) for one in value] if isinstance(value, list | tuple) else value


def escaped(text: str) -> str:
    """Text whose characters are no Markdown."""
    return re.sub(r"([\\`*_\[\]<>|#~])", r"\\\1", text)
