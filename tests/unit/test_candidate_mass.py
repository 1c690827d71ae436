"""Which candidates there are when some of the reference's mass is enough, and what the others cost: nothing."""

import random
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from torch import Tensor

from guided_vllm.oracle import Guided, Step, step_distributions
from guided_vllm.poisoned import POISON, poison
from guided_vllm.tiny_models import REFERENCE_VOCAB, TOKENS, make_value_model, prompt
from qtilt.distributions import Bernoulli, Categorical, ReturnDistribution
from qtilt.params import GuidanceParams
from qtilt.tilt import Candidates, ReferenceMass, likeliest, reference_mass, top_candidates
from qtilt.vllm_plugin.guided import run_counts
from qtilt.vllm_plugin.step import Asked, RowSettings, StepSettings
from qtilt.vllm_plugin.versions import ResidentVersion
from running_batch import RunningBatch, count_tokens, make_residents

pytestmark = pytest.mark.usefixtures("implementation")

SLOTS, TOP_K, ETA = 8, 20, 0.2


def fewest(masses: list[Fraction], enough: Fraction) -> int:
    """How many of the first hold that much; all of them if they hold less."""
    return next((count for count in range(1, len(masses)) if sum(masses[:count]) >= enough), len(masses))


@pytest.mark.parametrize("temperature", [0.0, 0.3, 1.0, 1.7])
def test_the_fewest_likeliest_that_hold_the_mass(temperature: float) -> None:
    draw = random.Random(0)
    counts = set()
    for _ in range(200):
        spread, k, mass = draw.choice([0.1, 2.0, 8.0]), draw.choice([1, 3, 6]), draw.choice([1e-9, 0.3, 0.7, 0.99])
        logits_1V = torch.tensor([[draw.gauss(0, spread) for _ in range(8)]])
        candidates = top_candidates(logits_1V, k, scorable=6)
        temperature_1 = torch.tensor([temperature])
        of_all = reference_mass(logits_1V, candidates, temperature_1)
        narrowed, left = likeliest(candidates, of_all, torch.tensor([mass]))
        probabilities = (logits_1V[0].double() / (temperature or 1.0)).softmax(-1)
        ranked = sorted(range(6), key=lambda token: -float(logits_1V[0, token]))[:k]
        masses = [Fraction(float(probabilities[token])) for token in ranked]
        count = fewest(masses, Fraction(mass))
        assert narrowed.token_ids_BK[0, narrowed.valid_BK[0]].tolist() == ranked[:count]
        # What is left is what the narrowed candidates themselves have.
        expected = reference_mass(logits_1V, narrowed, temperature_1)
        torch.testing.assert_close(left.candidates_BK, expected.candidates_BK)
        torch.testing.assert_close(left.rest_B1, expected.rest_B1, rtol=1e-5, atol=1e-5)
        counts.add((k, count))
    assert {(6, 1), (6, 6), (3, 2), (1, 1)} < counts


def test_infinite_mass_is_never_enough_and_rows_without_a_candidate_have_none() -> None:
    """Sums of rounded masses may be above 1."""
    mass_BK = torch.tensor([[0.6, 0.4 + 1e-6, 1e-7], [0.5, 0.0, 0.0], [0.0, 0.0, 0.0]]).double()
    valid_BK = mass_BK > 0
    mass = ReferenceMass(mass_BK.log(), torch.full((3, 1), -torch.inf).double())
    candidates = Candidates(torch.arange(3).expand(3, 3), valid_BK)
    narrowed, _ = likeliest(candidates, mass, torch.full((3,), torch.inf))
    assert torch.equal(narrowed.valid_BK, valid_BK)
    narrowed, left = likeliest(candidates, mass, torch.full((3,), 0.9))
    assert narrowed.valid_BK.sum(-1).tolist() == [2, 1, 0]
    assert left.rest_B1.exp().squeeze(-1).tolist() == [0.0, 0.5, 1.0]


def test_mass_that_is_just_held_is_enough() -> None:
    mass = ReferenceMass(torch.tensor([[0.5, 0.25, 0.25]]).double().log(), torch.full((1, 1), -torch.inf).double())
    candidates = Candidates(torch.arange(3).unsqueeze(0), torch.ones(1, 3, dtype=torch.bool))
    narrowed, _ = likeliest(candidates, mass, torch.tensor([0.5]))
    assert narrowed.valid_BK.tolist() == [[True, False, False]]


