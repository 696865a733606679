"""What is said anywhere: no secrets, nothing that a terminal obeys."""

import json

import pytest

from minitron.checkpoints.publish import write_companions
from minitron.door.mistakes import users_mistakes
from minitron.walk.console import Console
from minitron.walk.shown import all_without_secrets, shown, without_secrets

SECRETS = {"HF_TOKEN": "hf_" + "a1B2" * 9, "WANDB_API_KEY": "0123456789abcdef" * 2,
           "OPENAI_API_KEY": "mine-and-nobody-elses", "AWS_SECRET_ACCESS_KEY": "s3cr3t/s3c"}


@pytest.fixture
def secrets(monkeypatch) -> str:
    """A sentence that holds them all, and those of addresses."""
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    return f"{' '.join(SECRETS.values())} https://me:passw0rd@host/v1?api_key=k3y-k3y&page=2#x hf_{'Z' * 34} sk-proj-{'z' * 24}"


HIDDEN = (*SECRETS.values(), "passw0rd", "k3y-k3y", "ZZZZ", "zzzz")


def test_no_secret_is_shown(secrets, monkeypatch):
    """The control: other text, other variables and short values stay as they are."""
    monkeypatch.setenv("OTHER_TOKEN", "page")
    said = without_secrets(secrets)
    assert not [value for value in HIDDEN if value in said] and "host/v1?api_key=(hidden)&page=2#x" in said
    plain = "a token of 7, key=value, seed=1, HF_TOKEN, https://host/path?page=2, user@host, sha 0f1e2d3c4b5a69788796a5b4c3d2e1f00f1e2d3c"
    assert shown(plain) == plain


def test_a_value_is_searched_in_depth(secrets):
    found = json.dumps(all_without_secrets({"a": [secrets, {secrets: (1, None, secrets)}], "b": 2}))
    assert not [value for value in HIDDEN if value in found] and '"b": 2' in found


def test_the_terminal_gets_neither_secrets_nor_what_it_obeys(secrets, capsys):
    Console().say(f"{secrets}\x1b]0;title\x07")
    Console().headline("data", f"{secrets}\u202e\ud800")
    with pytest.raises(SystemExit), users_mistakes():
        raise ValueError(f"data.files: x\x1b[2J {secrets}")
    said = "".join(capsys.readouterr())
    assert not [value for value in HIDDEN if value in said] and not set("\x1b\x07\u202e\ud800") & set(said)
    assert "␛]0;title␇" in said and "<U+202E><U+D800>" in said and "error: data.files: x␛[2J" in said


def test_a_card_holds_no_secret(secrets, tmp_path):
    write_companions(tmp_path, config={}, companions=tmp_path, card=f"# Model\n\n{secrets}\n")
    card = (tmp_path / "README.md").read_text()
    assert card.startswith("# Model\n\n") and not [value for value in HIDDEN if value in card]
