"""Every sampling parameter acts on guided distributions as vLLM says it acts on the reference's."""

import itertools
import json

import pytest
import torch
from transformers import AutoTokenizer
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import StructuredOutputsParams

from guided_vllm.driving import Answer, Ask, drive, sampling_params
from guided_vllm.matrix import WITHOUT_SPECULATION, covers
from guided_vllm.oracle import Adjust, Measured
from guided_vllm.served import Served
from guided_vllm.tight_engine import THOUGHT_BEGINS, THOUGHT_ENDS
from guided_vllm.tiny_models import REFERENCE_VOCAB, TOKENS, VALUE_MODELS, prompt, words

END = TOKENS - 2
FEW = [3, 5, 8, 13]


def only(allowed: list[int], logits_V: torch.Tensor) -> torch.Tensor:
    masked_V = torch.full_like(logits_V, -torch.inf)
    masked_V[allowed] = logits_V[allowed]
    return masked_V


@covers("allowed tokens")
def test_tokens_that_are_not_allowed_stay_masked(served: Served) -> None:
    allowed = [3, 5, 8, 13, 21, 34, 55, 89, 97]
    sampling = {"allowed_token_ids": allowed}
    asks = [
        Ask(prompt(6, seed=80), served.guide("v-categorical", top_k=20), sampling=sampling),
        Ask(prompt(6, seed=81), served.guide("q-bernoulli", top_k=3), temperature=0.6, sampling=sampling),
        Ask(prompt(6, seed=82), None, sampling=sampling),
    ]
    for answer in drive(served.engine, asks):
        served.check(answer, lambda logits_V, generated: only(allowed, logits_V))


@covers("logit bias", engines=WITHOUT_SPECULATION)
def test_a_logit_bias_counts_as_the_reference(served: Served) -> None:
    bias = {5: 4.0, 8: -3.0, 40: 2.0}

    def biased(logits_V: torch.Tensor, generated: list[int]) -> torch.Tensor:
        for token, amount in bias.items():
            logits_V[token] += amount
        return logits_V

    asks = [
        Ask(prompt(6, seed=83 + index), guidance, temperature, sampling={"logit_bias": bias})
        for index, (guidance, temperature) in enumerate(
            [(served.guide("v-categorical"), 1.0), (served.guide("q-bernoulli", top_k=3), 0.6), (None, 1.0)]
        )
    ]
    for answer in drive(served.engine, asks):
        served.check(answer, biased)


def assert_refused(served: Served, sampling: dict[str, object]) -> None:
    ask = Ask(prompt(5, seed=84), served.guide("q-bernoulli"), sampling=sampling)
    with pytest.raises(VLLMValidationError, match="not yet supported with speculative decoding"):
        served.engine.add_request("refused", {"prompt_token_ids": ask.prompt}, sampling_params(ask))


@covers("logit bias", engines=["ngram"], refused="vLLM refuses `logit_bias` with speculative decoding: HTTP 400")
def test_a_logit_bias_is_refused_with_speculation(served: Served) -> None:
    assert_refused(served, {"logit_bias": {5: 4.0}})


@covers("min-p", engines=["ngram"], refused="vLLM refuses `min_p` with speculative decoding: HTTP 400")
def test_min_p_is_refused_with_speculation(served: Served) -> None:
    assert_refused(served, {"min_p": 0.1})


@covers("min-p", engines=WITHOUT_SPECULATION)
def test_min_p_truncates_the_guided_distribution_at_its_temperature(served: Served) -> None:
    sampling = [{"min_p": 0.1}, {"min_p": 0.02, "top_k": 6}, {"min_p": 0.05, "top_p": 0.8}, {"min_p": 0.3}]
    check_truncation(served, sampling)


@covers("top-p", "top-k")
def test_top_k_and_top_p_truncate_the_guided_distribution_at_its_temperature(served: Served) -> None:
    check_truncation(served, [{"top_k": 5}, {"top_p": 0.7}, {"top_k": 12, "top_p": 0.6}, {"top_k": 1}])


def check_truncation(served: Served, sampling: list[dict[str, float]]) -> None:
    """Eight requests: from that many rows on, vLLM takes another kernel where there is Triton."""
    asks = [
        Ask(
            prompt(6, seed=700 + index),
            served.guide(name, eta=0.5) if name else None,
            temperature=(0.8, 1.4, 1.0)[index % 3],
            max_tokens=8,
            sampling=sampling[index % 4],
        )
        for index, name in enumerate([*VALUE_MODELS, None, "v-bernoulli", "q-categorical", None])
    ]
    left = set()
    for answer in drive(served.engine, asks):
        served.check(answer)
        left |= {sum(logprob > -torch.inf for logprob in step.values()) for step in answer.choices[0].logprobs}
    assert len(left) > 2
    assert max(left) < 3 / 4 * REFERENCE_VOCAB


