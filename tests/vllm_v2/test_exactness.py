"""The probabilities Model Runner V2 reports are those of plain forwards, whatever it does to the batch."""

import pytest
import torch

from guided_vllm.driving import Ask, drive
from guided_vllm.served import Served
from guided_vllm.tiny_models import REFERENCE_VOCAB, prompt


def test_staggered_arrivals_at_several_temperatures(served: Served) -> None:
    asks = [
        Ask(prompt(4 + index, seed=index), None, temperature, arrives=2 * index)
        for index, temperature in enumerate((1.0, 0.0, 0.5, 1.7))
    ]
    for answer in drive(served.engine, asks):
        served.check(answer)


def test_chunked_prefill(served: Served) -> None:
    asks = [
        Ask(prompt(100, seed=100), max_tokens=8),
        Ask(prompt(70, seed=101), max_tokens=8, arrives=1),
        Ask(prompt(6, seed=102), max_tokens=24),
    ]
    answers = drive(served.engine, asks)
    assert answers[0].steps_to_first_token >= 4
    for answer in answers:
        served.check(answer)


def test_preemption_and_resumption(served: Served) -> None:
    before = served.preemptions()
    asks = [Ask(prompt(20 + 4 * index, seed=20 + index), max_tokens=50) for index in range(8)]
    answers = drive(served.engine, asks)
    assert served.preemptions() > before
    for answer in answers:
        served.check(answer)


def test_prefix_cache_hits(served: Served) -> None:
    shared = prompt(48, seed=30)
    first = Ask([*shared, 1, 2, 3], max_tokens=4)
    second = Ask([*shared, 4, 5], max_tokens=8, arrives=20)
    answers = drive(served.engine, [first, second])
    assert answers[1].cached_tokens >= 32
    for answer in answers:
        served.check(answer)


def test_every_choice_of_n_is_exact(served: Served) -> None:
    asks = [Ask(prompt(7, seed=40), temperature=0.4, n=4), Ask(prompt(7, seed=41), n=3, arrives=3)]
    for answer in drive(served.engine, asks):
        assert len(answer.choices) == answer.ask.n
        served.check(answer)
