"""Rewards of one's own: a Python function, and a real server that is slow, fails, or answers nonsense."""

import json
import math
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qtilt_trainer.tasks import Problem, Task, make_task
from reward_server import RewardServer, running_reward_server

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def running() -> Iterator[RewardServer]:
    with running_reward_server() as server:
        yield server


@pytest.fixture
def server(running: RewardServer) -> RewardServer:
    """Answers the length of each completion."""
    running.requests.clear()
    running.delay, running.slow_on, running.most_at_once = 0.0, None, 0
    running.reply = lambda body, number: (200, json.dumps({"rewards": lengths(body)}), "application/json")
    return running


def lengths(body: Any) -> list[float]:
    return [float(len(completion)) for completion in body["completions"]]


@pytest.fixture
def prompts(tmp_path: Path) -> dict[str, str]:
    """A `[task]` table of prompts without answers."""
    (tmp_path / "prompts.jsonl").write_text("".join(f'{{"prompt": "question {n}"}}\n' for n in range(3)))
    file = str(tmp_path / "prompts.jsonl")
    return {"name": "jsonl", "train": file, "test": file, "answer_field": ""}


def http_task(server: RewardServer, **fields: Any) -> Task:
    reward = {"url": server.url, "retries": 0, **fields}
    return make_task({"name": "letters:Letters", "reward": reward, "low": 0, "high": 100})


def pairs_of(*completions: str) -> list[tuple[Problem, str]]:
    return [(Problem(str(n), "ask: ", f"gold {n}"), completion) for n, completion in enumerate(completions)]


def rewards(task: Task, pairs: list[tuple[Problem, str]]) -> list[Any]:
    return list(task.rewards(pairs))  # type: ignore[attr-defined]


def test_the_request_has_the_form_of_openrlhf_and_the_rewards_come_in_order(server: RewardServer) -> None:
    task = http_task(server, batch_size=2)
    pairs = [*pairs_of("a", "bbb"), (Problem("2", CHAT, ("x", "y")), "cc")]
    assert rewards(task, pairs) == [1.0, 3.0, 2.0]
    first, second = sorted((body for _, body in server.requests), key=lambda body: -len(body["query"]))
    assert first == {
        "query": ["ask: a", "ask: bbb"],
        "prompts": ["ask: ", "ask: "],
        "labels": ["gold 0", "gold 1"],
        "completions": ["a", "bbb"],
    }
    assert second == {"query": ["Be brief.\nHi\ncc"], "prompts": [CHAT], "labels": [["x", "y"]], "completions": ["cc"]}
    assert task.reward(*pairs[1]) == 3.0


def test_an_answer_need_not_say_that_it_is_json(server: RewardServer) -> None:
    server.reply = lambda body, number: (200, json.dumps({"rewards": lengths(body)}), "text/plain")
    assert rewards(http_task(server), pairs_of("a", "bb")) == [1.0, 2.0]


def test_batches_are_asked_for_at_once_up_to_the_limit(server: RewardServer) -> None:
    server.delay = 0.2
    task = http_task(server, batch_size=1, concurrency=3)
    texts = ["x" * (n % 7) for n in range(12)]
    assert rewards(task, pairs_of(*texts)) == [float(n % 7) for n in range(12)]
    assert server.most_at_once == 3
    assert len(server.requests) == 12


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_server_that_recovers_is_asked_again(server: RewardServer, status: int) -> None:
    right = server.reply
    server.reply = lambda body, number: (status, "busy", "text/plain") if number == 0 else right(body, number)
    started = time.monotonic()
    assert rewards(http_task(server, retries=2), pairs_of("a", "bb")) == [1.0, 2.0]
    assert len(server.requests) == 2
    assert time.monotonic() - started > 0.3  # It waited.


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        ((500, "out of memory", "text/plain"), "out of memory"),
        ((400, '{"error": "bad"}', "application/json"), "400"),
        ((200, '{"rewards": [1.0]}', "application/json"), "1 rewards for 2 completions"),
        (
            (200, '{"scores": [1.0, 2.0]}', "application/json"),
            "[numbers]}, got {'scores'",
        ),
        ((200, "[1.0, 2.0]", "application/json"), 'the answer must be {"rewards": [numbers]}, got [1.0, 2.0]'),
        ((200, "<html>", "text/html"), "got '<html>'"),
        ((200, "{", "application/json"), "reward server"),
    ],
)
def test_what_is_no_list_of_rewards_fails_each_completion_of_its_batch_alone(
    server: RewardServer, reply: tuple[int, str, str], message: str
) -> None:
    right = server.reply
    server.reply = lambda body, number: right(body, number) if body["completions"] == ["good"] else reply
    *failed, good = rewards(http_task(server, batch_size=2), pairs_of("a", "bb", "good"))
    assert good == 4.0
    assert all(isinstance(error, Exception) and message in str(error) for error in failed)
    assert len(failed) == 2


@pytest.mark.parametrize("status", [500, 413])
def test_a_completion_that_the_server_can_not_take_costs_no_other_its_reward(server: RewardServer, status: int) -> None:
    right, refusal = server.reply, (status, "no such token", "text/plain")
    server.reply = lambda body, number: refusal if "bad" in body["completions"] else right(body, number)
    given = rewards(http_task(server, batch_size=8), pairs_of(*"abcde", "bad", *"fgh"))
    assert [reward for reward in given if isinstance(reward, float)] == [1.0] * 8
    assert isinstance(given[5], Exception)
    # The batch, then halves of the half with the bad one; and the ninth completion.
    assert [len(body["completions"]) for _, body in server.requests].count(1) == 3


