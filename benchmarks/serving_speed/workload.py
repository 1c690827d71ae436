"""What every system is asked in one round, and what it did. Imports no torch: both cross the pipe between processes."""

import itertools
import random
from dataclasses import dataclass


@dataclass(frozen=True)
class Request:
    """prompt: token ids. arrives: seconds after the start of the run."""

    prompt: list[int]
    arrives: float = 0.0


@dataclass(frozen=True)
class Workload:
    """At most ``concurrency`` requests are in flight; each gets ``new_tokens`` tokens."""

    requests: list[Request]
    new_tokens: int
    concurrency: int


@dataclass
class Outcome:
    """arrived, token_times: by request, in seconds after the start. cpu_seconds: of the process, all its threads."""

    arrived: list[float]
    token_times: list[list[float]]
    cpu_seconds: float

    @property
    def seconds(self) -> float:
        """From the start to the last token of all."""
        return max(times[-1] for times in self.token_times)

    @property
    def tokens(self) -> int:
        return sum(len(times) for times in self.token_times)

    @property
    def first_token_seconds(self) -> list[float]:
        """Of each request, waiting included."""
        return [times[0] - arrived for arrived, times in zip(self.arrived, self.token_times, strict=True)]

    @property
    def inter_token_seconds(self) -> list[float]:
        return [after - before for times in self.token_times for before, after in itertools.pairwise(times)]

    def check(self, workload: Workload) -> "Outcome":
        """Raises RuntimeError when a request did not get all its tokens."""
        counts = sorted({len(times) for times in self.token_times})
        if len(self.token_times) != len(workload.requests) or counts != [workload.new_tokens]:
            raise RuntimeError(f"requests got {counts} tokens, expected {workload.new_tokens} each")
        return self


def random_prompts(count: int, length: int, vocab: int, seed: int) -> list[list[int]]:
    """Ordinary tokens only: the last two ids are the end and the padding."""
    draw = random.Random(seed)
    return [[draw.randrange(vocab - 2) for _ in range(length)] for _ in range(count)]


def together(prompts: list[list[int]], new_tokens: int) -> Workload:
    """All requests at once, as many as the concurrency."""
    return Workload([Request(prompt) for prompt in prompts], new_tokens, len(prompts))


def staggered(
    prompts: list[list[int]], new_tokens: int, concurrency: int, step_seconds: float, load: float, seed: int
) -> Workload:
    """A Poisson process of arrivals.

    ``step_seconds`` is plain vLLM's step at full concurrency; at a ``load`` of 1, plain vLLM would on average have just
    ``concurrency`` requests in flight (rate × response time, Little's law).
    """
    draw = random.Random(seed)
    mean_gap = new_tokens * step_seconds / (concurrency * load)
    time, requests = 0.0, []
    for prompt in prompts:
        requests.append(Request(prompt, time))
        time += draw.expovariate(1 / mean_gap)
    return Workload(requests, new_tokens, concurrency)