# A batch without vLLM, on the real value engine.


class Serving(RunningBatch):
    """One version in a batch; a step draws the likeliest token of every row."""

    def __init__(
        self,
        directory: Path,
        type_: str = "v",
        distribution: ReturnDistribution | None = None,
        architecture: str = "llama",
        *,
        speculates: bool = False,
        kv_fraction: float = 1.0,
    ) -> None:
        super().__init__(SLOTS, speculates=speculates)
        self.directory = directory
        if not directory.exists():
            make_value_model(directory, type_, distribution or Bernoulli(), architecture, seed=1)
        self.version: ResidentVersion = make_residents(SLOTS, kv_fraction=kv_fraction).load_at_start(
            "value", str(directory)
        )
        self.rows: dict[int, tuple[GuidanceParams, float]] = {}
        for slot in range(SLOTS):
            self.add_unguided(slot, prompt(5, seed=slot))

    def put(self, slot: int, temperature: float = 1.0, **more: object) -> None:
        settings = {"eta": ETA, "top_k": TOP_K, "trace_id": str(slot)} | more
        request = self.add(slot, self.version, prompt(5, seed=slot), temperature=temperature, **settings)
        self.rows[slot] = request.params, temperature

    def expected(self, slot: int, logits_V: Tensor) -> Step:
        """Of its next step, by forwards of Hugging Face."""
        params, temperature = self.rows[slot]
        guided = Guided(
            self.directory, params.eta, params.top_k, params.method, None, params.candidate_mass, params.tail
        )
        (step,) = step_distributions(logits_V.double(), self.requests.tokens(slot), guided, temperature, TOKENS)
        return step

    def candidates(self, slot: int) -> float:
        """Of the steps until now, in the mean."""
        return self.summary(self.drawn(slot), str(slot))["candidates"]


@pytest.fixture
def serving(tmp_path: Path) -> Serving:
    return Serving(tmp_path / "value")


