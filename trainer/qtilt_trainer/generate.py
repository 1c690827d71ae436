"""Runs planned requests against the server, grades the completions and stores them in parts as they arrive.

What is planned and why is the business of collect.py and evaluate.py. A process killed here loses at most the
completions that are not yet in a part; planning again with the store's ids skips the rest.
"""

import asyncio
import hashlib
import itertools
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qtilt_trainer.client import Completion, Guidance, GuidedClient, Sampling
from qtilt_trainer.progress import progress_bar
from qtilt_trainer.rollouts import Rollout, RolloutStore, rollout_id
from qtilt_trainer.tasks.problem import Problem, Split, Task

if TYPE_CHECKING:
    from tqdm import tqdm

PART_ROLLOUTS = 256
PART_SECONDS = 20.0
"""A part is written when it has so many roll-outs or is so old."""
GRADING_THREADS = 2


@dataclass(frozen=True, slots=True)
class PlannedRequest:
    """Completions of one prompt that are asked for together."""

    iteration: int
    split: Split
    problem: Problem
    samples: tuple[int, ...]
    """Sample numbers, one a completion."""
    seed: int
    """Of the first completion; the server gives each further one the next seed."""
    sampling: Sampling
    guidance: Guidance | None

    @property
    def ids(self) -> list[str]:
        """The roll-out ids this request will give."""
        return [rollout_id(self.iteration, self.problem.id, sample) for sample in self.samples]


def seed_of(seed: int, what: str) -> int:
    """A seed that depends only on the run's seed and on what it is for: order and resumption don't matter."""
    digest = hashlib.sha256(f"{seed}/{what}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


def consecutive(samples: Sequence[int]) -> list[tuple[int, ...]]:
    """Cuts ascending sample numbers where one is left out.

    Sample i of a prompt has the prompt's seed + i and the i-th completion of a request the request's seed + i: samples
    asked for together must be neighbours.
    """
    runs = itertools.groupby(enumerate(samples), key=lambda pair: pair[1] - pair[0])
    return [tuple(sample for _, sample in run) for _, run in runs]


async def generate(
    client: GuidedClient, task: Task, plan: Sequence[PlannedRequest], store: RolloutStore, concurrency: int, label: str
) -> None:
    """Makes every planned roll-out and stores it.

    Raises ServerError when the server stays away or refuses; what had arrived is stored before.
    """
    if not plan:
        return
    model = await client.model()
    pending = iter(plan)
    total = sum(len(request.samples) for request in plan)
    with progress_bar(label, "rollout", total) as progress, _Writer(task, store, model, progress) as writer:
        workers = [asyncio.create_task(_work(client, pending, writer)) for _ in range(min(concurrency, len(plan)))]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)


async def _work(client: GuidedClient, pending: Iterator[PlannedRequest], writer: "_Writer") -> None:
    for request in pending:
        completions = await client.complete(
            request.problem.prompt, len(request.samples), request.seed, request.sampling, request.guidance
        )
        await writer.add(request, completions)


class _Writer:
    """Collects answered requests and writes them as parts, graded, without holding up the requests under way."""

    def __init__(self, task: Task, store: RolloutStore, model: str, progress: "tqdm[Any]") -> None:
        self._task, self._store, self._model, self._progress = task, store, model, progress
        self._arrived: list[tuple[PlannedRequest, Completion, int]] = []
        self._graders = ThreadPoolExecutor(GRADING_THREADS, "grading")
        # One thread: parts are numbered, and written one after the other.
        self._thread = ThreadPoolExecutor(1, "parts")
        self._parts: list[Future[None]] = []
        self._last_part = time.monotonic()

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, *_: object) -> None:
        """Writes the rest, also when the requests ended in an error or an interrupt."""
        try:
            self._write_arrived()
            for part in self._parts:
                part.result()
        finally:
            self._thread.shutdown()
            self._graders.shutdown()

    async def add(self, request: PlannedRequest, completions: list[Completion]) -> None:
        self._arrived += [(request, completion, index) for index, completion in enumerate(completions)]
        self._progress.update(len(completions))
        if len(self._arrived) >= PART_ROLLOUTS or time.monotonic() - self._last_part >= PART_SECONDS:
            # Shielded: when another request fails, this part is still written.
            await asyncio.shield(asyncio.wrap_future(self._write_arrived()))

    def _write_arrived(self) -> "Future[None]":
        part, self._arrived, self._last_part = self._arrived, [], time.monotonic()
        self._parts.append(self._thread.submit(self._write, part))
        return self._parts[-1]

    def _write(self, part: list[tuple[PlannedRequest, Completion, int]]) -> None:
        rewards = self._graders.map(lambda item: self._reward(item[0].problem, item[1].text), part)
        rollouts = [self._rollout(*item, reward) for item, reward in zip(part, rewards, strict=True)]
        self._store.append(rollouts)

    def _reward(self, problem: Problem, text: str) -> float:
        reward = float(self._task.reward(problem, text))
        if not self._task.low <= reward <= self._task.high:
            raise ValueError(
                f"task {self._task.name} gave reward {reward} for {problem.id}, outside its own range "
                f"[{self._task.low}, {self._task.high}]"
            )
        return reward

    def _rollout(self, request: PlannedRequest, completion: Completion, index: int, reward: float) -> Rollout:
        guidance, sampling = request.guidance, request.sampling
        return Rollout(
            rollout_id=request.ids[index],
            iteration=request.iteration,
            prompt_id=request.problem.id,
            split=request.split,
            prompt_token_ids=completion.prompt_token_ids,
            token_ids=completion.token_ids,
            text=completion.text,
            finish_reason=completion.finish_reason,
            ended=completion.ended,
            switch_point=_switch_point(guidance, sampling),
            guided_tokens=completion.guided_tokens,
            reward=reward,
            value_model=completion.value_model,
            eta=guidance.eta if guidance is not None else None,
            method=guidance.method if guidance is not None else None,
            guidance_top_k=completion.top_k,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            sampling_top_k=sampling.top_k,
            max_tokens=sampling.max_tokens,
            seed=request.seed + index,
            model=self._model,
            kl=completion.kl,
        )


def _switch_point(guidance: Guidance | None, sampling: Sampling) -> int:
    if guidance is None:
        return 0
    return sampling.max_tokens if guidance.guided_tokens is None else guidance.guided_tokens
