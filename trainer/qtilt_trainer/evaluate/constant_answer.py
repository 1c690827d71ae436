"""The best constant answer: what a policy would get that gives the same text to every prompt.

A guided policy that does no better has learned nothing about the prompts (letter counting, where most answers are "1").
Chosen on training prompts, measured on test prompts: the choice doesn't flatter the figure.
"""

import random
from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from qtilt_trainer.config import EvaluateConfig
from qtilt_trainer.estimators import bootstrap_interval
from qtilt_trainer.evaluate.record import Record, read_record, write_record
from qtilt_trainer.grade import TIMEOUT, grade
from qtilt_trainer.rollouts import RolloutStore
from qtilt_trainer.settings_file import claim
from qtilt_trainer.tasks.problem import Problem, Task
from qtilt_trainer.votes import answer_of

SURVEYED = 2_000
"""Roll-outs of iteration 1 that candidates are taken from."""
JUDGED_ON = 200
"""Training prompts that every candidate is tried on."""

Answered = tuple[Problem, str, float]
"""A problem, a completion, its reward."""


def measure_constant_answer(
    task: Task,
    store: RolloutStore,
    place: Path,
    prompts: int,
    config: EvaluateConfig,
    settings: dict[str, Any],
    timeout: float = TIMEOUT,
) -> Record | None:
    """The record of the best constant answer, made once and kept in `place`; None when none is wanted or found.

    store: the roll-outs of training, those of iteration 1 are read. prompts: how many training prompts those have.
    timeout: of one reward.
    """
    if not config.constant_candidates:
        return None
    file = place / "record.json"
    claim(place / "settings.json", settings, begun=file.exists())
    record = read_record(file)
    if record is None:
        problems = task.problems("train", prompts)
        candidates = candidate_texts(task, _survey(store, problems, config.seed), config.constant_candidates)
        if not candidates:
            return None
        judges = random.Random(f"{config.seed}/constant").sample(problems, min(JUDGED_ON, len(problems)))
        record = measure_text(task, best_text(task, candidates, judges, timeout), config, timeout)
        write_record(file, record)
    return record


def candidate_texts(task: Task, answered: Sequence[Answered], count: int) -> list[str]:
    """At most `count` texts: half the most frequent answers in their most frequent wording, half the best rewarded."""
    wordings: dict[Hashable, Counter[str]] = defaultdict(Counter)
    rewards: dict[str, list[float]] = defaultdict(list)
    for problem, text, reward in answered:
        answer = answer_of(task, problem, text)
        if answer is not None:
            wordings[answer][text] += 1
        rewards[text].append(reward)
    frequent = sorted(wordings.values(), key=lambda texts: -texts.total())
    rewarded = sorted(rewards, key=lambda text: (-sum(rewards[text]) / len(rewards[text]), -len(rewards[text])))
    common = [texts.most_common(1)[0][0] for texts in frequent[: (count + 1) // 2]]
    return list(dict.fromkeys([*common, *rewarded]))[:count]


def best_text(task: Task, candidates: Sequence[str], problems: Sequence[Problem], timeout: float = TIMEOUT) -> str:
    """The candidate with the highest mean reward when it answers every problem; the first of equals."""
    return max(candidates, key=lambda text: sum(_rewards(task, text, problems, timeout)))


def measure_text(task: Task, text: str, config: EvaluateConfig, timeout: float = TIMEOUT) -> Record:
    """The record of `text` as the answer to every test prompt."""
    rewards = _rewards(task, text, task.problems("test", config.prompts), timeout)
    low, high = bootstrap_interval(rewards, task.low, task.high, config.seed)
    accuracy = sum(rewards) / len(rewards)
    return Record(task=task.name, method="constant", n=len(rewards), accuracy=accuracy, low=low, high=high, text=text)


def _survey(store: RolloutStore, problems: Sequence[Problem], seed: int) -> list[Answered]:
    """Some roll-outs of iteration 1, the same whenever they are drawn."""
    by_id = {problem.id: problem for problem in problems}
    table = store.table(1, ["rollout_id", "prompt_id", "text", "reward"]).sort_by("rollout_id")
    table = table.filter(pc.is_valid(table.column("reward")))
    rows = random.Random(f"{seed}/survey").sample(range(table.num_rows), min(SURVEYED, table.num_rows))
    chosen = table.take(pa.array(rows, pa.int64())).to_pylist()
    return [(by_id[row["prompt_id"]], row["text"], row["reward"]) for row in chosen if row["prompt_id"] in by_id]


def _rewards(task: Task, text: str, problems: Sequence[Problem], timeout: float) -> list[float]:
    """What can't be graded counts as the lowest reward, as in the rest of the evaluation."""
    graded = grade(task, [(problem, text) for problem in problems], timeout)
    return [reward if isinstance(reward, float) else task.low for reward in graded]
