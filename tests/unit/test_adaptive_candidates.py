"""When scoring may stop: the bound against exact enumeration, and the stages of a step on the real value engine."""

import itertools
import random
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path

import pytest
import torch
from torch import Tensor

import shortened_guidance
from guided_vllm.oracle import value_oracle
from guided_vllm.poisoned import poison
from guided_vllm.tiny_models import REFERENCE_VOCAB, TOKENS, make_value_model, prompt
from qtilt.distributions import Bernoulli, Categorical, ReturnDistribution
from qtilt.params import GuidanceParams
from qtilt.tilt import (
    OFFSETS,
    TAILS,
    lowest_offset,
    may_stop_scoring,
    offsets,
    reference_mass,
    top_candidates,
    total_variation_bound,
)
from qtilt.vllm_plugin import step
from qtilt.vllm_plugin.versions import ResidentVersion
from running_batch import RunningBatch, make_residents
from shortened_guidance import STAGES

pytestmark = pytest.mark.usefixtures("implementation")

RANGES = [(0.0, 10.0), (-3.0, 0.5), (2.0, 2.001), (0.0, 1e-9), (0.0, 800.0), (-2000.0, -1000.0), (0.0, 1e5)]


class Case:
    """A random row: float64 logits over a small vocabulary, its candidates, and offsets within a range."""

    def __init__(self, seed: int, temperature: float = 1.0, tail: str = "floor") -> None:
        self.tail = tail
        draw = random.Random(seed)
        self.lowest, self.highest = draw.choice(RANGES)
        spread = draw.choice([0.1, 2.0, 8.0, 30.0])
        self.logits_1V = torch.tensor([[draw.gauss(0, spread) for _ in range(6)]], dtype=torch.float64)
        self.temperature_1 = torch.tensor([temperature], dtype=torch.float64)
        self.candidates = top_candidates(self.logits_1V, draw.choice([1, 3, 4, 6]), scorable=6)
        self.ranked: list[int] = self.candidates.token_ids_BK[0].tolist()
        self.offsets = {token: self._offset(draw) for token in self.ranked}
        scaled_V = self.logits_1V[0] / (temperature or 1.0)
        self.reference: list[float] = (scaled_V - scaled_V.max()).exp().tolist()
        self.lowest_1 = torch.tensor([self.lowest - self.highest], dtype=torch.float64)

    def _offset(self, draw: random.Random) -> float:
        """Often at an end of the range, where the bound is tight."""
        return draw.choice([self.lowest, self.highest, draw.uniform(self.lowest, self.highest)])

    def scored_sets(self) -> list[list[int]]:
        """All of them, not just the likeliest first."""
        return [list(some) for n in range(len(self.ranked) + 1) for some in itertools.combinations(self.ranked, n)]

    def arguments(self, scored: list[int]) -> tuple[object, ...]:
        """For the functions under test; what isn't to be read is NaN."""
        is_scored_1K = torch.tensor([[token in scored for token in self.ranked]])
        known = [self.offsets[token] - self.highest if token in scored else torch.nan for token in self.ranked]
        offsets_1K = torch.tensor([known], dtype=torch.float64)
        mass = reference_mass(self.logits_1V, self.candidates, self.temperature_1)
        return mass, is_scored_1K, offsets_1K, self.lowest_1, torch.tensor([self.tail == "mean"])

    def distance(self, scored: list[int]) -> float:
        """Of guidance that scores these from guidance that scores all candidates."""
        arguments = self.reference, self.offsets, scored, self.lowest, self.tail
        return float(shortened_guidance.total_variation(*arguments))

    def bound(self, scored: list[int]) -> float:
        return total_variation_bound(*self.arguments(scored)).item()

    def may_stop(self, scored: list[int], tolerance: float) -> bool:
        tolerance_1 = torch.tensor([tolerance], dtype=torch.float64)
        return bool(may_stop_scoring(*self.arguments(scored), self.temperature_1, tolerance_1))


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.7])
def test_the_bound_is_its_formula_and_no_score_can_lead_further_away(temperature: float, tail: str) -> None:
    tight = 0
    for seed in range(60):
        case = Case(seed, temperature, tail)
        for scored in case.scored_sets():
            bound = case.bound(scored)
            exact = shortened_guidance.bound(case.reference, case.offsets, scored, case.lowest, case.highest, tail)
            # Mass beyond the candidates that float32 can't tell from none counts as none, which raises the bound.
            assert bound == pytest.approx(float(exact), rel=2e-5, abs=1e-300)
            distance = case.distance(scored)
            assert 0 <= distance <= bound * (1 + 1e-9) + 1e-50
            tight += 0.999 * bound < distance < 0.999
    assert tight > 30, "a bound that is never reached would be no test of the inequality"


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("tolerance", [1e-6, 1e-3, 0.1, 0.9])
def test_within_the_tolerance_or_not_stopped(tolerance: float, tail: str) -> None:
    stopped = 0
    for seed in range(200):
        case = Case(seed, tail=tail)
        for count in range(len(case.ranked) + 1):
            scored = case.ranked[:count]
            stops = case.may_stop(scored, tolerance)
            assert stops == (case.bound(scored) <= tolerance)
            assert not stops or case.distance(scored) <= tolerance * (1 + 1e-9)
            stopped += stops and count < len(case.ranked)
    assert stopped > 20


