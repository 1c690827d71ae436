"""The probabilities vLLM reports for guided requests equal those of plain forwards, whatever vLLM does to the batch."""

from dataclasses import replace

import pytest

from guided_vllm.driving import Ask, drive
from guided_vllm.matrix import DRAFTING, ENGINES, covers
from guided_vllm.oracle import expected_steps
from guided_vllm.served import Served
from guided_vllm.tiny_models import VALUE_MODELS, prompt


@covers("Q-type", "V-type", "Bernoulli", "Categorical", "temperature 0", "temperature above 1")
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


def test_backbones_run_compiled_where_they_can(served: Served) -> None:
    forwards = {entry["name"]: entry["forward"] for entry in served.rpc("qtilt_describe")["value_models"]}
    assert forwards == {
        name: "transformers" if family == "gpt2" else "compiled" for name, (_, _, family) in VALUE_MODELS.items()
    }


@covers("staggered arrivals", "guided beside unguided", "two value models at once")
def test_mixed_batches_of_guided_unguided_and_several_value_models_with_staggered_arrivals(served: Served) -> None:
    guided = [served.guide(name, method=method) for name in VALUE_MODELS for method in ("qsharp", "cd")]
    asks = [
        Ask(prompt(4 + index, seed=index), guidance, temperature=0.7 if index % 3 else 0.0, arrives=2 * index)
        for index, guidance in enumerate([guided[0], None, *guided[1:4], None, *guided[4:]])
    ]
    for answer in drive(served.engine, asks):
        served.check(answer)


@covers("chunked prefill")
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


