"""The probabilities vLLM reports for guided requests equal those of plain forwards, whatever vLLM does to the batch."""

from dataclasses import replace

import pytest
import torch

from guided_vllm.driving import Ask, drive
from guided_vllm.oracle import expected_steps
from guided_vllm.served import Served
from guided_vllm.tiny_models import REFERENCE_VOCAB, VALUE_MODELS, prompt


@pytest.mark.parametrize("method", ["qsharp", "cd"])
@pytest.mark.parametrize("value_model", VALUE_MODELS)
def test_every_kind_of_value_model_is_exact_at_several_temperatures_and_eta(
    served: Served, value_model: str, method: str
) -> None:
    settings = [(1.0, 0.2), (0.0, 0.1), (0.5, 1.0), (1.7, 0.05)]
    asks = [
        Ask(prompt(5 + 3 * index, seed=index), served.guide(value_model, eta=eta, method=method), temperature)
        for index, (temperature, eta) in enumerate(settings)
    ]
    for answer in drive(served.engine, asks):
        served.check(answer)


def test_mixed_batches_of_guided_unguided_and_several_value_models_with_staggered_arrivals(served: Served) -> None:
    guided = [served.guide(name, method=method) for name in VALUE_MODELS for method in ("qsharp", "cd")]
    asks = [
        Ask(prompt(4 + index, seed=index), guidance, temperature=0.7 if index % 3 else 0.0, arrives=2 * index)
        for index, guidance in enumerate([guided[0], None, *guided[1:4], None, *guided[4:]])
    ]
    for answer in drive(served.engine, asks):
        served.check(answer)


def test_unguided_requests_on_a_guided_server_are_the_reference(served: Served) -> None:
    asks = [Ask(prompt(9, seed=index), None, temperature=temperature) for index, temperature in enumerate((0.0, 0.8))]
    for answer in drive(served.engine, asks):
        served.check(answer)


@pytest.mark.parametrize(("value_model", "seed"), [("q-bernoulli", 100), ("v-categorical", 110)])
def test_chunked_prefill(served: Served, value_model: str, seed: int) -> None:
    asks = [
        Ask(prompt(100, seed), served.guide(value_model), max_tokens=8),
        Ask(prompt(70, seed + 1), served.guide(value_model), max_tokens=8, arrives=1),
        Ask(prompt(6, seed + 2), served.guide(value_model), max_tokens=24),
    ]
    answers = drive(served.engine, asks)
    assert answers[0].steps_to_first_token >= 4
    for answer in answers:
        served.check(answer)


@pytest.mark.parametrize("value_model", ["q-categorical", "v-bernoulli"])
def test_preemption_and_resumption(served: Served, value_model: str) -> None:
    before = served.preemptions()
    asks = [
        Ask(prompt(20 + 4 * index, seed=20 + index), served.guide(value_model), max_tokens=50) for index in range(8)
    ]
    asks[3].guidance = None
    answers = drive(served.engine, asks)
    assert served.preemptions() > before
    for answer in answers:
        served.check(answer)