def test_greedy_stops_exactly_when_no_unscored_candidate_can_win() -> None:
    """By enumeration of the best that can come: every unscored candidate in turn at the upper end."""
    outcomes = []
    for seed in range(300):
        case = Case(seed, temperature=0.0)
        for scored in case.scored_sets()[1:]:
            unscored = [token for token in case.ranked if token not in scored]
            can_win = any(_winner(case, scored, raised) == raised for raised in unscored)
            assert case.may_stop(scored, 1e-9) is not can_win
            assert case.may_stop(scored, 0.999) is not can_win
            outcomes.append((can_win, bool(unscored)))
    assert min(outcomes.count((True, True)), outcomes.count((False, True))) > 300
    assert outcomes.count((False, False)) > 100


def test_greedy_with_the_tail_mean_stops_when_no_score_is_missing() -> None:
    for seed in range(100):
        case = Case(seed, temperature=0.0, tail="mean")
        for scored in case.scored_sets():
            has_mass = [token for token in case.ranked if case.reference[token] > 1e-300]
            assert case.may_stop(scored, 0.999) is (set(has_mass) <= set(scored))


def _winner(case: Case, scored: list[int], raised: int) -> int:
    """Among the candidates, all unscored ones but ``raised`` at the lower end."""
    weights = {token: Decimal(case.reference[token]) * Decimal(case.lowest).exp() for token in case.ranked}
    weights |= {token: Decimal(case.reference[token]) * Decimal(case.offsets[token]).exp() for token in scored}
    weights[raised] = Decimal(case.reference[raised]) * Decimal(case.highest).exp()
    return max([raised, *case.ranked], key=lambda token: weights[token])


def test_a_row_in_which_nothing_is_left_or_nothing_is_allowed_stops() -> None:
    for temperature, tail in itertools.product((0.0, 1.0), TAILS):
        case = Case(0, temperature, tail)
        assert case.may_stop(case.ranked, 5e-324)
        for absent in (-torch.inf, torch.nan):
            case.logits_1V = torch.full_like(case.logits_1V, absent)
            case.candidates = top_candidates(case.logits_1V, 3, scorable=6)
            case.ranked, case.offsets = [0, 1, 2], dict.fromkeys(range(3), case.lowest)
            assert case.may_stop([], 5e-324)


def test_scores_that_are_no_numbers_certify_nothing() -> None:
    for temperature, tail in itertools.product((0.0, 1.0), TAILS):
        case = Case(5, temperature, tail)
        assert len(case.ranked) > 1
        case.offsets[case.ranked[0]] = float("nan")
        assert not case.may_stop(case.ranked[:1], 0.999)


@pytest.mark.parametrize("distribution", [Bernoulli(), Categorical(-1.0, 0.5, 4)], ids=["bernoulli", "categorical"])
def test_the_range_holds_the_offsets_of_both_methods(distribution: ReturnDistribution) -> None:
    inv_eta_B = torch.tensor([0.1, 5.0, 1000.0])
    lowest_B = lowest_offset(distribution, inv_eta_B)
    for scale in (1.0, 100.0):
        logits_BKA = scale * torch.randn(3, 50, distribution.num_logits)
        for method in OFFSETS:
            offsets_BK = offsets(distribution, logits_BKA, inv_eta_B, method)
            slack_B = 1e-12 * inv_eta_B.double()
            assert (offsets_BK.amin(-1) >= lowest_B - slack_B).all()
            assert (offsets_BK.amax(-1) <= 0).all()


