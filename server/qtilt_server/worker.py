"""The worker's guidance calls with types: a thin face on vLLM's ``collective_rpc``, which runs between two steps.

Of a tensor-parallel engine the first rank guides and answers; the others answer with nothing but their errors.
"""

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from qtilt.vllm_plugin.answers import raise_errors
from qtilt.vllm_plugin.failure import GuidanceFailure
from qtilt.vllm_plugin.measures import Measures
from qtilt_server.schema import ChoiceGuidance

if TYPE_CHECKING:
    from qtilt.vllm_plugin.details import TokenDetails
    from qtilt.vllm_plugin.scoring import TextValues

PREPARATION_POLL_S = 0.05
ENGINE_POLL_S = 1.0


class EngineRpc(Protocol):
    """The part of vLLM's engine client used here."""

    @property
    def errored(self) -> bool:
        """Whether the engine has stopped, for good."""
        ...

    async def collective_rpc(self, method: str, *, args: tuple[Any, ...] = ()) -> list[Any]:
        """Call ``method`` in every worker and return their answers."""
        ...


class WorkerError(RuntimeError):
    """A guidance call failed in the worker; the message is the worker's."""


class GuidanceWorker:
    """Guidance in the engine's workers."""

    def __init__(self, engine: EngineRpc) -> None:
        self._engine = engine

    async def describe(self) -> dict[str, Any]:
        """What the first worker has loaded. Raises WorkerError when the guidance processor isn't live in any."""
        description: dict[str, Any] = await self._call("qtilt_describe")
        return description

    async def measure(self) -> Measures:
        """What guidance has done so far. Raises WorkerError."""
        measures: Measures = await self._call("qtilt_measure")
        return measures

    async def prepare(self, name: str, version: int, path: str) -> None:
        """Load a directory beside the running versions; returns when it is ready.

        Raises WorkerError, after clearing away what was prepared, when it can't be used.
        """
        await self._call("qtilt_prepare_value_model", name, version, path)
        try:
            await self._wait_until_ready(name, version)
        except BaseException:
            await self.discard(name, version)
            raise

    async def commit(self, name: str, version: int) -> None:
        """From now on requests may name the prepared version."""
        await self._call("qtilt_commit_value_model", name, version)

    async def discard(self, name: str, version: int) -> None:
        """Unload a prepared or a resident version. Raises WorkerError while running rows use it."""
        await self._call("qtilt_discard_value_model", name, version)

    async def read_records(
        self, trace_id: str, returned: Sequence[Sequence[int]], *, more_to_come: bool
    ) -> list[ChoiceGuidance | GuidanceFailure]:
        """What was done to each returned token sequence of a trace; forgets the trace unless more is to come."""
        sequences = [list(token_ids) for token_ids in returned]
        answers = await self._call("qtilt_take_records", trace_id, sequences, more_to_come)
        return [answer if "reason" in answer else ChoiceGuidance.model_validate(answer) for answer in answers]

    async def details(self, trace_id: str, first: int, token_ids: Sequence[int]) -> list["TokenDetails | None"]:
        """Of a choice's tokens from ``first`` on; token_ids: all that it has so far. None where one wasn't guided."""
        details: list[TokenDetails | None] = await self._call("qtilt_details", trace_id, first, list(token_ids))
        return details

    async def begin_text(
        self, text: str, name: str, version: int, token_ids: Sequence[int], first: int, *, wants_all: bool
    ) -> None:
        """Tokens are to be scored, from number ``first`` on; ``text`` names them until they :meth:`end_text`.
        wants_all: distributions, not only the last.
        """
        await self._call("qtilt_begin_text", text, name, version, list(token_ids), first, wants_all)

    async def advance_text(self, text: str) -> "TextValues | None":
        """Run a part of it, between two steps: its values if that was the last."""
        values: TextValues | None = await self._call("qtilt_advance_text", text)
        return values

    async def end_text(self, text: str) -> None:
        """Forget it, done or not."""
        await self._call("qtilt_end_text", text)

    async def failures(self) -> dict[str, GuidanceFailure]:
        """Why guidance failed, by the id of each trace that it failed for and that isn't forgotten yet."""
        failures: dict[str, GuidanceFailure] = await self._call("qtilt_failures")
        return failures

    async def forget(self, trace_id: str) -> None:
        """Drop the records of a trace that nobody will ask for."""
        await self._call("qtilt_take_records", trace_id, [])

    async def _wait_until_ready(self, name: str, version: int) -> None:
        while True:
            status = await self._call("qtilt_prepare_status", name, version)
            if status["state"] == "failed":
                raise WorkerError(status["error"])
            if status["state"] == "ready":
                return
            await asyncio.sleep(PREPARATION_POLL_S)

    async def _call(self, method: str, *args: Any) -> Any:
        """The first worker's answer. Raises WorkerError when it, or another one, is an error."""
        call = asyncio.ensure_future(self._engine.collective_rpc(method, args=args))
        try:
            while call not in (await asyncio.wait([call], timeout=ENGINE_POLL_S))[0]:
                if self._engine.errored:  # vLLM never answers a call that its engine stopped on
                    raise RuntimeError(f"the engine stopped before it answered {method}")
            return raise_errors(call.result())[0]
        except Exception as error:  # vLLM hands errors of the engine over as bare Exceptions
            raise WorkerError(str(error)) from error
        finally:
            call.cancel()
