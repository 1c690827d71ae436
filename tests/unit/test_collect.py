"""Algorithm 1's plan, and its requests against a server that speaks the API."""

import asyncio
import json
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from collecting import TASK, planned, run
from qtilt_trainer.client import Guidance, Sampling
from qtilt_trainer.collect import earlier_lengths, switch_point
from qtilt_trainer.config import ServerConfig
from qtilt_trainer.generate import generate
from qtilt_trainer.plan import PlannedRequest, consecutive
from qtilt_trainer.refused import RefusedPrompts
from qtilt_trainer.rewards import Rules, TooManyFailuresError
from qtilt_trainer.rollouts import RolloutStore
from qtilt_trainer.server_errors import PromptRefusedError, ServerError
from qtilt_trainer.steady_client import SteadyClient
from qtilt_trainer.tasks import Problem
from stand_in_server import StandInServer
from stored_rollouts import store_graded

BLOCK = {"value_model", "eta", "top_k", "method", "guided_tokens", "tail"}


def test_the_first_iteration_asks_the_reference_for_all_samples_of_a_prompt_at_once(tmp_path: Path) -> None:
    plan = planned(RolloutStore(tmp_path), 1)
    assert [request.problem for request in plan] == TASK.problems("train", 6)
    assert all(request.samples == (0, 1, 2, 3) and request.guidance is None for request in plan)
    assert len({request.seed for request in plan}) == 6


def test_later_iterations_roll_in_for_a_switch_point_of_each_sample(tmp_path: Path) -> None:
    store = RolloutStore(tmp_path)
    with StandInServer() as server:
        run(planned(store, 1), store, server)
        plan = planned(store, 2, "value@4")
        assert [len(request.samples) for request in plan] == [1] * 24
        run(plan, store, server)
        bodies = server.bodies("/v1/completions")[6:]
    lengths = earlier_lengths(store, 2)
    assert lengths == {problem.id: [5] * 4 for problem in TASK.problems("train", 6)}  # four nodes and the end token
    for request in plan:
        g = 0 if request.guidance is None else request.guidance.guided_tokens
        assert g is not None
        assert g < max(lengths[request.problem.id])
        assert request.guidance is None or request.guidance == Guidance("value@4", 0.2, 7, "qsharp", g, "mean")
    assert sum("guidance" in body for body in bodies) == sum(request.guidance is not None for request in plan)
    guided = [body["guidance"] for body in bodies if "guidance" in body]
    assert all(block.keys() == BLOCK for block in guided)
    stored = {rollout.rollout_id: rollout for rollout in store.read(2)}
    for request in plan:
        rollout = stored[request.ids[0]]
        assert rollout.switch_point == (request.guidance.guided_tokens if request.guidance else 0)
        assert rollout.guided_tokens == min(rollout.switch_point, len(rollout.token_ids))
        assert rollout.value_model == ("value@4" if request.guidance else None)
        assert (rollout.kl, rollout.kl_candidates) == (0.25 * rollout.guided_tokens, 0.125 * rollout.guided_tokens)
        assert (rollout.tail, rollout.mass) == (("mean", 0.75) if request.guidance else (None, None))


def test_switch_points_are_uniform_below_the_length_of_an_earlier_response() -> None:
    drawn = Counter(switch_point(0, f"2/p/{n}", [4]) for n in range(8000))
    assert set(drawn) == {0, 1, 2, 3}
    assert all(count == pytest.approx(2000, rel=0.1) for count in drawn.values())
    mixed = Counter(switch_point(0, f"2/p/{n}", [2, 4]) for n in range(8000))
    assert mixed[0] == pytest.approx(3000, rel=0.1)
    assert mixed[3] == pytest.approx(1000, rel=0.15)
    assert switch_point(0, "2/p/0", []) == 0


