"""How much slower running requests get while others have completions scored (POST /v1/guidance/score).

    python benchmarks/scoring_load.py            # SmolLM2 with the demo's value model, 8 streams, 0, 1 and 4 scorers

Streams of guided completions run all the time, each followed by the next, and beside them so many clients that ask for
scores, one request after the other. A round runs every number of scorers once; a ratio is to none of them within a
round. Gaps are between the chunks of a stream, after its first.
"""

import argparse
import asyncio
import statistics
import time
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx

from candidate_mass import demo_server, spread

VALUE_MODEL = "keywords"
PROMPT = "Tell me a story about a lighthouse."


@dataclass
class Measured:
    """Of one number of scorers, by round: median and 99 % gaps in seconds, scored tokens a second."""

    scorers: int
    medians: list[float] = field(default_factory=list)
    tails: list[float] = field(default_factory=list)
    scored: list[float] = field(default_factory=list)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--scorers", type=int, nargs="+", default=[0, 1, 4])
    parser.add_argument("--tokens", type=int, default=200, help="of each completion that is scored")
    parser.add_argument("--seconds", type=float, default=20, help="of one measurement")
    parser.add_argument("--rounds", type=int, default=3)
    return parser.parse_args()


async def stream(client: httpx.AsyncClient, gaps: list[float]) -> None:
    """Guided completions, one after the other; ``gaps`` are added to."""
    body = {"model": "reference", "prompt": PROMPT, "max_tokens": 128, "ignore_eos": True, "stream": True}
    while True:
        last: float | None = None
        async with client.stream("POST", "/v1/completions", json=body | {"guidance": {}}) as response:
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    now = time.perf_counter()
                    if last is not None:
                        gaps.append(now - last)
                    last = now


async def score(client: httpx.AsyncClient, tokens: int, scored: list[int]) -> None:
    """Requests for scores, one after the other; ``scored`` has the tokens of each."""
    completion = list(range(100, 100 + tokens))
    while True:
        answer = await client.post("/v1/guidance/score", json={"prompt": PROMPT, "completions": [completion]})
        answer.raise_for_status()
        scored.append(tokens)


@asynccontextmanager
async def running(*coroutines: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """They run inside the block, and no longer."""
    tasks = [asyncio.ensure_future(each) for each in coroutines]
    try:
        yield
        for task in tasks:
            if task.done():
                task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def measure(url: str, arguments: argparse.Namespace) -> list[Measured]:
    """All rounds."""
    settings = [Measured(scorers) for scorers in dict.fromkeys([0, *arguments.scorers])]
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:
        for number in range(-1, arguments.rounds):  # the first isn't counted
            for one in settings:
                gaps: list[float] = []
                scored: list[int] = []
                streams = [stream(client, gaps) for _ in range(arguments.streams)]
                scorers = [score(client, arguments.tokens, scored) for _ in range(one.scorers)]
                async with running(*streams, *scorers):
                    await asyncio.sleep(arguments.seconds if number >= 0 else arguments.seconds / 4)
                if number >= 0:
                    one.medians.append(statistics.median(gaps))
                    one.tails.append(statistics.quantiles(gaps, n=100)[98])
                    one.scored.append(sum(scored) / arguments.seconds)
    return settings


def table(settings: Sequence[Measured]) -> str:
    """One line a number of scorers."""
    none = settings[0]
    lines = [f"{'scorers':>8}{'gap p50':>12}{'p99':>12}{'÷ none':>22}{'p99 ÷ none':>22}{'scored tokens/s':>18}"]
    for one in settings:
        ratios = [spread(one.medians, none.medians), spread(one.tails, none.tails)]
        gaps = [f"{statistics.median(each) * 1e3:>9.1f} ms" for each in (one.medians, one.tails)]
        scored = f"{statistics.median(one.scored):>18.0f}"
        lines.append(f"{one.scorers:>8}{gaps[0]}{gaps[1]}{ratios[0]:>22}{ratios[1]:>22}{scored}")
    return "\n".join(lines)


def main() -> None:
    arguments = parse_arguments()
    with demo_server([VALUE_MODEL]) as url:
        print(table(asyncio.run(measure(url, arguments))), flush=True)


if __name__ == "__main__":
    main()
