"""The same seed and the same version give the same tokens, whatever else is in the batch."""

import pytest

from guided_vllm.driving import Ask, drive
from guided_vllm.matrix import covers
from guided_vllm.served import Served
from guided_vllm.tiny_models import prompt

SEEDS = "seeds, whatever else is in the batch"


def seeded(served: Served, value_model: str | None, max_tokens: int = 12, length: int = 25, **more: int) -> Ask:
    guidance = served.guide(value_model) if value_model else None
    return Ask(prompt(length, seed=94), guidance, max_tokens=max_tokens, sampling={"seed": 7}, **more)


@covers(SEEDS)
@pytest.mark.parametrize(("value_model", "seed"), [("v-bernoulli", 95), ("q-categorical", 96), (None, 97)])
def test_a_seed_gives_the_same_tokens_alone_and_in_company(served: Served, value_model: str | None, seed: int) -> None:
    """Beside guided and unguided requests, its prompt in several chunks; and as the first of two choices."""
    (alone,) = drive(served.engine, [seeded(served, value_model)])
    company = [
        Ask(prompt(42, seed), served.guide("q-bernoulli"), n=2),
        Ask(prompt(5, seed=98), None, 0.7),
        seeded(served, value_model, arrives=1),
        seeded(served, value_model, arrives=3, n=2),
    ]
    answers = drive(served.engine, company)
    assert answers[2].steps_to_first_token > alone.steps_to_first_token
    for answer in answers[2:]:
        assert answer.choices[0].token_ids == alone.choices[0].token_ids
    assert answers[3].choices[1].token_ids != alone.choices[0].token_ids
    for answer in (alone, *answers):
        served.check(answer)


@covers(SEEDS)
def test_a_seed_gives_the_same_tokens_after_a_preemption(served: Served) -> None:
    """Of eleven blocks each prompt takes two and soon needs a third; vLLM preempts the request that came last."""
    (alone,) = drive(served.engine, [seeded(served, "v-bernoulli", 20, length=60)])
    preempted = set()

    def look_for_preemptions(step: int) -> None:
        requests = served.engine.engine_core.engine_core.scheduler.requests.values()
        preempted.update(tuple(request.prompt_token_ids) for request in requests if request.num_preemptions)

    guidances = [served.guide("q-bernoulli"), None, served.guide("v-categorical")]
    company = [
        Ask(prompt(58 + index, seed=510 + index), guidance, max_tokens=24) for index, guidance in enumerate(guidances)
    ]
    *others, answer = drive(
        served.engine, [*company, seeded(served, "v-bernoulli", 20, length=60)], look_for_preemptions
    )
    assert tuple(answer.ask.prompt) in preempted
    assert answer.choices[0].token_ids == alone.choices[0].token_ids
    for each in (alone, answer, *others):
        served.check(each)
