"""Every bad input is an HTTP 400 in the OpenAI error shape, also when streaming; the server goes on afterwards."""

import re
from collections.abc import Callable
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI

from guided_vllm.matrix import covers
from real_server.process import RunningServer

BAD_BLOCKS: dict[str, Any] = {
    "unknown key": {"etta": 0.1},
    "eta 0": {"eta": 0},
    "eta negative": {"eta": -0.1},
    "eta too small": {"eta": 1e-30},
    "eta infinite": {"eta": float("inf")},
    "eta NaN": {"eta": float("nan")},
    "eta huge integer": {"eta": 10**400},
    "eta bool": {"eta": True},
    "eta string": {"eta": "0.1"},
    "top_k 0": {"top_k": 0},
    "top_k beyond the limit": {"top_k": 65},
    "top_k huge": {"top_k": 10**30},
    "top_k bool": {"top_k": True},
    "top_k fraction": {"top_k": 2.5},
    "top_k float": {"top_k": 2.0},
    "method unknown": {"method": "vas"},
    "method number": {"method": 1},
    "tail unknown": {"tail": "average"},
    "tail bool": {"tail": True},
    "guided_tokens negative": {"guided_tokens": -1},
    "guided_tokens bool": {"guided_tokens": False},
    "guided_tokens fraction": {"guided_tokens": 1.5},
    "guided_tokens huge": {"guided_tokens": 10**30},
    "kl_budget 0": {"kl_budget": 0},
    "kl_budget negative": {"kl_budget": -0.1},
    "kl_budget infinite": {"kl_budget": float("inf")},
    "kl_budget NaN": {"kl_budget": float("nan")},
    "kl_budget string": {"kl_budget": "1"},
    "details number": {"details": 1},
    "candidate_mass negative": {"candidate_mass": -1e-3},
    "candidate_mass 0": {"candidate_mass": 0},
    "candidate_mass above 1": {"candidate_mass": 1.001},
    "candidate_mass infinite": {"candidate_mass": float("inf")},
    "candidate_mass NaN": {"candidate_mass": float("nan")},
    "candidate_mass bool": {"candidate_mass": True},
    "candidate_mass string": {"candidate_mass": "0.9"},
    "value_model unknown": {"value_model": "nobody"},
    "value_model number": {"value_model": 1},
    "version unknown": {"value_model": "value@999"},
    "version malformed": {"value_model": "value@one"},
    "version empty": {"value_model": "value@"},
    "a list": [],
    "a string": "qsharp",
    "a bool": True,
    "a number": 0.1,
}
COMPLETION = {"prompt": "abc", "max_tokens": 3}
CHAT = {"messages": [{"role": "user", "content": "abc"}], "max_tokens": 3}
ROUTES = {"/v1/completions": COMPLETION, "/v1/chat/completions": CHAT}


@pytest.fixture
def post(idle: RunningServer) -> Callable[..., httpx.Response]:
    import json

    def send(path: str, body: dict[str, Any]) -> httpx.Response:
        # httpx refuses to write NaN and Infinity; a client may well send them.
        content = json.dumps({"model": idle.model, **body})
        return httpx.post(
            f"{idle.origin}{path}", content=content, headers={"content-type": "application/json"}, timeout=60
        )

    return send


def assert_refused(response: httpx.Response, mentions: str = "guid") -> None:
    assert response.status_code == 400, response.text
    assert response.headers["content-type"].startswith("application/json")
    error = response.json()["error"]
    assert {"message", "type", "param", "code"} <= set(error)
    assert error["code"] == 400
    assert mentions in error["message"] + str(error["param"])


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", BAD_BLOCKS)
def test_a_bad_block_is_refused(post: Callable[..., httpx.Response], name: str, route: str, stream: bool) -> None:
    assert_refused(post(route, {**ROUTES[route], "stream": stream, "guidance": BAD_BLOCKS[name]}))


MISPLACED: dict[str, Any] = {
    "extra_body.guidance": {"extra_body": {"guidance": {"eta": 0.1}}},
    "Guidance": {"Guidance": {"eta": 0.1}},
    "guidence": {"guidence": {}},
    "sampling_params.guidance": {"sampling_params": {"guidance": {}}},
    "vllm_xargs.guidance": {"vllm_xargs": {"guidance": "{}"}},
    "eta": {"guidance": {}, "eta": 0.1},
}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("place", MISPLACED)
def test_guidance_in_a_place_where_nobody_reads_it_is_refused(
    post: Callable[..., httpx.Response], place: str, route: str, stream: bool
) -> None:
    response = post(route, {**ROUTES[route], "stream": stream, **MISPLACED[place]})
    assert_refused(response, mentions="goes into the field 'guidance' at the top level")
    assert response.json()["error"]["param"] == place


