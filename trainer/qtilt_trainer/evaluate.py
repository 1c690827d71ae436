"""Accuracy and KL on test prompts over a grid: the reference, and each method at each 1/eta, sampled and greedy.

Every cell of the grid has a directory of its own with its completions and, when complete, its record: a killed
evaluation goes on where it was. `results.json` is the list of the records.
"""

import json
import logging
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from qtilt_trainer.atomic_file import write_json
from qtilt_trainer.client import Guidance, GuidedClient
from qtilt_trainer.collect import sampling_of
from qtilt_trainer.config import Decoding, EvaluateConfig, Method, SamplingConfig
from qtilt_trainer.estimators import best_of_k, bootstrap_interval, majority_of_k
from qtilt_trainer.generate import generate
from qtilt_trainer.plan import PlannedRequest, consecutive, seed_of
from qtilt_trainer.rewards import Rules
from qtilt_trainer.rollouts import Rollout, RolloutStore, rollout_id
from qtilt_trainer.settings_file import claim
from qtilt_trainer.tasks.problem import Problem, Task
from qtilt_trainer.votes import votes

logger = logging.getLogger(__name__)

RECORD = "record.json"


@dataclass(frozen=True, slots=True)
class Cell:
    """One policy and one way to decode it."""

    method: Method | None
    """None: the reference."""
    inv_eta: float | None
    decoding: Decoding

    @property
    def name(self) -> str:
        """Also its directory's."""
        policy = "reference" if self.method is None else f"{self.method}-{self.inv_eta}".removesuffix(".0")
        return f"{policy}-{self.decoding}"


@dataclass(frozen=True, slots=True)
class Record:
    """One line of `results.json`."""

    task: str
    method: str
    """reference, qsharp or cd."""
    inv_eta: float | None
    """1/eta; null for the reference."""
    decoding: str
    accuracy: float
    """pass@1: mean reward of a completion, averaged over prompts."""
    low: float
    """95 % bootstrap interval of the accuracy, over prompts."""
    high: float
    kl: float
    """Nats a response: mean of the summed KL(guided || reference); 0 for the reference."""
    n: int
    """Prompts."""
    samples: int
    """Completions a prompt."""
    k: int
    maj_at_k: float
    pass_at_k: float
    value_model: str | None
    """NAME@VERSION that guided."""


def grid(config: EvaluateConfig) -> list[Cell]:
    """The cells in the order of the result table."""
    guided = [
        Cell(method, inv_eta, decoding)
        for method in config.methods
        for inv_eta in config.inv_eta
        for decoding in config.decoding
    ]
    reference = [Cell(None, None, decoding) for decoding in config.decoding]
    return (reference if config.reference else []) + guided


def cell_directory(directory: Path, cell: Cell, iteration: int) -> Path:
    """Where a cell's completions are."""
    return directory / f"iteration-{iteration:03d}" / cell.name


def iteration_of(cell: Cell, iteration: int) -> int:
    """The reference is what was there before the first iteration, so it is measured once."""
    return 0 if cell.method is None else iteration


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
    records = []
    for cell in grid(config):
        number = iteration_of(cell, iteration)
        place = cell_directory(directory, cell, number)
        store = RolloutStore(place)
        claim(place / "settings.json", settings(cell), begun=store.has(number))
        record = _read_record(place)
        if record is None:
            store.remove_unfinished()
            plan = _missing_requests(cell, problems, number, store.ids(), value_model, config, sampling)
            await generate(client, task, plan, store, concurrency, cell.name, rules)
            record = summarise(task, cell, problems, store.read(ungraded=task.low), config)
            write_json(place / RECORD, asdict(record))
        logger.info("%s: %s", cell.name, record)
        records.append(record)
    return records


def summarise(
    task: Task, cell: Cell, problems: Sequence[Problem], rollouts: Sequence[Rollout], config: EvaluateConfig
) -> Record:
    """The record of one cell from its completions."""
    by_prompt: dict[str, list[Rollout]] = defaultdict(list)
    for rollout in rollouts:
        by_prompt[rollout.prompt_id].append(rollout)
    groups = [(problem, by_prompt[problem.id]) for problem in problems if problem.id in by_prompt]
    if not groups:
        raise ValueError(f"the server refused all {len(problems)} test prompts: see refused.jsonl of {cell.name}")
    rewards = [[rollout.reward for rollout in group] for _, group in groups]
    answers = [votes(task, problem, [rollout.text for rollout in group]) for problem, group in groups]
    samples = _samples(cell, config)
    k = min(config.k or samples, samples)
    means = [float(np.mean(row)) for row in rewards]
    low, high = bootstrap_interval(means, task.low, task.high, config.seed)
    return Record(
        task=task.name,
        method=cell.method or "reference",
        inv_eta=cell.inv_eta,
        decoding=cell.decoding,
        accuracy=float(np.mean(means)),
        low=low,
        high=high,
        kl=float(np.mean([rollout.kl for rollout in rollouts])),
        n=len(groups),
        samples=samples,
        k=k,
        maj_at_k=float(np.mean([majority_of_k(*pair, k) for pair in zip(answers, rewards, strict=True)])),
        pass_at_k=float(np.mean([best_of_k(row, k) for row in rewards])),
        value_model=next((rollout.value_model for rollout in rollouts if rollout.value_model), None),
    )


def _missing_requests(
    cell: Cell,
    problems: Sequence[Problem],
    iteration: int,
    stored: set[str],
    value_model: str,
    config: EvaluateConfig,
    sampling: SamplingConfig,
) -> list[PlannedRequest]:
    sampled = sampling_of(sampling)
    drawn = sampled if cell.decoding == "sample" else replace(sampled, temperature=0.0, top_p=1.0, top_k=0)
    guidance = (
        Guidance(value_model, 1 / cell.inv_eta, config.guidance_top_k, cell.method)
        if cell.method is not None and cell.inv_eta is not None
        else None
    )
    plan = []
    for problem in problems:
        ids = {sample: rollout_id(iteration, problem.id, sample) for sample in range(_samples(cell, config))}
        # The same in every cell: what differs between policies isn't their seeds.
        seed = seed_of(config.seed, f"{problem.id}/0")
        plan += [
            PlannedRequest(iteration, "test", problem, samples, seed + samples[0], drawn, guidance)
            for samples in consecutive([sample for sample, name in ids.items() if name not in stored])
        ]
    return plan


def _samples(cell: Cell, config: EvaluateConfig) -> int:
    return config.samples if cell.decoding == "sample" else 1


def _read_record(place: Path) -> Record | None:
    file = place / RECORD
    return Record(**json.loads(file.read_text(encoding="utf-8"))) if file.exists() else None
