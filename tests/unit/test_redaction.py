"""Nothing secret is left, and nothing else is taken away."""

from typing import Any

import pytest

from qtilt_trainer.redaction import redacted, without_url_secrets

SECRET = "api_key API_KEY openai_api_key apikey auth_key access-key token hf_token password db-password secret"
SECRET += " client_secret Authorization headers credentials cookie accessToken bearer"


@pytest.mark.parametrize("name", SECRET.split())
def test_fields_with_a_secret_name(name: str) -> None:
    assert redacted({"task": {name: "hush", "x": 1}}) == {"task": {name: "***", "x": 1}}
    assert redacted({name: {"X-Key": "hush"}}) == {name: {"X-Key": "***"}}
    assert redacted({name: None}) == {name: None}


@pytest.mark.parametrize("name", ["max_tokens", "stop_token_ids", "answer_key", "tokenizer", "prompt_field", "monkey"])
def test_other_fields_stay(name: str) -> None:
    value: dict[str, Any] = {name: "shown", "list": [1, {"x": "y"}]}
    assert redacted(value) == value


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://user:hush@host:1/v1?x=1", "http://***@host:1/v1?x=1"),
        ("no server answers at https://hush@h/ (3 tries)", "no server answers at https://***@h/ (3 tries)"),
        ("http://h/score?api_key=hush&k=2", "http://h/score?api_key=***&k=2"),
        ("http://h:8000/v1", "http://h:8000/v1"),
        ("mail me@host.org", "mail me@host.org"),
        ("http://[u:hush@x", "***"),
    ],
)
def test_urls(text: str, shown: str) -> None:
    assert without_url_secrets(text) == shown
    assert redacted({"url": [text]}) == {"url": [shown]}
