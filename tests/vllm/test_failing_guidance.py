"""A value model that gives NaN or raises inside the real engine: its requests end, all others stay exact."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from guided_vllm.driving import Ask, drive
from guided_vllm.poisoned import POISON, broken_forward, poison
from guided_vllm.served import Served, await_preparation
from guided_vllm.tiny_models import make_value_model, prompt
from qtilt.distributions import Bernoulli
from qtilt.vllm_plugin.versions import ResidentVersion

END = 60
NEVER_POISON = {"logit_bias": {POISON: -100}}
"""For requests that are to be healthy on a poisoned value model."""


@pytest.fixture(params=["v", "q"])
def poisoned(served: Served, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of a resident value model that is NaN on histories with the token POISON."""
    directory = poison(make_value_model(tmp_path / "poisoned", request.param, Bernoulli(), "gpt2", seed=70))
    served.rpc("qtilt_prepare_value_model", "poisoned", 1, str(directory))
    assert await_preparation(served, "poisoned", 1)["state"] == "ready"
    served.rpc("qtilt_commit_value_model", "poisoned", 1)
    served.directories["poisoned", 1] = directory
    yield "poisoned"
    served.rpc("qtilt_discard_value_model", "poisoned", 1)


def poisoned_prompt(length: int, seed: int) -> list[int]:
    return [*prompt(length - 3, seed), POISON, 4, 5]


def without_poison(logits_V: torch.Tensor, generated: list[int]) -> torch.Tensor:
    logits_V[POISON] -= 100
    return logits_V


def failure(served: Served, ask: Ask, returned: list[list[int]]) -> list[dict[str, Any]]:
    assert ask.guidance is not None
    result: list[dict[str, Any]] = served.rpc("qtilt_take_records", ask.guidance.trace_id, returned)
    return result


def test_poisoned_requests_end_and_all_others_stay_exact(served: Served, poisoned: str) -> None:
    """Short prompts and long ones (in chunks), beside healthy requests of the same version, of another and of none."""
    failing = [
        Ask(poisoned_prompt(8, 300), served.guide(poisoned), sampling={"stop_token_ids": [END]}),
        Ask(poisoned_prompt(70, 301), served.guide(poisoned), arrives=1, sampling={"stop_token_ids": [END]}),
        Ask(poisoned_prompt(20, 302), served.guide(poisoned), arrives=4, max_tokens=9),
    ]
    healthy = [
        Ask(prompt(9, 310), served.guide(poisoned), max_tokens=25, sampling=NEVER_POISON),
        Ask(prompt(50, 311), served.guide(poisoned), max_tokens=15, arrives=2, sampling=NEVER_POISON),
    ]
    others = [
        Ask(poisoned_prompt(12, 312), served.guide("q-bernoulli"), max_tokens=20),
        Ask(poisoned_prompt(12, 313), None, max_tokens=20),
    ]
    answers = drive(served.engine, [*failing, *healthy, *others])
    for ask, answer, tokens in zip(failing, answers, (1, 1, 9), strict=False):
        returned = [choice.token_ids for choice in answer.choices]
        assert [len(token_ids) for token_ids in returned] == [tokens]
        if tokens == 1:
            assert returned == [[END]]
        (record,) = failure(served, ask, returned)
        assert record["kind"] == "nan"
    for answer in answers[3:5]:
        served.check(answer, adjust=without_poison)
    for answer in answers[5:]:
        served.check(answer)
    # Nor does it reach who takes their slots.
    budgeted = [Ask(prompt(9, 320 + index), served.guide("q-bernoulli", kl_budget=0.5)) for index in range(8)]
    for answer in drive(served.engine, budgeted):
        served.check(answer)


@pytest.mark.parametrize(
    "sampling",
    [
        {},
        {"min_tokens": 12},
        {"logit_bias": {END: -100}},
        {"allowed_token_ids": [1, 2, 3]},
        {"bad_words": ["w60"]},
        {"repetition_penalty": 2.0, "frequency_penalty": 2.0, "presence_penalty": 2.0},
        {"top_k": 1, "top_p": 0.1, "min_p": 0.5},
        {"temperature": 0.0},
        {"temperature": 2.0},
    ],
    ids=str,
)
def test_whatever_a_failed_request_asks_for_it_ends_after_the_step_that_failed(
    served: Served, poisoned: str, sampling: dict[str, Any]
) -> None:
    sampling = {"temperature": 1.0, **sampling}
    temperature = sampling.pop("temperature")
    ask = Ask(
        poisoned_prompt(10, 320),
        served.guide(poisoned),
        temperature,
        sampling={"stop_token_ids": [END], **sampling},
    )
    (answer,) = drive(served.engine, [ask])
    assert [choice.token_ids for choice in answer.choices] == [[END]]
    assert failure(served, ask, [[END]])[0]["kind"] == "nan"


