"""The guard in front of a small app that echoes what it was sent."""

import asyncio
import json
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from qtilt_server.guard import SESSIONS, GuidanceGuard


class Session:
    def __init__(self) -> None:
        self.closed = 0

    def close(self) -> None:
        self.closed += 1


def app(sessions: list[Session]) -> GuidanceGuard:
    async def echo(request: Request) -> Response:
        session = Session()
        sessions.append(session)
        request.scope.get(SESSIONS, []).append(session)
        if request.headers.get("fail"):
            raise RuntimeError("the route failed")
        return Response(await request.body())

    return GuidanceGuard(Starlette(routes=[Route("/{path:path}", echo, methods=["GET", "POST"])]))


def send(path: str, body: bytes, headers: dict[str, str] | None = None) -> tuple[httpx.Response, list[Session]]:
    sessions: list[Session] = []

    async def go() -> httpx.Response:
        transport = httpx.ASGITransport(app(sessions), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.post(path, content=body, headers=headers)

    return asyncio.run(go()), sessions


REFUSED: list[tuple[str, Any, str]] = [
    ("/v1/responses", {"guidance": {}}, "guidance"),
    ("/v1/responses", {"extra_body": {"value_model": "v"}}, "extra_body.value_model"),
    ("/v1/responses", {"vllm_xargs": {"Guidance": "{}"}}, "vllm_xargs.Guidance"),
    ("/v1/completions/", {"guidance": {}}, "guidance"),
    ("/v1/responses", {"Guidance": {}}, "Guidance"),
    ("/v1/messages", {"model": "m", "guidence": {"eta": 1}}, "guidence"),
    ("/v1/responses", {"extra_body": {"guidance": {}}}, "extra_body.guidance"),
    ("/inference/v1/generate", {"sampling_params": {"guidance": {}}}, "sampling_params.guidance"),
    (
        "/inference/v1/generate",
        {"sampling_params": {"extra_args": {"GUIDANCE": {}}}},
        "sampling_params.extra_args.GUIDANCE",
    ),
    ("/v1/completions", {"vllm_xargs": {"qtilt": "{}"}}, "vllm_xargs"),
    ("/v1/chat/completions", {"vllm_xargs": {"qtilt": 1}}, "vllm_xargs"),
    ("/v1/responses", {"vllm_xargs": {"qtilt": 1}}, "vllm_xargs"),
    ("/inference/v1/generate", {"sampling_params": {"extra_args": {"qtilt": {}}}}, "sampling_params.extra_args"),
]


@pytest.mark.parametrize(("path", "body", "names"), REFUSED)
def test_guidance_that_would_be_ignored_is_refused(path: str, body: Any, names: str) -> None:
    response, sessions = send(path, json.dumps(body).encode())
    assert response.status_code == 400
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == names
    assert not sessions, "the app was reached"


@pytest.mark.parametrize(
    "body",
    [
        rb'{"guid\u0061nce": {}}',
        json.dumps({"guidance": {}}).encode("utf-16"),
        json.dumps({"guidance": {}}).encode("utf-32-le"),
        b'--x\r\nContent-Disposition: form-data; name="guidance"\r\n\r\n{}\r\n--x--\r\n',
    ],
)
def test_no_encoding_hides_it(body: bytes) -> None:
    assert send("/v1/responses", body)[0].status_code == 400


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/responses", b'{"guidance": null, "input": "guidance"}'),
        ("/v1/responses", b'{"metadata": {"guidance": 1}, "vllm_xargs": {"other": 1, "eta": 0.1}}'),
        ("/v1/responses", b'{"guidance": false, "use_guidance": false}'),
        ("/v1/responses", b'{"input": [{"guidance": {}}], "text": {"guidance": {}}, "extra_body": {"guidance": null}}'),
        ("/v1/completions", b'{"guidance": {}}'),
        ("/v1/responses", b'{"guidance": '),
        ("/v1/responses", b'["guidance"]'),
        ("/v1/responses", b"\x00\xff guidance"),
        ("/v1/responses", b"[" * 100_000 + b"guidance"),
        ("/v1/responses", b""),
    ],
)
def test_everything_else_passes_unchanged_and_its_sessions_are_closed(path: str, body: bytes) -> None:
    response, (session,) = send(path, body)
    assert (response.status_code, response.content) == (200, body)
    assert session.closed == 1


def test_sessions_are_closed_when_the_route_fails() -> None:
    response, (session,) = send("/v1/completions", b"{}", {"fail": "1"})
    assert response.status_code == 500
    assert session.closed == 1
