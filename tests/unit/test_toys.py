"""The toys of examples/toys: problems, rewards and the flaws of their references' training texts."""

import random
import re
from pathlib import Path

import pytest

from arithmetic import Arithmetic
from qtilt_trainer.config import read_config
from qtilt_trainer.tasks import Task, make_task
from star_graph import StarGraph

ROOT = Path(__file__).parents[2]
TOYS = ROOT / "examples" / "toys"


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


def test_more_problems_than_there_are_is_an_error() -> None:
    with pytest.raises(ValueError, match="different problems asked for"):
        StarGraph(degree=2, length=2, nodes=3).problems("train", 1000)


@pytest.mark.parametrize("name", ["arithmetic", "star_graph"])
def test_a_toy_is_what_its_configuration_names(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    config = read_config(TOYS / f"{name}.toml")
    assert make_task(config.task.model_dump()).name == name
    assert Path(config.value_model.backbone, "model.safetensors").exists()
