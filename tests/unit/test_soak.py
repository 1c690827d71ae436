"""What the soak would find: every kind of wrong answer is complained about, a right one isn't."""

import argparse
import asyncio
import json
import math
import os
import random
import subprocess
import sys
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from guided_vllm import oracle
from guided_vllm.oracle import Guided, Step, expected_steps, reference_oracle, step_distributions
from qtilt.params import DEFAULT_TAIL
from real_server.models import ALPHABET, TOKENS, make_reference, make_value_model
from soaking.answers import Answer, Choice, complaints, names_a_version_that_left
from soaking.asks import CHAT, COMPLETIONS, Ask, Asker, Leaving
from soaking.exactness import Sample, compare
from soaking.findings import Findings, reported
from soaking.load import Load
from soaking.memory import MemorySeries, processes, resident_mib
from soaking.run import check_memory
from soaking.versions import Published, Versions

END = len(ALPHABET)
SOAK = Path(__file__).parents[2] / "benchmarks" / "soak.py"
GUIDANCE = {"guided_tokens": 3, "kl": 0.1, "candidates": float(TOKENS)}


@pytest.fixture
def published() -> Published:
    """value@1 from the start, @2 asked for at 10 and there at 12, @3 refused at 20 and asked for again at 30."""
    value = Versions("value")
    value.started_with(Path("first"))
    assert value.try_next(Path("second"), 10.0) == 2
    value.published(2, 12.0)
    assert value.try_next(Path("third"), 20.0) == 3
    assert value.try_next(Path("fourth"), 30.0) == 3
    return Published({"value": value})


@pytest.mark.parametrize(
    ("number", "sent", "ended", "expected"),
    [
        (1, 0.0, 5.0, True),
        (1, 12.0, 13.0, True),
        (1, 12.1, 13.0, False),
        (2, 0.0, 9.9, False),
        (2, 0.0, 10.0, True),
        (2, 100.0, 101.0, True),
        (3, 20.0, 29.0, False),
        (3, 20.0, 30.0, True),
        (4, 0.0, 100.0, False),
    ],
)
def test_a_version_is_active_from_its_publication_to_the_next(
    published: Published, number: int, sent: float, ended: float, expected: bool
) -> None:
    assert published["value"].was_active(number, sent, ended) is expected


def test_a_version_may_be_gone_once_two_later_ones_were_asked_for(published: Published) -> None:
    value = published["value"]
    assert not value.may_be_gone(1, 19.0)
    assert value.may_be_gone(1, 21.0), "it takes no requests while a load waits for its place, refused later or not"
    assert not value.may_be_gone(2, 100.0)
    assert value.active == 2
    assert published.directory("value@3") == Path("fourth")


@pytest.fixture
def answer() -> Answer:
    body = {"stream": True, "n": 2, "max_tokens": 3, "logprobs": 0, "guidance": {"eta": 0.5, "top_k": 64}}
    choices = {index: Choice([1, 2, END], [-1.0, -2.0, -3.0], [], "stop", GUIDANCE) for index in range(2)}
    applied = {
        "value_model": "value@2",
        "eta": 0.5,
        "top_k": TOKENS,
        "method": "qsharp",
        "tail": DEFAULT_TAIL,
        "candidate_mass": 1.0,
    }
    return Answer(Ask(COMPLETIONS, body, [[1]]), 15.0, 16.0, 200, None, choices, applied, is_complete=True)


def test_a_right_answer_is_not_complained_about(answer: Answer, published: Published) -> None:
    assert complaints(answer, published) == []


def changed(**fields: Any) -> Callable[[Answer], None]:
    return lambda answer: answer.__dict__.update(fields)


def choice_changed(**fields: Any) -> Callable[[Answer], None]:
    return lambda answer: answer.choices[1].__dict__.update(fields)


def applied_changed(**fields: Any) -> Callable[[Answer], None]:
    return lambda answer: changed(applied={**(answer.applied or {}), **fields})(answer)


