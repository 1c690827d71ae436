"""Stores completions in parts as they arrive, then grades each part, without holding up the requests under way."""

import asyncio
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qtilt_trainer.client import Completion, Guidance, Sampling
from qtilt_trainer.digests import prompt_digest
from qtilt_trainer.plan import PlannedRequest
from qtilt_trainer.rewards import Grader, Rules
from qtilt_trainer.rollouts import Rollout, RolloutStore
from qtilt_trainer.tasks.problem import Problem, Task

if TYPE_CHECKING:
    from tqdm import tqdm

PART_ROLLOUTS = 256
PART_SECONDS = 20.0
"""A part is written when it has so many roll-outs or is so old."""


class Writer:
    """A context manager around the requests of one iteration.

    Raises TooManyFailuresError, and whatever stops grading or writing altogether, from `add` and at its end.
    """

    def __init__(
        self,
        task: Task,
        store: RolloutStore,
        model: str,
        problems: Mapping[str, Problem],
        rules: Rules,
        progress: "tqdm[Any]",
    ) -> None:
        self._store, self._model, self._progress = store, model, progress
        self._grader = Grader(task, store, problems, rules)
        self._arrived: list[Rollout] = []
        # One thread each: parts are numbered, and written one after the other; a slow reward must not hold them up.
        self._storing = ThreadPoolExecutor(1, "parts")
        self._grading = ThreadPoolExecutor(1, "rewards")
        self._parts: list[Future[None]] = []
        self._last_part = time.monotonic()

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *_: object) -> None:
        """Writes the rest, also when the requests ended in an error or an interrupt."""
        try:
            self._write_arrived()
            for part in self._parts:
                part.result()
        finally:
            self._storing.shutdown()
            self._grading.shutdown()

    async def add(self, request: PlannedRequest, completions: list[Completion]) -> None:
        """Takes what one request was answered."""
        self._arrived += [
            _rollout(request, completion, index, self._model) for index, completion in enumerate(completions)
        ]
        self._progress.update(len(completions))
        if len(self._arrived) >= PART_ROLLOUTS or time.monotonic() - self._last_part >= PART_SECONDS:
            # Shielded: when another request fails, this part is still written.
            await asyncio.shield(asyncio.wrap_future(self._write_arrived()))

    def _write_arrived(self) -> "Future[None]":
        part, self._arrived, self._last_part = self._arrived, [], time.monotonic()
        stored = self._storing.submit(self._store.append, part) if part else None
        self._parts.append(self._grading.submit(self._grade, stored, part))
        return self._parts[-1]

    def _grade(self, stored: "Future[Path] | None", rollouts: list[Rollout]) -> None:
        if stored is None:
            return
        iteration = rollouts[0].iteration
        self._grader.grade_part(stored.result())
        self._grader.count_stored(iteration)
        self._grader.check_share(iteration)


def _rollout(request: PlannedRequest, completion: Completion, index: int, model: str) -> Rollout:
    guidance, sampling = request.guidance, request.sampling
    return Rollout(
        rollout_id=request.ids[index],
        iteration=request.iteration,
        prompt_id=request.problem.id,
        prompt_digest=prompt_digest(request.problem.prompt),
        split=request.split,
        prompt_token_ids=completion.prompt_token_ids,
        token_ids=completion.token_ids,
        text=completion.text,
        finish_reason=completion.finish_reason,
        ended=completion.ended,
        switch_point=_switch_point(guidance, sampling),
        guided_tokens=completion.guided_tokens,
        value_model=completion.value_model,
        eta=guidance.eta if guidance is not None else None,
        method=guidance.method if guidance is not None else None,
        guidance_top_k=completion.top_k,
        tail=completion.tail,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        sampling_top_k=sampling.top_k,
        max_tokens=sampling.max_tokens,
        seed=request.seed + index,
        model=model,
        kl=completion.kl,
        kl_candidates=completion.kl_candidates,
        mass=completion.mass,
    )


def _switch_point(guidance: Guidance | None, sampling: Sampling) -> int:
    if guidance is None:
        return 0
    return sampling.max_tokens if guidance.guided_tokens is None else guidance.guided_tokens
