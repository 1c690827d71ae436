"""The figures of one cell, from its completions. `results.json` is a list of them; this file writes and reads it."""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qtilt_trainer.atomic_file import write_json
from qtilt_trainer.config import EvaluateConfig
from qtilt_trainer.estimators import best_of_k, bootstrap_interval, majority_of_k, paired_interval
from qtilt_trainer.evaluate.degeneration import distinct, repetition
from qtilt_trainer.evaluate.grid import Cell, Regime
from qtilt_trainer.rollouts import Rollout
from qtilt_trainer.tasks.problem import Problem, Task
from qtilt_trainer.votes import votes


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One line of `results.json`. KLs are nats a response: the mean of what is summed over its guided steps.

    Of the best constant answer only the fields up to `text` say anything.
    """

    task: str
    method: str
    """reference, constant, qsharp or cd."""
    n: int
    """Prompts."""
    accuracy: float
    """pass@1: mean reward of a completion, averaged over prompts."""
    low: float
    """95 % bootstrap interval of the accuracy, over prompts."""
    high: float
    text: str | None = None
    """The constant answer."""
    inv_eta: float | None = None
    """1/eta; null for the reference."""
    tail: str | None = None
    """What tokens got that weren't candidates, as the server applied it."""
    regime: str | None = None
    """Its label; what it consists of follows."""
    temperature: float | None = None
    """0: greedy."""
    top_p: float | None = None
    top_k: int | None = None
    """Of sampling; 0: no truncation."""
    guidance_top_k: int | None = None
    """Candidates of guidance; the reference's record has it too, for comparison."""
    gain: float | None = None
    """Accuracy less the reference's on the same prompts in the same regime; null for the reference."""
    gain_low: float | None = None
    """95 % bootstrap interval of the gain, over prompts, paired."""
    gain_high: float | None = None
    kl: float | None = None
    """KL(guided || reference) at the sampling temperature, before truncation; 0 for the reference."""
    kl_candidates: float | None = None
    """The same given that the token is a candidate."""
    mass: float | None = None
    """The reference's mass in the candidates, mean over guided steps; null without one."""
    tokens: float | None = None
    """Mean length, end token included."""
    cut: float | None = None
    """Share of the completions that were cut by max_tokens."""
    rep_4: float | None = None
    """Mean share of 4-grams that repeat within their completion."""
    distinct_2: float | None = None
    """Different bigrams of all completions by the number of all; null without one."""
    samples: int | None = None
    """Completions a prompt."""
    k: int | None = None
    maj_at_k: float | None = None
    pass_at_k: float | None = None
    value_model: str | None = None
    """NAME@VERSION that guided."""
    cell: str | None = None
    """ITERATION/NAME: its completions are there below `evaluation/`, its value model in `value_models/ITERATION`."""

    @property
    def is_truncated_to_candidates(self) -> bool:
        """Whether sampling itself draws from no more tokens than guidance has candidates."""
        return bool(self.top_k and self.guidance_top_k and self.top_k <= self.guidance_top_k)

    @property
    def drawn_in(self) -> Regime | None:
        """The regime; None for the constant answer."""
        if self.temperature is None or self.top_p is None or self.top_k is None:
            return None
        return Regime(self.temperature, self.top_p, self.top_k)


