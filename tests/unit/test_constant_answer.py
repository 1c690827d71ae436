"""The best constant answer of a task whose best one is known."""

from collections import Counter
from collections.abc import Hashable
from dataclasses import replace
from pathlib import Path

import pytest

from qtilt_trainer.config import EvaluateConfig
from qtilt_trainer.evaluate import measure_constant_answer
from qtilt_trainer.evaluate.constant_answer import best_text, candidate_texts
from qtilt_trainer.rollouts import RolloutStore
from qtilt_trainer.tasks import Problem, Split
from stored_rollouts import make_rollout, store_graded

CONFIG = EvaluateConfig(prompts=40)


class Letter:
    """Name the prompt's letter: `a` for 6 of 10 prompts of training and for 4 of 10 of the test."""

    name, low, high = "letter", 0.0, 1.0

    def __init__(self) -> None:
        self.graded: list[tuple[str, str]] = []

    def problems(self, split: Split, count: int) -> list[Problem]:
        letters = "aaaaaabbbc" if split == "train" else "aaaabbbbcc"
        return [Problem(f"{split}-{n}", f"{split} {n}", letters[n % 10]) for n in range(count)]

    def reward(self, problem: Problem, completion: str) -> float:
        self.graded.append((problem.id, completion))
        return float(completion.strip("!") == problem.answer)

    def answer(self, problem: Problem, completion: str) -> Hashable | None:
        return completion.strip("!") or None


def stored(directory: Path, texts: list[str]) -> RolloutStore:
    """Roll-outs of iteration 1 to prompts with the answer `a`, and one of iteration 2 that must not count."""
    store, task = RolloutStore(directory), Letter()
    problem = task.problems("train", 1)[0]
    rollouts = [
        replace(make_rollout("train-0", sample), text=text, reward=task.reward(problem, text))
        for sample, text in enumerate(texts)
    ]
    store_graded(store, [*rollouts, replace(make_rollout("train-0", 0, iteration=2), text="b")])
    return store


def test_the_constant_is_chosen_on_training_prompts_and_measured_on_test_prompts(tmp_path: Path) -> None:
    task = Letter()
    store = stored(tmp_path / "rollouts", ["c"] * 5 + ["b"] * 3 + ["a!", "!"])
    record = measure_constant_answer(task, store, tmp_path / "constant", 50, CONFIG, {})
    assert record is not None
    # Rarely given, but the one with the best mean reward on training prompts; 0.4 is its share of the test prompts.
    assert (record.method, record.text, record.accuracy, record.n) == ("constant", "a!", 0.4, 40)
    assert record.low < 0.4 < record.high
    assert (record.kl, record.gain, record.regime) == (None, None, None)
    tested = Counter(text for problem_id, text in task.graded if problem_id.startswith("test"))
    assert tested == {"a!": 40}


def test_it_is_made_once_and_refused_with_other_settings(tmp_path: Path) -> None:
    task, store = Letter(), stored(tmp_path / "rollouts", ["a", "b"])
    first = measure_constant_answer(task, store, tmp_path / "constant", 50, CONFIG, {"prompts": 40})
    task.graded.clear()
    assert measure_constant_answer(task, store, tmp_path / "constant", 50, CONFIG, {"prompts": 40}) == first
    assert task.graded == []
    with pytest.raises(ValueError, match="prompts: 40 then, 41 now"):
        measure_constant_answer(task, store, tmp_path / "constant", 50, CONFIG, {"prompts": 41})


def test_none_is_looked_for_without_candidates(tmp_path: Path) -> None:
    task, store = Letter(), stored(tmp_path / "rollouts", ["a", "b"])
    off = EvaluateConfig(prompts=40, constant_candidates=0)
    assert measure_constant_answer(task, store, tmp_path / "constant", 50, off, {}) is None
    assert (
        measure_constant_answer(task, RolloutStore(tmp_path / "empty"), tmp_path / "constant", 50, CONFIG, {}) is None
    )
    assert task.graded == []


def test_candidates_are_frequent_answers_in_their_usual_wording_and_the_best_rewarded_texts() -> None:
    problem = Letter().problems("train", 1)[0]
    texts = (
        [("x", 0.1)] * 3 + [("x!", 0.0)] * 2 + [("y!", 0.2)] * 2 + [("y", 0.3)] + [("z", 0.9), ("z!", 1.0), ("!", 0.8)]
    )
    answered = [(problem, text, reward) for text, reward in texts]
    assert candidate_texts(Letter(), answered, 4) == ["x", "y!", "z!", "z"]
    assert candidate_texts(Letter(), answered, 1) == ["x"]
    assert candidate_texts(Letter(), answered, 50) == ["x", "y!", "z", "z!", "!", "y", "x!"]


def test_the_best_text_is_that_of_enumeration() -> None:
    task = Letter()
    problems = task.problems("train", 10)
    assert best_text(task, ["c", "b", "a"], problems) == "a"
    assert best_text(task, ["c", "x", "b"], problems) == "b"
    assert best_text(task, ["x", "y"], problems) == "x"
