"""Applies the task's present grader and gold answers to completions that are stored already."""

import json
import logging
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qtilt_trainer.atomic_file import write_json
from qtilt_trainer.digests import prompt_digest
from qtilt_trainer.rewards import MISSING_PROBLEM, Grader, Rules, report_rewards
from qtilt_trainer.rollouts import RolloutStore
from qtilt_trainer.settings_file import GRADER, claim, differences
from qtilt_trainer.tasks.problem import Problem, Task

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Stored:
    """Completions of one iteration, and what they are to be graded with."""

    store: RolloutStore
    iteration: int
    settings_file: Path
    settings: dict[str, Any]
    problems: Sequence[Problem]
    rules: Rules


def check_regradable(stored: Stored) -> None:
    """Raises ValueError when more than the grader has changed, or none of the prompts is in the task's data."""
    differing = differences(stored.settings_file, stored.settings)
    if not all(line.startswith((*GRADER, "size")) for line in differing):
        claim(stored.settings_file, stored.settings, begun=True)
    digests = stored.store.table(stored.iteration, ["prompt_digest"]).column("prompt_digest").to_pylist()
    if {prompt_digest(problem.prompt) for problem in stored.problems}.isdisjoint(digests):
        raise ValueError(
            f"none of the prompts in {stored.settings_file.parent} is in the task's data: nothing there can be graded "
            "with it; undo the change, or use another run_dir"
        )


def regrade(task: Task, stored: Stored) -> None:
    """Grades every completion anew; none is dropped.

    A problem whose id has changed with its gold answer is found by its prompt. A completion whose prompt is not among
    the problems has no reward any more; how many those are is logged. While it works, the settings say so: a run that
    is killed in between can't be taken for either. Raises TooManyFailuresError when too many can't be graded.
    """
    store, iteration = stored.store, stored.iteration
    found = json.loads(stored.settings_file.read_text(encoding="utf-8"))
    write_json(stored.settings_file, {**found, "regrading": True})
    before = _rewards(store, iteration)
    new_ids = _new_ids(store, iteration, stored.problems)
    grader = Grader(task, store, {problem.id: problem for problem in stored.problems}, stored.rules)
    for part in store.parts(iteration):
        store.rename_prompts(part, new_ids)
        grader.grade_part(part, again=True)
    grader.check_share(iteration)
    # How many roll-outs there are has not changed.
    write_json(stored.settings_file, {**stored.settings, **({"size": found["size"]} if "size" in found else {})})
    _warn_of_missing(stored)
    changed = sum(old != new for old, new in zip(before, _rewards(store, iteration), strict=True))
    logger.info("%s: %d of %d rewards changed", stored.settings_file.parent, changed, len(before))
    report_rewards(store, iteration)


def _new_ids(store: RolloutStore, iteration: int, problems: Sequence[Problem]) -> dict[str, str]:
    """Stored prompt id -> the id that the same prompt has now, where that is one and nobody else's."""
    known = {problem.id for problem in problems}
    digests = [prompt_digest(problem.prompt) for problem in problems]
    unique = {digest for digest, count in Counter(digests).items() if count == 1}
    now = {digest: problem.id for digest, problem in zip(digests, problems, strict=True) if digest in unique}
    table = store.table(iteration, ["rollout_id", "prompt_id", "prompt_digest"])
    rollout_ids, prompt_ids, prompt_digests = (column.to_pylist() for column in table.columns)
    stored = dict(zip(prompt_ids, prompt_digests, strict=True))
    samples: dict[str, set[str]] = defaultdict(set)
    for rollout_id, prompt_id in zip(rollout_ids, prompt_ids, strict=True):
        samples[prompt_id].add(rollout_id.rpartition("/")[2])
    new_ids = {old: now[digest] for old, digest in stored.items() if old not in known and digest in now}
    taken = Counter(new_ids.values())
    # The new id may be there already, for the parts that a regrade had come to when it was killed.
    return {old: new for old, new in new_ids.items() if taken[new] == 1 and samples[old].isdisjoint(samples[new])}


def _warn_of_missing(stored: Stored) -> None:
    failures = stored.store.table(stored.iteration, ["failure"]).column("failure").to_pylist()
    missing = failures.count(MISSING_PROBLEM)
    if missing:
        logger.warning(
            "%s: %d completions have no reward any more, because their prompts are not among the first %d of the task; "
            "if rows were added, more `prompts` and another regrade bring them back",
            stored.settings_file.parent,
            missing,
            len(stored.problems),
        )


def _rewards(store: RolloutStore, iteration: int) -> list[float | None]:
    rewards: list[float | None] = store.table(iteration, ["reward"]).column("reward").to_pylist()
    return rewards
