"""Tasks of files and entry points: problems, rewards, and errors that name the field."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from qtilt_trainer.tasks import make_task
from qtilt_trainer.tasks.matching import MATCHERS, last_number


@pytest.mark.parametrize(
    ("match", "pattern", "expected", "completion", "right"),
    [
        ("exact", None, "yes", " yes\n", True),
        ("exact", None, "yes", "Yes", False),
        ("numeric", None, "72", "so 70 + 2 = 72.", True),
        ("numeric", None, "$1,200.50", "it costs 1200.5 dollars", True),
        ("numeric", None, "5", "10-5", True),
        ("numeric", None, "-5", "x = -5", True),
        ("numeric", None, "0.333333333", "0.3333333", True),
        ("numeric", None, "0.3333", "0.3334", False),
        ("numeric", None, "7", "no idea", False),
        ("numeric", None, "7", "7e99999999", False),
        ("regex", None, r"(?i)\bparis\b", "It is Paris.", True),
        ("regex", None, r"(?i)\bparis\b", "It is London.", False),
        ("regex", r"Answer: (\w+)", "B", "Answer: A ... Answer: B", True),
        ("regex", r"Answer: (\w+)", "A", "Answer: A ... Answer: B", False),
        ("regex", r"Answer: (\w+)", "A", "A", False),
    ],
)
def test_matching(match: str, pattern: str | None, expected: str, completion: str, right: bool) -> None:
    assert MATCHERS[match].matches(expected, completion, pattern) is right


def test_equal_numbers_vote_together_and_no_number_does_not_vote() -> None:
    extract = MATCHERS["numeric"].extract
    assert extract("12.50", None) == extract("is 12.5", None)
    assert extract("none", None) is None
    assert last_number("1,234,567.5e2 m") is not None


@pytest.mark.parametrize(
    ("match", "answer", "message"),
    [
        ("numeric", "seven", "there is no number in the answer 'seven'"),
        ("regex", "(", "the answer '(' is not a regular expression"),
    ],
)
def test_an_answer_that_can_not_be_matched_is_named(tmp_path: Path, match: str, answer: str, message: str) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "?", "answer": answer}])
    with pytest.raises(ValueError, match=re.escape(f"line 1: {message}" if match == "regex" else message)):
        make_task({"name": "jsonl", "train": str(file), "test": str(file), "match": match}).problems("train", 1)


def write_jsonl(file: Path, records: list[Any]) -> Path:
    file.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return file


def test_jsonl_reads_fields_templates_and_answers_inside_answers(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "gsm.jsonl", [{"question": "2+3?\u2028", "solution": "2+3=5\n#### 5"}])
    task = make_task(
        {
            "name": "jsonl",
            "train": str(file),
            "test": str(file),
            "prompt_field": "question",
            "answer_field": "solution",
            "answer_pattern": "#### (.*)",
            "template": r"{prompt} Use \boxed{}.",
            "chat": True,
            "match": "numeric",
        }
    )
    (problem,) = task.problems("train", 1)
    assert problem.prompt == [{"role": "user", "content": "2+3?\u2028 Use \\boxed{}."}]
    assert problem.answer == "5"
    assert task.reward(problem, "it is 5") == 1.0
    assert task.name == "gsm"


def test_jsonl_holds_out_the_same_prompts_whatever_the_order_of_the_file(tmp_path: Path) -> None:
    records = [{"prompt": f"question {n}", "answer": n} for n in range(400)]
    first = make_task({"name": "jsonl", "train": str(write_jsonl(tmp_path / "a.jsonl", records)), "held_out": 0.25})
    second = make_task(
        {"name": "jsonl", "train": str(write_jsonl(tmp_path / "b.jsonl", records[::-1])), "held_out": 0.25}
    )
    test = {problem.prompt for problem in first.problems("test", 70)}
    assert test <= {problem.prompt for problem in second.problems("test", 80)} | test
    assert not test & {problem.prompt for problem in second.problems("train", 280)}
    assert not test & {problem.prompt for problem in first.problems("train", 280)}


def test_jsonl_takes_chat_messages_as_they_are(tmp_path: Path) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    file = write_jsonl(tmp_path / "chat.jsonl", [{"prompt": messages, "answer": "Hello"}])
    task = make_task({"name": "jsonl", "train": str(file), "test": str(file)})
    assert task.problems("test", 1)[0].prompt == messages


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "bad.jsonl, line 1: not JSON"),
        ("[]", "line 1: a JSON object is needed"),
        ('{"answer": "1"}', "line 1: no field 'prompt', only"),
        ('{"prompt": 3, "answer": "1"}', "'prompt' must be a text or a list of chat messages"),
        ('{"prompt": "a", "answer": true}', "'answer' must be a text or a number, got True"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "bad.jsonl").write_text(line)
    task = make_task({"name": "jsonl", "train": str(tmp_path / "bad.jsonl"), "test": str(tmp_path / "bad.jsonl")})
    with pytest.raises(ValueError, match=re.escape(message)):
        task.problems("train", 1)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "task.name must be one of"),
        ({"name": "chess"}, "task.name must be one of"),
        ({"name": "star_graph:StarGraph", "degre": 3}, "task.degre: there is no such field"),
        ({"name": "star_graph:StarGraph", "degree": 1}, "task.degree: Input should be greater than or equal to 2"),
        ({"name": "jsonl"}, "task.train: this field is required"),
        ({"name": "jsonl", "train": "x", "match": "regex", "pattern": "("}, "task.pattern: not a regular expression"),
        ({"name": "jsonl", "train": "x", "pattern": "a"}, "pattern is for match = 'regex' only"),
        ({"name": "jsonl", "train": "x", "template": "no place"}, "template must contain {prompt}"),
        ({"name": "no_such_module:make"}, "there is no module 'no_such_module'"),
        ({"name": "json:nothing"}, "'json' has no function 'nothing'"),
        ({"name": "json:"}, "task.name must be module:function or path/to/file.py:function, got 'json:'"),
        ({"name": "none/task.py:make"}, "task.name: there is no file 'none/task.py' in "),
        ({"name": "my_task:make", "colour": 1}, "my_task:make can't be called with {'colour': 1}"),
        ({"name": "my_task:no_task"}, "is no task, it lacks name, low, high"),
        ({"name": "my_task:make", "size": 3, "low": 2.0}, "low must be below high"),
    ],
)
def test_a_wrong_task_table_is_an_error_that_names_the_field(
    config: dict[str, Any], message: str, my_task: None
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make_task(config)


def test_a_python_entry_point_makes_a_task(my_task: None) -> None:
    task = make_task({"name": "my_task:make", "size": 3})
    assert task.reward(task.problems("train", 1)[0], "aaa") == 1.0


def test_a_file_is_an_entry_point_too_and_finds_its_neighbours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "two_letters.py").write_text("ANSWER = 'ab'\n")
    # A name that the standard library has: neither may pass for the other.
    (folder / "json.py").write_text(
        "from qtilt_trainer.tasks import Problem\n"
        "class Two:\n"
        "    name, low, high = 'two', 0.0, 1.0\n"
        "    def problems(self, split, count): return [Problem('0', 'x', None)]\n"
        "    def reward(self, problem, completion):\n"
        "        from two_letters import ANSWER\n"
        "        return float(completion == ANSWER)\n"
        "    def answer(self, problem, completion): return completion\n"
    )
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(tmp_path)
    task = make_task({"name": "tasks/json.py:Two"})
    (problem,) = task.problems("train", 1)
    assert (task.reward(problem, "ab"), task.reward(problem, "ba")) == (1.0, 0.0)
    assert json.loads("1") == 1
    assert type(make_task({"name": f"{folder}/json.py:Two"})) is type(task)


def test_a_file_that_fails_while_it_is_loaded_says_why_every_time(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("import json\n1 / 0\n")
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            make_task({"name": f"{tmp_path}/broken.py:make"})


@pytest.fixture
def my_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_task.py").write_text(
        "from qtilt_trainer.tasks import Problem\n"
        "class Counting:\n"
        "    name, high = 'counting', 1.0\n"
        "    def __init__(self, size, low): self.size, self.low = size, low\n"
        "    def problems(self, split, count): return [Problem(str(n), 'x', self.size) for n in range(count)]\n"
        "    def reward(self, problem, completion): return float(len(completion) == problem.answer)\n"
        "    def answer(self, problem, completion): return completion\n"
        "def make(size, low=0.0): return Counting(size, low)\n"
        "def no_task(): return object()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_task", raising=False)
