"""The probabilities Model Runner V2 reports are those of plain forwards, whatever it does to the batch."""

import torch

from guided_vllm.driving import Ask, drive
from guided_vllm.oracle import reference_oracle
from guided_vllm.served import Served
from guided_vllm.tiny_models import prompt


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
    asks = [Ask(prompt(20 + 2 * index, seed=20 + index), max_tokens=24) for index in range(8)]
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


def test_speculation_reports_the_target_distribution_at_accepted_corrected_and_bonus_tokens(
    served: Served, speculative: bool
) -> None:
    few = [3, 5, 8, 13]  # n-gram drafts are often right, and often wrong

    def only_few(logits_V: torch.Tensor) -> torch.Tensor:
        masked_V = torch.full_like(logits_V, -torch.inf)
        masked_V[few] = logits_V[few]
        return masked_V

    before = drafts_accepted_of(served)
    asks = [
        Ask(prompt(12, seed=60 + index), None, temperature, 30, sampling={"allowed_token_ids": few})
        for index, temperature in enumerate((1.0, 0.0, 0.6, 1.5))
    ]
    answers = drive(served.engine, asks)
    accepted, drafted = (now - then for now, then in zip(drafts_accepted_of(served), before, strict=True))
    assert (20 < accepted < drafted - 20) if speculative else drafted == 0
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