def test_every_choice_of_n_fails(served: Served, poisoned: str) -> None:
    ask = Ask(poisoned_prompt(10, 330), served.guide(poisoned), n=3, sampling={"stop_token_ids": [END]})
    (answer,) = drive(served.engine, [ask])
    assert [choice.token_ids for choice in answer.choices] == [[END]] * 3
    assert [record["kind"] for record in failure(served, ask, [[END]] * 3)] == ["nan"] * 3


def test_a_failure_survives_a_preemption(served: Served, poisoned: str) -> None:
    """Failed requests that no token ends run on, are preempted and come back: they are still failed, and unguided."""
    before = served.preemptions()
    asks = [
        Ask(poisoned_prompt(20 + 4 * index, 340 + index), served.guide(poisoned), max_tokens=50) for index in range(8)
    ]
    answers = drive(served.engine, asks)
    assert served.preemptions() > before
    for ask, answer in zip(asks, answers, strict=True):
        returned = [choice.token_ids for choice in answer.choices]
        assert failure(served, ask, returned)[0]["kind"] == "nan"
        guidance, ask.guidance = ask.guidance, None
        served.check(answer)
        ask.guidance = guidance


def test_a_request_aborted_after_it_failed_leaves_nothing(served: Served, poisoned: str) -> None:
    """As the server does it: it learns of the failure, aborts, and forgets the trace."""
    ask = Ask(poisoned_prompt(10, 350), served.guide(poisoned), max_tokens=100, aborted_at=6)
    assert ask.guidance is not None
    seen: list[dict[str, Any]] = []
    drive(served.engine, [ask], before_step=lambda _: seen.append(served.rpc("qtilt_failures")))
    assert seen[0] == {}
    assert set(seen[5]) == {ask.guidance.trace_id}
    assert seen[5][ask.guidance.trace_id]["kind"] == "nan"
    served.rpc("qtilt_take_records", ask.guidance.trace_id, [])
    assert served.rpc("qtilt_failures") == {}


def test_an_exception_in_the_forward_ends_its_requests_and_the_engine_lives(served: Served) -> None:
    """The version is broken for steps 4 to 7; requests that arrive later are exact again, those of others always."""
    breaking, stops = broken_forward(resident(served, "v-bernoulli").engine), {"stop_token_ids": [END]}

    def before_step(step: int) -> list[Ask]:
        if step == 4:
            breaking.__enter__()
            return [Ask(prompt(40, 362), served.guide("v-bernoulli"), arrives=5, sampling=stops)]
        if step == 8:
            breaking.__exit__(None, None, None)
            return [Ask(prompt(11, 363), served.guide("v-bernoulli"), arrives=8)]
        return []

    asks = [
        Ask(prompt(8, 360), served.guide("v-bernoulli"), max_tokens=30, sampling={**stops, "min_tokens": 30}),
        Ask(prompt(9, 361), served.guide("v-bernoulli"), max_tokens=10, n=2),
        Ask(prompt(10, 364), served.guide("q-categorical"), max_tokens=30),
        Ask(prompt(10, 365), None, max_tokens=30),
    ]
    answers = drive(served.engine, asks, before_step)
    first, pair, other, unguided, late, after = answers
    for answer in (first, pair, late):
        returned = [choice.token_ids for choice in answer.choices]
        for record in failure(served, answer.ask, returned):
            assert record["kind"] == "exception"
            assert record["reason"].startswith("RuntimeError: ")
    assert len(first.choices[0].token_ids) < 8
    assert first.choices[0].token_ids[-1] == END
    assert late.choices[0].token_ids == [END]
    for answer in (other, unguided, after):
        served.check(answer)


def resident(served: Served, name: str) -> ResidentVersion:
    worker = served.engine.engine_core.engine_core.model_executor.driver_worker.worker
    version: ResidentVersion = worker._qtilt_processor().residents.get(name, 1)
    return version
