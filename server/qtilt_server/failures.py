"""Requests whose guidance failed while they ran: the error they are answered with, and who notices those that run on.

Why a failed request may run on in the engine, and what the worker does about it: ``qtilt/vllm_plugin/failure.py``.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable

from vllm.exceptions import GenerationError

from qtilt.vllm_plugin.failure import GuidanceFailure
from qtilt_server.worker import GuidanceWorker, WorkerError

logger = logging.getLogger("vllm.qtilt_server.failures")

POLL_S = 0.5


class GuidanceFailedError(GenerationError):
    """vLLM answers it with HTTP 500, on a stream with an error event. value_model: NAME@VERSION."""

    def __init__(self, value_model: str, failure: GuidanceFailure) -> None:
        super().__init__(f"guidance failed in value model {value_model}: {failure['reason']}")


EndRequest = Callable[[GuidanceFailure], Awaitable[None]]


class FailureWatch:
    """While requests are watched, asks the worker every half second which of them have failed, and ends those.

    One question for all of them, between two steps of the engine; none while nothing is watched.
    """

    def __init__(self, worker: GuidanceWorker, poll_s: float = POLL_S) -> None:
        self._worker = worker
        self._poll_s = poll_s
        self._watched: dict[str, EndRequest] = {}
        self._polling: asyncio.Task[None] | None = None

    def add(self, trace_id: str, end: EndRequest) -> None:
        """Await ``end``, once, if guidance of this trace fails before :meth:`remove`."""
        self._watched[trace_id] = end
        if self._polling is None or self._polling.done():
            self._polling = asyncio.get_running_loop().create_task(self._poll())

    def remove(self, trace_id: str) -> None:
        """The request is over; harmless when it isn't watched."""
        self._watched.pop(trace_id, None)

    async def _poll(self) -> None:
        while True:
            await asyncio.sleep(self._poll_s)
            if not self._watched:
                return
            try:
                failures = await self._worker.failures()
            except WorkerError as error:
                logger.warning("could not ask for failed requests: %s", error)
                continue
            for trace_id, failure in failures.items():
                if (end := self._watched.pop(trace_id, None)) is not None:
                    await _end(end, failure)


async def _end(end: EndRequest, failure: GuidanceFailure) -> None:
    """The edge of one request: what goes wrong in ending it is no reason not to watch the others."""
    try:
        await end(failure)
    except Exception:
        logger.exception("could not end a request whose guidance failed")