# The stages, in a batch without vLLM.

SLOTS, TOP_K, ETA = 8, 20, 0.2
WITH = {"tolerance": 0.02}


class Serving(RunningBatch):
    """One version in a batch; a step draws the likeliest token of every row."""

    def __init__(self, directory: Path, type_: str = "v", distribution: ReturnDistribution | None = None) -> None:
        super().__init__(SLOTS)
        self.directory = directory
        if not directory.exists():
            make_value_model(directory, type_, distribution or Bernoulli(), "llama", seed=1)
        self.version: ResidentVersion = make_residents(SLOTS).load_at_start("value", str(directory))
        self.forwards: list[tuple[int, int]] = []
        self.version.engine.score = self._counted(self.version.engine.score)  # type: ignore[method-assign]
        self.rows: dict[int, tuple[GuidanceParams, float]] = {}
        for slot in range(SLOTS):
            self.add_unguided(slot, prompt(5, seed=slot))

    def _counted(self, score: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def counted(last: object, candidates_BK: Tensor, spans: object = ()) -> Tensor:
            self.forwards.append(tuple(candidates_BK.shape))
            return score(last, candidates_BK, spans)

        return counted

    def put(self, slot: int, prompt_ids: list[int] | None = None, temperature: float = 1.0, **more: object) -> None:
        settings = {"eta": ETA, "top_k": TOP_K, "trace_id": str(slot)} | more
        prompt_ids = prompt_ids or prompt(5, seed=slot)
        request = self.add(slot, self.version, prompt_ids, temperature=temperature, **settings)
        self.rows[slot] = request.params, temperature

    def step_of_all(self, logits_BV: Tensor) -> Tensor:
        self.forwards.clear()
        return self.draw(logits_BV)

    def candidates(self, slot: int) -> float:
        """Of the steps until now, in the mean."""
        summary = self.summary(self.drawn(slot), str(slot))
        assert summary["guided_tokens"] == len(self.drawn(slot))
        return summary["candidates"]


@pytest.fixture
def serving(tmp_path: Path) -> Serving:
    return Serving(tmp_path / "value")


def logits(rows: int, seed: int, spread: float = 9.0) -> Tensor:
    """Of which a few tokens have most of the mass."""
    return spread * torch.randn(rows, REFERENCE_VOCAB, generator=torch.Generator().manual_seed(seed))


def expected_scored(
    serving: Serving, index: int, logits_V: Tensor, stages: tuple[int, ...]
) -> tuple[list[float], dict[int, float], list[int]]:
    """Reference, all offsets, and the scored candidates of the next step, by forwards of Hugging Face."""
    params, temperature = serving.rows[index]
    ranked = logits_V[:TOKENS].argsort(descending=True).tolist()[: params.top_k]
    offsets_K, lowest = value_oracle(serving.directory).offsets(
        serving.requests.tokens(index), ranked, params.eta, params.method
    )
    offsets = dict(zip(ranked, offsets_K.tolist(), strict=True))
    scaled_V = logits_V.double() / (temperature or 1.0)
    reference = (scaled_V - scaled_V.max()).exp().tolist()
    highest = serving.version.distribution.v_max / params.eta
    scored = shortened_guidance.scored_in_stages(
        reference,
        ranked,
        offsets,
        lowest,
        highest,
        params.tolerance,
        greedy=temperature == 0,
        tail=params.tail,
        stages=stages,
    )
    return reference, offsets, scored


def forwards_of_stages(
    stages: tuple[int, ...],
    counts: dict[int, list[int]],
    settings: list[tuple[float, float, int]],
    top_k: int,
) -> list[tuple[int, int]]:
    """Rows and candidates of the last step's forwards for requests of this top_k: they are scored together."""
    ends = [*(end for end in stages if end < top_k), top_k]
    scored = [counts[index][-1] for index, (_, _, of_request) in enumerate(settings) if of_request == top_k]
    widths = [end - start for start, end in itertools.pairwise([0, *ends])]
    going_on = [sum(count > before for count in scored) for before in (0, *ends)]
    return [(rows, width) for rows, width in zip(going_on, widths, strict=False) if rows]


@pytest.mark.parametrize("distribution", [Bernoulli(), Categorical(0.2, 1.2, 11)], ids=["bernoulli", "categorical"])
@pytest.mark.parametrize("methods", [("qsharp", "cd"), ("cd", "qsharp")], ids=lambda methods: methods[0])
@pytest.mark.parametrize("stages", [STAGES, (2, 8), (7, 20, 30)], ids=str)
def test_stages_score_what_the_bound_asks_for_and_sampling_is_within_the_tolerance(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stages: tuple[int, ...],
    methods: tuple[str, str],
    distribution: ReturnDistribution,
) -> None:
    """Rows of both methods, both tails and two etas share each forward."""
    tails = list(TAILS) if methods[0] == "qsharp" else list(TAILS)[::-1]
    monkeypatch.setattr(step, "STAGES", stages)
    serving = Serving(tmp_path / "value", distribution=distribution)
    settings = [(0.6, 1e-3, 20), (1.0, 0.05, 20), (0.0, 0.5, 20), (1.0, 1e-9, 20), (0.8, 1e-3, 5), (1.0, 0.02, 1)]
    for index, (temperature, tolerance, top_k) in enumerate(settings):
        more = {"method": methods[index % 2], "eta": (ETA, 0.5)[index % 2]}
        more["tail"] = tails[index // 2 % 2]
        serving.put(index, temperature=temperature, tolerance=tolerance, top_k=top_k, **more)
    counts: dict[int, list[int]] = {index: [] for index in range(len(settings))}
    ends = [count for count in (*stages, 20) if count <= 20]
    for number in range(12):
        logits_BV = logits(len(settings), seed=number)
        expected = {index: expected_scored(serving, index, logits_BV[index], stages) for index in counts}
        guided_BV = serving.step_of_all(logits_BV)
        for index, (reference, true_offsets, scored) in expected.items():
            temperature, tolerance, _ = settings[index]
            counts[index].append(len(scored))
            lowest = distribution.v_min / serving.rows[index][0].eta
            of_scored = {token: true_offsets[token] for token in scored}
            tail = serving.rows[index][0].tail
            exact = shortened_guidance.guided(reference, of_scored, lowest, tail)
            got_V = (guided_BV[index].double() / (temperature or 1.0)).softmax(-1)
            torch.testing.assert_close(got_V, torch.tensor(exact, dtype=torch.float64), rtol=1e-4, atol=1e-5)
            full = shortened_guidance.guided(reference, true_offsets, lowest, tail)
            if temperature:
                distance = sum(abs(a - b) for a, b in zip(got_V.tolist(), full, strict=True)) / 2
                assert distance <= tolerance + 1e-5
            else:
                assert int(got_V.argmax()) == full.index(max(full))
        assert serving.forwards == [
            forward for top_k in (20, 5, 1) for forward in forwards_of_stages(stages, counts, settings, top_k)
        ]
    assert set(ends) == {count for index in (0, 1, 2, 3) for count in counts[index]}
    assert set(counts[4]) == ({2, 5} if stages[0] == 2 else {5})
    assert set(counts[5]) == {1}
    for index, of_steps in counts.items():
        assert serving.candidates(index) == pytest.approx(sum(of_steps) / len(of_steps))


def test_rows_without_a_tolerance_are_bit_identical_beside_rows_with_one(serving: Serving, tmp_path: Path) -> None:
    alone = Serving(tmp_path / "value")
    for index in (1, 3):
        serving.put(index)
        alone.put(index)
    for index in (0, 2, 4):
        serving.put(index, **WITH)
    for number in range(8):
        logits_BV = logits(6, seed=number)
        guided_BV, expected_BV = serving.step_of_all(logits_BV), alone.step_of_all(logits_BV)
        assert alone.forwards == [(2, TOP_K)]
        assert (2, TOP_K) in serving.forwards
        assert torch.equal(guided_BV[[1, 3, 5]], expected_BV[[1, 3, 5]])
        assert torch.equal(expected_BV[5], logits_BV[5])
    assert serving.candidates(1) == serving.candidates(3) == alone.candidates(1) == TOP_K
    assert min(serving.candidates(index) for index in (0, 2, 4)) < TOP_K


def test_a_row_is_scored_as_it_would_be_alone(serving: Serving, tmp_path: Path) -> None:
    """Whatever the rows beside it need: another top-k, another tolerance, none."""
    alone = Serving(tmp_path / "value")
    alone.put(2, **WITH)
    for index, more in enumerate([{"tolerance": 1e-9, "top_k": 40}, {}, WITH, {"tolerance": 0.5, "top_k": 3}]):
        serving.put(index, **more)
    for number in range(8):
        logits_BV = logits(4, seed=number)
        guided_BV, expected_BV = serving.step_of_all(logits_BV), alone.step_of_all(logits_BV)
        torch.testing.assert_close(guided_BV[2], expected_BV[2], rtol=1e-5, atol=1e-5)
    assert serving.candidates(2) == alone.candidates(2)
    assert serving.candidates(0) > TOP_K


def test_a_q_type_value_model_scores_all_candidates_at_once(tmp_path: Path) -> None:
    serving, without = Serving(tmp_path / "value", "q"), Serving(tmp_path / "value", "q")
    for index in range(3):
        serving.put(index, tolerance=0.9 if index else 0.0)
        without.put(index)
    for number in range(3):
        assert torch.equal(serving.step_of_all(logits(3, seed=number)), without.step_of_all(logits(3, seed=number)))
        assert serving.forwards == [(3, TOP_K)]
    assert serving.candidates(1) == TOP_K


def test_masked_candidates_are_neither_scored_nor_counted(serving: Serving) -> None:
    serving.put(0, tolerance=1e-9)
    serving.put(1)
    logits_BV = logits(2, seed=3, spread=0.5)
    allowed = torch.arange(2, 32, 6)
    masked_BV = torch.full_like(logits_BV, -torch.inf).index_copy(1, allowed, logits_BV[:, allowed])
    masked_BV[:, 1] = torch.nan
    guided_BV = serving.step_of_all(masked_BV)
    assert torch.equal(guided_BV.isneginf(), masked_BV.isneginf())
    assert torch.equal(guided_BV.isnan(), masked_BV.isnan())
    assert serving.candidates(0) == serving.candidates(1) == len(allowed)


def test_a_nan_ends_its_row_in_whatever_stage_and_no_other(tmp_path: Path) -> None:
    """The value of one candidate is NaN; its rank decides in which stage that is seen, if at all."""
    directory = make_value_model(tmp_path / "value", "v", Bernoulli(), "gpt2", seed=1)
    poison(directory, token=50)
    serving = Serving(directory)
    for index in range(4):
        serving.put(index, tolerance=1e-3 if index < 3 else 0.9)
    logits_BV = torch.zeros(4, REFERENCE_VOCAB)
    ranks = [1, 5, 15, 5]
    for row, rank in enumerate(ranks):
        ranked = [*range(rank), 50, *range(rank, TOP_K - 1)]
        logits_BV[row, ranked] = 3 - torch.arange(TOP_K) * 0.1
    logits_BV[3, 0] = 30.0
    guided_BV = serving.step_of_all(logits_BV)
    assert [bool(row.softmax(-1)[17] == 1) for row in guided_BV] == [True, True, True, False]
    assert serving.forwards == [(4, 2), (2, 18)]
    assert serving.records.failures() == {}, "the host doesn't know yet"
    failures = ["kind" in serving.outcome([17], str(slot)) for slot in range(4)]
    assert failures == [True, True, True, False]


def test_an_exception_fails_only_the_rows_that_are_scored_the_same_way(serving: Serving) -> None:
    serving.put(0)
    serving.put(1, **WITH)
    score = serving.version.engine.score

    def broken(last: object, candidates_BK: Tensor, spans: object = ()) -> Tensor:
        if candidates_BK.shape[1] == TOP_K - 2:
            raise MemoryError("in the second stage")
        return score(last, candidates_BK, spans)

    serving.version.engine.score = broken  # type: ignore[method-assign, assignment]
    logits_BV = logits(2, seed=0, spread=0.3)
    guided_BV = serving.step_of_all(logits_BV)
    assert guided_BV[1].softmax(-1)[17] == 1
    assert guided_BV[0].softmax(-1)[17] < 1
    assert serving.records.failures() == {"1": {"kind": "exception", "reason": "MemoryError: in the second stage"}}