def test_of_other_routes_too(post: Callable[..., httpx.Response]) -> None:
    body = {"messages": CHAT["messages"], "max_tokens": 3}
    assert_refused(post("/v1/messages", {**body, "Guidance": {}}), mentions="isn't available on /v1/messages")
    assert_refused(post("/v1/messages", {**body, "extra_body": {"guidance": {}}}), mentions="extra_body.guidance")


def test_the_official_client_raises_bad_request(client: OpenAI, idle: RunningServer) -> None:
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError, match="unknown value model 'nobody'; loaded: value@"):
            client.completions.create(
                model=idle.model, prompt="a", stream=stream, extra_body={"guidance": {"value_model": "nobody"}}
            )


@pytest.mark.parametrize("route", ROUTES)
def test_what_was_given_and_what_is_allowed_is_said(post: Callable[..., httpx.Response], route: str) -> None:
    response = post(route, {**ROUTES[route], "guidance": {"tail": "average"}})
    for mentioned in ("guidance", "tail", "average", "'floor' or 'mean'"):
        assert_refused(response, mentions=mentioned)


@covers("beam search", engines=["sync"], refused="it drops what guidance travels in: HTTP 400")
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("route", ROUTES)
def test_beam_search_is_refused(post: Callable[..., httpx.Response], route: str, stream: bool) -> None:
    assert_refused(post(route, {**ROUTES[route], "stream": stream, "use_beam_search": True, "guidance": {}}))


@covers("prompt embeddings", engines=["sync"], refused="a value model needs tokens: HTTP 400")
@pytest.mark.parametrize("prompt", [None, "abc"])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_prompt_embeddings_are_refused(post: Callable[..., httpx.Response], prompt: str | None, stream: bool) -> None:
    body = {"prompt": prompt, "prompt_embeds": _embeddings(), "max_tokens": 2, "stream": stream}
    assert_refused(post("/v1/completions", {**body, "guidance": {}}))


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_prompt_embeddings_in_a_chat_are_refused(post: Callable[..., httpx.Response], stream: bool) -> None:
    content = [{"type": "prompt_embeds", "data": _embeddings()}]
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": 2, "stream": stream}
    assert post("/v1/chat/completions", {**body, "guidance": {}}).status_code == 400


@pytest.mark.parametrize("route", ROUTES)
def test_the_arguments_guidance_travels_in_are_not_for_clients(post: Callable[..., httpx.Response], route: str) -> None:
    assert_refused(post(route, {**ROUTES[route], "vllm_xargs": {"qtilt": "{}"}}), mentions="vllm_xargs")
    smuggled = {"value_model": "value", "version": 1, "eta": 0.1, "top_k": 5}
    body = {"token_ids": [1, 2], "sampling_params": {"max_tokens": 2, "extra_args": {"qtilt": smuggled}}}
    assert_refused(post("/inference/v1/generate", body), mentions="extra_args")


def test_no_other_route_takes_guidance(post: Callable[..., httpx.Response], idle: RunningServer) -> None:
    posts = re.findall(r"Route: (\S+), Methods: .*POST", idle.log.read_text())
    others = [path for path in posts if path not in ROUTES]
    assert {"/v1/responses", "/v1/messages", "/invocations", "/inference/v1/generate"} <= set(others)
    assert "/v1/chat/completions/batch" in others
    for path in others:
        assert_refused(post(path.replace("{response_id}", "x"), {"input": "a", "guidance": {}}))


def test_other_routes_work_without_guidance(post: Callable[..., httpx.Response]) -> None:
    body = {"input": "abc", "max_output_tokens": 16, "guidance": None}
    assert post("/v1/responses", body).status_code == 200
    assert post("/invocations", {**COMPLETION}).status_code == 200
    assert post("/tokenize", {"prompt": "guidance"}).status_code == 200


def _embeddings() -> str:
    import base64
    import io

    import torch

    buffer = io.BytesIO()
    torch.save(torch.zeros(3, 64), buffer)
    return base64.b64encode(buffer.getvalue()).decode()
