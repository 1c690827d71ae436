"""The rewards of stored completions: graded part by part, and again when that failed or the grader has changed."""

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.compute as pc

from qtilt_trainer.atomic_file import write_text
from qtilt_trainer.grade import TIMEOUT, RewardFailure, grade
from qtilt_trainer.rollouts import RolloutStore
from qtilt_trainer.tasks.problem import Problem, Task

logger = logging.getLogger(__name__)

Truncated = Literal["zero", "grade", "drop"]

CUT = "length"
"""finish_reason of a completion that max_tokens cut off."""
CUT_WARNING = 0.3
COUNTED_FROM = 100
"""A share is taken of at least so many, so that a single failure among the first few doesn't stop a run."""
MISSING_PROBLEM = "its problem is not among the task's first `prompts` any more"


class TooManyFailuresError(ValueError):
    """More than the allowed share was refused or couldn't be graded; the message says where the record is."""


@dataclass(frozen=True, slots=True)
class Rules:
    """What becomes of completions and prompts that went wrong."""

    truncated: Truncated = "zero"
    """A cut completion has the task's lowest reward, is graded like any other, or leaves no label."""
    max_failed_share: float = 0.05
    max_refused_share: float = 0.05
    timeout: float = TIMEOUT
    """Seconds one call of a task's `reward` may take."""
    is_binary: bool = False
    """The value model knows the rewards 0 and 1 only."""

    def for_evaluation(self) -> "Rules":
        """The same, with a reward for every completion: what `drop` leaves out of the labels counts as lowest."""
        return replace(self, truncated="zero" if self.truncated == "drop" else self.truncated, is_binary=False)

    def check_representable(self, rewards: Iterable[float | RewardFailure | None]) -> None:
        """Raises ValueError for a reward that the value model has no place for: the fit would, after hours."""
        graded = [reward for reward in rewards if isinstance(reward, float) and reward not in (0.0, 1.0)]
        if self.is_binary and graded:
            raise ValueError(
                f"a completion has the reward {graded[0]:g}, and a bernoulli value is for rewards 0 and 1: set "
                "value_model.distribution = 'categorical' and delete value_models/ in the run directory; what was "
                "collected stays"
            )


def is_above(count: int, total: int, share: float) -> bool:
    """Whether `count` of `total` is more than `share`, taken of COUNTED_FROM at least."""
    return count > share * max(total, COUNTED_FROM)


