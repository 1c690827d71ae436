"""Tasks: problems, rewards and the flaws of the reference's training texts."""

import json
import random
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from qtilt_trainer.tasks import Task, make_task
from qtilt_trainer.tasks.arithmetic import Arithmetic
from qtilt_trainer.tasks.matching import MATCHERS, last_number
from qtilt_trainer.tasks.star_graph import StarGraph


def paths_in(prompt: str) -> list[str]:
    """All simple paths from the asked start to the asked end, by exhaustive walking."""
    edges, ends = prompt[:-1].split("/")
    pairs = [tuple(edge) for edge in edges.split("|")]

    def extend(path: str) -> list[str]:
        if path[-1] == ends[1]:
            return [path]
        steps = [b for a, b in pairs if a == path[-1]] + [a for a, b in pairs if b == path[-1]]
        return [found for step in steps if step not in path for found in extend(path + step)]

    return extend(ends[0])


@pytest.mark.parametrize(
    "task", [StarGraph(), StarGraph(degree=5, length=5, nodes=30), Arithmetic(), Arithmetic(steps=4)]
)
def test_problems_are_the_same_in_every_run_and_a_longer_list_begins_with_the_shorter(task: Task) -> None:
    fifty = task.problems("train", 50)
    assert task.problems("train", 20) == fifty[:20]
    assert len({str(problem.prompt) for problem in fifty}) == len({problem.id for problem in fifty}) == 50


@pytest.mark.parametrize("task", [StarGraph(), Arithmetic()])
def test_train_and_test_never_share_a_prompt_and_reference_texts_never_show_a_test_prompt(
    task: StarGraph | Arithmetic,
) -> None:
    test = {str(problem.prompt).rstrip(">") for problem in task.problems("test", 300)}
    train = {str(problem.prompt).rstrip(">") for problem in task.problems("train", 2000)}
    shown = {str(prompt).rstrip("<>") for prompt, _ in task.reference_texts(random.Random(0), 2000)}
    assert not test & (train | shown)


def test_a_star_graph_is_answered_by_its_only_path() -> None:
    task = StarGraph(degree=3, length=4, nodes=20)
    for problem in task.problems("test", 30):
        assert isinstance(problem.prompt, str)
        assert paths_in(problem.prompt) == [problem.answer]
        assert len(problem.answer) == 4
        assert task.reward(problem, problem.answer) == 1.0
        assert task.reward(problem, problem.answer[:-1]) == task.reward(problem, problem.answer + "1") == 0.0


def test_every_second_reference_text_asks_for_the_reversed_path() -> None:
    for index, (prompt, path) in enumerate(StarGraph().reference_texts(random.Random(1), 40)):
        found = paths_in(prompt)
        assert found == [path[::-1]] if index % 2 else found == [path]
        assert prompt.endswith("<" if index % 2 else ">")


def test_a_graph_that_needs_more_nodes_than_there_are_is_refused() -> None:
    with pytest.raises(ValueError, match=r"at least 1 \+ degree"):
        StarGraph(degree=3, length=4, nodes=9)


def test_arithmetic_answers_equal_what_python_computes() -> None:
    task = Arithmetic(steps=4)
    for problem in task.problems("test", 100):
        question = problem.prompt[0]["content"]  # type: ignore[index]
        expression = re.sub(r"\(\d\)", "", question.removeprefix("Start").rstrip("?"))
        assert int(problem.answer) == eval(expression)  # noqa: S307
        assert task.reward(problem, rf"\boxed{{{problem.answer}}}") == 1.0
        assert task.reward(problem, rf"\boxed{{{int(problem.answer) + 1}}}") == 0.0
        assert task.reward(problem, problem.answer) == 0.0


def test_reference_texts_have_the_flaws_at_their_rates_and_no_others() -> None:
    texts = Arithmetic(steps=2).reference_texts(random.Random(0), 6000)
    minus = misread = could_stop = stopped = 0
    for prompt, text in texts:
        asked = re.findall(r"\(\d\)([+-])(\d)", prompt[0]["content"])
        lines = text.split("\n")
        read = [re.fullmatch(r"\(\d\)(\d+)([+-])(\d)=(\d+)", line) for line in lines[:-1]]
        for (sign, operand), line in zip(asked, read, strict=False):
            assert line is not None
            before, written, copied, after = line.groups()
            assert copied == operand
            assert int(after) == int(before) + (int(operand) if written == "+" else -int(operand))
            assert written == sign or (sign, written) == ("-", "+")
            minus += sign == "-"
            misread += sign != written
        assert lines[-1] == rf"\boxed{{{read[-1].group(4)}}}"  # type: ignore[union-attr]
        could_stop += len(asked) == 2
        stopped += len(read) < len(asked)
    assert misread / minus == pytest.approx(0.6, abs=0.03)
    assert stopped / could_stop == pytest.approx(0.25, abs=0.03)


def test_every_character_of_prompts_and_texts_is_in_the_alphabet() -> None:
    for task in (StarGraph(), Arithmetic()):
        for prompt, completion in task.reference_texts(random.Random(3), 200):
            text = prompt if isinstance(prompt, str) else prompt[0]["content"]
            assert set(text + completion) <= set(task.alphabet)
        assert len(set(task.alphabet)) == len(task.alphabet)


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
        ({"name": "star_graph", "degre": 3}, "task.degre: there is no such field"),
        ({"name": "star_graph", "degree": 1}, "task.degree: Input should be greater than or equal to 2, got 1"),
        ({"name": "jsonl"}, "task.train: this field is required"),
        ({"name": "jsonl", "train": "x", "match": "regex", "pattern": "("}, "task.pattern: not a regular expression"),
        ({"name": "jsonl", "train": "x", "pattern": "a"}, "pattern is for match = 'regex' only"),
        ({"name": "jsonl", "train": "x", "template": "no place"}, "template must contain {prompt}"),
        ({"name": "no_such_module:make"}, "there is no module 'no_such_module'"),
        ({"name": "json:nothing"}, "module 'json' has no function 'nothing'"),
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


def test_more_problems_than_there_are_is_an_error() -> None:
    with pytest.raises(ValueError, match="different problems asked for"):
        StarGraph(degree=2, length=2, nodes=3).problems("train", 1000)
