"""What fewer candidates cost in reward and save in time: a `candidate_mass` below 1, and a smaller `top_k`.

    make ~/.cache/qtilt/SmolLM2-135M-Instruct
    python benchmarks/candidate_mass.py                   # both tasks of the demo, its value models, over HTTP

Every setting answers the same test prompts with the same seeds, sampled from the reference's 20 likeliest tokens at the
task's temperature, with the tail `mean`: what isn't scored keeps the reference's probability. Printed are the reward,
its difference to 20 candidates of mass 1 (paired by prompt, ± 1.96 standard errors), the KL of a completion in nats,
the candidates scored a step, and the time a token relative to 20 candidates and to the reference. Prompts come in
batches, and a batch is answered under all settings one after the other before the next: a time ratio is the median of
the batches', with the lowest and the highest. Nothing else may run meanwhile.
"""

import argparse
import asyncio
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from openai import AsyncOpenAI

from qtilt_trainer.config import LoopConfig, read_config
from qtilt_trainer.tasks import make_task
from qtilt_trainer.tasks.problem import Problem, Task

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
TASKS = ("keywords", "sentiment")
TOP_K = 20


@dataclass
class Setting:
    """guidance: None of the reference. What was seen: rewards and KLs, candidates a step, and seconds and tokens."""

    name: str
    guidance: dict[str, Any] | None
    rewards: list[float] = field(default_factory=list)
    """Of each prompt, the mean of its samples."""
    kls: list[float] = field(default_factory=list)
    candidates: list[float] = field(default_factory=list)
    seconds_per_token: list[float] = field(default_factory=list)
    """Of each batch."""


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--candidate-mass", type=float, nargs="*", default=[0.95, 0.9, 0.8, 0.6])
    parser.add_argument("--top-k", type=int, nargs="*", default=[10, 5])
    parser.add_argument("--inv-eta", type=float, default=10.0)
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--batch", type=int, default=16, help="prompts")
    return parser.parse_args(arguments)


def settings_of(task: str, arguments: argparse.Namespace) -> list[Setting]:
    """The reference, all candidates, and fewer of them."""
    common = {"value_model": task, "eta": 1 / arguments.inv_eta, "tail": "mean"}
    masses = [Setting(f"mass {mass:g}", common | {"candidate_mass": mass}) for mass in arguments.candidate_mass]
    fewer = [Setting(f"top_k {top_k}", common | {"top_k": top_k}) for top_k in arguments.top_k]
    return [Setting("reference", None), Setting(f"top_k {TOP_K}", common | {"top_k": TOP_K}), *masses, *fewer]


async def answer(
    client: AsyncOpenAI, problem: Problem, seed: int, samples: int, config: LoopConfig, guidance: Any
) -> Any:
    """One response."""
    fields = {"guidance": guidance, "top_k": TOP_K} if guidance else {"top_k": TOP_K}
    settings: dict[str, Any] = {
        "model": "reference",
        "n": samples,
        "seed": seed,
        "temperature": config.sampling.temperature,
        "max_tokens": config.sampling.max_tokens,
        "extra_body": fields,
    }
    if isinstance(problem.prompt, str):
        return await client.completions.create(prompt=problem.prompt, **settings)
    return await client.chat.completions.create(messages=problem.prompt, **settings)  # type: ignore[arg-type]


async def run_batch(
    client: AsyncOpenAI,
    task: Task,
    problems: Sequence[tuple[int, Problem]],
    setting: Setting,
    samples: int,
    config: Any,
) -> None:
    """All at once; what was seen is noted."""
    started = time.perf_counter()
    responses = await asyncio.gather(
        *(answer(client, problem, 1000 * number, samples, config, setting.guidance) for number, problem in problems)
    )
    seconds, tokens = time.perf_counter() - started, sum(response.usage.completion_tokens for response in responses)
    setting.seconds_per_token.append(seconds / tokens)
    for (_, problem), response in zip(problems, responses, strict=True):
        texts = [choice.text if hasattr(choice, "text") else choice.message.content for choice in response.choices]
        setting.rewards.append(statistics.fmean(task.reward(problem, text or "") for text in texts))
        told = [choice.guidance for choice in response.choices] if setting.guidance else []
        setting.kls += [each["kl"] for each in told]
        setting.candidates += [each["candidates"] for each in told]


async def measure(url: str, name: str, arguments: argparse.Namespace) -> str:
    """A table of one task."""
    config = read_config(EXAMPLES / "demo" / f"{name}.toml")
    task = make_task(config.task)
    problems = list(enumerate(task.problems("test", arguments.prompts)))
    batches = [problems[first : first + arguments.batch] for first in range(0, len(problems), arguments.batch)]
    settings = settings_of(name, arguments)
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", timeout=600, max_retries=0) as client:
        for setting in settings_of(name, arguments):  # not counted
            await run_batch(client, task, batches[0], setting, arguments.samples, config)
        for batch in batches:
            for setting in settings:
                await run_batch(client, task, batch, setting, arguments.samples, config)
    return table(name, settings)


def table(task: str, settings: Sequence[Setting]) -> str:
    """One line a setting."""
    reference, full = settings[:2]
    lines = [f"{task:<14}{'reward':>8}{'difference':>18}{'KL':>8}{'candidates':>12}{'÷ 20':>20}{'÷ reference':>20}"]
    for one in settings:
        measured = [f"{statistics.fmean(one.rewards):>8.3f}", f"{difference(one.rewards, full.rewards):>18}"]
        told = (
            [f"{statistics.fmean(one.kls):>8.2f}", f"{statistics.fmean(one.candidates):>12.1f}"]
            if one.kls
            else [" " * 20]
        )
        ratios = [f"{spread(one.seconds_per_token, other.seconds_per_token):>20}" for other in (full, reference)]
        lines.append("".join([f"{one.name:<14}", *measured, *told, *ratios]))
    return "\n".join(lines)


def difference(rewards: Sequence[float], others: Sequence[float]) -> str:
    """Of means, paired by prompt, ± 1.96 standard errors."""
    pairs = [mine - other for mine, other in zip(rewards, others, strict=True)]
    return f"{statistics.fmean(pairs):+.3f} ± {1.96 * statistics.stdev(pairs) / len(pairs) ** 0.5:.3f}"


def spread(mine: Sequence[float], others: Sequence[float]) -> str:
    """Median, lowest and highest of the batches' ratios."""
    ratios = [one / other for one, other in zip(mine, others, strict=True)]
    return f"{statistics.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]"


@contextmanager
def demo_server(tasks: Sequence[str]) -> Iterator[str]:
    """The URL of a server of the demo's reference with its value models of these tasks."""
    sys.path[:0] = [str(EXAMPLES), str(EXAMPLES / "demo")]
    from smollm2 import DIRECTORY, server_flags

    from served_runs.server_process import running_server

    models = [f"--value-model={task}={EXAMPLES / 'demo' / 'value_models' / task}" for task in tasks]
    with (
        tempfile.TemporaryDirectory(prefix="qtilt-benchmark-") as folder,
        running_server(DIRECTORY, "reference", Path(folder), [*server_flags(), *models]) as url,
    ):
        yield url


def main() -> None:
    arguments = parse_arguments()
    with demo_server(arguments.tasks) as url:
        for task in arguments.tasks:
            print(asyncio.run(measure(url, task, arguments)), end="\n\n", flush=True)


if __name__ == "__main__":
    main()
