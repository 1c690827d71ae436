"""Speculative decoding drafts tokens that come true or not: what is reported and what is drawn are the target's."""

import math

import pytest
import torch

from guided_vllm.driving import Ask, drive
from guided_vllm.matrix import covers
from guided_vllm.oracle import expected_steps
from guided_vllm.served import Served
from guided_vllm.tiny_models import VALUE_MODELS, prompt

FEW = [3, 5, 8, 13]  # among so few tokens n-gram drafts are often right, and often wrong
MOST_SIGMAS = 4
LARGEST_SCORE = 2.0


def only_few(logits_V: torch.Tensor, generated: list[int]) -> torch.Tensor:
    masked_V = torch.full_like(logits_V, -torch.inf)
    masked_V[FEW] = logits_V[FEW]
    return masked_V


@covers("speculative decoding", engines=["ngram"])
@pytest.mark.parametrize("value_model", [None, *VALUE_MODELS])
def test_accepted_corrected_and_bonus_tokens_are_reported_with_the_target_distribution(
    served: Served, value_model: str | None
) -> None:
    before = drafts_accepted_of(served)
    asks = [
        Ask(
            prompt(12, seed=60 + index),
            None
            if value_model is None
            else served.guide(value_model, eta=1.0, top_k=3, guided_tokens=20 if index == 3 else None),
            temperature,
            30,
            sampling={"allowed_token_ids": FEW},
        )
        for index, temperature in enumerate((1.0, 0.0, 0.6, 1.5))
    ]
    answers = drive(served.engine, asks)
    accepted, drafted = (now - then for now, then in zip(drafts_accepted_of(served), before, strict=True))
    assert 20 < accepted < drafted - 20
    for answer in answers:
        served.check(answer, only_few)


@covers("speculative decoding", engines=["ngram"])
def test_accepted_corrected_and_bonus_tokens_are_drawn_from_the_target_distribution(served: Served) -> None:
    """As often as the oracle's probabilities say, in all and where the reference without guidance says otherwise.

    With drafts accepted by the reference's probabilities the first score is 15 σ off.
    """
    before = drafts_accepted_of(served)
    asks = [
        Ask(
            prompt(4, seed=70 + index),
            served.guide("q-categorical", eta=0.05, top_k=3),
            temperature,
            25,
            n=8,  # all fit into the batch and into memory
            sampling={"allowed_token_ids": FEW, "seed": 1000 * index},
        )
        for index, temperature in enumerate((1.0, 1.7))
    ]
    answers = drive(served.engine, asks)
    accepted, drafted = (now - then for now, then in zip(drafts_accepted_of(served), before, strict=True))
    assert 50 < accepted < drafted - 50
    for ask in asks:
        served.rpc("qtilt_take_records", ask.guidance.trace_id, [])
    drawn = [draws_of(served, answer.ask, choice.token_ids) for answer in answers for choice in answer.choices]
    tokens_N = torch.cat([tokens for tokens, _, _ in drawn])
    target_NV, reference_NV = (torch.cat([each[part] for each in drawn]) for part in (1, 2))
    unguided_NV = (reference_NV / target_NV).log().nan_to_num().clamp(-LARGEST_SCORE, LARGEST_SCORE)
    assert abs(sigmas(tokens_N, target_NV, unguided_NV)) < MOST_SIGMAS
    for token in FEW:
        of_token_NV = torch.zeros_like(target_NV)
        of_token_NV[:, token] = 1
        assert abs(sigmas(tokens_N, target_NV, of_token_NV)) < MOST_SIGMAS


def draws_of(served: Served, ask: Ask, token_ids: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What was drawn ``[N]``, and the probabilities ``[N, V]`` of the target and of the reference without guidance."""
    target, reference = (
        torch.stack(
            [
                step.log_probs_V.exp()
                for step in expected_steps(
                    served.reference, ask.prompt, token_ids, guided, ask.temperature, served.scorable, only_few
                )
            ]
        )
        for guided in (served.for_oracle(ask.guidance), None)
    )
    return torch.tensor(token_ids), target, reference


def sigmas(tokens_N: torch.Tensor, probs_NV: torch.Tensor, scores_NV: torch.Tensor) -> float:
    """By how many standard deviations the summed scores of the draws are above what is expected.

    Given the draws before it, each has known probabilities: the variances add up.
    """
    expected_N = (probs_NV * scores_NV).sum(1)
    variance_N = (probs_NV * (scores_NV - expected_N[:, None]) ** 2).sum(1)
    drawn_N = scores_NV.gather(1, tokens_N[:, None])[:, 0]
    return float((drawn_N - expected_N).sum()) / math.sqrt(float(variance_N.sum()))


def drafts_accepted_of(served: Served) -> tuple[int, int]:
    counters = {metric.name: metric for metric in served.engine.get_metrics()}
    names = ("vllm:spec_decode_num_accepted_tokens", "vllm:spec_decode_num_draft_tokens")
    return tuple(int(counters[name].value) if name in counters else 0 for name in names)
