"""Measures the grid against the server.

Every cell has a directory of its own with its completions and, when complete, its record: a killed evaluation goes on
where it was.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from qtilt_trainer.client import Guidance, GuidedClient, Sampling
from qtilt_trainer.collect import sampling_of
from qtilt_trainer.config import EvaluateConfig, SamplingConfig
from qtilt_trainer.evaluate.grid import Cell, Regime, grid
from qtilt_trainer.evaluate.record import Record, mean_rewards, read_record, samples_of, summarise, write_record
from qtilt_trainer.generate import generate
from qtilt_trainer.plan import PlannedRequest, consecutive, seed_of
from qtilt_trainer.rewards import Grader, Rules
from qtilt_trainer.rollouts import RolloutStore, rollout_id
from qtilt_trainer.settings_file import claim
from qtilt_trainer.tasks.problem import Problem, Task

logger = logging.getLogger(__name__)

RECORD = "record.json"


async def evaluate(
    client: GuidedClient,
    task: Task,
    directory: Path,
    iteration: int,
    value_model: str,
    config: EvaluateConfig,
    sampling: SamplingConfig,
    concurrency: int,
    settings: Callable[[Cell], dict[str, Any]],
    rules: Rules | None = None,
) -> list[Record]:
    """The records of all cells of the grid; those already complete are read.

    value_model: NAME@VERSION of iteration `iteration`. settings: what a cell depends on, kept beside it.
    A completion that can't be graded counts as the task's lowest reward; a prompt that the server refuses is left out.
    Raises ServerError; what had arrived is stored.
    """
    rules = (rules or Rules()).for_evaluation()
    problems = task.problems("test", config.prompts)
    reference: dict[Regime, Mapping[str, float]] = {}
    records = []
    for cell in grid(config, sampling):
        number, place = cell.iteration(iteration), directory / cell.place(iteration)
        store = RolloutStore(place)
        claim(place / "settings.json", settings(cell), begun=store.has(number))
        record = read_record(place / RECORD)
        if record is None:
            store.remove_unfinished()
            _grade_stored(task, store, number, problems, rules)
            plan = _missing_requests(cell, problems, number, store.ids(), value_model, config, sampling)
            await generate(client, task, plan, store, concurrency, cell.name, rules)
            rollouts = store.read(ungraded=task.low)
            record = summarise(task, cell, iteration, problems, rollouts, reference.get(cell.regime), config)
            write_record(place / RECORD, record)
        if cell.method is None:
            reference[cell.regime] = mean_rewards(store.read(ungraded=task.low))
        logger.info("%s: mean reward %.3f [%.3f, %.3f]", cell.name, record.accuracy, record.low, record.high)
        records.append(record)
    return records


def _grade_stored(task: Task, store: RolloutStore, iteration: int, problems: Sequence[Problem], rules: Rules) -> None:
    """Grades what a killed process had stored: without a reward it would count as wrong."""
    grader = Grader(task, store, {problem.id: problem for problem in problems}, rules)
    grader.grade_missing(iteration)
    grader.count_stored(iteration)
    grader.check_share(iteration)


def _missing_requests(
    cell: Cell,
    problems: Sequence[Problem],
    iteration: int,
    stored: set[str],
    value_model: str,
    config: EvaluateConfig,
    sampling: SamplingConfig,
) -> list[PlannedRequest]:
    plan = []
    for problem in problems:
        ids = {sample: rollout_id(iteration, problem.id, sample) for sample in range(samples_of(cell, config))}
        # The same in every cell: what differs between policies isn't their seeds.
        seed = seed_of(config.seed, f"{problem.id}/0")
        plan += [
            PlannedRequest(
                iteration,
                "test",
                problem,
                samples,
                seed + samples[0],
                _sampling(cell.regime, sampling),
                _guidance(cell, value_model, config),
            )
            for samples in consecutive([sample for sample, name in ids.items() if name not in stored])
        ]
    return plan


def _sampling(regime: Regime, config: SamplingConfig) -> Sampling:
    drawn = sampling_of(config)
    return replace(drawn, temperature=regime.temperature, top_p=regime.top_p, top_k=regime.top_k)


def _guidance(cell: Cell, value_model: str, config: EvaluateConfig) -> Guidance | None:
    if cell.method is None or cell.inv_eta is None:
        return None
    return Guidance(value_model, 1 / cell.inv_eta, config.guidance_top_k, cell.method, tail=cell.tail)
