"""A budget for a response's KL: never exceeded, spent as it comes, and exact about what is sampled from."""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from guided_vllm.tiny_models import REFERENCE_VOCAB, make_value_model, prompt
from played_graphs import PlayedGraphs
from qtilt.distributions import Bernoulli, Categorical
from qtilt.method.budget import HALVINGS, largest_scale
from qtilt.vllm_plugin.step import FORCED
from running_batch import RunningBatch, logits_at, make_residents

SLOTS = 6
FINE = 2.0**-HALVINGS
numbers = st.floats(-30, 0, allow_nan=False)


def closed_form(log_p_K: Tensor, offsets_K: Tensor, scale: float) -> float:
    """KL(p·e^(λo)/Z ‖ p) as a sum."""
    tilted_K = (log_p_K + scale * offsets_K).log_softmax(0)
    return float((tilted_K.exp() * (tilted_K - log_p_K)).sum())


@given(st.lists(st.tuples(numbers, numbers), min_size=2, max_size=8), st.floats(0, 5))
def test_the_largest_scale_spends_what_is_left_and_no_more(tokens: list[tuple[float, float]], left: float) -> None:
    log_p_K, offsets_K = torch.tensor(tokens, dtype=torch.float64).unbind(1)
    log_p_K = log_p_K.log_softmax(0)

    def kl(scale_B: Tensor) -> Tensor:
        return torch.tensor([closed_form(log_p_K, offsets_K, float(scale)) for scale in scale_B], dtype=torch.float64)

    (scale,) = largest_scale(kl, torch.tensor([left], dtype=torch.float64)).tolist()
    assert 0 <= scale <= 1
    assert scale == 0 or closed_form(log_p_K, offsets_K, scale) <= left
    assert scale == 1 or closed_form(log_p_K, offsets_K, min(1, scale + FINE)) > left


class Runner(RunningBatch):
    """Requests for one value model; the reference's logits depend on the position only."""

    def __init__(self, directory: Path, type_: str = "v", graphs: PlayedGraphs | None = None) -> None:
        super().__init__(SLOTS, graphs=graphs)
        distribution = Categorical(-1.0, 0.5, 4) if type_ == "q" else Bernoulli()
        path = make_value_model(directory / "value", type_, distribution, "llama", seed=1)
        self.version = make_residents(SLOTS).load_at_start("value", str(path))

    def put(self, slot: int, budget: float | None, output: tuple[int, ...] = (), **more: object) -> None:
        asked = {"eta": 0.05, "top_k": 8, "kl_budget": budget, "trace_id": str(slot), **more}
        self.add(slot, self.version, prompt(5, seed=1), output, **asked)


def measured(guided_V: Tensor, logits_V: Tensor, temperature: float) -> float:
    """The full-vocabulary KL of what is sampled from."""
    guided_V, logits_V = (each.double().div(temperature).log_softmax(-1) for each in (guided_V, logits_V))
    return float((guided_V.exp() * (guided_V - logits_V)).sum())


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("replayed", [False, True])
@pytest.mark.parametrize("tail", ["mean", "floor"])
@pytest.mark.parametrize("type_", ["q", "v"])
def test_a_response_never_spends_more_and_guides_as_ever_until_then(
    tmp_path: Path, type_: str, tail: str, replayed: bool
) -> None:
    runner = Runner(tmp_path, type_, PlayedGraphs() if replayed else None)
    budgets, temperatures = [None, 1e9, 1.0, 0.3, 1e-6], [1.0, 1.0, 0.7, 1.0, 1.0]
    for slot, (budget, temperature) in enumerate(zip(budgets, temperatures, strict=True)):
        runner.put(slot, budget, tail=tail, temperature=temperature, method=("qsharp", "cd")[slot == 2])
    spent, tokens = [0.0] * 5, []
    for step in range(20):
        logits_V = logits_at(4 + step)
        guided_BV = runner.guide(range(5), logits_V.repeat(5, 1))
        assert torch.equal(guided_BV[1], guided_BV[0]), "what it may spend is never reached"
        for slot, budget in enumerate(budgets):
            kl = measured(guided_BV[slot], logits_V, temperatures[slot])
            spent[slot] += kl
            if budget is not None:
                assert spent[slot] <= budget + 1e-5, "what is sampled from is float32"
            if slot == 3 and kl < 1e-9:
                assert spent[slot] == pytest.approx(budget, rel=1e-4), "all of it is spent before"
            runner.requests.commit(slot, [step])
        tokens.append(step)
        for slot, budget in enumerate(budgets):
            told = runner.summary(tokens, str(slot))["kl"]
            assert told <= (math.inf if budget is None else budget)
            assert told == pytest.approx(spent[slot], abs=1e-4)
    assert spent[0] > 2
    assert spent[2] == pytest.approx(1.0, abs=1e-4)