def test_roll_outs_keep_the_servers_tokens_and_everything_that_made_them(tmp_path: Path) -> None:
    store = RolloutStore(tmp_path)
    with StandInServer() as server:
        run(planned(store, 1), store, server)
        problem = TASK.problems("train", 1)[0]
        rollouts = {rollout.rollout_id: rollout for rollout in store.read()}
        assert len(rollouts) == 24
        again: Any = None
        for sample in range(4):
            rollout = rollouts[f"1/{problem.id}/{sample}"]
            # One completion with the stored seed is the stored completion.
            body = {"prompt": problem.prompt, "seed": rollout.seed, "n": 1}
            _, again = server.answer("/v1/completions", body)
            assert rollout.token_ids == again["choices"][0]["token_ids"]
            assert rollout.prompt_token_ids == again["choices"][0]["prompt_token_ids"]
            assert rollout.reward == TASK.reward(problem, rollout.text)
            assert (rollout.ended, rollout.finish_reason, rollout.switch_point, rollout.kl) == (True, "stop", 0, 0.0)
            assert (rollout.value_model, rollout.eta, rollout.method, rollout.guidance_top_k) == (None,) * 4
            assert (rollout.tail, rollout.kl_candidates, rollout.mass) == (None, 0.0, None)
            assert (rollout.temperature, rollout.top_p, rollout.sampling_top_k, rollout.max_tokens) == (0.8, 0.9, 0, 9)
            assert (rollout.model, rollout.split) == ("stand-in", "train")


def test_every_request_names_its_whole_policy(tmp_path: Path) -> None:
    store = RolloutStore(tmp_path)
    with StandInServer() as server:
        run(planned(store, 1)[:1], store, server)
        (body,) = server.bodies("/v1/completions")
    assert (body["temperature"], body["top_p"], body["top_k"], body["max_tokens"]) == (0.8, 0.9, 0, 9)
    assert (body["min_p"], body["repetition_penalty"], body["return_token_ids"], body["n"]) == (0.0, 1.0, True, 4)


def test_only_what_is_missing_is_asked_for_and_it_is_what_it_would_have_been(tmp_path: Path) -> None:
    whole, halves = RolloutStore(tmp_path / "whole"), RolloutStore(tmp_path / "halves")
    with StandInServer() as server:
        run(planned(whole, 1), whole, server)
        run(planned(whole, 2, "value@1"), whole, server)
        run(planned(halves, 1)[2:5], halves, server)
        assert [request.problem.id[-1] for request in planned(halves, 1)] == ["0", "1", "5"]
        run(planned(halves, 1), halves, server)
        run(planned(halves, 2, "value@1")[5:15], halves, server)
        assert len(planned(halves, 2, "value@1")) == 14
        run(planned(halves, 2, "value@1"), halves, server)
    assert planned(halves, 2, "value@1") == []
    assert halves.read() == whole.read()


def test_single_samples_of_a_prompt_are_made_again_with_their_own_seeds(tmp_path: Path) -> None:
    whole, holed = RolloutStore(tmp_path / "whole"), RolloutStore(tmp_path / "holed")
    with StandInServer() as server:
        run(planned(whole, 1), whole, server)
        store_graded(holed, [rollout for rollout in whole.read() if rollout.rollout_id[-1] not in "02"])
        plan = planned(holed, 1)
        assert [request.samples for request in plan] == [(0,), (2,)] * 6
        run(plan, holed, server)
    assert holed.read() == whole.read()


def test_samples_asked_for_together_are_neighbours() -> None:
    assert consecutive([0, 2, 3, 4, 7]) == [(0,), (2, 3, 4), (7,)]
    assert consecutive([]) == []


@pytest.mark.parametrize("reason", ["abort", "error"])
def test_a_completion_that_was_broken_off_is_not_stored(tmp_path: Path, reason: str) -> None:
    store = RolloutStore(tmp_path)
    with StandInServer() as server:

        def broken(path: str, body: Any) -> tuple[int, Any] | None:
            if path != "/v1/completions":
                return None
            answer = server._complete(body)
            answer["choices"][1]["finish_reason"] = reason
            return 200, answer

        server.before = broken
        with pytest.raises(ServerError, match=f"broke a completion off .'{reason}'"):
            run(planned(store, 1), store, server)
    assert store.ids() == set()