def asked(**guidance: Any) -> Callable[[Answer], None]:
    return lambda answer: answer.ask.body.update(guidance=guidance or None)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (changed(status=500, error="boom"), "status 500: boom"),
        (changed(error="in the middle"), "in the middle"),
        (changed(is_complete=False), "without [DONE]"),
        (lambda answer: answer.choices.pop(1), "choices [0]"),
        (choice_changed(finish_reason=None), "finish_reason None"),
        (choice_changed(finish_reason="length", token_ids=[1, 2]), "2 tokens of 3"),
        (choice_changed(token_ids=[1, 2, 3, 4]), "4 tokens of 3"),
        (choice_changed(token_ids=[1, END, 2]), "after the end token"),
        (choice_changed(logprobs=[-1.0]), "1 log-probabilities for 3 tokens"),
        (choice_changed(all_logprobs=[{1: -1.0}]), "1 times the log-probabilities of all tokens for 3 tokens"),
        (choice_changed(guidance=GUIDANCE | {"guided_tokens": 2}), "for 3 tokens"),
        (choice_changed(guidance=GUIDANCE | {"kl": math.nan}), "KL is nan"),
        (choice_changed(guidance={"guided_tokens": 3, "candidates": 5.0}), "KL is None"),
        (choice_changed(guidance={"guided_tokens": 3, "kl": 0.1}), "None candidates"),
        (choice_changed(guidance=GUIDANCE | {"candidates": TOKENS - 0.5}), f"{TOKENS - 0.5} candidates"),
        (choice_changed(guidance=GUIDANCE | {"candidates": TOKENS + 0.5}), f"{TOKENS + 0.5} candidates"),
        (changed(applied=None), "without guidance"),
        (applied_changed(eta=0.2), "eta is 0.2"),
        (applied_changed(top_k=64), "top_k is 64"),
        (applied_changed(candidate_mass=0.1), "candidate_mass is 0.1, asked for 1.0"),
        (changed(applied={}), "candidate_mass is None"),
        (applied_changed(value_model="value@two"), "value@two wasn't active"),
        (applied_changed(value_model="value@1"), "value@1 wasn't active"),
        (applied_changed(value_model="value@3"), "value@3 wasn't active"),
        (applied_changed(value_model="graded@1"), "graded@1 answered a request for value"),
        (asked(eta=0.5, top_k=64, value_model="value@1"), "value@2 answered a request for value@1"),
        (asked(), "an unguided request was answered with guidance"),
    ],
)
def test_a_wrong_answer_is_complained_about(
    answer: Answer, published: Published, change: Callable[[Answer], None], complaint: str
) -> None:
    change(answer)
    assert complaint in "\n".join(complaints(answer, published))


@pytest.mark.parametrize(
    ("block", "candidates", "is_right"),
    [
        ({"candidate_mass": 0.1}, 0.0, True),
        ({"candidate_mass": 0.1}, 7.3, True),
        ({"candidate_mass": 0.1}, TOKENS + 1, False),
        ({"candidate_mass": 0.1, "tail": "floor"}, 0.9, False),
        ({"candidate_mass": 0.1, "tail": "floor"}, 1.0, True),
        ({"top_k": 1}, 0.0, True),
        ({"top_k": 1}, 1.0, False),
        ({"top_k": 1, "tail": "floor"}, 1.0, True),
    ],
)
def test_how_many_candidates_are_scored(
    answer: Answer, published: Published, block: dict[str, Any], candidates: float, is_right: bool
) -> None:
    asked(eta=0.5, **{"top_k": 64, **block})(answer)
    applied_changed(**block)(answer)
    for choice in answer.choices.values():
        choice.guidance = GUIDANCE | {"candidates": candidates}
    assert (complaints(answer, published) == []) is is_right


def test_no_candidates_are_scored_for_tokens_that_are_not_guided(answer: Answer, published: Published) -> None:
    asked(eta=0.5, top_k=64, guided_tokens=0)(answer)
    for choice in answer.choices.values():
        choice.guidance = {"guided_tokens": 0, "kl": 0.0, "candidates": 0.0}
    assert complaints(answer, published) == []


BROKEN = [
    (500, "Internal Server Error"),
    (502, ""),
    (500, '{"detail": "broken"}'),
    (500, '{"error": "broken"}'),
    (200, "[1]"),
    (200, '{"choices": [{"text": "no index"}]}'),
    (200, 'data: {"choices"\n\ndata: [DONE]\n\n'),
]


