r"""Problems from JSON-lines files: one object a line with a prompt and its answer.

[task]
name = "jsonl"
train = "gsm8k/train.jsonl"
test = "gsm8k/test.jsonl"            # or held_out = 0.1 of the training file
prompt_field = "question"
answer_field = "answer"
answer_pattern = '#### (.*)'         # GSM8K's answers end so
template = '{prompt} Put the final answer in \boxed{}.'
chat = true
match = "boxed"
"""

import functools
import json
import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from qtilt_trainer.tasks.matching import MATCHERS, last_group, last_number
from qtilt_trainer.tasks.problem import Problem, Prompt, Split, split_of

PLACE = "{prompt}"


class Jsonl(BaseModel):
    """Settings of the task, and the task."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    low: ClassVar[float] = 0.0
    high: ClassVar[float] = 1.0

    train: Path
    test: Path | None = None
    """None: every prompt's own text decides whether it is held out."""
    held_out: float = Field(0.1, gt=0.0, lt=1.0)
    """Fraction of `train` that is the test split; not used when `test` is given."""
    prompt_field: str = "prompt"
    """A text, or a list of chat messages."""
    answer_field: str = "answer"
    """A text or a number."""
    answer_pattern: str | None = None
    """Regular expression whose first group is the answer inside the answer field; None: the field is the answer."""
    template: str = PLACE
    """What is sent for a text prompt; {prompt} is where it goes."""
    chat: bool = False
    """Whether a text prompt is sent as a user's chat message."""
    match: Literal["exact", "numeric", "boxed", "regex"] = "exact"
    r"""exact: the whole completion. numeric: its last number. boxed: its last \boxed{}, compared by math-verify.
    regex: what `pattern` finds last is the answer; without a pattern the answer itself is the expression to find."""
    pattern: str | None = None

    @property
    def name(self) -> str:
        """The training file's name."""
        return self.train.stem

    @field_validator("answer_pattern", "pattern")
    @classmethod
    def _is_expression(cls, value: str | None) -> str | None:
        try:
            re.compile(value or "")
        except re.error as error:
            raise ValueError(f"not a regular expression: {error}") from error
        return value

    @model_validator(mode="after")
    def _is_consistent(self) -> "Jsonl":
        if PLACE not in self.template:
            raise ValueError(f"template must contain {PLACE}, got {self.template!r}")
        if self.pattern is not None and self.match != "regex":
            raise ValueError(f"pattern is for match = 'regex' only, and match is {self.match!r}")
        return self

    def problems(self, split: Split, count: int) -> list[Problem]:
        """The first `count` of a split, in the files' order. Raises ValueError if there are fewer."""
        problems = self._problems(split)
        if len(problems) < count:
            raise ValueError(f"{self._file(split)} has {len(problems)} {split} problems, not {count}: ask for less")
        return problems[:count]

    def reward(self, problem: Problem, completion: str) -> float:
        """1 if the completion matches the problem's answer, else 0."""
        return float(MATCHERS[self.match].matches(problem.answer, completion, self.pattern))

    def answer(self, problem: Problem, completion: str) -> Hashable | None:
        """What the completion answers, in the form `match` reads it."""
        return MATCHERS[self.match].extract(completion, self.pattern)

    def _problems(self, split: Split) -> list[Problem]:
        problems = list(_read(self, self._file(split)))
        if self.test is None:
            problems = [problem for problem in problems if split_of(_text(problem.prompt), self.held_out) == split]
        return [Problem(f"{split}-{problem.id}", problem.prompt, problem.answer) for problem in problems]

    def _file(self, split: Split) -> Path:
        return self.train if split == "train" or self.test is None else self.test

    def problem_from(self, line: str, number: int, file: Path) -> Problem:
        """One line of a file. Raises ValueError that names the file, the line and the field."""
        where = f"{file}, line {number}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: not JSON ({error})") from error
        if not isinstance(record, dict):
            raise ValueError(f"{where}: a JSON object is needed, got {type(record).__name__}")
        prompt = self._prompt(self._field(record, self.prompt_field, where), where)
        return Problem(f"{number:06d}", prompt, self._answer(self._field(record, self.answer_field, where), where))

    def _prompt(self, value: Any, where: str) -> Prompt:
        if isinstance(value, str):
            text = self.template.replace(PLACE, value)
            return [{"role": "user", "content": text}] if self.chat else text
        if isinstance(value, list) and value and all(isinstance(item, dict) and "role" in item for item in value):
            return value
        raise ValueError(f"{where}: {self.prompt_field!r} must be a text or a list of chat messages, got {value!r}")

    def _answer(self, value: Any, where: str) -> str:
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise ValueError(f"{where}: {self.answer_field!r} must be a text or a number, got {value!r}")
        answer = str(value) if self.answer_pattern is None else last_group(self.answer_pattern, str(value))
        if answer is None:
            raise ValueError(f"{where}: answer_pattern {self.answer_pattern!r} finds nothing in {value!r}")
        if self.match == "numeric" and last_number(answer) is None:
            raise ValueError(f"{where}: match is 'numeric', and there is no number in the answer {answer!r}")
        if self.match == "regex" and self.pattern is None:
            try:
                re.compile(answer)
            except re.error as error:
                raise ValueError(f"{where}: the answer {answer!r} is not a regular expression: {error}") from error
        return answer

    def _field(self, record: dict[str, Any], field: str, where: str) -> Any:
        if field not in record:
            raise ValueError(f"{where}: no field {field!r}, only {sorted(record)}")
        return record[field]


@functools.lru_cache(maxsize=8)
def _read(task: Jsonl, file: Path) -> tuple[Problem, ...]:
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"task: can't read {file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"task: {file} is not UTF-8: {error}") from error
    lines = enumerate(text.split("\n"), 1)  # splitlines() would also split inside JSON strings, at U+2028
    return tuple(task.problem_from(line, number, file) for number, line in lines if line.strip())


def _text(prompt: Prompt) -> str:
    return prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True)
