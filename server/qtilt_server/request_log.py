"""One line of JSON for each guided request, when it has ended: its ids, and nothing of prompts, answers or keys."""

import json
import logging
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self, TextIO

from starlette.requests import Request

from qtilt_server.errors import StartupError
from qtilt_server.flags import STDOUT
from qtilt_server.session import GuidedSession

logger = logging.getLogger("vllm.qtilt_server.request_log")

LONGEST_ID = 128
"""Characters of a client's id that are kept."""


class RequestLog:
    """Lines in a stream."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    @classmethod
    def open(cls, target: str) -> Self:
        """target: a file, appended to, or ``-`` for stdout. Raises StartupError."""
        if target == STDOUT:
            return cls(sys.stdout)
        try:
            return cls(Path(target).open("a", encoding="utf-8"))  # for as long as the server runs
        except OSError as error:
            raise StartupError(f"--guidance-log {target}: {error.strerror}") from error

    def follow(self, session: GuidedSession, request: Request) -> "LoggedRequest":
        """What writes the line when it is closed, after the session."""
        return LoggedRequest(self, session, request)

    def write(self, entry: dict[str, Any]) -> None:
        """The edge of a request: it has been answered, whether or not its line can be written."""
        try:
            self._stream.write(json.dumps(entry) + "\n")
            self._stream.flush()
        except OSError:
            logger.exception("a line of --guidance-log is lost")


class LoggedRequest:
    """One guided request on its way."""

    def __init__(self, log: RequestLog, session: GuidedSession, request: Request) -> None:
        self._log = log
        self._session = session
        self._request = request
        self._began = time.monotonic()

    def close(self) -> None:
        """The response has ended, one way or another."""
        session, params, total = self._session, self._session.params, self._session.total
        metadata = getattr(self._request.state, "request_metadata", None)
        client_id = self._request.headers.get("x-request-id")
        self._log.write(
            {
                "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
                "id": None if metadata is None else metadata.request_id[: 2 * LONGEST_ID],
                "client_id": None if client_id is None else client_id[:LONGEST_ID],
                "route": self._request.url.path,
                "outcome": session.outcome,
                "seconds": round(time.monotonic() - self._began, 3),
                "value_model": params.value_model,
                "version": params.version,
                "method": params.method,
                "eta": params.eta,
                "top_k": params.top_k,
                "tail": params.tail,
                "guided_tokens": total.guided_tokens,
                "kl": total.guidance_kl,
                "kl_candidates": total.guidance_kl_candidates,
            }
        )
