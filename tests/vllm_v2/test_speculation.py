"""Speculative decoding drafts tokens that come true or not: the distributions reported are the target's."""

import pytest
import torch

from guided_vllm.driving import Ask, drive
from guided_vllm.oracle import reference_oracle
from guided_vllm.served import Served
from guided_vllm.tiny_models import VALUE_MODELS, prompt

FEW = [3, 5, 8, 13]  # among so few tokens n-gram drafts are often right, and often wrong


def only_few(logits_V: torch.Tensor) -> torch.Tensor:
    masked_V = torch.full_like(logits_V, -torch.inf)
    masked_V[FEW] = logits_V[FEW]
    return masked_V


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
    assert (20 < accepted < drafted - 20) if served.speculates else drafted == 0
    for answer in answers:
        served.check(answer, only_few)


def drafts_accepted_of(served: Served) -> tuple[int, int]:
    counters = {metric.name: metric for metric in served.engine.get_metrics()}
    names = ("vllm:spec_decode_num_accepted_tokens", "vllm:spec_decode_num_draft_tokens")
    return tuple(int(counters[name].value) if name in counters else 0 for name in names)


def test_truncation_with_eight_requests(served: Served) -> None:
    """Reported are the truncated distributions."""
    asks = [
        Ask(prompt(6, seed=70 + index), None, 0.8, max_tokens=6, sampling={"top_p": 0.7, "top_k": 5 + index})
        for index in range(8)
    ]
    for answer in drive(served.engine, asks):
        (choice,) = answer.choices
        logits_LV = reference_oracle(served.reference).logits([*answer.ask.prompt, *choice.token_ids])
        for count, logprobs in enumerate(choice.logprobs):
            kept = {token for token, logprob in logprobs.items() if logprob > -torch.inf}
            probabilities_V = torch.softmax(logits_LV[len(answer.ask.prompt) + count - 1] / 0.8, 0)
            likeliest_first = probabilities_V.argsort(descending=True).tolist()
            top_V = probabilities_V[likeliest_first[: answer.ask.sampling["top_k"]]]
            needed = int(((top_V / top_V.sum()).cumsum(0) < 0.7).sum()) + 1
            assert kept == set(likeliest_first[:needed])
            reported = torch.tensor([logprobs[token] for token in likeliest_first[:needed]], dtype=torch.float64).exp()
            torch.testing.assert_close(reported, top_V[:needed] / top_V[:needed].sum(), atol=1e-5, rtol=0)