class Grader:
    """Grades the parts of a store and keeps the count of what failed."""

    def __init__(self, task: Task, store: RolloutStore, problems: Mapping[str, Problem], rules: Rules) -> None:
        self._task, self._store, self._problems, self._rules = task, store, problems, rules
        self._graded: dict[Path, int] = {}
        self._failed: dict[Path, int] = {}

    def grade_part(self, part: Path, again: bool = False) -> None:
        """Grades what has no reward in a part; everything when `again`."""
        table = self._store.read_part(part, ["prompt_id", "text", "finish_reason", "reward", "failure"])
        prompt_ids, texts, reasons, rewards, failures = (column.to_pylist() for column in table.columns)
        rows = [row for row in range(len(rewards)) if again or rewards[row] is None]
        for row, reward in zip(rows, self._rewards(rows, prompt_ids, texts, reasons), strict=True):
            rewards[row] = reward if isinstance(reward, float) else None
            failures[row] = reward.message if isinstance(reward, RewardFailure) else None
        self._store.set_rewards(part, rewards, failures)
        self._rules.check_representable(rewards)
        self._count(part, failures)

    def count_stored(self, iteration: int) -> None:
        """Counts what earlier processes have graded."""
        for part in self._store.parts(iteration):
            if part not in self._graded and self._store.is_graded(part):
                self._count(part, self._store.read_part(part, ["failure"]).column("failure").to_pylist())

    def _count(self, part: Path, failures: Sequence[str | None]) -> None:
        self._graded[part] = len(failures)
        # A problem that was taken out of the data is no failure of the grader.
        self._failed[part] = sum(failure not in (None, MISSING_PROBLEM) for failure in failures)

    def grade_missing(self, iteration: int) -> None:
        """The same for all parts of an iteration that lack a reward."""
        for part in self._store.parts(iteration):
            table = self._store.read_part(part, ["reward", "finish_reason"])
            lacking = pc.is_null(table.column("reward"))
            if self._rules.truncated == "drop":
                lacking = pc.and_(lacking, pc.not_equal(table.column("finish_reason"), CUT))
            if pc.any(lacking).as_py():
                self.grade_part(part)

    def check_share(self, iteration: int) -> None:
        """Raises TooManyFailuresError, with the failures written down, when too many couldn't be graded."""
        failed, graded = sum(self._failed.values()), sum(self._graded.values())
        if is_above(failed, graded, self._rules.max_failed_share):
            record = write_failures(self._store, iteration)
            raise TooManyFailuresError(
                f"{failed} of {graded} completions could not be graded, more than reward.max_failed_share "
                f"= {self._rules.max_failed_share:g} allows: see {record}. Mend the reward; the same command then "
                "grades them again (or, when settings.json notices the change, `qtilt-trainer regrade`)"
            )

    def _rewards(
        self, rows: Sequence[int], prompt_ids: Sequence[str], texts: Sequence[str], reasons: Sequence[str]
    ) -> list[float | RewardFailure | None]:
        """Of each of `rows`; None where the rule drops it."""
        rewards: dict[int, float | RewardFailure | None] = {}
        pairs: dict[int, tuple[Problem, str]] = {}
        for row in rows:
            problem = self._problems.get(prompt_ids[row])
            if problem is None:  # Also when it was cut: all completions of a prompt have a label, or none has.
                rewards[row] = RewardFailure(MISSING_PROBLEM)
            elif reasons[row] == CUT and self._rules.truncated != "grade":
                rewards[row] = self._task.low if self._rules.truncated == "zero" else None
            else:
                pairs[row] = problem, texts[row]
        rewards |= zip(pairs, grade(self._task, list(pairs.values()), self._rules.timeout), strict=True)
        return [rewards[row] for row in rows]


def write_failures(store: RolloutStore, iteration: int) -> Path:
    """What has no reward and why, a JSON object a line, for people to read; no file when nothing failed."""
    file = store.iteration_directory(iteration) / "failed_rewards.jsonl"
    table = store.table(iteration, ["rollout_id", "prompt_id", "failure"])
    failed = table.filter(pc.is_valid(table.column("failure"))).to_pylist()
    if failed:
        lines = (
            {
                "rollout_id": row["rollout_id"],
                "prompt_id": row["prompt_id"],
                "what": "reward",
                "message": row["failure"],
            }
            for row in failed
        )
        write_text(file, "".join(f"{json.dumps(line, ensure_ascii=False)}\n" for line in lines))
    else:
        file.unlink(missing_ok=True)
    return file


def report_rewards(store: RolloutStore, iteration: int) -> None:
    """Logs how many completions were cut and how many have no reward; writes the failures down."""
    table = store.table(iteration, ["finish_reason", "failure"])
    total, cut = table.num_rows, cut_count(table)
    failed = total - table.column("failure").null_count
    file = write_failures(store, iteration)
    if failed:
        logger.warning("iteration %d: %d of %d completions could not be graded: see %s", iteration, failed, total, file)
    if total:
        log = logger.warning if cut > CUT_WARNING * total else logger.info
        log(
            "iteration %d: %d of %d completions (%.1f %%) were cut by max_tokens",
            iteration,
            cut,
            total,
            100 * cut / total,
        )


def ungraded_count(store: RolloutStore, iteration: int, truncated: Truncated) -> int:
    """How many completions have neither a reward nor a reason for having none: their process was killed before."""
    table = store.table(iteration, ["finish_reason", "reward", "failure"])
    ungraded = pc.and_(pc.is_null(table.column("reward")), pc.is_null(table.column("failure")))
    if truncated == "drop":
        ungraded = pc.and_(ungraded, pc.not_equal(table.column("finish_reason"), CUT))
    return int(pc.sum(ungraded).as_py() or 0)


def cut_count(table: pa.Table) -> int:
    """How many rows max_tokens cut off."""
    return int(pc.sum(pc.equal(table.column("finish_reason"), CUT)).as_py() or 0)
