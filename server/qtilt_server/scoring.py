"""Values of given completions: parts of texts, one between two steps of the engine, so that decoding goes on."""

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING
from uuid import uuid4

from qtilt_server.errors import UnavailableError
from qtilt_server.registry import ResidentVersion
from qtilt_server.worker import GuidanceWorker, WorkerError

if TYPE_CHECKING:
    from qtilt.vllm_plugin.scoring import TextValues

MOST_TEXTS = 4
"""At once: each has a cache of its own in the worker."""


class Scorer:
    """Takes turns: however many texts are scored, there is one part of one of them between two steps."""

    def __init__(self, worker: GuidanceWorker) -> None:
        self._worker = worker
        self._places = asyncio.Semaphore(MOST_TEXTS)
        self._turn = asyncio.Lock()

    async def score(
        self,
        version: ResidentVersion,
        prompt: Sequence[int],
        completions: Sequence[Sequence[int]],
        *,
        wants_all: bool = False,
    ) -> "list[TextValues]":
        """Of each completion's tokens after the prompt. wants_all: distributions, not only the last.

        version: leased until this has ended. Raises UnavailableError when the worker can't do it.
        """
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._score(version, prompt, each, wants_all)) for each in completions]
        except* WorkerError as errors:
            raise UnavailableError(f"the completions can't be scored now: {errors.exceptions[0]}") from errors
        return [task.result() for task in tasks]

    async def _score(
        self, version: ResidentVersion, prompt: Sequence[int], completion: Sequence[int], wants_all: bool
    ) -> "TextValues":
        text = uuid4().hex
        async with self._places:
            try:
                token_ids, first = [*prompt, *completion], len(prompt)
                await self._worker.begin_text(
                    text, version.name, version.version, token_ids, first, wants_all=wants_all
                )
                while True:
                    async with self._turn:
                        values = await self._worker.advance_text(text)
                    if values is not None:
                        return values
            finally:
                await asyncio.shield(asyncio.ensure_future(self._worker.end_text(text)))