def logits(rows: int, seed: int, spread: float = 4.0) -> Tensor:
    """Of which a few tokens have most of the mass."""
    return spread * torch.randn(rows, REFERENCE_VOCAB, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("type_", ["v", "q"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("distribution", [Bernoulli(), Categorical(0.2, 1.2, 11)], ids=["bernoulli", "categorical"])
def test_each_row_is_guided_by_the_candidates_that_hold_its_mass_and_runs_no_others(
    tmp_path: Path, distribution: ReturnDistribution, architecture: str, type_: str
) -> None:
    """Both methods, both tails, temperatures, and masses share a forward."""
    serving = Serving(tmp_path / "value", type_, distribution, architecture)
    settings = [(0.6, 0.9, 20), (1.0, 0.5, 20), (0.0, 0.8, 20), (1.0, 1.0, 64), (0.8, 0.99, 5), (1.0, 1e-9, 20)]
    for slot, (temperature, mass, top_k) in enumerate(settings):
        more = {"method": ("qsharp", "cd")[slot % 2], "tail": ("mean", "floor")[slot // 2 % 2]}
        serving.put(slot, temperature, candidate_mass=mass, top_k=top_k, **more)
    run = count_tokens(serving.version) if architecture == "gpt2" else None
    counts: dict[int, list[int]] = {slot: [] for slot in serving.rows}
    for number in range(12):
        logits_BV = logits(len(settings), seed=number)
        expected = [serving.expected(slot, logits_BV[slot]) for slot in serving.rows]
        if run is not None:
            run.clear()
        guided_BV = serving.draw(logits_BV)
        for slot, step in enumerate(expected):
            got_V = (guided_BV[slot].double() / (settings[slot][0] or 1.0)).softmax(-1)
            torch.testing.assert_close(got_V, step.log_probs_V.exp(), rtol=1e-4, atol=1e-5)
            assert step.candidates is not None
            counts[slot].append(step.candidates)
        if number and run is not None:
            run_candidates = sum(step.candidates or 0 for step in expected) if type_ == "v" else 0
            assert run == [len(settings) + run_candidates]
    assert len(set(counts[0])) > 2, "the same for all steps would be no test"
    assert set(counts[3]) == {64}
    assert 0 in counts[0], "sure steps score none with the tail mean"
    assert set(counts[5]) == {0}
    assert min(counts[2]) == 1, "one with the tail floor"
    for slot, of_steps in counts.items():
        assert serving.candidates(slot) == pytest.approx(sum(of_steps) / len(of_steps))


def test_a_row_is_scored_as_it_would_be_alone(serving: Serving, tmp_path: Path) -> None:
    """Whatever the rows beside it need: another top-k, another mass, all."""
    alone = Serving(tmp_path / "value")
    alone.put(2, candidate_mass=0.9)
    others = [{"candidate_mass": 0.5, "top_k": 40}, {}, {"candidate_mass": 0.9}, {"candidate_mass": 0.1, "top_k": 3}]
    for slot, more in enumerate(others):
        serving.put(slot, **more)
    for number in range(8):
        logits_BV = logits(4, seed=number)
        guided_BV, expected_BV = serving.draw(logits_BV), alone.draw(logits_BV)
        torch.testing.assert_close(guided_BV[2], expected_BV[2], rtol=1e-5, atol=1e-5)
        assert torch.equal(expected_BV[0], logits_BV[0])
    assert serving.candidates(2) == alone.candidates(2) < TOP_K
    assert serving.candidates(1) == TOP_K


def test_a_row_that_takes_all_candidates_does_so_beside_one_that_does_not(serving: Serving) -> None:
    """Rounded, its likeliest may hold more than 1."""
    for slot in range(SLOTS - 1):
        serving.put(slot)
    serving.put(SLOTS - 1, candidate_mass=0.9)
    for number in range(12):
        serving.draw(logits(SLOTS, seed=number, spread=30.0))
    assert [serving.candidates(slot) for slot in range(SLOTS - 1)] == [TOP_K] * (SLOTS - 1)


@pytest.mark.parametrize("type_", ["q", "v"])
@pytest.mark.parametrize("kv_fraction", [1.0, 0.5], ids=["one piece", "pages"])
def test_a_draft_that_is_no_number_fails_a_row_that_scores_nothing(
    tmp_path: Path, type_: str, kv_fraction: float
) -> None:
    """It is cached as zeros, and the rows after it couldn't tell."""
    directory = make_value_model(tmp_path / "value", type_, Bernoulli(), "gpt2", seed=1)
    poison(directory, token=POISON)
    serving = Serving(directory, speculates=True, kv_fraction=kv_fraction)
    serving.put(0, candidate_mass=0.9)
    logits_RV = logits(3, seed=1)
    logits_RV[1] = torch.nn.functional.one_hot(torch.tensor(4), REFERENCE_VOCAB) * 90.0
    serving.guide([0], logits_RV, {0: [POISON, 4]})
    serving.requests.commit(0, [POISON, 4, 5])
    serving.batch.look_for_failures()
    assert list(serving.records.failures()) == ["0"]


def test_masked_candidates_are_neither_scored_nor_counted(tmp_path: Path) -> None:
    serving = Serving(tmp_path / "value", architecture="gpt2")
    serving.put(0, candidate_mass=0.99)
    serving.put(1)
    logits_BV = logits(2, seed=3, spread=0.5)
    allowed = torch.arange(2, 32, 6)
    masked_BV = torch.full_like(logits_BV, -torch.inf).index_copy(1, allowed, logits_BV[:, allowed])
    masked_BV[:, 1] = torch.nan
    run = count_tokens(serving.version)
    guided_BV = serving.draw(masked_BV)
    assert torch.equal(guided_BV.isneginf(), masked_BV.isneginf())
    assert torch.equal(guided_BV.isnan(), masked_BV.isnan())
    assert serving.candidates(0) == serving.candidates(1) == len(allowed)
    prompts = 2 * 5
    assert sum(run) == prompts + 2 * len(allowed)


def test_a_nan_ends_its_row_if_it_is_scored_and_no_other(tmp_path: Path) -> None:
    """The value of one candidate is NaN; its rank decides whether that is seen."""
    directory = make_value_model(tmp_path / "value", "v", Bernoulli(), "gpt2", seed=1)
    poison(directory, token=50)
    serving = Serving(directory)
    for slot in range(4):
        serving.put(slot, candidate_mass=0.5)
    logits_BV = torch.zeros(4, REFERENCE_VOCAB)
    for row, rank in enumerate([0, 1, 5, 0]):
        logits_BV[row, [*range(rank), 50, *range(rank, TOP_K - 1)]] = 20 - 0.5 * torch.arange(TOP_K)
    logits_BV[3, 50] = 60.0
    guided_BV = serving.draw(logits_BV)
    assert [bool(row.softmax(-1)[17] == 1) for row in guided_BV] == [True, True, False, False]
    assert torch.equal(guided_BV[3], logits_BV[3]), "sure of it, the reference is left as it is"
    assert serving.records.failures() == {}, "the host doesn't know yet"
    failures = ["kind" in serving.outcome([17], str(slot)) for slot in range(4)]
    assert failures == [True, True, False, False]


def test_with_drafts_no_row_of_others_is_scored(tmp_path: Path) -> None:
    serving = Serving(tmp_path / "value", architecture="gpt2", speculates=True)
    serving.put(0, candidate_mass=0.9)
    serving.put(1, top_k=5)
    serving.step({slot: [5] for slot in range(4)})
    run = count_tokens(serving.version)
    positions = [serving.requests.total_lens[slot] - 1 + row for slot in range(4) for row in range(3)]
    drafts = {slot: [5, 6] for slot in range(4)}
    serving.step({slot: [5, 6, 7] for slot in range(4)}, drafts)
    counts = [serving.summary([5, 5, 6, 7], str(slot))["candidates"] * 4 for slot in range(2)]
    first = [serving.summary([5], str(slot))["candidates"] for slot in range(2)]
    assert run == [len(positions) + sum(counts) - sum(first)]
    assert counts[1] == 4 * 5


def test_with_drafts_rows_of_others_and_past_the_guided_tokens_stay_as_they_are(tmp_path: Path) -> None:
    serving = Serving(tmp_path / "value", speculates=True)
    serving.put(0, guided_tokens=2)
    logits_RV = logits(6, seed=1)
    guided_RV = serving.guide([0, 1], logits_RV.clone(), {0: [5, 6], 1: [5, 6]})
    stayed = [torch.equal(guided_V, logits_V) for guided_V, logits_V in zip(guided_RV, logits_RV, strict=True)]
    assert stayed == [False, False, True, True, True, True]


def test_a_q_type_has_the_same_candidates(tmp_path: Path) -> None:
    counts: dict[str, Callable[[int], float]] = {}
    for type_ in ("q", "v"):
        serving = Serving(tmp_path / type_, type_)
        for slot in range(3):
            serving.put(slot, candidate_mass=(0.3, 0.7, 0.9)[slot], tail="floor")
        for number in range(3):
            guided_BV = serving.guide(range(3), logits(3, seed=number))
            assert guided_BV.isfinite().all()
            for slot in range(3):
                serving.requests.commit(slot, [number])
        counts[type_] = serving.candidates
    assert [counts["q"](slot) for slot in range(3)] == [counts["v"](slot) for slot in range(3)]


def test_on_a_gpu_nothing_is_asked_of_the_device_without_a_mass(tmp_path: Path) -> None:
    """A device that has no numbers stands for one that is busy."""
    serving = Serving(tmp_path / "value")
    top_ks = [5, 64, 20]
    requests = [serving.add(slot, serving.version, prompt(5, seed=slot), top_k=k) for slot, k in enumerate(top_ks)]
    rows = torch.zeros(3, len(RowSettings._fields), dtype=torch.float64)
    settings = StepSettings.of(rows, Asked.by(request.params for request in requests))
    is_scored_GK = torch.empty(3, 40, dtype=torch.bool, device="meta")
    counts_G = run_counts(requests, settings, is_scored_GK, has_drafts=False)
    assert counts_G is not None
    assert counts_G.tolist() == [5, 40, 20]
    assert run_counts(requests, settings, is_scored_GK, has_drafts=True) is None
    same = StepSettings.of(rows, Asked.by([requests[0].params] * 3))
    assert run_counts([requests[0]] * 3, same, is_scored_GK, has_drafts=False) is None
