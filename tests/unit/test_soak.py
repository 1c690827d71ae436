"""What the soak would find: every kind of wrong answer is complained about, a right one isn't."""

import math
import os
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from guided_vllm.oracle import Guided, expected_steps
from real_server.models import ALPHABET, TOKENS, make_reference, make_value_model
from soaking.answers import Answer, Choice, complaints, names_a_version_that_left
from soaking.asks import CHAT, COMPLETIONS, Ask, Asker
from soaking.exactness import Sample, compare
from soaking.memory import MemorySeries, processes, resident_mib
from soaking.versions import Published, Versions

END = len(ALPHABET)


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
    choices = {
        index: Choice([1, 2, END], [-1.0, -2.0, -3.0], [], "stop", {"guided_tokens": 3, "kl": 0.1})
        for index in range(2)
    }
    applied = {"value_model": "value@2", "eta": 0.5, "top_k": TOKENS, "method": "qsharp"}
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
        (choice_changed(guidance={"guided_tokens": 2, "kl": 0.1}), "for 3 tokens"),
        (choice_changed(guidance={"guided_tokens": 3, "kl": math.nan}), "KL is nan"),
        (changed(applied=None), "without guidance"),
        (applied_changed(eta=0.2), "eta is 0.2"),
        (applied_changed(top_k=64), "top_k is 64"),
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
    steps = expected_steps(reference, prompt, token_ids, Guided(value, 0.5, 8, "qsharp", 3), 0.7, TOKENS)
    all_logprobs = [{index: each + 1e-6 for index, each in enumerate(step.log_probs_V.tolist())} for step in steps]
    return Sample(
        reference=reference,
        directory=value,
        applied={"value_model": "value@1", "eta": 0.5, "top_k": 8, "method": "qsharp"},
        guided_tokens=3,
        temperature=0.7,
        prompt=prompt,
        token_ids=token_ids,
        logprobs=[step[token] for step, token in zip(all_logprobs, token_ids, strict=True)],
        all_logprobs=all_logprobs,
        kl=sum(step.kl for step in steps),
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
