"""What a `kl_budget` gets for its KL, next to a fixed η: reward of the demo's tasks at equal mean KL.

    make ~/.cache/qtilt/SmolLM2-135M-Instruct
    python benchmarks/kl_budget.py                        # both tasks of the demo, its value models, over HTTP

Every setting answers the same test prompts with the same seeds, sampled as in candidate_mass.py. Fixed are the
strengths 1/η of the frontier; a budget bounds the KL of each completion under the strongest of them. Printed are the
reward (± 1.96 standard errors over prompts), the mean and the largest KL of a completion in nats, and what a fixed η
gets at the same mean KL, between two of the frontier.
"""

import argparse
import asyncio
import statistics
from collections.abc import Sequence

import numpy as np
from openai import AsyncOpenAI

from candidate_mass import EXAMPLES, TASKS, TOP_K, Setting, demo_server, run_batch
from qtilt_trainer.config import read_config
from qtilt_trainer.tasks import make_task


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--inv-eta", type=float, nargs="+", default=[2.5, 5.0, 10.0, 20.0, 40.0])
    parser.add_argument("--budget", type=float, nargs="+", default=[0.25, 0.5, 1.0, 2.0])
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--batch", type=int, default=16, help="prompts")
    return parser.parse_args(arguments)


def settings_of(task: str, arguments: argparse.Namespace) -> tuple[list[Setting], list[Setting]]:
    """The frontier of fixed η, and the budgets under the strongest."""
    common = {"value_model": task, "tail": "mean", "top_k": TOP_K}
    fixed = [Setting(f"1/η {inv_eta:g}", common | {"eta": 1 / inv_eta}) for inv_eta in arguments.inv_eta]
    strongest = common | {"eta": 1 / max(arguments.inv_eta)}
    return fixed, [Setting(f"budget {budget:g}", strongest | {"kl_budget": budget}) for budget in arguments.budget]


async def measure(url: str, name: str, arguments: argparse.Namespace) -> str:
    """A table of one task."""
    config = read_config(EXAMPLES / "demo" / f"{name}.toml")
    task = make_task(config.task)
    problems = list(enumerate(task.problems("test", arguments.prompts)))
    fixed, budgets = settings_of(name, arguments)
    reference = Setting("reference", None)
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", timeout=600, max_retries=0) as client:
        for first in range(0, len(problems), arguments.batch):
            for setting in (reference, *fixed, *budgets):
                batch = problems[first : first + arguments.batch]
                await run_batch(client, task, batch, setting, arguments.samples, config)
    return table(name, reference, fixed, budgets)


def table(task: str, reference: Setting, fixed: Sequence[Setting], budgets: Sequence[Setting]) -> str:
    """One line a setting."""
    lines = [f"{task:<14}{'reward':>18}{'KL':>8}{'largest':>9}{'fixed η at this KL':>20}"]
    kls = [0.0, *(statistics.fmean(one.kls) for one in fixed)]
    rewards = [statistics.fmean(one.rewards) for one in (reference, *fixed)]
    for one in (reference, *fixed, *budgets):
        told = [f"{statistics.fmean(one.kls):>8.3f}", f"{max(one.kls):>9.3f}"] if one.kls else []
        at_equal = f"{np.interp(statistics.fmean(one.kls), kls, rewards):>20.3f}" if one in budgets else ""
        lines.append("".join([f"{one.name:<14}", f"{reward(one.rewards):>18}", *told, at_equal]))
    return "\n".join(lines)


def reward(rewards: Sequence[float]) -> str:
    """Mean over prompts ± 1.96 standard errors."""
    return f"{statistics.fmean(rewards):.3f} ± {1.96 * statistics.stdev(rewards) / len(rewards) ** 0.5:.3f}"


def main() -> None:
    arguments = parse_arguments()
    with demo_server(arguments.tasks) as url:
        for task in arguments.tasks:
            print(asyncio.run(measure(url, task, arguments)), end="\n\n", flush=True)


if __name__ == "__main__":
    main()
