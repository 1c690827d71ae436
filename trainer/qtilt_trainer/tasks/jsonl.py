r"""Problems from data files: rows with a prompt and the answer that is expected.

[task]
name = "jsonl"
train = "gsm8k/train.jsonl"          # .jsonl, .jsonl.gz, .parquet, a directory or hub id of `datasets`
test = "gsm8k/test.jsonl"            # or held_out = 0.1 of the training prompts
prompt_field = "question"
answer_field = "answer"              # or nested: "reward_model.ground_truth"
answer_pattern = '#### (.*)'         # GSM8K's answers end so
template = '{prompt} Put the final answer in \boxed{}.'
chat = true
match = "boxed"
"""

import functools
import hashlib
import json
import logging
from collections.abc import Hashable, Iterator, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from qtilt_trainer.tasks.answer_text import boxed_answer
from qtilt_trainer.tasks.data_rows import Row, read_rows, source_of
from qtilt_trainer.tasks.matching import MATCHERS, bad_pattern, last_group
from qtilt_trainer.tasks.problem import Problem, Prompt, Split, prompt_text

logger = logging.getLogger(__name__)

PLACE = "{prompt}"
ID_DIGITS = 16
READ_AHEAD = 64
"""Problems whose answers are checked at once while unreadable ones are being skipped."""

Source = Annotated[Path | str, BeforeValidator(source_of)]


