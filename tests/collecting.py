"""One iteration collected from the stand-in server: what tests of it have in common."""

import asyncio
from typing import Any

from qtilt_trainer.client import GuidedClient
from qtilt_trainer.collect import missing_samples, plan_requests
from qtilt_trainer.config import CollectConfig, SamplingConfig, ServerConfig
from qtilt_trainer.generate import generate
from qtilt_trainer.plan import PlannedRequest
from qtilt_trainer.rewards import Rules
from qtilt_trainer.rollouts import RolloutStore
from qtilt_trainer.tasks import Task
from stand_in_server import StandInServer
from star_graph import StarGraph

TASK = StarGraph()
CONFIG = CollectConfig(prompts=6, samples_per_prompt=4, eta=0.2, guidance_top_k=7, tail="mean", seed=3)
SAMPLING = SamplingConfig(temperature=0.8, top_p=0.9, max_tokens=9)


def planned(store: RolloutStore, iteration: int, value_model: str | None = None) -> list[PlannedRequest]:
    missing = missing_samples(TASK, iteration, store, CONFIG)
    return plan_requests(missing, iteration, store, CONFIG, SAMPLING, value_model)


def run(
    plan: list[PlannedRequest],
    store: RolloutStore,
    server: StandInServer,
    rules: Rules | None = None,
    task: Task = TASK,
    **settings: Any,
) -> None:
    config = ServerConfig(url=server.url, **{"concurrency": 5, "retries": 1, **settings})

    async def collect() -> None:
        async with GuidedClient(config) as client:
            await generate(client, task, plan, store, config.concurrency, "test", rules)

    asyncio.run(collect())