def test_histories_that_a_small_value_cache_drops_are_computed_again(served: Served) -> None:
    before = served.dropped()
    asks = [
        Ask(prompt(30 + 6 * index, seed=120 + index), served.guide("v-bernoulli"), max_tokens=20, arrives=index // 2)
        for index in range(6)
    ]
    for answer in drive(served.engine, asks):
        served.check(answer)
    assert (served.dropped() > before) == (served.kv_fraction < 1)


def test_prefix_cache_hits(served: Served) -> None:
    shared = prompt(48, seed=30)
    first = Ask([*shared, 1, 2, 3], served.guide("v-bernoulli"), max_tokens=4)
    second = Ask([*shared, 4, 5], served.guide("q-bernoulli"), max_tokens=8, arrives=20)
    third = Ask([*shared, 6], served.guide("v-bernoulli"), max_tokens=8, arrives=21)
    answers = drive(served.engine, [first, second, third])
    assert answers[1].cached_tokens >= 32
    assert answers[2].cached_tokens >= 32
    for answer in answers:
        served.check(answer)


@pytest.mark.parametrize("temperature", [0.4, 1.0])
def test_every_choice_of_n_is_exact(served: Served, temperature: float) -> None:
    asks = [
        Ask(prompt(7, seed=40), served.guide("v-categorical"), temperature, n=4),
        Ask(prompt(7, seed=41), served.guide("q-bernoulli", guided_tokens=3), temperature, n=3, arrives=3),
    ]
    for answer in drive(served.engine, asks):
        assert len(answer.choices) == answer.ask.n
        served.check(answer)


def test_preempted_choices_of_n_keep_their_own_records(served: Served) -> None:
    before = served.preemptions()
    asks = [Ask(prompt(30, seed=50 + index), served.guide("v-bernoulli"), max_tokens=50, n=4) for index in range(2)]
    answers = drive(served.engine, asks)
    assert served.preemptions() > before
    for answer in answers:
        served.check(answer)


@pytest.mark.parametrize("guided_tokens", [0, 1, 5, 12, 40])
def test_only_the_first_guided_tokens_are_guided(served: Served, guided_tokens: int) -> None:
    asks = [
        Ask(prompt(8, seed=60), served.guide("v-bernoulli", guided_tokens=guided_tokens), temperature=0.9),
        Ask(prompt(8, seed=61), served.guide("q-categorical", guided_tokens=guided_tokens), temperature=0.0, arrives=2),
        Ask(prompt(8, seed=62), served.guide("v-bernoulli")),
    ]
    for answer in drive(served.engine, asks):
        served.check(answer)


def test_candidates_from_one_to_more_than_the_vocabulary(served: Served) -> None:
    asks = [
        Ask(prompt(6, seed=70 + index), served.guide(name, top_k=top_k))
        for index, top_k in enumerate((1, 2, 33, 128))
        for name in ("v-bernoulli", "q-categorical")
    ]
    for answer in drive(served.engine, asks):
        served.check(answer)


def test_masked_tokens_stay_masked_and_biases_count_as_the_reference(served: Served) -> None:
    allowed, bias = [3, 5, 8, 13, 21, 34, 55, 89, 97], {} if served.speculates else {5: 4.0, 8: -3.0}

    def adjust(logits_V: torch.Tensor) -> torch.Tensor:
        masked_V = torch.full((REFERENCE_VOCAB,), -torch.inf).double()
        masked_V[allowed] = logits_V[allowed]
        for token, amount in bias.items():
            masked_V[token] += amount
        return masked_V

    sampling = {"allowed_token_ids": allowed, "logit_bias": bias}
    asks = [
        Ask(prompt(6, seed=80), served.guide("v-categorical", top_k=20), sampling=sampling),
        Ask(prompt(6, seed=81), served.guide("q-bernoulli", top_k=3), temperature=0.6, sampling=sampling),
        Ask(prompt(6, seed=82), None, sampling=sampling),
    ]
    for answer in drive(served.engine, asks):
        assert all(token in allowed for token in answer.choices[0].token_ids)
        served.check(answer, adjust)


@pytest.mark.parametrize("temperature", [0.0, 0.6])
def test_penalties_act_after_guidance_on_v1_and_before_it_on_v2(served: Served, temperature: float) -> None:
    def penalise(logits_V: torch.Tensor, generated: list[int]) -> torch.Tensor:
        counts_V = torch.bincount(torch.tensor(generated, dtype=torch.long), minlength=REFERENCE_VOCAB)
        return logits_V - 1.5 * (counts_V > 0) - 0.25 * counts_V

    sampling = {"presence_penalty": 1.5, "frequency_penalty": 0.25}
    asks = [
        Ask(prompt(6, seed=85 + index), guidance, temperature, max_tokens=24, sampling=sampling)
        for index, guidance in enumerate([served.guide("v-bernoulli"), served.guide("q-categorical"), None])
    ]
    for answer in drive(served.engine, asks):
        served.check(answer, penalise=penalise)


def test_a_seed_gives_the_same_tokens_in_whatever_chunks_its_prompt_comes(served: Served) -> None:
    def seeded() -> Ask:
        return Ask(prompt(25, seed=94), served.guide("v-bernoulli"), arrives=1, sampling={"seed": 7})

    (alone,) = drive(served.engine, [seeded()])
    answers = drive(served.engine, [Ask(prompt(42, seed=95), served.guide("q-bernoulli")), seeded()])
    assert answers[1].steps_to_first_token > alone.steps_to_first_token
    assert answers[1].choices[0].token_ids == alone.choices[0].token_ids
    for answer in (alone, *answers):
        served.check(answer)


def test_a_crowd_that_queues_is_preempted_amid_prefills_and_partly_aborted_leaves_the_others_exact(
    served: Served,
) -> None:
    before, names = served.preemptions(), list(VALUE_MODELS)
    asks = [
        Ask(
            prompt(5 + index, seed=500 + index),
            served.guide(names[index % 4], guided_tokens=(None, 3, 0)[index % 3]) if index % 5 else None,
            temperature=(0.0, 0.5, 1.0)[index % 3],
            max_tokens=10 + index,
            n=3 if index % 12 in (1, 5) else 1,
            arrives=index // 4,
            aborted_at=index // 4 + (0, 1, 3, 9, 20)[index % 5] if index % 3 == 0 else None,
        )
        for index in range(24)
    ]
    for answer in drive(served.engine, asks):
        served.check(answer)
    assert served.preemptions() > before
    for ask in asks:
        if ask.guidance is not None:
            served.rpc("qtilt_take_records", ask.guidance.trace_id, [])


def test_a_tolerance_bounds_the_distance_to_full_guidance_and_saves_candidates(served: Served) -> None:
    """Beside requests without; the records, checked too, are of the policy that was sampled from."""
    settings = [(1.0, 0.3), (0.5, 0.02), (0.5, 1e-3), (0.0, 1e-3), (1.7, 0.1), (0.7, 1e-12)]
    asks = [
        Ask(
            prompt(5 + index, seed=600 + index),
            served.guide(name, eta=0.5, top_k=20, tolerance=tolerance, method=("qsharp", "cd")[index % 2]),
            temperature,
            arrives=index // 2,
        )
        for index, (temperature, tolerance) in enumerate(settings)
        for name in ("v-bernoulli", "v-categorical")
    ]
    asks += [Ask(prompt(5, seed=620), served.guide("v-bernoulli", top_k=20)), Ask(prompt(5, seed=621), None)]
    asks.append(Ask(prompt(5, seed=622), served.guide("q-bernoulli", top_k=20, tolerance=0.5)))
    scored = []
    for answer in drive(served.engine, asks):
        served.check(answer)
        (choice,) = answer.choices
        guided = served.for_oracle(answer.ask.guidance)
        if guided is None:
            continue
        steps = expected_steps(
            served.reference,
            answer.ask.prompt,
            choice.token_ids,
            replace(guided, tolerance=0.0),
            answer.ask.temperature,
            served.scorable,
        )
        for token, reported, full in zip(choice.token_ids, choice.logprobs, steps, strict=True):
            reported_V = torch.tensor([reported[index] for index in range(REFERENCE_VOCAB)]).exp()
            if answer.ask.temperature == 0:
                assert token == int(full.logprobs_V.argmax())
            else:
                distance = float((reported_V - full.logprobs_V.exp()).abs().sum()) / 2
                assert distance <= guided.tolerance + 5e-5
        shortened = expected_steps(
            served.reference,
            answer.ask.prompt,
            choice.token_ids,
            guided,
            answer.ask.temperature,
            served.scorable,
        )
        scored += [step.candidates for step in shortened]
    assert set(scored) == ({20} if served.speculates else {2, 20})


def test_requests_as_long_as_the_model_allows(served: Served) -> None:
    asks = [Ask(prompt(100, 400 + seed), served.guide(name), max_tokens=28) for seed, name in enumerate(VALUE_MODELS)]
    asks += [
        Ask(prompt(127, seed=410), served.guide("v-bernoulli"), max_tokens=1),
        Ask(prompt(1, seed=411), served.guide("q-bernoulli"), max_tokens=127),
    ]
    for answer in drive(served.engine, asks):
        assert len(answer.choices[0].token_ids) == answer.ask.max_tokens
        served.check(answer)


def test_aborted_requests_leave_the_others_exact(served: Served) -> None:
    doomed = [served.guide("v-bernoulli"), served.guide("q-bernoulli")]
    asks = [
        Ask(prompt(6, seed=90), doomed[0], aborted_at=6),
        Ask(prompt(6, seed=91), served.guide("v-bernoulli"), arrives=2),
        Ask(prompt(100, seed=92), doomed[1], arrives=3, aborted_at=5),
        Ask(prompt(6, seed=93), served.guide("q-bernoulli"), arrives=5),
    ]
    for answer in drive(served.engine, asks):
        served.check(answer)
    for guidance in doomed:
        assert served.rpc("qtilt_take_records", guidance.trace_id, []) == []