class Jsonl(BaseModel):
    """Settings of the task, and the task."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    low: ClassVar[float] = 0.0
    high: ClassVar[float] = 1.0

    train: Source
    """A .jsonl, .jsonl.gz or .parquet file; a directory (saved by `datasets`, or a folder of data files); a hub id."""
    test: Source | None = None
    """None: `held_out` of the prompts of `train`. A prompt that is in both counts as a test prompt only."""
    subset: str | None = None
    """Subset (configuration) of a directory or hub id."""
    train_split: str | None = None
    """Split of a directory or hub id; None: "train", or the only one there is."""
    test_split: str | None = None
    """The same for `test`."""
    held_out: float = Field(0.1, gt=0.0, lt=1.0)
    """Fraction of the prompts of `train` that is the test split; not used when `test` is given."""
    seed: int = 0
    """Decides the order of the prompts, and which are held out."""
    prompt_field: str = "prompt"
    """A text, or a list of chat messages. Dots lead into nested fields."""
    answer_field: str = "answer"
    """A text, a number, true or false, or a list of them, of which any is right. Dots lead into nested fields. Empty:
    rows have none; for a `reward` of your own."""
    answer_pattern: str | None = None
    """Regular expression whose first group is the answer inside the answer field; None: the field is the answer."""
    answer_boxed: bool = False
    r"""Whether the answer is what the answer field has in its last \boxed{}."""
    skip_unreadable: bool = False
    """Whether a row whose answer `match` can't read is left out (and counted in the log) instead of an error."""
    template: str = PLACE
    """What is sent for a text prompt; {prompt} is where it goes."""
    chat: bool = False
    """Whether a text prompt is sent as a user's chat message."""
    match: Literal["exact", "numeric", "boxed", "regex"] = "exact"
    r"""exact: the whole completion. numeric: the number it answers. boxed: its last \boxed{}, compared as mathematics.
    regex: what `pattern` finds last is the answer; without a pattern the answer itself is the expression to find."""
    pattern: str | None = None

    @property
    def name(self) -> str:
        """The training file's or data set's name."""
        return self.train.name.partition(".")[0] if isinstance(self.train, Path) else self.train.rpartition("/")[2]

    @field_validator("answer_pattern", "pattern")
    @classmethod
    def _is_expression(cls, value: str | None) -> str | None:
        reason = bad_pattern(value or "")
        if reason is not None:
            raise ValueError(reason)
        return value

    @model_validator(mode="after")
    def _is_consistent(self) -> "Jsonl":
        if PLACE not in self.template:
            raise ValueError(f"template must contain {PLACE}, got {self.template!r}")
        if self.pattern is not None and self.match != "regex":
            raise ValueError(f"pattern is for match = 'regex' only, and match is {self.match!r}")
        if self.answer_boxed and self.answer_pattern is not None:
            raise ValueError("answer_boxed and answer_pattern both say where the answer is: give one of them")
        if self.test_split is not None and self.test is None:
            raise ValueError("test_split is a split of `test`, and `test` is not given (it may be the same as `train`)")
        return self

    def problems(self, split: Split, count: int) -> list[Problem]:
        """The first `count` of a split. Raises ValueError if there are fewer, or for an answer that can't be read.

        Their order, and which are held out, follow from `seed` and each prompt's own text: rows added to a file, or
        their order in it, change neither.
        """
        problems: list[Problem] = []
        waiting = iter(_split_problems(self, split))
        while len(problems) < count:
            batch = [found for _, found in zip(range(max(READ_AHEAD, count - len(problems))), waiting, strict=False)]
            if not batch:
                raise ValueError(
                    f"{self._source(split)} has {len(problems)} {split} problems, not {count}: ask for less"
                )
            problems += self._readable(batch)
        return problems[:count]

    def reward(self, problem: Problem, completion: str) -> float:
        """1 if the completion matches the problem's answer (one of its answers), else 0."""
        matches = MATCHERS[self.match].matches
        return float(any(matches(expected, completion, self.pattern) for expected in _answers(problem)))

    def answer(self, problem: Problem, completion: str) -> Hashable | None:
        """What the completion answers, in the form `match` reads it."""
        return MATCHERS[self.match].extract(completion, self.pattern)

    def same_answer(self, problem: Problem, one: Hashable, other: Hashable) -> bool:
        """Whether two results of `answer` are the same to `match`: 1/2 and 0.5 are."""
        return MATCHERS[self.match].same(one, other)

    def _source(self, split: Split) -> Path | str:
        return self.train if split == "train" or self.test is None else self.test

    def _readable(self, found: Sequence[tuple[Problem, str]]) -> list[Problem]:
        """The problems whose answers `match` can read. Raises ValueError for the others, unless they are skipped."""
        answers = [answer for problem, _ in found for answer in _answers(problem)]
        reasons = MATCHERS[self.match].unreadable(answers, self.pattern)
        bad = [
            f"{where}: match = {self.match!r} can't read the answer {answer!r}: {reasons[answer]}"
            for problem, where in found
            for answer in _answers(problem)
            if answer in reasons
        ]
        if bad and not self.skip_unreadable:
            more = f" (and {len(bad) - 1} more; skip_unreadable = true leaves them out)" if len(bad) > 1 else ""
            raise ValueError(bad[0] + more)
        if bad:
            logger.warning("left out %d of %d problems, the first because %s", len(bad), len(found), bad[0])
        return [problem for problem, _ in found if not reasons.keys() & set(_answers(problem))]

    def problem_from(self, row: Row) -> Problem:
        """The problem of one row. Raises ValueError that names the file, the row and the field."""
        prompt = self._prompt(_field(row, self.prompt_field), row.where)
        answers = self._expected(_field(row, self.answer_field), row.where) if self.answer_field else [""]
        identity = json.dumps([prompt, answers], sort_keys=True, ensure_ascii=False)
        try:
            identity.encode()
        except UnicodeEncodeError as error:
            half = identity[error.start]
            raise ValueError(
                f"{row.where}: prompt and answer must be texts that UTF-8 can hold, and there is half a character in "
                f"them ({half!r})"
            ) from error
        return Problem(_digest(identity)[:ID_DIGITS], prompt, answers[0] if len(answers) == 1 else tuple(answers))

    def _prompt(self, value: Any, where: str) -> Prompt:
        if isinstance(value, str):
            text = self.template.replace(PLACE, value)
            return [{"role": "user", "content": text}] if self.chat else text
        if isinstance(value, list) and value and all(isinstance(item, dict) and "role" in item for item in value):
            return value
        raise ValueError(f"{where}: {self.prompt_field!r} must be a text or a list of chat messages, got {value!r}")

    def _expected(self, value: Any, where: str) -> list[str]:
        """The answers of which any is right, at least one."""
        values = value if isinstance(value, list) else [value]
        answers = [answer for one in values for answer in self._answers_in(one, where)]
        if not answers:
            raise ValueError(f"{where}: {self.answer_field!r} is an empty list")
        return list(dict.fromkeys(answers))

    def _answers_in(self, value: Any, where: str) -> list[str]:
        if isinstance(value, bool):
            return [str(value), str(value).lower()]
        if not isinstance(value, str | int | float | Decimal):
            allowed = "a text, a number, true or false, or a list of them"
            raise ValueError(f"{where}: {self.answer_field!r} must be {allowed}, got {value!r}")
        return [self._inner_answer(str(value), where)]

    def _inner_answer(self, text: str, where: str) -> str:
        answer: str | None = text
        missing = "is empty"
        if self.answer_boxed:
            answer, missing = boxed_answer(text), f"has no complete \\boxed{{}} in {text!r}"
        elif self.answer_pattern is not None:
            missing = f": answer_pattern {self.answer_pattern!r} finds nothing in {text!r}"
            try:
                answer = last_group(self.answer_pattern, text)
            except TimeoutError:
                answer, missing = None, f": answer_pattern {self.answer_pattern!r} takes too long in {text!r}"
        if answer is None or not answer.strip():
            raise ValueError(f"{where}: {self.answer_field!r} {missing}".replace("' :", "':"))
        return answer


