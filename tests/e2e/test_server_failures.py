"""A value model that gives NaN on some requests: those are answered with an error, all others go on, exact."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI

from real_server.checking import Oracle, Returned, encode
from real_server.models import make_overflowing_value_model
from real_server.process import RunningServer
from real_server.state import versions
from real_server.streams import collect

POISON = "="
"""Value model ``fragile`` is NaN on every history with this character."""
(POISON_ID,) = encode(POISON)
FRAGILE = {"guidance": {"value_model": "fragile"}}
HEALTHY = {"logit_bias": {str(POISON_ID): -100}}
REASON = "guidance failed in value model fragile@1: its values were not finite numbers"
LONG = 4000
ROUTES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": f"a{POISON}b"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": f"a{POISON}b"}]},
}


@pytest.fixture(scope="module")
def fragile(server: RunningServer, models: Path, oracle: Oracle) -> RunningServer:
    """The server with the value model ``fragile`` published."""
    directory = make_overflowing_value_model(models / "published" / "fragile", POISON_ID, seed=90)
    response = server.post("/v1/guidance/value_models", {"name": "fragile", "path": "fragile"})
    assert response.status_code == 200, response.text
    oracle.directories["fragile@1"] = directory
    return server


@pytest.fixture
def post(fragile: RunningServer, idle: RunningServer) -> Any:
    def send(path: str = "/v1/completions", **body: Any) -> httpx.Response:
        asked = {"model": idle.model, **ROUTES[path], "max_tokens": 20, **FRAGILE, **body}
        return idle.post(path, asked)

    return send


def metric(server: RunningServer, name: str, **labels: str) -> float:
    """The sum of a counter over the label sets that have all of ``labels``."""
    lines = re.findall(rf"^{re.escape(name)}\{{(.*)\}} (\S+)$", server.get("/metrics").text, re.MULTILINE)
    wanted = [f'{key}="{label}"' for key, label in labels.items()]
    return sum(float(value) for labelled, value in lines if all(label in labelled for label in wanted))


def failures(server: RunningServer) -> float:
    labels = {"value_model": "fragile", "version": "1", "kind": "nan"}
    return metric(server, "qtilt_guidance_failures_total", **labels)


def assert_failed(response: httpx.Response) -> None:
    assert response.status_code == 500, response.text
    error = response.json()["error"]
    assert error["message"].startswith(REASON)
    assert error["type"] == "InternalServerError"
    assert error["code"] == 500


def events(response: httpx.Response) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: ")]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


def assert_stream_failed(response: httpx.Response) -> list[Any]:
    """The last event is the error, no choice has finished; returns the events before it."""
    *before, last = events(response)
    assert last["error"]["message"].startswith(REASON)
    assert last["error"]["type"] == "InternalServerError"
    assert last["error"]["code"] == 500
    assert all(choice["finish_reason"] is None for chunk in before for choice in chunk["choices"])
    return before


@contextmanager
def healthy_beside(client: OpenAI, server: RunningServer, oracle: Oracle) -> Iterator[None]:
    """Streams that run through the block, guided by ``fragile``, by another value model and by none, are exact."""
    blocks = [{"value_model": "fragile"}, {"value_model": "value"}, None]
    streams = [
        client.completions.create(
            model=server.model,
            prompt="beside",
            max_tokens=150,
            logprobs=0,
            stream=True,
            logit_bias=HEALTHY["logit_bias"] if block and block["value_model"] == "fragile" else None,
            extra_body={"guidance": block, "return_token_ids": True, "ignore_eos": True},
        )
        for block in blocks
    ]
    yield
    for stream, block in zip(streams, blocks, strict=True):
        (choice,) = collect(stream).choices.values()
        assert choice.finish_reason == "length"
        assert len(choice.token_ids) == 150
        if block is None or block["value_model"] != "fragile":  # the oracle knows no logit bias
            returned = Returned(encode("beside"), choice.token_ids, choice.logprobs, choice.guidance)
            oracle.check(returned, choice.applied)


@pytest.mark.parametrize("route", ROUTES)
def test_a_failed_request_is_a_500_that_says_so_and_others_go_on(
    post: Any, client: OpenAI, idle: RunningServer, oracle: Oracle, route: str
) -> None:
    before, said = failures(idle), versions(idle, "fragile")[1]["failed"]
    with healthy_beside(client, idle, oracle):
        for _ in range(3):
            assert_failed(post(route))
    assert failures(idle) == before + 3
    assert versions(idle, "fragile")[1]["failed"] == said + 3


@pytest.mark.parametrize("route", ROUTES)
def test_a_failed_stream_ends_with_an_error_event(post: Any, idle: RunningServer, route: str) -> None:
    before = failures(idle)
    chunks = assert_stream_failed(post(route, stream=True))
    assert not any(choice.get("text") for chunk in chunks for choice in chunk["choices"])
    assert failures(idle) == before + 1


def test_the_official_client_raises(post: Any, client: OpenAI, idle: RunningServer) -> None:
    ask: dict[str, Any] = {"model": idle.model, "prompt": f"a{POISON}", "extra_body": FRAGILE}
    with pytest.raises(openai.InternalServerError, match=REASON):
        client.completions.create(**ask)
    with pytest.raises(openai.APIError, match=REASON):
        collect(client.completions.create(**ask, stream=True))


@pytest.mark.parametrize("stream", [False, True])
def test_all_choices_fail_together(post: Any, idle: RunningServer, stream: bool) -> None:
    before = failures(idle)
    for body in ({"n": 2}, {"prompt": ["abc", f"a{POISON}", "d"]}, {"n": 2, "prompt": [f"{POISON}a", f"a{POISON}"]}):
        response = post(**body, stream=stream, ignore_eos=True, max_tokens=LONG, **HEALTHY)
        if stream:
            assert_stream_failed(response)
        else:
            assert_failed(response)
    assert failures(idle) == before + 3, "requests are counted, not choices"


@pytest.mark.parametrize("stream", [False, True])
def test_one_failed_choice_fails_its_request_although_the_others_run_on(
    post: Any, idle: RunningServer, stream: bool
) -> None:
    """A choice fails when it samples the poison, at another time than its siblings."""
    generated = metric(idle, "vllm:generation_tokens_total")
    sampled = {"prompt": "abc", "n": 4, "seed": 3, "logit_bias": {str(POISON_ID): 2}}
    response = post(**sampled, stream=stream, ignore_eos=True, max_tokens=LONG)
    if stream:
        assert_stream_failed(response)
    else:
        assert_failed(response)
    assert metric(idle, "vllm:generation_tokens_total") - generated < LONG


@pytest.mark.parametrize("stream", [False, True])
def test_a_failed_request_that_no_token_ends_is_aborted(post: Any, idle: RunningServer, stream: bool) -> None:
    """Nothing but max_tokens would end it, long after the server has noticed."""
    generated = metric(idle, "vllm:generation_tokens_total")
    response = post(ignore_eos=True, max_tokens=LONG, stream=stream)
    if stream:
        assert_stream_failed(response)
    else:
        assert_failed(response)
    assert metric(idle, "vllm:generation_tokens_total") - generated < LONG


def test_a_request_with_the_same_id_as_an_aborted_one_goes_on(
    client: OpenAI, fragile: RunningServer, idle: RunningServer
) -> None:
    """Clients choose ids, a proxy may give all requests one."""
    same: dict[str, Any] = {"model": idle.model, "extra_headers": {"X-Request-Id": "same"}, "stream": True}
    healthy = client.completions.create(**same, prompt="beside", max_tokens=LONG // 4, extra_body={"ignore_eos": True})
    with pytest.raises(openai.APIError, match=REASON):
        collect(
            client.completions.create(
                **same, prompt=f"a{POISON}", max_tokens=LONG, extra_body={**FRAGILE, "ignore_eos": True}
            )
        )
    (choice,) = collect(healthy).choices.values()
    assert choice.finish_reason == "length"


@pytest.mark.parametrize(
    "body",
    [
        {"min_tokens": LONG, "max_tokens": LONG},
        {"stop_token_ids": [3], "ignore_eos": True, "max_tokens": LONG},
        {"temperature": 0, "max_tokens": LONG},
        {"logit_bias": {"0": 100}, "max_tokens": LONG},
        {"allowed_token_ids": [1, 2], "max_tokens": LONG},
        {"structured_outputs": {"regex": "[ab]{3000}"}, "max_tokens": LONG},
        {"structured_outputs": {"regex": "[ab]{3000}"}, "max_tokens": LONG, "ignore_eos": True},
        {"echo": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("stream", [False, True])
def test_whatever_is_asked_for_nothing_is_generated_after_the_failure(
    post: Any, idle: RunningServer, body: dict[str, Any], stream: bool
) -> None:
    """But one token a request: what the step that failed has sampled."""
    generated = metric(idle, "vllm:generation_tokens_total")
    response = post(**body, stream=stream)
    if stream:
        assert_stream_failed(response)
    else:
        assert_failed(response)
    if "ignore_eos" not in body or "stop_token_ids" in body:
        assert metric(idle, "vllm:generation_tokens_total") - generated <= 2


def test_the_prompt_alone_is_no_failure(post: Any) -> None:
    """vLLM generates a token for ``echo`` with ``max_tokens`` 0 and returns none."""
    response = post(echo=True, max_tokens=0)
    assert response.status_code == 200
    assert response.json()["choices"][0]["text"] == ROUTES["/v1/completions"]["prompt"]


def test_tokens_drawn_by_the_reference_are_no_failure(post: Any) -> None:
    response = post(guidance={"value_model": "fragile", "guided_tokens": 0})
    assert response.status_code == 200


def test_the_server_answers_exactly_after_all_that(
    post: Any, client: OpenAI, idle: RunningServer, oracle: Oracle
) -> None:
    """The same version that has failed requests guides others."""
    for _ in range(3):
        assert_failed(post())
    response: Any = client.completions.create(
        model=idle.model,
        prompt="abc",
        max_tokens=10,
        logprobs=0,
        temperature=0,
        extra_body={**FRAGILE, "return_token_ids": True},
    )
    (choice,) = response.choices
    assert POISON_ID not in choice.token_ids
    returned = Returned(encode("abc"), choice.token_ids, choice.logprobs.token_logprobs, choice.guidance)
    oracle.check(returned, response.guidance, temperature=0)
