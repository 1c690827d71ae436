"""--guidance-log: a line of JSON for each guided request, with what its answer says, and nothing of what was asked."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI

from real_server.checking import encode
from real_server.models import make_overflowing_value_model
from real_server.process import RunningServer, running_server

POISON = "="
PROMPT = "nobody may read this"


@pytest.fixture(scope="module")
def logged(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[RunningServer, Path]]:
    """A server of its own, and its log."""
    directory = tmp_path_factory.mktemp("logged")
    root = models / "published"
    fragile = make_overflowing_value_model(directory / "fragile", encode(POISON)[0], seed=7)
    log = directory / "guidance.jsonl"
    flags = (
        f"--value-model=value={root / 'start'}",
        f"--value-model=fragile={fragile}",
        f"--guidance-log={log}",
        "--api-key=secret-of-clients",
        "--admin-key=secret-of-admins",
    )
    with running_server(models / "reference", root, directory / "server.log", *flags) as server:
        yield server, log


@pytest.fixture
def client(logged: tuple[RunningServer, Path]) -> Iterator[OpenAI]:
    with OpenAI(base_url=logged[0].base_url, api_key="secret-of-clients", max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture
def lines(logged: tuple[RunningServer, Path]) -> Any:
    """Those that have come since the test began; waits until there are so many."""
    server, log = logged
    before = len(log.read_text().splitlines())

    def read(count: int) -> list[dict[str, Any]]:
        server.wait_until(lambda: len(log.read_text().splitlines()) >= before + count)
        time.sleep(0.2)
        new = log.read_text().splitlines()[before:]
        assert len(new) == count
        return [json.loads(line) for line in new]

    return read


def ask(client: OpenAI, server: RunningServer, *, guidance: dict[str, Any] | None = None, **more: Any) -> Any:
    body = {"ignore_eos": True, "guidance": {} if guidance is None else guidance}
    asked = {"model": server.model, "prompt": PROMPT, "max_tokens": 5, **more}
    return client.completions.create(**asked, extra_body=body)


def test_a_line_says_what_the_answer_says(logged: Any, client: OpenAI, lines: Any) -> None:
    answer = ask(client, logged[0], n=2, extra_headers={"X-Request-Id": "mine"}, guidance={"eta": 0.5, "top_k": 4})
    (line,) = lines(1)
    assert answer.id.startswith(line["id"])
    assert (line["client_id"], line["route"], line["outcome"]) == ("mine", "/v1/completions", "finished")
    assert (line["value_model"], line["version"]) == ("value", 1)
    assert (line["method"], line["eta"], line["top_k"], line["tail"]) == ("qsharp", 0.5, 4, "mean")
    details = answer.usage.completion_tokens_details
    assert line["guided_tokens"] == details.guided_tokens == 10
    assert (line["kl"], line["kl_candidates"]) == (details.guidance_kl, details.guidance_kl_candidates)
    assert 0 < line["seconds"] < 60


def test_a_stream_has_a_line_too(logged: Any, client: OpenAI, lines: Any) -> None:
    stream = client.chat.completions.create(
        model=logged[0].model,
        messages=[{"role": "user", "content": PROMPT}],
        max_tokens=4,
        stream=True,
        extra_body={"guidance": {}, "ignore_eos": True},
    )
    chunks = list(stream)
    (line,) = lines(1)
    assert (line["id"], line["client_id"], line["route"]) == (chunks[0].id, None, "/v1/chat/completions")
    assert (line["outcome"], line["guided_tokens"]) == ("finished", 4)


def test_outcomes_of_requests_that_do_not_finish(logged: Any, client: OpenAI, lines: Any) -> None:
    with pytest.raises(openai.InternalServerError):
        ask(client, logged[0], prompt=f"a{POISON}b", guidance={"value_model": "fragile"})
    with pytest.raises(openai.BadRequestError):
        ask(client, logged[0], max_tokens=10**6)
    impossible = {"guidance": {}, "allowed_token_ids": [10**6]}
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model=logged[0].model, prompt=PROMPT, extra_body=impossible)
    with ask(client, logged[0], max_tokens=4000, stream=True) as stream:
        next(iter(stream))
    told = lines(4)
    assert [line["outcome"] for line in told] == ["failed", "refused", "refused", "aborted"]
    assert [line["value_model"] for line in told] == ["fragile", "value", "value", "value"]
    assert [line["guided_tokens"] for line in told] == [0, 0, 0, 0]


def test_unguided_requests_and_those_that_name_nothing_have_no_line(logged: Any, client: OpenAI, lines: Any) -> None:
    client.completions.create(model=logged[0].model, prompt=PROMPT, max_tokens=2)
    with pytest.raises(openai.BadRequestError):
        ask(client, logged[0], guidance={"value_model": "unknown"})
    assert httpx.post(f"{logged[0].base_url}/completions", json={"guidance": {}}, timeout=30).status_code == 401
    ask(client, logged[0])
    lines(1)


def test_a_long_or_hostile_id_stays_one_short_line(logged: Any, client: OpenAI, lines: Any) -> None:
    ask(client, logged[0], extra_headers={"X-Request-Id": '"}, {"x": "' + "y" * 5000})
    (line,) = lines(1)
    assert line["client_id"].startswith('"}, {"x": "yyy')
    assert len(json.dumps(line)) < 1000


def test_nothing_of_prompts_answers_or_keys_is_logged(logged: Any, client: OpenAI, lines: Any) -> None:
    ask(client, logged[0])
    lines(1)
    text = logged[1].read_text()
    assert PROMPT not in text
    assert "secret" not in text
    assert {key for line in text.splitlines() for key in json.loads(line)} == {
        "time",
        "id",
        "client_id",
        "route",
        "outcome",
        "seconds",
        "value_model",
        "version",
        "method",
        "eta",
        "top_k",
        "tail",
        "guided_tokens",
        "kl",
        "kl_candidates",
    }
