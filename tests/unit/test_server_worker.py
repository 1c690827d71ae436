"""Calls into the worker when the engine doesn't answer."""

import asyncio
from typing import Any

import pytest

from qtilt_server.worker import GuidanceWorker, WorkerError


class StoppingEngine:
    """Takes calls and stops without answering them."""

    def __init__(self) -> None:
        self.errored = False
        self.cancelled = False

    async def collective_rpc(self, method: str, *, args: tuple[Any, ...] = ()) -> list[Any]:
        self.errored = True
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.cancelled = True
            raise
        return []


def test_a_call_ends_when_the_engine_stops_without_answering() -> None:
    engine = StoppingEngine()

    async def call() -> None:
        with pytest.raises(WorkerError, match="the engine stopped before it answered qtilt_take_records"):
            async with asyncio.timeout(10):
                await GuidanceWorker(engine).read_records("trace", [[1]], more_to_come=False)
        await asyncio.sleep(0)
        assert engine.cancelled

    asyncio.run(call())
