"""What a guided request's answer says of its guidance, where clients keep it.

Clients drop fields that they don't know, each in other places. Of a stream the official one's helper keeps those of
the first chunk and in ``usage``, LiteLLM those in its ``completion_tokens_details``, LangChain none but the headers. So
what is done is said in a header and in the first chunk, the sum of it in ``usage.completion_tokens_details``, and each
choice's own beside its ``finish_reason``. tests/e2e/test_server_clients.py reads each with these clients.
"""

import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qtilt_server.session import GuidedSession

EVENT_PREFIX = "data: "
DONE = f"{EVENT_PREFIX}[DONE]"
HEADER = "x-qtilt-guidance"


async def say_guidance(events: AsyncGenerator[str, None], session: "GuidedSession") -> AsyncGenerator[str, None]:
    """vLLM's server-sent events with the guidance in the first, in ``usage``, and with each ``finish_reason``.

    A stream on which guidance failed ends with the error: the ``[DONE]`` that vLLM sends even then isn't passed on.
    """
    is_first = True
    async with aclosing(events):
        async for event in events:
            if session.failed and event.startswith(DONE):
                return
            # Nothing else has anything to say: most chunks pass unread.
            has_to_say = is_first or session.has_finished or session.has_news
            yield _with_guidance(event, session, is_first=is_first) if has_to_say else event
            is_first = False


def _with_guidance(event: str, session: "GuidedSession", *, is_first: bool) -> str:
    if not event.startswith(EVENT_PREFIX) or event.startswith(DONE):
        return event
    chunk = json.loads(event.removeprefix(EVENT_PREFIX))
    if "choices" not in chunk:  # an error
        return event
    if is_first:
        chunk["guidance"] = session.applied.model_dump()
    add_guidance(chunk, session)
    return f"{EVENT_PREFIX}{json.dumps(chunk, ensure_ascii=False, separators=(',', ':'))}\n\n"


def add_guidance(response: dict[str, Any], session: "GuidedSession") -> dict[str, Any]:
    """A response or a chunk of one, with the guidance of its finished choices, and the details of new tokens; in its
    ``usage`` of all so far.
    """
    for choice in response["choices"]:
        if choice["finish_reason"] is not None:
            response["guidance"] = session.applied.model_dump()
            choice["guidance"] = session.choice(choice["index"]).model_dump()
        if session.params.details:
            news = [details.model_dump() for details in session.take_news(choice["index"])]
            choice["guidance"] = {**choice.get("guidance", {}), "details": news}
    usage = response.get("usage")
    if usage is not None and session.has_finished:
        details = usage.get("completion_tokens_details") or {}
        usage["completion_tokens_details"] = {**details, **session.total.model_dump()}
    return response


def header_of(session: "GuidedSession") -> dict[str, str]:
    """What is done, as JSON, for clients and proxies that keep nothing of the body."""
    return {HEADER: session.applied.model_dump_json()}
