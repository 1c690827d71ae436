"""Completions are stored as they come and graded behind that: whatever a reward does, none is lost."""

import json
import math
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import qtilt_trainer.writer
from collecting import TASK, planned, run
from qtilt_trainer.preflight import check_rewards
from qtilt_trainer.rewards import Grader, Rules, TooManyFailuresError, write_failures
from qtilt_trainer.rollouts import RolloutStore
from qtilt_trainer.tasks import Problem
from stand_in_server import StandInServer
from star_graph import StarGraph
from stored_rollouts import make_rollout, store_graded


class Moody(StarGraph):
    """Right answers of some prompts raise, of others are NaN or beyond the range."""

    def reward(self, problem: Problem, completion: str) -> float:
        number = int(problem.id[-1])
        if number == 1 and super().reward(problem, completion):
            raise KeyError("no such node")
        return {2: math.nan, 3: 2.0}.get(number, super().reward(problem, completion))


def test_completions_that_can_not_be_graded_are_kept_and_noted_and_graded_again(tmp_path: Path) -> None:
    store, good = RolloutStore(tmp_path / "moody"), RolloutStore(tmp_path / "good")
    rules = Rules(max_failed_share=0.2)
    with StandInServer() as server:
        run(planned(store, 1), store, server, rules, task=Moody())
        run(planned(good, 1), good, server)
    assert len(store.ids()) == 24
    right = {rollout.rollout_id: rollout.reward for rollout in good.read()}
    moody = {rollout.rollout_id: rollout.reward for rollout in store.read()}
    failed = {key for key in right if key.split("/")[1][-1] in "23" or (key.split("/")[1][-1] == "1" and right[key])}
    assert moody == {key: reward for key, reward in right.items() if key not in failed}
    assert write_failures(store, 1) == tmp_path / "moody" / "iteration-001" / "failed_rewards.jsonl"
    noted = {line["rollout_id"]: line["message"] for line in read_lines(write_failures(store, 1))}
    assert noted.keys() == failed
    assert {message for key, message in noted.items() if "2/" in key} == {
        "the reward is nan, outside the task's range [0, 1]"
    }
    assert "KeyError: 'no such node'" in noted.values()
    assert "the reward is 2.0, outside the task's range [0, 1]" in noted.values()

    mended = Grader(TASK, store, {problem.id: problem for problem in TASK.problems("train", 6)}, rules)
    mended.grade_missing(1)
    assert store.read() == good.read()
    assert not write_failures(store, 1).exists()


class Rude(StarGraph):
    """Its reward never returns for one prompt, and ends the process for another."""

    def reward(self, problem: Problem, completion: str) -> float:
        if problem.id.endswith("1"):
            threading.Event().wait()
        if problem.id.endswith("2"):
            sys.exit(3)
        return super().reward(problem, completion)


def test_a_reward_that_hangs_or_exits_costs_no_other_completion_its_reward(tmp_path: Path) -> None:
    store, rules = RolloutStore(tmp_path), Rules(max_failed_share=0.2, timeout=0.5)
    with StandInServer() as server:
        run(planned(store, 1), store, server, rules, task=Rude())
    assert {rollout.prompt_id[-1] for rollout in store.read()} == set("0345")
    noted = {line["prompt_id"][-1]: line["message"] for line in read_lines(write_failures(store, 1))}
    assert noted == {"1": "TimeoutError: no reward within 0.5 s (reward.timeout)", "2": "SystemExit: 3"}


def test_a_graded_reward_that_a_bernoulli_value_has_no_place_for_is_named_when_it_comes(tmp_path: Path) -> None:
    class Graded(StarGraph):
        def reward(self, problem: Problem, completion: str) -> float:
            return 0.5 * super().reward(problem, completion)

    store = RolloutStore(tmp_path)
    message = r"the reward 0.5, and a bernoulli value is for rewards 0 and 1: set value_model.distribution"
    with StandInServer() as server, pytest.raises(ValueError, match=message):
        run(planned(store, 1), store, server, Rules(is_binary=True), task=Graded())
    assert len(store.read()) == 24  # With their rewards: a categorical value is fitted to them.
    problem = Problem("1", "?", StarGraph().problems("train", 1)[0].answer)
    with pytest.raises(ValueError, match=message):
        check_rewards(Graded(), problem, Rules(is_binary=True))
    check_rewards(StarGraph(), problem, Rules(is_binary=True))


