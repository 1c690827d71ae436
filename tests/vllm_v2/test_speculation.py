"""Speculative decoding drafts tokens that come true or not: the distributions reported are the target's."""

import pytest
import torch

from guided_vllm.driving import Ask, drive
from guided_vllm.matrix import covers
from guided_vllm.served import Served
from guided_vllm.tiny_models import VALUE_MODELS, prompt

FEW = [3, 5, 8, 13]  # among so few tokens n-gram drafts are often right, and often wrong


def only_few(logits_V: torch.Tensor, generated: list[int]) -> torch.Tensor:
    masked_V = torch.full_like(logits_V, -torch.inf)
    masked_V[FEW] = logits_V[FEW]
    return masked_V


@covers("speculative decoding", engines=["ngram"])
@pytest.mark.parametrize("value_model", [None, *VALUE_MODELS])
def test_accepted_corrected_and_bonus_tokens_come_from_the_target_distribution(
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


def drafts_accepted_of(served: Served) -> tuple[int, int]:
    counters = {metric.name: metric for metric in served.engine.get_metrics()}
    names = ("vllm:spec_decode_num_accepted_tokens", "vllm:spec_decode_num_draft_tokens")
    return tuple(int(counters[name].value) if name in counters else 0 for name in names)
