"""Tasks of files and entry points: problems, rewards, and errors that name the field."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from qtilt_trainer.tasks import make_task


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
    assert type(make_task({"name": "tasks/json.py:Two"})) is type(task)


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