def on_broken_server(scenario: Callable[[Load], Awaitable[None]], status: int, body: str, published: Published) -> None:
    """With a load whose server answers everything with the same."""

    async def run() -> None:
        transport = httpx.MockTransport(lambda request: httpx.Response(status, text=body))
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as http:
            with ThreadPoolExecutor(1) as checker:
                load = Load(http, published, Findings(), checker, Path("reference"), {}, 1.0, asyncio.Event())
                await scenario(load)

    asyncio.run(run())


@pytest.mark.parametrize(("status", "body"), BROKEN)
@pytest.mark.parametrize("streams", [False, True])
def test_what_a_broken_server_says_is_a_problem_and_ends_no_client(
    published: Published, status: int, body: str, streams: bool
) -> None:
    ask = Ask(COMPLETIONS, {"stream": streams, "max_tokens": 3}, [[1]])
    left = replace(ask, leaves=Leaving(after_s=60.0))

    async def scenario(load: Load) -> None:
        await load._ask_and_check(ask, random.Random(0))
        assert len(load.findings.problems) > 0
        known = len(load.findings.problems)
        await load._ask_and_leave(left, left.leaves)
        await load._publish("value", Path("new"))
        await load._misbehave(Asker(random.Random(0), "model", published))
        assert len(load.findings.problems) >= known + 3
        assert published["value"].active == 2

    on_broken_server(scenario, status, body, published)


def test_an_unreadable_answer_says_what_came(published: Published) -> None:
    answer = Answer(Ask(COMPLETIONS, {"stream": False, "max_tokens": 3}, [[1]]), 0.0, 1.0, 500, is_complete=True)
    answer.read(b"Internal Server Error")
    (complaint,) = complaints(answer, published)
    assert complaint.startswith("status 500: unreadable, JSONDecodeError")
    assert "Internal Server Error" in complaint


@pytest.mark.parametrize("error", [RuntimeError("no server"), KeyboardInterrupt()])
def test_a_soak_that_breaks_off_leaves_its_report(tmp_path: Path, error: BaseException) -> None:
    findings = Findings()
    findings.counts["answered"] = 7
    with pytest.raises(type(error)), reported(findings, {"minutes": 1.0}, tmp_path):
        raise error
    report = json.loads((tmp_path / "soak.json").read_text())
    assert not report["passed"]
    assert report["counts"] == {"answered": 7}
    assert report["arguments"] == {"minutes": "1.0"}
    assert report["problems"] == [f"broken off: {error!r}"]