def test_too_many_failed_rewards_stop_it_and_no_completion_is_lost(tmp_path: Path) -> None:
    store = RolloutStore(tmp_path)
    with StandInServer() as server:
        with pytest.raises(
            TooManyFailuresError, match=r"of 24 completions could not be graded, .*failed_rewards.jsonl"
        ):
            run(planned(store, 1), store, server, task=Moody())
        assert len(store.ids()) == 24
        assert len(read_lines(tmp_path / "iteration-001" / "failed_rewards.jsonl")) > 8


def test_the_share_of_failures_is_taken_of_all_that_is_stored(tmp_path: Path) -> None:
    """A resumed run whose bad prompts all come in its own half must not stop where an undisturbed one doesn't."""
    store = RolloutStore(tmp_path)
    problems = {problem.id: problem for problem in TASK.problems("train", 6)}
    grader = Grader(Moody(), store, problems, Rules(max_failed_share=0.05))
    good, bad = (TASK.problems("train", 6)[number].id for number in (0, 2))
    store_graded(store, [replace(make_rollout(good, n), reward=1.0) for n in range(300)])
    part = store.append([make_rollout(bad, n) for n in range(10)])
    grader.grade_part(part)
    with pytest.raises(TooManyFailuresError, match="10 of 10 completions"):
        grader.check_share(1)
    grader.count_stored(1)
    grader.check_share(1)


@pytest.mark.parametrize(("truncated", "reward"), [("zero", 0.0), ("grade", 1.0), ("drop", None)])
def test_cut_completions(tmp_path: Path, truncated: Any, reward: float | None) -> None:
    class Kind(StarGraph):
        def reward(self, problem: Problem, completion: str) -> float:
            return 1.0

    store = RolloutStore(tmp_path)
    with StandInServer() as server:

        def cut(path: str, body: Any) -> tuple[int, Any] | None:
            if path != "/v1/completions":
                return None
            answer = server._complete(body)
            for choice in answer["choices"][:2]:
                choice["finish_reason"] = "length"
            return 200, answer

        server.before = cut
        run(planned(store, 1)[:1], store, server, Rules(truncated=truncated), task=Kind())
    table = store.table(1, ["rollout_id", "reward", "failure"]).sort_by("rollout_id")
    assert table.column("reward").to_pylist() == [reward, reward, 1.0, 1.0]
    assert table.column("failure").null_count == 4
    in_evaluation = Rules(truncated=truncated).for_evaluation().truncated
    assert in_evaluation == {"zero": "zero", "grade": "grade", "drop": "zero"}[truncated]
    # What was dropped on purpose isn't graded again at every start.
    problems = {problem.id: problem for problem in TASK.problems("train", 6)}
    written = (tmp_path / "iteration-001" / "rewards-00000.parquet").stat().st_mtime_ns
    Grader(Kind(), store, problems, Rules(truncated=truncated)).grade_missing(1)
    assert (tmp_path / "iteration-001" / "rewards-00000.parquet").stat().st_mtime_ns == written


def read_lines(file: Path) -> list[Any]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_parts_are_written_while_requests_still_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qtilt_trainer.writer, "PART_ROLLOUTS", 8)
    store = RolloutStore(tmp_path)
    stored_before: list[int] = []
    with StandInServer() as server:
        server.before = lambda path, body: stored_before.append(len(store.ids()))
        run(planned(store, 1), store, server, concurrency=1)
    assert stored_before[-1] == 16
    assert len(store.ids()) == 24


def test_a_slow_reward_holds_no_completion_back_from_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All are stored while the first reward is still awaited: a kill would lose nothing."""
    monkeypatch.setattr(qtilt_trainer.writer, "PART_ROLLOUTS", 8)
    store, graded = RolloutStore(tmp_path), threading.Event()
    stored: list[int] = []

    class Slow(StarGraph):
        def reward(self, problem: Problem, completion: str) -> float:
            assert graded.wait(60)
            return super().reward(problem, completion)

    def release_when_all_is_stored() -> None:
        deadline = time.monotonic() + 30
        while len(store.ids()) < 24 and time.monotonic() < deadline:
            time.sleep(0.01)
        stored.append(len(store.ids()))
        graded.set()

    watcher = threading.Thread(target=release_when_all_is_stored)
    watcher.start()
    with StandInServer() as server:
        run(planned(store, 1), store, server, task=Slow())
    watcher.join()
    assert stored == [24]
    assert len(store.read()) == 24
