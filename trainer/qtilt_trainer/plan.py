"""What is asked of the server: a request for some samples of one prompt, and the seeds they are drawn with."""

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from qtilt_trainer.client import Guidance, Sampling
from qtilt_trainer.rollouts import rollout_id
from qtilt_trainer.tasks.problem import Problem, Split


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
