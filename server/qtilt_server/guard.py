"""ASGI middleware: guidance that would be ignored silently is refused, and guided requests are closed when they end.

vLLM accepts unknown fields on every route, so a ``guidance`` sent to a route that knows nothing of it would come back
as an unguided answer. The extra arguments that guidance travels in are not for clients either: they bypass the checks
and the lease that keeps a value model loaded.
"""

import json
import re
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qtilt.params import EXTRA_ARGS_KEY
from qtilt_server.errors import GuidanceRequestError, error_response
from qtilt_server.misplaced import ONLY_OURS, is_like, misplaced_in_carriers

GUIDED_ROUTES = ("/v1/completions", "/v1/chat/completions")
SESSIONS = "qtilt_sessions"
"""Scope entry: the guided sessions of this request, and what logs them, closed in their order when it ends."""
SHORT_KEY = re.compile(rb'"([A-Za-z_. -]{6,12})"\s*:')
"""In a body of JSON, what may be a key that is like ``guidance``."""


class GuidanceGuard:
    """Wraps the whole app, below authentication. Reads the body of every POST and hands it on unchanged."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        body, replay = await _read_body(receive)
        try:
            _refuse_ignored_guidance(scope["path"].removeprefix(scope.get("root_path", "")), body)
        except GuidanceRequestError as refusal:
            await error_response(refusal)(scope, replay, send)
            return
        sessions = scope[SESSIONS] = []  # a list, because routing may copy the scope
        try:
            await self.app(scope, replay, send)
        finally:
            for session in sessions:
                session.close()


def _refuse_ignored_guidance(path: str, body: bytes) -> None:
    guided = path in GUIDED_ROUTES
    if not guided and b'name="guidance"' in body:  # a field of a multipart form
        raise _not_here(path, "guidance")
    if not _may_be_refused(body, guided=guided):
        return
    try:
        request = json.loads(body)
    except (ValueError, RecursionError):
        return  # vLLM answers malformed JSON itself
    if not isinstance(request, dict):
        return
    if not guided:
        place = misplaced_in_carriers(request)
        if place is not None:
            raise _not_here(path, place)
    for holder, field in _extra_arguments(request):
        if EXTRA_ARGS_KEY in holder:
            raise GuidanceRequestError(
                f"{field} can't carry {EXTRA_ARGS_KEY!r}: use the field 'guidance' instead", field
            )


def _extra_arguments(request: dict[str, Any]) -> list[tuple[dict[str, Any], str]]:
    """The places from which vLLM fills a request's extra arguments."""
    sampling = request.get("sampling_params")
    places = [
        (request.get("vllm_xargs"), "vllm_xargs"),
        (sampling.get("extra_args") if isinstance(sampling, dict) else None, "sampling_params.extra_args"),
    ]
    return [(holder, field) for holder, field in places if isinstance(holder, dict)]


def _may_be_refused(body: bytes, *, guided: bool) -> bool:
    """False spares the parsing. Escapes, or an encoding other than UTF-8, may hide a key."""
    if any(mark in body for mark in (EXTRA_ARGS_KEY.encode(), b"\\u", b"\0")):
        return True
    if guided:  # its request looks itself for what is misplaced
        return False
    return any(b'"%s"' % key.encode() in body for key in ONLY_OURS) or any(
        is_like(key.decode()) for key in set(SHORT_KEY.findall(body))
    )


def _not_here(path: str, place: str) -> GuidanceRequestError:
    return GuidanceRequestError(f"guidance isn't available on {path}, only on {' and '.join(GUIDED_ROUTES)}", place)


async def _read_body(receive: Receive) -> tuple[bytes, Receive]:
    """The whole body, and a ``receive`` that delivers it again before what comes after it."""
    messages: list[Message] = []
    while True:
        message = await receive()
        messages.append(message)
        if message["type"] != "http.request" or not message.get("more_body", False):
            break
    pending = iter(messages)

    async def replay() -> Message:
        message = next(pending, None)
        return message if message is not None else await receive()

    return b"".join(message.get("body", b"") for message in messages), replay