def test_a_completion_that_the_server_hangs_on_costs_no_other_its_reward(server: RewardServer) -> None:
    server.delay, server.slow_on = 9.0, "bad"
    given = rewards(http_task(server, batch_size=8, timeout=1.0), pairs_of(*"abc", "bad", *"defg"))
    assert [reward for reward in given if isinstance(reward, float)] == [1.0] * 7
    assert "timed out" in str(given[3]).lower()


def test_a_server_that_answers_nothing_is_not_asked_for_each_completion(server: RewardServer) -> None:
    server.delay = 2.0
    given = rewards(http_task(server, batch_size=8, timeout=0.3), pairs_of(*"abcdefgh"))
    assert all(isinstance(reward, Exception) for reward in given)
    assert len(server.requests) <= 3  # The batch and its halves.


def test_a_time_out_and_a_server_that_is_away_are_failures_too(server: RewardServer) -> None:
    server.delay = 2.0
    (late,) = rewards(http_task(server, timeout=0.2), pairs_of("a"))
    assert "timed out" in str(late).lower()
    away = make_task({"name": "letters:Letters", "reward": {"url": "http://127.0.0.1:9/", "retries": 0}})
    (gone,) = rewards(away, pairs_of("a"))
    assert "connection error" in str(gone).lower()
    with pytest.raises(RuntimeError, match=r"(?i)connection error"):
        away.reward(*pairs_of("a")[0])


def test_numbers_that_are_none_are_handed_on_for_the_one_place_that_checks_them(server: RewardServer) -> None:
    server.reply = lambda body, number: (200, '{"rewards": [NaN, null]}', "application/json")
    first, second = rewards(http_task(server), pairs_of("a", "b"))
    assert math.isnan(first)
    assert second is None


def test_keys_and_headers_are_sent_and_never_shown(server: RewardServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_TENANT", "tenant-secret")
    task = http_task(server, api_key="key-secret", headers={"X-Tenant": "$MY_TENANT", "X-Plain": "plain-secret"})
    rewards(task, pairs_of("a"))
    sent, _ = server.requests[0]
    assert sent["authorization"] == "Bearer key-secret"
    assert (sent["x-tenant"], sent["x-plain"]) == ("tenant-secret", "plain-secret")
    assert "secret" not in f"{vars(task)!r}"


def test_the_key_may_stand_in_the_environment_and_none_is_sent_without_one(
    server: RewardServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("QTILT_REWARD_API_KEY", raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", "not for them")
    rewards(http_task(server), pairs_of("a"))
    monkeypatch.setenv("QTILT_REWARD_API_KEY", "from-environment")
    rewards(http_task(server), pairs_of("a"))
    (without, _), (with_key, _) = server.requests
    assert "authorization" not in without
    assert with_key["authorization"] == "Bearer from-environment"


def test_a_function_of_a_file_rewards_prompts_without_answers(tmp_path: Path, prompts: dict[str, str]) -> None:
    (tmp_path / "shortness.py").write_text(
        "def score(completion, gold, problem):\n    assert gold == '' and problem.prompt\n    return -len(completion)\n"
    )
    task = make_task({**prompts, "reward": f"{tmp_path}/shortness.py:score", "low": -10, "high": 0})
    (problem, *_) = task.problems("test", 1)
    assert (task.low, task.high, task.name) == (-10.0, 0.0, "prompts")
    assert task.reward(problem, "abc") == -3
    assert not hasattr(task, "rewards")
    assert vars(task)["reward_code"] == tmp_path / "shortness.py"


def test_a_function_gets_the_gold(tmp_path: Path) -> None:
    (tmp_path / "sums.jsonl").write_text('{"prompt": "1+1=", "answer": "2"}\n')
    (tmp_path / "share.py").write_text("def share(completion, gold, problem):\n    return (gold in completion) / 2\n")
    file = str(tmp_path / "sums.jsonl")
    task = make_task({"name": "jsonl", "train": file, "test": file, "reward": f"{tmp_path}/share.py:share"})
    (problem,) = task.problems("test", 1)
    assert (task.reward(problem, "2"), task.reward(problem, "3")) == (0.5, 0.0)
    assert task.answer(problem, " 2 ") == "2"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"reward": 3}, "task.reward must be module:function, path/to/file.py:function or a table, got 3"),
        ({"reward": "score"}, "task.reward must be module:function or path/to/file.py:function, got 'score'"),
        ({"reward": "none.py:score"}, "task.reward: there is no file 'none.py'"),
        ({"reward": "json:loads"}, "task.reward: json:loads can't be called as (completion, gold, problem)"),
        ({"reward": "difflib:unified_diff", "low": 1}, "low must be below high, got 1.0 and 1.0"),
        ({"reward": "difflib:unified_diff", "low": "0"}, "task.low must be a number, got '0'"),
        ({"reward": {}}, "task.reward.url: this field is required"),
        ({"reward": {"url": "localhost"}}, "task.reward.url: must begin with http:// or https://, got 'localhost'"),
        ({"reward": {"url": "http://a", "batch": 3}}, "task.reward.batch: there is no such field"),
        ({"reward": {"url": "http://a", "timeout": 0}}, "task.reward.timeout: Input should be greater than 0, got 0"),
        ({"reward": {"url": "http://a", "headers": {"X": "$NOT_SET"}}}, "the header X is to be $NOT_SET, which the"),
    ],
)
def test_a_wrong_setting_is_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make_task({"name": "letters:Letters", **fields})


def test_prompts_without_answers_need_a_reward(prompts: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"task\.answer_field is empty: rows without answers need a reward"):
        make_task(prompts)