def test_a_soak_too_short_to_see_memory_grow_is_refused() -> None:
    done = subprocess.run([sys.executable, SOAK, "--minutes", "0.2"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.endswith("soak.py: error: expected at least 0.5 --minutes and 8 --clients\n")


def test_a_load_that_ended_early_says_so() -> None:
    findings = Findings()
    check_memory(argparse.Namespace(most_growth=64.0), MemorySeries(0, 3.0, [0.0, 3.0], [{"a": 1.0}] * 2), findings)
    assert findings.problems == ["the load ended after 3 s: too early to say whether memory grows"]


def test_only_a_version_that_left_may_be_refused(answer: Answer, published: Published) -> None:
    answer.status, answer.error, answer.ended = 400, "guidance.value_model: unloaded", 25.0
    assert not names_a_version_that_left(answer, published), "no version was asked for by number"
    asked(value_model="value@1")(answer)
    assert names_a_version_that_left(answer, published)
    answer.ended = 15.0
    assert not names_a_version_that_left(answer, published)


def test_chunks_add_up_to_the_whole_answer() -> None:
    tops = [{"token_id:1": -1.0, "token_id:2": -0.5}, {"token_id:1": -0.1, "token_id:2": -3.0}]
    whole = {"token_ids": [1, 2], "finish_reason": "stop", "guidance": {"kl": 0.1}}
    of_completion = {**whole, "index": 0, "logprobs": {"token_logprobs": [-1.0, -3.0], "top_logprobs": tops}}
    contents = [
        {"logprob": logprob, "top_logprobs": [{"token": token, "logprob": each} for token, each in top.items()]}
        for logprob, top in zip([-1.0, -3.0], tops, strict=True)
    ]
    first = {"index": 0, "token_ids": [1], "finish_reason": None, "logprobs": {"content": contents[:1]}}
    last = {**whole, "index": 0, "token_ids": [2], "logprobs": {"content": contents[1:]}}
    completion, chat = (Answer(Ask(path, {}, [[1]]), 0.0) for path in (COMPLETIONS, CHAT))
    completion.add({"choices": [of_completion], "guidance": {"value_model": "value@1"}})
    chat.add({"choices": [first]})
    chat.add({"choices": [last], "guidance": {"value_model": "value@1"}})
    chat.add({"choices": [], "usage": {}})
    assert chat.choices == completion.choices
    assert chat.applied == completion.applied == {"value_model": "value@1"}
    assert chat.choices[0].all_logprobs == [{1: -1.0, 2: -0.5}, {1: -0.1, 2: -3.0}]


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Sample:
    """As a server would report it that is exact to float32."""
    folder = tmp_path_factory.mktemp("soak")
    reference, value = make_reference(folder / "reference"), make_value_model(folder / "value", 1)
    make_value_model(folder / "other", 2)
    prompt, token_ids = [1, 2, 3], [4, 5, 6, 7]
    steps = expected_steps(reference, prompt, token_ids, Guided(value, 0.5, 8, "qsharp", 3, tail="floor"), 0.7, TOKENS)
    assert [step.candidates for step in steps] == [8, 8, 8, None]
    all_logprobs = [{index: each + 1e-6 for index, each in enumerate(step.log_probs_V.tolist())} for step in steps]
    return Sample(
        reference=reference,
        directory=value,
        applied={
            "value_model": "value@1",
            "eta": 0.5,
            "top_k": 8,
            "method": "qsharp",
            "tail": "floor",
            "candidate_mass": 1.0,
        },
        guided_tokens=3,
        temperature=0.7,
        prompt=prompt,
        token_ids=token_ids,
        logprobs=[step[token] for step, token in zip(all_logprobs, token_ids, strict=True)],
        all_logprobs=all_logprobs,
        kl=sum(step.kl for step in steps),
        candidates=8.0,
    )


def test_an_exact_sample_passes(sample: Sample) -> None:
    for exact in (sample, replace(sample, all_logprobs=[]), replace(sample, logprobs=[], all_logprobs=[])):
        difference = compare(exact)
        assert not difference.complaints
        assert difference.tokens == len(exact.logprobs)
        assert difference.logprob == pytest.approx(1e-6 if exact.logprobs else 0.0)


def off_by(sample: Sample, difference: float) -> list[float]:
    return [*sample.logprobs[:-1], sample.logprobs[-1] + difference]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda exact: {"logprobs": off_by(exact, 1e-3), "all_logprobs": []}, "token 7 has log-probability"),
        (lambda exact: {"logprobs": off_by(exact, math.nan), "all_logprobs": []}, "token 7 has log-probability nan"),
        (lambda exact: {"kl": exact.kl + 1e-3}, "the KL is"),
        (lambda exact: {"candidates": 7.5}, "7.5 candidates"),
        (
            lambda exact: {"applied": exact.applied | {"candidate_mass": 1e-9}},
            "8.0 candidates in the mean, expected 1.0",
        ),
        (lambda exact: {"directory": exact.directory.with_name("other")}, "probability"),
        (lambda exact: {"directory": None, "applied": None, "kl": None}, "probability"),
        (lambda exact: {"prompt": [1, 2, 4]}, "probability"),
        (lambda exact: {"temperature": 1.0}, "probability"),
        (lambda exact: {"temperature": 0.0}, "isn't the likeliest"),
        (lambda exact: {"guided_tokens": 4, "logprobs": [], "all_logprobs": []}, "the KL is"),
        (lambda exact: {"all_logprobs": [{4: -1.0}, *exact.all_logprobs[1:]]}, "log-probabilities of 1 tokens"),
    ],
)
def test_an_inexact_sample_is_complained_about(sample: Sample, change: Any, complaint: str) -> None:
    assert complaint in "\n".join(compare(replace(sample, **change(sample))).complaints)


