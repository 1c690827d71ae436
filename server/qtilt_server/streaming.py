"""Server-sent events of a guided request: the guidance goes into the chunk that carries a choice's finish_reason."""

import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qtilt_server.session import GuidedSession

EVENT_PREFIX = "data: "
DONE = f"{EVENT_PREFIX}[DONE]"
HAS_FINISH_REASON = '"finish_reason":"'
"""In the text of a chunk, this can't be part of a string: quotes inside strings are escaped."""


async def say_guidance(events: AsyncGenerator[str, None], session: "GuidedSession") -> AsyncGenerator[str, None]:
    """vLLM's events with the guidance of each choice that finishes.

    A stream on which guidance failed ends with the error: the ``[DONE]`` that vLLM sends even then isn't passed on.
    """
    async with aclosing(events):
        async for event in events:
            if session.failed and event.startswith(DONE):
                return
            yield _with_guidance(event, session) if HAS_FINISH_REASON in event else event


def _with_guidance(event: str, session: "GuidedSession") -> str:
    chunk = json.loads(event.removeprefix(EVENT_PREFIX))
    return f"{EVENT_PREFIX}{json.dumps(add_guidance(chunk, session), ensure_ascii=False, separators=(',', ':'))}\n\n"


def add_guidance(response: dict[str, Any], session: "GuidedSession") -> dict[str, Any]:
    """A response or a chunk of one, with the guidance of its finished choices."""
    response["guidance"] = session.applied.model_dump()
    for choice in response["choices"]:
        if choice["finish_reason"] is not None:
            choice["guidance"] = session.choice(choice["index"]).model_dump()
    return response