def _answers(problem: Problem) -> tuple[str, ...]:
    return problem.answer if isinstance(problem.answer, tuple) else (problem.answer,)


def _field(row: Row, path: str) -> Any:
    """The value of a field; a dot leads into a nested one, unless the field's own name has it."""
    if path in row.record:
        return row.record[path]
    value: Any = row.record
    for name in path.split("."):
        if not isinstance(value, dict) or name not in value:
            there = sorted(value) if isinstance(value, dict) else type(value).__name__
            raise ValueError(f"{row.where}: no field {path!r}, only {there}")
        value = value[name]
    return value


@functools.lru_cache(maxsize=8)
def _split_problems(task: Jsonl, split: Split) -> tuple[tuple[Problem, str], ...]:
    """All problems of a split in their order, each with where it came from."""
    train = _read(task, task.train, task.train_split)
    found: Sequence[tuple[Problem, str]]
    if task.test is None:
        found = [one for one in train if (_position(task, one[0], "held out") < task.held_out) == (split == "test")]
    else:
        test = _read(task, task.test, task.test_split)
        found = test if split == "test" else _without(train, test)
    return tuple(sorted(found, key=lambda one: (_position(task, one[0], "order"), one[0].id)))


def _without(train: Sequence[tuple[Problem, str]], test: Sequence[tuple[Problem, str]]) -> list[tuple[Problem, str]]:
    """The training problems whose prompts aren't test prompts."""
    asked = {prompt_text(problem.prompt) for problem, _ in test}
    kept = [one for one in train if prompt_text(one[0].prompt) not in asked]
    if len(kept) < len(train):
        logger.warning(
            "left out %d of %d training problems: their prompts are test prompts too",
            len(train) - len(kept),
            len(train),
        )
    return kept


@functools.lru_cache(maxsize=4)
def _read(task: Jsonl, source: Path | str, split: str | None) -> tuple[tuple[Problem, str], ...]:
    """All different problems of a source, each with where it came from."""
    found: dict[str, tuple[Problem, str]] = {}
    rows = 0
    for problem, where in _problems(task, source, split):
        rows += 1
        found.setdefault(problem.id, (problem, where))
    if rows > len(found):
        logger.warning("%s: %d of %d rows repeat another one and are kept once", source, rows - len(found), rows)
    return tuple(found.values())


def _problems(task: Jsonl, source: Path | str, split: str | None) -> Iterator[tuple[Problem, str]]:
    for row in read_rows(source, task.subset, split):
        yield task.problem_from(row), row.where


def _position(task: Jsonl, problem: Problem, purpose: str) -> float:
    """A uniform number in [0, 1) that belongs to the prompt, whatever else is in the file."""
    return int(_digest(f"{purpose}/{task.seed}/{prompt_text(problem.prompt)}")[:16], 16) / 2**64


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
