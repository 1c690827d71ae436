"""Runs planned requests against the server and hands the completions to the writer as they arrive.

What is planned and why is the business of collect.py and evaluate/measure.py. A process killed here loses at most the
completions that are not yet in a part; planning again with the store's ids skips the rest.
"""

import asyncio
import logging
from collections.abc import Iterator, Sequence

from qtilt_trainer.client import GuidedClient
from qtilt_trainer.plan import PlannedRequest
from qtilt_trainer.progress import progress_bar
from qtilt_trainer.refused import RefusedPrompts
from qtilt_trainer.rewards import Rules, TooManyFailuresError, is_above
from qtilt_trainer.rollouts import RolloutStore
from qtilt_trainer.server_errors import PromptRefusedError
from qtilt_trainer.tasks.problem import Task
from qtilt_trainer.writer import Writer

logger = logging.getLogger(__name__)


async def generate(
    client: GuidedClient,
    task: Task,
    plan: Sequence[PlannedRequest],
    store: RolloutStore,
    concurrency: int,
    label: str,
    rules: Rules | None = None,
) -> None:
    """Makes every planned roll-out, stores and grades it.

    Prompts that the server refuses are noted and left out, now and later.
    Raises ServerError when the server stays away, TooManyFailuresError above the shares that `rules` allows; what had
    arrived is stored before.
    """
    rules = rules or Rules()
    refused = RefusedPrompts(store.directory)
    ids_refused = refused.ids()
    plan = [request for request in plan if request.problem.id not in ids_refused]
    if not plan:
        return
    model = await client.model()
    total = sum(len(request.samples) for request in plan)
    problems = {request.problem.id: request.problem for request in plan}
    with (
        progress_bar(label, "rollout", total) as progress,
        Writer(task, store, model, problems, rules, progress) as writer,
    ):
        asking = _Asking(client, writer, refused, ids_refused, rules, store.prompt_ids())
        pending = iter(plan)
        workers = [asyncio.create_task(asking.work(pending)) for _ in range(min(concurrency, len(plan)))]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)


class _Asking:
    """What the workers of one `generate` share."""

    def __init__(
        self,
        client: GuidedClient,
        writer: Writer,
        refused: RefusedPrompts,
        ids_refused: set[str],
        rules: Rules,
        answered: set[str],
    ) -> None:
        """ids_refused: those in `refused`, of earlier processes. answered: prompts that have a stored completion."""
        self._client, self._writer, self._refused, self._rules = client, writer, refused, rules
        self._ids_refused = ids_refused
        self._asked = answered | ids_refused

    async def work(self, pending: Iterator[PlannedRequest]) -> None:
        for request in pending:
            if request.problem.id in self._ids_refused:
                continue
            self._asked.add(request.problem.id)
            try:
                completions = await self._client.complete(
                    request.problem.prompt, len(request.samples), request.seed, request.sampling, request.guidance
                )
            except PromptRefusedError as refusal:
                self._note(request.problem.id, refusal)
            else:
                await self._writer.add(request, completions)

    def _note(self, prompt_id: str, refusal: PromptRefusedError) -> None:
        if prompt_id in self._ids_refused:
            return
        self._ids_refused.add(prompt_id)
        self._refused.add(prompt_id, str(refusal))
        logger.warning("prompt %s is left out: %s", prompt_id, refusal)
        refused, asked = len(self._ids_refused), len(self._asked)
        if is_above(refused, asked, self._rules.max_refused_share):
            raise TooManyFailuresError(
                f"the server refused {refused} of {asked} prompts, more than collect.max_refused_share = "
                f"{self._rules.max_refused_share:g} allows, the last with: {refusal}; all are in {self._refused.file}. "
                "Mend what it complains of and start again with --retry-refused"
            )