def test_a_scaled_step_is_the_closed_form(tmp_path: Path) -> None:
    """With all tokens as candidates: p·e^(λo)/Z, with the o of a request that has no budget."""
    runner = Runner(tmp_path)
    runner.put(0, None, top_k=REFERENCE_VOCAB, tail="floor")
    runner.put(1, 0.2, top_k=REFERENCE_VOCAB, tail="floor")
    logits_V = logits_at(4)
    free_V, bound_V = runner.guide([0, 1], logits_V.repeat(2, 1)).double()
    log_p_V, offsets_V = logits_V.double().log_softmax(0), free_V - logits_V.double()
    assert measured(free_V, logits_V, 1.0) > 0.25
    scale = max((float(step) / 4096 for step in range(4097)), key=lambda each: _below(log_p_V, offsets_V, each, 0.2))
    expected_V = (log_p_V + scale * offsets_V).log_softmax(0)
    torch.testing.assert_close(bound_V.log_softmax(0).exp(), expected_V.exp(), rtol=0, atol=1e-3)


def _below(log_p_V: Tensor, offsets_V: Tensor, scale: float, budget: float) -> float:
    """scale, where its KL is within the budget."""
    return scale if closed_form(log_p_V, offsets_V, scale) <= budget else -1.0


def test_steps_are_counted_of_a_request_that_comes_back(tmp_path: Path) -> None:
    """Its last token may not be known yet; the KL of the step that drew it counts."""
    runner = Runner(tmp_path)
    runner.put(0, None)
    for token in (3, 4, 5):
        runner.step({0: [token]})
    whole = runner.summary([3, 4, 5], "0")["kl"]
    two = runner.summary([3, 4], "0")["kl"]
    assert whole > two > 0
    runner.batch.keep_only([])
    assert runner.records.spent("0", [3, 4, 5], 3) == pytest.approx(whole)
    assert runner.records.spent("0", [3, 4], 3) == pytest.approx(whole)
    assert runner.records.spent("0", [3, 4], 2) == pytest.approx(two)
    assert runner.records.spent("0", [], 0) == runner.records.spent("other", [3], 1) == 0.0


def test_siblings_keep_to_their_own_budgets_though_they_measure_alike(tmp_path: Path) -> None:
    """What is on record of a choice is its own: not a sibling's, whose logits were rounded otherwise."""
    runner = Runner(tmp_path)
    for slot in (0, 1, 2):
        runner.put(slot, 0.3, trace_id="t")
    tokens = []
    for step in range(8):
        noise_BV = torch.randn(3, REFERENCE_VOCAB, generator=torch.Generator().manual_seed(step)) * 0.02
        runner.guide([0, 1, 2], logits_at(4 + step).repeat(3, 1) + noise_BV)
        tokens.append(step)
        for slot in (0, 1, 2):
            runner.requests.commit(slot, [step if step < 7 else slot])
    for slot in (0, 1, 2):
        told = runner.summary([*tokens[:7], slot], "t")["kl"]
        assert 0.2999 < told <= 0.3


def test_forced_tokens_spend_nothing(tmp_path: Path) -> None:
    runner = Runner(tmp_path)
    runner.put(0, 0.3)
    runner.put(1, None)
    for step in range(8):
        guided_BV = runner.guide([0, 1], logits_at(4 + step).repeat(2, 1))
        if step < 4:
            guided_BV[:, 9] = FORCED
            runner.batch.leave_out_forced(guided_BV)
        for slot in (0, 1):
            runner.requests.commit(slot, [9])
    assert runner.summary([9] * 4, "0")["kl"] == 0
    assert 0.2999 < runner.summary([9] * 8, "0")["kl"] <= 0.3
    assert runner.records.spent("0", [9] * 8, 8) == pytest.approx(runner.summary([9] * 8, "0")["kl"])


def test_a_slot_begins_with_nothing_spent(tmp_path: Path) -> None:
    runner = Runner(tmp_path)
    first = []
    for _ in range(2):
        runner.put(0, 0.3)
        first.append(runner.step({0: [3]}))
        runner.step({0: [4]})
    assert torch.equal(*first)