def of_one_step(sample: Sample, step: Step, candidate_mass: float = 1.0) -> Sample:
    """As a server that took this step would report it."""
    all_logprobs = [dict(enumerate(step.log_probs_V.tolist()))]
    return replace(
        sample,
        applied={**(sample.applied or {}), "candidate_mass": candidate_mass},
        token_ids=sample.token_ids[:1],
        logprobs=[all_logprobs[0][sample.token_ids[0]]],
        all_logprobs=all_logprobs,
        kl=step.kl,
        candidates=float(step.candidates or 0),
    )


def test_rounding_may_decide_how_many_candidates_hold_the_mass_and_only_there(sample: Sample) -> None:
    assert sample.directory is not None
    logits_V = reference_oracle(sample.reference).logits(sample.prompt)[-1]
    ranked = logits_V[:TOKENS].argsort(descending=True)[:8].tolist()
    of_three = float((logits_V / 0.7).softmax(0)[ranked[:3]].sum())

    def steps(candidate_mass: float) -> dict[int | None, Step]:
        guided = Guided(sample.directory, 0.5, 8, "qsharp", None, candidate_mass, tail="floor")
        found = step_distributions(logits_V, sample.prompt, guided, 0.7, TOKENS)
        return {step.candidates: step for step in found}

    assert list(steps(0.999 * of_three)) == [3]
    assert list(steps(1.001 * of_three)) == [4]
    either = steps(of_three)
    assert either.keys() == {3, 4}
    for step in either.values():
        exact = of_one_step(sample, step, of_three)
        for each in (exact, replace(exact, all_logprobs=[])):
            assert compare(each).complaints == ()
    assert compare(of_one_step(sample, either[4], 0.999 * of_three)).complaints
    assert compare(of_one_step(sample, either[3], 1.001 * of_three)).complaints


def test_either_of_two_tokens_may_be_the_last_candidate_where_they_tie(
    sample: Sample, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert sample.directory is not None
    logits_V = reference_oracle(sample.reference).logits(sample.prompt)[-1]
    guided = Guided(sample.directory, 0.5, 8, "qsharp", None, tail="floor")
    with monkeypatch.context() as patch:
        patch.setattr(oracle, "TIE", math.inf)
        either = step_distributions(logits_V, sample.prompt, guided, 0.7, TOKENS)
        assert len(either) == 2
        for step in either:
            assert compare(of_one_step(sample, step)).complaints == ()
    first, second = (compare(of_one_step(sample, step)).complaints for step in either)
    assert not first
    assert second, "these two differ by more than rounding"


def test_random_requests_are_what_they_say_they_are(published: Published) -> None:
    asker = Asker(random.Random(0), "model", published)
    asks = [asker.ask() for _ in range(300)]
    for ask in asks:
        assert all(prompt and max(prompt) < TOKENS for prompt in ask.prompts)
        text = ask.body["prompt"] if ask.path == COMPLETIONS else ask.body["messages"][0]["content"]
        assert len(text) > 0
    assert {ask.path for ask in asks} == {COMPLETIONS, CHAT}
    assert {ask.n for ask in asks} == {1, 2, 3, 4}
    assert {ask.body["stream"] for ask in asks} == {True, False}
    assert 0.15 < sum(ask.leaves is not None for ask in asks) / len(asks) < 0.3
    assert {ask.guidance.get("candidate_mass") for ask in asks if ask.guidance} == {None, 1, 0.9, 0.3}
    named = {ask.wanted for ask in asks if ask.guidance is not None}
    assert named == {"value", "value@1", "value@2"}


def test_memory_of_the_own_session_is_seen() -> None:
    session = os.getsid(0)
    assert os.getpid() in processes(session)
    (mine,) = [mib for name, mib in resident_mib(session).items() if name.endswith(f"-{os.getpid()}")]
    assert mine > 10


def test_growth_is_taken_between_two_windows() -> None:
    series = MemorySeries(0, seconds=[0.0, 10.0, 20.0, 30.0, 40.0, 50.0])
    series.samples = [{"a": mib, "b": 1.0} for mib in (1.0, 5.0, 6.0, 7.0, 9.0, 11.0)]
    assert series.ends(warm_up_s=10.0, window_s=10.0) == (6.5, 11.0)