@covers("preemption and resumption")
@pytest.mark.parametrize("value_model", ["q-categorical", "v-bernoulli"])
def test_preemption_and_resumption(served: Served, value_model: str) -> None:
    before = served.preemptions()
    asks = [
        Ask(prompt(56 + index, seed=20 + index), served.guide(value_model), max_tokens=12 + 2 * index)
        for index in range(5)
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


@covers("prefix caching")
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


@covers("n > 1", "`guided_tokens`")
@pytest.mark.parametrize("temperature", [0.4, 1.0])
def test_every_choice_of_n_is_exact(served: Served, temperature: float) -> None:
    asks = [
        Ask(prompt(7, seed=40), served.guide("v-categorical"), temperature, n=4),
        Ask(prompt(7, seed=41), served.guide("q-bernoulli", guided_tokens=3), temperature, n=3, arrives=3),
    ]
    for answer in drive(served.engine, asks):
        assert len(answer.choices) == answer.ask.n
        served.check(answer)


@covers("n > 1", "preemption and resumption")
def test_preempted_choices_of_n_keep_their_own_records(served: Served) -> None:
    before = served.preemptions()
    asks = [Ask(prompt(60, seed=50 + index), served.guide("v-bernoulli"), max_tokens=12, n=3) for index in range(2)]
    answers = drive(served.engine, asks)
    assert served.preemptions() > before
    for answer in answers:
        served.check(answer)


@covers("`guided_tokens`")
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


@covers("preemption and resumption", "chunked prefill", "aborted requests", "guided beside unguided")
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


@covers("`candidate_mass`")
def test_candidates_are_those_that_hold_the_mass(served: Served) -> None:
    """Beside requests that take all, and with either tail; rows with none to score are among them."""
    settings = [(1.0, 0.3), (0.5, 0.5), (0.5, 0.95), (0.0, 0.8), (1.7, 0.1), (0.7, 1e-9)]
    asks = [
        Ask(
            prompt(5 + index, seed=600 + index),
            served.guide(name, eta=0.5, top_k=20, candidate_mass=mass, method=("qsharp", "cd")[index % 2], tail=tail),
            temperature,
            arrives=index // 2,
        )
        for index, (temperature, mass) in enumerate(settings)
        for name, tail in (("v-bernoulli", "mean"), ("v-categorical", "floor"), ("q-bernoulli", "mean"))
    ]
    asks += [Ask(prompt(5, seed=620), served.guide("v-bernoulli", top_k=20)), Ask(prompt(5, seed=621), None)]
    scored: set[int | None] = set()
    for answer in drive(served.engine, asks):
        served.check(answer)
        (choice,) = answer.choices
        arguments = served.reference, answer.ask.prompt, choice.token_ids, served.for_oracle(answer.ask.guidance)
        scored |= {step.candidates for step in expected_steps(*arguments, answer.ask.temperature, served.scorable)}
    assert {0, 1, 2, 20} < scored


@covers("`tail`: mean")
@pytest.mark.parametrize("value_model", VALUE_MODELS)
def test_with_the_tail_mean_others_keep_the_reference_and_candidates_share_theirs(
    served: Served, value_model: str
) -> None:
    """Both tails and methods share the batch; some have fewer candidates."""
    settings = [(1.0, 0.2, 1.0), (0.0, 0.1, 1.0), (0.5, 1.0, 0.5), (1.7, 0.05, 1.0), (0.0, 0.5, 0.9), (0.7, 0.3, 0.1)]
    asks = [
        Ask(
            prompt(5 + 2 * index, seed=630 + index),
            served.guide(value_model, eta=eta, method=method, tail=tail, candidate_mass=mass, top_k=5 + index),
            temperature,
            arrives=index // 2,
        )
        for index, (temperature, eta, mass) in enumerate(settings)
        for method, tail in (("qsharp", "mean"), (("cd", "mean") if index % 2 else ("qsharp", "floor")))
    ]
    for answer in drive(served.engine, asks):
        served.check(answer)


@covers("`details`", engines=[engine for engine in ENGINES if engine not in DRAFTING])
def test_details_are_those_of_the_steps_whatever_happens_to_the_batch(served: Served) -> None:
    """Requests that queue, prefill in chunks, are preempted, stop being guided, and don't ask for details."""
    before, names = served.preemptions(), list(VALUE_MODELS)
    asks = [
        Ask(
            prompt(20 + 9 * index, seed=640 + index),
            served.guide(
                names[index % 4],
                details=index % 5 != 4,
                guided_tokens=4 if index % 5 == 3 else None,
                top_k=5 + index,
                tail=("mean", "floor")[index % 2],
            ),
            temperature=(0.0, 0.6, 1.0)[index % 3],
            max_tokens=10 + index,
            n=3 if index in (1, 7) else 1,
            arrives=index // 3,
        )
        for index in range(9)
    ]
    for answer in drive(served.engine, asks):
        served.check(answer)
    assert served.preemptions() > before


@covers("`kl_budget`", engines=[engine for engine in ENGINES if engine not in DRAFTING])
def test_no_response_exceeds_its_budget_whatever_happens_to_the_batch(served: Served) -> None:
    """Budgets that are spent in one step, after some, and never, of requests that queue, and that are preempted and
    come back to slots that others have left.
    """
    before, names = served.preemptions(), list(VALUE_MODELS)
    asks = [
        Ask(
            prompt(50 + index, seed=660 + index),
            served.guide(
                names[index % 4],
                eta=0.1,
                kl_budget=(2.0, 0.5, 4.0, 0.05, 100.0)[index % 5],
                tail=("mean", "floor")[index % 2],
                method=("qsharp", "cd")[index % 3 == 0],
            ),
            temperature=(0.6, 1.0, 0.0)[index % 3],
            max_tokens=16 + index,
            n=2 if index == 4 else 1,
            arrives=index // 3,
        )
        for index in range(12)
    ]
    for answer in drive(served.engine, asks):
        served.check(answer)
    assert served.preemptions() > before + 5


@covers("`details`", "`kl_budget`", engines=DRAFTING, refused="its request ends with an error")
@pytest.mark.parametrize(("field", "asked"), [("details", True), ("kl_budget", 1.0)])
def test_what_isnt_there_for_drafted_tokens_ends_its_request_and_no_other(
    served: Served, field: str, asked: object
) -> None:
    impossible = served.guide("v-bernoulli", **{field: asked})
    asks = [Ask(prompt(8, seed=650), impossible), Ask(prompt(8, seed=651), served.guide("v-bernoulli"))]
    refused, other = drive(served.engine, asks)
    returned = [choice.token_ids for choice in refused.choices]
    (outcome,) = served.rpc("qtilt_take_records", impossible.trace_id, returned)
    assert f"guidance.{field} is" in outcome["reason"]
    served.check(other)


def test_requests_as_long_as_the_model_allows(served: Served) -> None:
    asks = [Ask(prompt(100, 400 + seed), served.guide(name), max_tokens=28) for seed, name in enumerate(VALUE_MODELS)]
    asks += [
        Ask(prompt(127, seed=410), served.guide("v-bernoulli"), max_tokens=1),
        Ask(prompt(1, seed=411), served.guide("q-bernoulli"), max_tokens=127),
    ]
    for answer in drive(served.engine, asks):
        assert len(answer.choices[0].token_ids) == answer.ask.max_tokens
        served.check(answer)


@covers("aborted requests")
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


@covers("a version that isn't resident", refused="its request ends with an error")
@pytest.mark.parametrize(("change", "names"), [({"version": 9}, "v-bernoulli@9"), ({"top_k": 129}, "at most 128")])
def test_what_the_server_must_not_let_through_ends_its_request_and_no_other(
    served: Served, change: dict[str, int], names: str
) -> None:
    """Never unguided: an evicted version, say. Long prompts come in chunks, and what no token ends runs on."""
    impossible = [replace(served.guide("v-bernoulli"), **change) for _ in range(3)]
    stops = {"stop_token_ids": [60]}
    asks = [
        Ask(prompt(8, seed=95), impossible[0], sampling=stops),
        Ask(prompt(70, seed=96), impossible[1], sampling=stops, arrives=1),
        Ask(prompt(9, seed=97), impossible[2], max_tokens=5),
        Ask(prompt(6, seed=98), served.guide("v-bernoulli"), arrives=1),
        Ask(prompt(6, seed=99), None),
    ]
    answers = drive(served.engine, asks)
    for guidance, answer, tokens in zip(impossible, answers, (1, 1, 5), strict=False):
        returned = [choice.token_ids for choice in answer.choices]
        assert [len(token_ids) for token_ids in returned] == [tokens]
        assert names in served.rpc("qtilt_failures")[guidance.trace_id]["reason"]
        (outcome,) = served.rpc("qtilt_take_records", guidance.trace_id, returned)
        assert names in outcome["reason"]
    for answer in answers[3:]:
        served.check(answer)