def summarise(
    task: Task,
    cell: Cell,
    iteration: int,
    problems: Sequence[Problem],
    rollouts: Sequence[Rollout],
    reference: Mapping[str, float] | None,
    config: EvaluateConfig,
) -> Record:
    """The record of one cell from its completions.

    reference: prompt id -> the reference's mean reward in the same regime; None for the reference itself.
    """
    by_prompt: dict[str, list[Rollout]] = defaultdict(list)
    for rollout in rollouts:
        by_prompt[rollout.prompt_id].append(rollout)
    groups = [(problem, by_prompt[problem.id]) for problem in problems if problem.id in by_prompt]
    if not groups:
        raise ValueError(f"the server refused all {len(problems)} test prompts: see refused.jsonl of {cell.name}")
    # Without those of problems that have left the data: a regrade keeps them.
    rollouts = [rollout for _, group in groups for rollout in group]
    rewards = [[rollout.reward for rollout in group] for _, group in groups]
    answers = [votes(task, problem, [rollout.text for rollout in group]) for problem, group in groups]
    samples = samples_of(cell, config)
    k = min(config.k or samples, samples)
    means = [float(np.mean(row)) for row in rewards]
    low, high = bootstrap_interval(means, task.low, task.high, config.seed)
    by_id = {problem.id: mean for (problem, _), mean in zip(groups, means, strict=True)}
    gain, gain_low, gain_high = _gain(task, by_id, reference, config)
    return Record(
        task=task.name,
        method=cell.method or "reference",
        n=len(groups),
        accuracy=float(np.mean(means)),
        low=low,
        high=high,
        inv_eta=cell.inv_eta,
        tail=_applied_tail(cell, rollouts),
        regime=cell.regime.label,
        temperature=cell.regime.temperature,
        top_p=cell.regime.top_p,
        top_k=cell.regime.top_k,
        guidance_top_k=config.guidance_top_k,
        gain=gain,
        gain_low=gain_low,
        gain_high=gain_high,
        kl=_mean([rollout.kl for rollout in rollouts]),
        kl_candidates=_mean([rollout.kl_candidates for rollout in rollouts]),
        mass=_mean_mass(rollouts),
        tokens=_mean([len(rollout.token_ids) for rollout in rollouts]),
        cut=_mean([rollout.finish_reason == "length" for rollout in rollouts]),
        rep_4=_mean([repetition(rollout.token_ids) for rollout in rollouts]),
        distinct_2=distinct([rollout.token_ids for rollout in rollouts]),
        samples=samples,
        k=k,
        maj_at_k=_mean([majority_of_k(*pair, k) for pair in zip(answers, rewards, strict=True)]),
        pass_at_k=_mean([best_of_k(row, k) for row in rewards]),
        value_model=next((rollout.value_model for rollout in rollouts if rollout.value_model), None),
        cell=cell.place(iteration),
    )


def samples_of(cell: Cell, config: EvaluateConfig) -> int:
    """Completions a prompt."""
    return 1 if cell.regime.is_greedy else config.samples


def mean_rewards(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Prompt id -> mean reward of its completions."""
    by_prompt: dict[str, list[float]] = defaultdict(list)
    for rollout in rollouts:
        by_prompt[rollout.prompt_id].append(rollout.reward)
    return {prompt_id: _mean(rewards) for prompt_id, rewards in by_prompt.items()}


def write_record(file: Path, record: Record) -> None:
    """One record, of one cell."""
    write_json(file, asdict(record))


def read_record(file: Path) -> Record | None:
    """What `write_record` wrote; None when it hasn't. Raises ValueError for what another version of qtilt wrote."""
    return _record(file, json.loads(file.read_text(encoding="utf-8"))) if file.exists() else None


def write_results(file: Path, records: Sequence[Record]) -> None:
    """All records."""
    write_json(file, [asdict(record) for record in records])


def read_results(file: Path) -> list[Record]:
    """What `write_results` wrote. Raises ValueError for what another version of qtilt wrote."""
    return [_record(file, fields) for fields in json.loads(file.read_text(encoding="utf-8"))]


def _record(file: Path, fields: dict[str, Any]) -> Record:
    try:
        return Record(**fields)
    except TypeError as error:
        raise ValueError(f"{file} is of another version of qtilt ({error}): delete it and evaluate again") from error


def _gain(
    task: Task, means: Mapping[str, float], reference: Mapping[str, float] | None, config: EvaluateConfig
) -> tuple[float, float, float] | tuple[None, None, None]:
    """On the prompts that the server refused in neither cell."""
    shared = [prompt_id for prompt_id in means if prompt_id in (reference or {})]
    if reference is None or not shared:
        return None, None, None
    values, references = ([mean[prompt_id] for prompt_id in shared] for mean in (means, reference))
    return paired_interval(values, references, task.low, task.high, config.seed)


def _applied_tail(cell: Cell, rollouts: Sequence[Rollout]) -> str | None:
    applied = {rollout.tail for rollout in rollouts if rollout.value_model is not None}
    if len(applied) > 1:
        raise ValueError(
            f"{cell.name} was guided with the tails {' and '.join(sorted(map(str, applied)))}, because the server's "
            "default changed: say which in evaluate.tails, or delete the cell's directory"
        )
    return next(iter(applied), None)


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))


def _mean_mass(rollouts: Sequence[Rollout]) -> float | None:
    """Over guided steps: a response counts by how many it had."""
    guided = [(rollout.mass, rollout.guided_tokens) for rollout in rollouts if rollout.mass is not None]
    steps = sum(count for _, count in guided)
    return sum(mass * count for mass, count in guided) / steps if steps else None