@covers("bad words")
def test_bad_words_are_masked_before_guidance(served: Served) -> None:
    """Of two words, the second is masked after the first. Among few tokens that is often."""

    def without_bad_words(logits_V: torch.Tensor, generated: list[int]) -> torch.Tensor:
        good_V = only(FEW, logits_V)
        good_V[[13, *([8] if generated[-1:] == [5] else [])]] = -torch.inf
        return good_V

    sampling = {"bad_words": ["w13", "w5 w8"], "allowed_token_ids": FEW}
    asks = [
        Ask(prompt(6, seed=86 + index), guidance, temperature, max_tokens=16, sampling=sampling)
        for index, (guidance, temperature) in enumerate(
            [(served.guide("v-bernoulli", eta=1.0), 1.0), (served.guide("q-categorical", eta=1.0), 1.5), (None, 1.5)]
        )
    ]
    answers = drive(served.engine, asks)
    assert any(5 in answer.choices[0].token_ids[:-1] for answer in answers)
    for answer in answers:
        served.check(answer, without_bad_words)


@covers("presence and frequency penalties")
@pytest.mark.parametrize("temperature", [0.0, 0.6])
def test_penalties_act_after_guidance_on_v1_and_before_it_on_v2(served: Served, temperature: float) -> None:
    def penalise(logits_V: torch.Tensor, generated: list[int]) -> torch.Tensor:
        counts_V = torch.bincount(torch.tensor(generated, dtype=torch.long), minlength=REFERENCE_VOCAB)
        return logits_V - 1.5 * (counts_V > 0) - 0.25 * counts_V

    sampling = {"presence_penalty": 1.5, "frequency_penalty": 0.25}
    asks = [
        Ask(prompt(6, seed=85 + index), guidance, temperature, max_tokens=16, sampling=sampling)
        for index, guidance in enumerate([served.guide("v-bernoulli"), served.guide("q-categorical"), None])
    ]
    for answer in drive(served.engine, asks):
        served.check(answer, penalise=penalise)


def repetition_penalty(penalty: float, prompt: list[int]) -> Adjust:
    def penalise(logits_V: torch.Tensor, generated: list[int]) -> torch.Tensor:
        seen = sorted({*prompt, *generated})
        logits_V[seen] = torch.where(logits_V[seen] > 0, logits_V[seen] / penalty, logits_V[seen] * penalty)
        return logits_V

    return penalise


@covers("repetition penalty")
def test_a_repetition_penalty_acts_where_other_penalties_do(served: Served) -> None:
    """It depends on where zero is: on V1 it sees each row with the most valuable candidate at its own logit."""
    asks = [
        Ask(prompt(20, seed=89 + index), guidance, temperature, sampling={"repetition_penalty": 1.6})
        for index, (guidance, temperature) in enumerate(
            [
                (served.guide("v-bernoulli"), 1.0),
                (served.guide("q-categorical"), 0.7),
                (served.guide("v-categorical"), 0.0),
                (None, 0.7),
            ]
        )
    ]
    for answer in drive(served.engine, asks):
        served.check(answer, penalise=repetition_penalty(1.6, answer.ask.prompt))


@covers("stop ids")
def test_a_request_ends_with_its_stop_token(served: Served) -> None:
    """``min_tokens`` masks it before. What a step after the end would have drawn isn't on record."""
    guidances = [served.guide("v-bernoulli", eta=1.0), served.guide("q-categorical", eta=1.0, guided_tokens=5), None]
    stops, allowed = [8, 13], [3, 5, *range(8, 14)]

    def without_early_stops(logits_V: torch.Tensor, generated: list[int]) -> torch.Tensor:
        return only([token for token in allowed if token not in stops or len(generated) >= 3], logits_V)

    asks = [
        Ask(
            prompt(6, seed=93 + index),
            guidance,
            temperature=1.5,
            max_tokens=60,
            sampling={"stop_token_ids": stops, "min_tokens": 3, "allowed_token_ids": allowed},
        )
        for index, guidance in enumerate(guidances)
    ]
    for answer in drive(served.engine, asks):
        tokens = answer.choices[0].token_ids
        assert answer.finish_reason == "stop"
        assert [index for index, token in enumerate(tokens) if token in stops] == [len(tokens) - 1]
        served.check(answer, without_early_stops)


@covers("stop strings")
def test_a_request_ends_at_its_stop_string(served: Served) -> None:
    """Only the API process sees it; the steps the worker has done by then aren't on record."""
    tokenizer, ordinary = AutoTokenizer.from_pretrained(served.reference), list(range(END))

    def asks(stops: list[list[str]]) -> list[Ask]:
        guidances = [served.guide("v-bernoulli"), served.guide("q-categorical", guided_tokens=9), None]
        sampling = {"detokenize": True, "allowed_token_ids": ordinary}
        return [
            Ask(prompt(6, seed=96 + index), guidance, sampling=sampling | {"seed": 96 + index, "stop": stop})
            for index, (guidance, stop) in enumerate(zip(guidances, stops, strict=True))
        ]

    def check(answer: Answer) -> None:
        served.check(answer, lambda logits_V, generated: only(ordinary, logits_V))

    unstopped = drive(served.engine, asks([[], [], []]))
    tokens = [answer.choices[0].token_ids for answer in unstopped]
    stops = [tokenizer.decode(token_ids[4:6]) for token_ids in tokens]
    stopped = drive(served.engine, asks([[stop] for stop in stops]))
    for answer, token_ids, stop in zip(stopped, tokens, stops, strict=True):
        returned = answer.choices[0].token_ids
        assert answer.finish_reason == "stop"
        assert len(returned) < len(token_ids)
        assert returned == token_ids[: len(returned)]
        assert stop in tokenizer.decode(returned)
    for answer in (*unstopped, *stopped):
        check(answer)


