"""The demo's two tasks: their rewards against rows written by hand, and no constant answer that does well."""

from pathlib import Path

import pytest
from keywords import WORDS, Keywords
from sentiment import Sentiment

from qtilt_trainer.config import read_config
from qtilt_trainer.tasks import Problem, Task, make_task

DEMO = Path(__file__).parents[2] / "examples" / "demo"
PROBLEM = Problem("p", [{"role": "user", "content": "…"}], ("apple", "river", "window"))


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        ("An apple floats down the river past my window.", 1.0),
        ("APPLE, river; window", 1.0),
        ("An apple floats down the river.", 0.0),
        ("Pineapple, river and windows.", 0.0),
        ("The appleriver window", 0.0),
        ("", 0.0),
    ],
)
def test_a_sentence_needs_every_word_whole(completion: str, reward: float) -> None:
    assert Keywords().reward(PROBLEM, completion) == reward


def test_a_constant_sentence_can_hold_few_of_the_sets_of_words() -> None:
    problems = Keywords().problems("test", 300)
    many_words = " ".join(WORDS[:30])  # more than 32 tokens have room for
    assert sum(Keywords().reward(problem, many_words) for problem in problems) <= 15


@pytest.mark.parametrize("completion", ["I love it, a wonderful day!", "I hate it, a terrible day!"])
def test_what_pleases_one_mood_displeases_the_other(completion: str) -> None:
    happy, sad = (Sentiment().reward(Problem(mood, "…", mood), completion) for mood in ("happy", "sad"))
    assert happy + sad == pytest.approx(1)
    assert (happy > 0.75) == ("love" in completion)
    assert (sad > 0.75) == ("hate" in completion)


def test_a_constant_continuation_earns_what_half_of_the_moods_give() -> None:
    problems = Sentiment().problems("test", 200)
    rewards = [Sentiment().reward(problem, "wonderful, the best day, I love it!") for problem in problems]
    assert sum(rewards) / len(rewards) == pytest.approx(0.5, abs=0.06)


@pytest.mark.parametrize("task", [Keywords(), Sentiment()])
def test_problems_are_distinct_disjoint_and_the_same_again(task: Task) -> None:
    train, test = task.problems("train", 400), task.problems("test", 200)
    assert len({problem.id for problem in train + test}) == 600
    assert len({str(problem.prompt) for problem in train + test}) == 600
    assert task.problems("train", 100) == train[:100]


@pytest.mark.parametrize("name", ["keywords", "sentiment"])
def test_the_configurations_can_be_read_and_make_their_tasks(name: str) -> None:
    config = read_config(DEMO / f"{name}.toml")
    assert make_task({"name": str(DEMO / f"{name}.py:{name.title()}")}).name == name == config.value_model.name