def test_requests_in_flight_are_limited(tmp_path: Path) -> None:
    store = RolloutStore(tmp_path)
    with StandInServer() as server:
        most = 0
        now = 0
        three = threading.Barrier(3)

        def count(path: str, body: Any) -> None:
            nonlocal most, now
            if path == "/v1/completions":
                with server.lock:
                    now += 1
                    most = max(most, now)
                three.wait(60)  # Six requests: two rounds of three.
                time.sleep(0.02)
                with server.lock:
                    now -= 1

        server.before = count
        run(planned(store, 1), store, server, concurrency=3)
    assert most == 3


def test_passing_failures_are_retried(tmp_path: Path) -> None:
    store = RolloutStore(tmp_path)
    with StandInServer() as server:
        server.before = lambda path, body: (
            (503, {"error": {"message": "busy"}}) if len(server.bodies("/v1/completions")) == 3 else None
        )
        run(planned(store, 1), store, server)
    assert len(store.ids()) == 24


def test_a_server_that_stays_away_is_a_clear_error_and_what_came_is_kept(tmp_path: Path) -> None:
    store = RolloutStore(tmp_path)
    with StandInServer() as server:
        server.before = lambda path, body: (
            (403, {"error": {"message": "not yours"}}) if len(server.bodies("/v1/completions")) > 3 else None
        )
        with pytest.raises(ServerError, match=r"answered 403: .*not yours"):
            run(planned(store, 1), store, server, concurrency=1)
    assert len(store.ids()) == 12
    with pytest.raises(ServerError, match=r"no server answers at http://127.0.0.1:\d+ \(1 tries, .*start qtilt-server"):
        run(planned(store, 1), store, server, retries=0)


def test_guidance_that_the_server_refuses_is_no_matter_of_the_prompt(tmp_path: Path) -> None:
    store = RolloutStore(tmp_path)
    with StandInServer() as server:
        run(planned(store, 1), store, server)
        error = {"error": {"message": "top_k is 7, allowed: 1 to 5", "param": "guidance.top_k"}}
        server.before = lambda path, body: (400, error) if "guidance" in (body or {}) else None
        with pytest.raises(ServerError, match=r"answered 400: .*top_k is 7") as refused:
            run(planned(store, 2, "value@1"), store, server)
    assert not isinstance(refused.value, PromptRefusedError)
    assert RefusedPrompts(store.directory).ids() == set()


def refuse(server: StandInServer, problems: list[Problem]) -> None:
    prompts = {problem.prompt for problem in problems}
    error = {"error": {"message": "the prompt is too long", "param": "prompt"}}
    server.before = lambda path, body: (400, error) if (body or {}).get("prompt") in prompts else None


def test_a_refused_prompt_is_noted_and_left_out_now_and_later(tmp_path: Path) -> None:
    store, problems = RolloutStore(tmp_path), TASK.problems("train", 6)
    with StandInServer() as server:
        refuse(server, problems[1:2])
        run(planned(store, 1), store, server)
        assert store.ids() == {f"1/{p.id}/{n}" for p in problems if p != problems[1] for n in range(4)}
        (line,) = (tmp_path / "refused.jsonl").read_text().splitlines()
        noted = json.loads(line)
        assert (noted["prompt_id"], noted["what"]) == (problems[1].id, "request")
        assert "answered 400: the prompt is too long" in noted["message"]
        assert planned(store, 1) == []
        asked = len(server.bodies("/v1/completions"))
        run(planned(store, 2, "value@1"), store, server)
        assert len(server.bodies("/v1/completions")) == asked + 5 * 4
        RefusedPrompts(tmp_path).forget()
        server.before = lambda path, body: None
        assert [request.problem for request in planned(store, 1)] == problems[1:2]
        run(planned(store, 1), store, server)
    assert len(store.read(1)) == 24