SCHEMA = {
    "type": "object",
    "properties": {
        "a": {"enum": ["ab", "abc", "b", "cab"]},
        "b": {"type": "boolean"},
        "c": {"enum": [1, 12, 31, 131, None]},
    },
    "required": ["a", "b", "c"],
    "additionalProperties": False,
}


def documents() -> list[str]:
    """All that the schema allows; no word of the vocabulary has white space in it."""
    values = itertools.product(["ab", "abc", "b", "cab"], [False, True], [1, 12, 31, 131, None])
    return [json.dumps(dict(zip("abc", row, strict=True)), separators=(",", ":")) for row in values]


def by_schema(logits_V: torch.Tensor, generated: list[int]) -> torch.Tensor:
    """Allowed is what begins a document with the words before it; the end, where a document is complete."""
    vocabulary, complete = words(), documents()
    text = "".join(vocabulary[token] for token in generated)
    allowed = [token for token, word in enumerate(vocabulary) if any(one.startswith(text + word) for one in complete)]
    return only(allowed + [END] * (text in complete), logits_V)


@covers("structured output (JSON schema)")
@pytest.mark.filterwarnings("ignore:max_rollback_tokens:DeprecationWarning")  # xgrammar of vLLM's use of it
def test_structured_output_is_guided_within_its_grammar(served: Served) -> None:
    structured = {"structured_outputs": StructuredOutputsParams(json=SCHEMA), "ignore_eos": False}
    guidances = [*(served.guide(name, eta=1.0, top_k=3) for name in VALUE_MODELS), None]
    asks = [
        Ask(prompt(6, seed=800 + index), guidance, temperature, 40, arrives=index, sampling=structured)
        for index, (guidance, temperature) in enumerate(zip(guidances, (1.0, 0.0, 1.5, 0.7, 1.0), strict=True))
    ]
    free = Ask(prompt(6, seed=810), served.guide("v-bernoulli"))
    *answers, unstructured = drive(served.engine, [*asks, free])
    for answer in answers:
        served.check(answer, by_schema)
        *document, end = answer.choices[0].token_ids
        assert "".join(words()[token] for token in document) in documents()
        assert end == END
    served.check(unstructured)


@covers("a thinking budget")
@pytest.mark.parametrize("budget", [0, 3])
def test_tokens_that_a_thinking_budget_forces_are_left_out_of_the_record(served: Served, budget: int) -> None:
    """They are drawn from no distribution; those before and after them are guided."""
    begins, *ends = [words().index(word) for word in f"{THOUGHT_BEGINS} {THOUGHT_ENDS}".split()]
    sampling = {"thinking_token_budget": budget, "bad_words": ["w1", "w2"]}
    asks = [
        Ask([*prompt(6, seed=170), begins], served.guide("v-bernoulli"), max_tokens=12, sampling=sampling),
        Ask([*prompt(9, seed=171), begins], served.guide("q-categorical"), 0.7, max_tokens=9, sampling=sampling),
        Ask(prompt(8, seed=172), served.guide("v-categorical"), max_tokens=9, sampling=sampling),
        Ask([*prompt(7, seed=173), begins], None, max_tokens=9, sampling=sampling),
    ]
    answers = drive(served.engine, asks)
    for answer, is_thinking in zip(answers, (True, True, False, True), strict=True):
        (choice,), guidance = answer.choices, answer.ask.guidance
        forced = [budget, budget + 1] if is_thinking else []
        assert [choice.token_ids[step] for step in forced] == (ends if is_thinking else [])
        steps = served.expected(answer, choice, lambda logits_V, _: only_not([begins, ends[0]], logits_V))
        drawn = [step for count, step in enumerate(steps) if count not in forced]
        if guidance is not None:
            (summary,) = served.rpc("qtilt_take_records", guidance.trace_id, [choice.token_ids])
            measured = Measured.of(drawn)
            assert summary["guided_tokens"] == len(choice.token_ids) - len(forced)
            assert summary["kl"] == pytest.approx(measured.kl, abs=1e-4, rel=1e-5)
            assert summary["mass"] == pytest.approx(measured.mass, abs=1e-5)
            assert summary["candidates"] == pytest.approx(measured.candidates)


def only_not(banned: list[int], logits_V: torch.Tensor) -> torch.Tensor:
    logits_V[banned] = -torch.inf
    return logits_V