def test_a_prompt_whose_requests_always_fail_is_noted_and_left_out(tmp_path: Path) -> None:
    """Guidance that isn't a number ends its request with a 500, whenever it is asked for; the server is well."""
    store, problems = RolloutStore(tmp_path), TASK.problems("train", 6)
    failure = {"error": {"message": "the value is NaN"}}

    async def collect(server: StandInServer) -> None:
        async with SteadyClient(ServerConfig(url=server.url, retries=0)) as client:
            await generate(client, TASK, planned(store, 1), store, 4, "test")

    with StandInServer() as server:
        server.before = lambda path, body: (500, failure) if (body or {}).get("prompt") == problems[1].prompt else None
        asyncio.run(collect(server))
    assert store.ids() == {f"1/{p.id}/{n}" for p in problems if p != problems[1] for n in range(4)}
    assert RefusedPrompts(tmp_path).ids() == {problems[1].id}


def test_too_many_refused_prompts_stop_it_and_all_are_noted(tmp_path: Path) -> None:
    store, problems = RolloutStore(tmp_path), TASK.problems("train", 6)
    rules = Rules(max_refused_share=0.01)  # One of the first hundred.
    with StandInServer() as server:
        refuse(server, problems[2:5])
        with pytest.raises(TooManyFailuresError, match=r"refused 2 of 4 prompts, more than collect.max_refused_share"):
            run(planned(store, 1), store, server, rules, concurrency=1)
    assert RefusedPrompts(tmp_path).ids() == {problem.id for problem in problems[2:4]}
    assert len(store.read(1)) == 2 * 4


def test_the_share_of_refused_prompts_is_that_of_all_starts_together(tmp_path: Path) -> None:
    store, problems = RolloutStore(tmp_path), TASK.problems("train", 6)
    rules = Rules(max_refused_share=0.01)
    with StandInServer() as server:
        refuse(server, problems[1:3])
        run(planned(store, 1)[:2], store, server, rules, concurrency=1)
        with pytest.raises(TooManyFailuresError, match=r"refused 2 of 3 prompts"):
            run(planned(store, 1), store, server, rules, concurrency=1)


@pytest.mark.parametrize("answer", ["<html>", {"data": [{}]}, []])
def test_what_is_no_model_server_is_named(tmp_path: Path, answer: Any) -> None:
    store = RolloutStore(tmp_path)
    with StandInServer() as server:
        server.before = lambda path, body: (200, answer)
        with pytest.raises(ServerError, match=r"what answers at http://127.0.0.1:\d+ is no qtilt-server"):
            run(planned(store, 1), store, server)


def test_a_server_that_ignores_guidance_is_refused(tmp_path: Path) -> None:
    problem = TASK.problems("train", 1)[0]
    guidance = Guidance("value@1", 0.1, 20, "qsharp", 2)
    request = PlannedRequest(2, "train", problem, (0,), 1, Sampling(1.0, 1.0, 0, 9), guidance)
    with StandInServer() as server:

        def plain(path: str, body: Any) -> tuple[int, Any] | None:
            if body is None or "guidance" not in body:
                return None
            return 200, server._complete({**body, "guidance": None})

        server.before = plain
        with pytest.raises(ServerError, match="ignored `guidance`"):
            run([request], RolloutStore(tmp_path), server)


def test_a_stop_string_ends_a_completion_and_max_tokens_does_not(tmp_path: Path) -> None:
    store = RolloutStore(tmp_path)
    with StandInServer() as server:

        def stopped(path: str, body: Any) -> tuple[int, Any] | None:
            if path != "/v1/completions":
                return None
            answer = server._complete(body)
            reasons = ["\n", None, 7, None]
            for choice, reason in zip(answer["choices"], reasons, strict=True):
                choice["stop_reason"] = reason
            answer["choices"][3]["finish_reason"] = "length"
            return 200, answer

        server.before = stopped
        run(planned(store, 1)[:1], store, server)
    assert [rollout.ended for rollout in store.read()] == [True, True, True, False]


def test_the_first_iteration_has_no_value_model_and_later_ones_need_one(tmp_path: Path) -> None:
    store = RolloutStore(tmp_path)
    with pytest.raises(ValueError, match="only the first iteration has no value model"):
        planned(store, 1, "value@1")
    with pytest.raises(ValueError, match="only the first iteration has no value model"):
        planned(store, 2)
