"""The tilt against its formula written out token by token with Python floats."""

import math
from decimal import Decimal, localcontext
from typing import NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qtilt.distributions import Bernoulli, Categorical
from qtilt.params import MIN_ETA, GuidanceParams
from qtilt.tilt import (
    TAILS,
    Candidates,
    Divergence,
    Drops,
    divergence,
    drops,
    lowest_offset,
    offsets,
    reference_mass,
    tilt_,
    top_candidates,
)

pytestmark = pytest.mark.usefixtures("implementation")

INF = float("inf")


def tilt(logits_BV, candidates, offsets_BK, floor_B, temperature_B, tail="floor"):
    dropped = drops_of(logits_BV, candidates, offsets_BK, floor_B, temperature_B, tail)
    return tilt_by_drops(logits_BV, candidates, dropped, temperature_B)


def tilt_by_drops(logits_BV, candidates, dropped, temperature_B):
    tilted_BV = logits_BV.clone()
    tilt_(tilted_BV, candidates, dropped, temperature_B)
    return tilted_BV


def measured(logits_BV, candidates, offsets_BK, floor_B, temperature_B, tail="floor") -> Divergence:
    dropped = drops_of(logits_BV, candidates, offsets_BK, floor_B, temperature_B, tail)
    return Divergence(*divergence(reference_mass(logits_BV, candidates, temperature_B), dropped).unbind(-1))


def kl_divergence(*arguments):
    return measured(*arguments).kl_B


def drops_of(logits_BV, candidates, offsets_BK, floor_B, temperature_B, tail) -> Drops:
    mass = reference_mass(logits_BV, candidates, temperature_B)
    return drops(mass, candidates.valid_BK, offsets_BK, floor_B, tail)


def softmax(logits: list[float]) -> list[float]:
    largest = max(logits)
    weights = [math.exp(x - largest) for x in logits]
    return [w / sum(weights) for w in weights]


class Expected(NamedTuple):
    """A row of guidance written out; the lists are over the vocabulary."""

    guided: list[float]
    reference: list[float]
    kl: float
    kl_candidates: float
    mass: float


def expected_row(logits: list[float], q_over_eta: dict[int, float], floor: float, temperature: float, tail: str):
    """softmax(logits/T + Q/η), candidates with their own Q/η, all others with what the tail says; T = 0 as T = 1."""
    scaled = [x / (temperature or 1.0) if math.isfinite(x) else -INF for x in logits]
    reference = softmax(scaled) if max(scaled) > -INF else [0.0] * len(scaled)
    mass = sum(reference[token] for token in q_over_eta)
    largest = max(q_over_eta.values(), default=0.0)
    weight = sum(reference[token] * math.exp(offset - largest) for token, offset in q_over_eta.items())
    if tail == "mean" and mass > 0:
        floor = largest + math.log(weight / mass)
    elif tail == "mean":
        floor = largest
    tilted = [x + q_over_eta.get(token, floor) for token, x in enumerate(scaled)]
    guided = softmax(tilted) if max(tilted) > -INF else reference
    among = list(q_over_eta)
    return Expected(guided, reference, kl_of(guided, reference), kl_given(among, guided, reference), mass)


def kl_of(of: list[float], to: list[float]) -> float:
    return sum(p * math.log(p / q) for p, q in zip(of, to, strict=True) if p > 0)


def kl_given(among: list[int], of: list[float], to: list[float]) -> float:
    of_mass, to_mass = sum(of[token] for token in among), sum(to[token] for token in among)
    if of_mass == 0 or to_mass == 0:
        return 0.0
    return kl_of([of[token] / of_mass for token in among], [to[token] / to_mass for token in among])


def candidates_of(token_ids: list[list[int]]) -> Candidates:
    token_ids_BK = torch.tensor(token_ids)
    return Candidates(token_ids_BK, torch.ones_like(token_ids_BK, dtype=torch.bool))


@pytest.mark.parametrize("temperature", [0.0, 0.3, 1.0, 1.7])
@pytest.mark.parametrize("inv_eta", [0.5, 10.0, 1000.0])
@pytest.mark.parametrize("method", ["qsharp", "cd"])
@pytest.mark.parametrize("distribution", [Bernoulli(), Categorical(-1.0, 2.0, 7)], ids=["bernoulli", "categorical"])
def test_tilted_probabilities_and_divergences_equal_the_formula(distribution, method, inv_eta, temperature):
    torch.manual_seed(1)
    logits_BV = torch.randn(3, 12) * 3
    value_logits_BKA = torch.randn(3, 5, distribution.num_logits) * 4
    candidates = top_candidates(logits_BV, 5, scorable=12)
    inv_eta_B = torch.full((3,), inv_eta, dtype=torch.float64)
    temperature_B = torch.full((3,), temperature)
    offsets_BK = offsets(distribution, value_logits_BKA, inv_eta_B, method)
    arguments = logits_BV, candidates, offsets_BK, lowest_offset(distribution, inv_eta_B), temperature_B
    scale = temperature or 1.0
    for tail in TAILS:
        got_BV = (tilt(*arguments, tail) / scale).softmax(-1)
        divergences = measured(*arguments, tail)
        for row in range(3):
            q_over_eta = {}
            for token, value_logits in zip(candidates.token_ids_BK[row].tolist(), value_logits_BKA[row], strict=True):
                q_over_eta[token] = brute_force_offset(distribution, value_logits.tolist(), inv_eta, method)
            logits, floor = logits_BV[row].tolist(), distribution.v_min * inv_eta
            expected = expected_row(logits, q_over_eta, floor, temperature, tail)
            assert got_BV[row].tolist() == pytest.approx(expected.guided, abs=1e-6)
            assert divergences.kl_B[row].item() == pytest.approx(expected.kl, abs=1e-5)
            assert divergences.kl_candidates_B[row].item() == pytest.approx(expected.kl_candidates, abs=1e-5)
            assert divergences.mass_B[row].item() == pytest.approx(expected.mass, abs=1e-6)


def brute_force_offset(distribution, value_logits: list[float], inv_eta: float, method: str) -> float:
    if isinstance(distribution, Bernoulli):
        pmf, values = softmax([0.0, value_logits[0]]), [0.0, 1.0]
    else:
        step = (distribution.high - distribution.low) / (distribution.atoms - 1)
        pmf, values = softmax(value_logits), [distribution.low + i * step for i in range(distribution.atoms)]
    if method == "cd":
        return sum(p * v for p, v in zip(pmf, values, strict=True)) * inv_eta
    largest = max(values)
    return largest * inv_eta + math.log(
        sum(p * math.exp((v - largest) * inv_eta) for p, v in zip(pmf, values, strict=True))
    )


def test_small_differences_between_huge_offsets_survive():
    """1/η = 1000: two candidates whose offsets differ by a thousandth of a nat keep that difference."""
    logits_BV = torch.zeros(1, 2)
    offsets_BK = torch.tensor([[1000.0, 999.999]], dtype=torch.float64)
    tilted_BV = tilt(logits_BV, candidates_of([[0, 1]]), offsets_BK, torch.zeros(1), torch.ones(1))
    assert (tilted_BV[0, 0] - tilted_BV[0, 1]).item() == pytest.approx(1e-3, rel=1e-4)


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_equal_offsets_over_the_whole_vocabulary_change_no_bit(temperature):
    logits_BV = torch.randn(2, 9)
    candidates = top_candidates(logits_BV, 9, scorable=9)
    offsets_BK, temperature_B = torch.full((2, 9), 7.3), torch.full((2,), temperature)
    assert torch.equal(tilt(logits_BV, candidates, offsets_BK, torch.zeros(2), temperature_B), logits_BV)
    kl_B = kl_divergence(logits_BV, candidates, offsets_BK, torch.zeros(2), temperature_B)
    assert kl_B.tolist() == pytest.approx([0.0, 0.0], abs=1e-6)


def test_offsets_at_the_floor_change_no_bit_even_for_few_candidates():
    logits_BV = torch.randn(2, 9)
    candidates = top_candidates(logits_BV, 3, scorable=9)
    floor_B = torch.full((2,), -4.0)
    assert torch.equal(tilt(logits_BV, candidates, torch.full((2, 3), -4.0), floor_B, torch.ones(2)), logits_BV)


def test_masked_and_nan_logits_are_never_candidates_and_never_come_back():
    logits_BV = torch.tensor([[0.0, -INF, 1.0, float("nan"), 2.0]])
    candidates = top_candidates(logits_BV, 5, scorable=5)
    assert candidates.token_ids_BK[candidates.valid_BK].tolist() == [4, 2, 0]
    assert top_candidates(logits_BV, 2, scorable=5).token_ids_BK.tolist() == [[4, 2]]
    arguments = (candidates, torch.full((1, 5), 3.0), torch.zeros(1), torch.ones(1))
    tilted_BV = tilt(logits_BV, *arguments)
    assert tilted_BV[0, 1].item() == -INF
    assert tilted_BV[0, 3].isnan()
    assert kl_divergence(logits_BV, *arguments).item() == pytest.approx(0.0, abs=1e-6)


def test_a_row_with_one_allowed_token_has_no_kl():
    logits_BV = torch.tensor([[-INF, 0.5, -INF]])
    candidates = top_candidates(logits_BV, 2, scorable=3)
    arguments = (candidates, torch.tensor([[9.0, 9.0]]), torch.zeros(1), torch.ones(1))
    assert tilt(logits_BV, *arguments).softmax(-1).tolist() == [[0.0, 1.0, 0.0]]
    assert kl_divergence(logits_BV, *arguments).item() == 0.0


@pytest.mark.parametrize("absent", [-INF, float("nan")])
def test_a_row_without_any_token_has_no_kl_and_stays_as_it_is(absent):
    logits_BV = torch.full((1, 3), absent)
    candidates = top_candidates(logits_BV, 2, scorable=3)
    assert not candidates.valid_BK.any()
    arguments = (candidates, torch.tensor([[9.0, 1.0]]), torch.zeros(1), torch.ones(1))
    torch.testing.assert_close(tilt(logits_BV, *arguments), logits_BV, equal_nan=True)
    assert kl_divergence(logits_BV, *arguments).item() == 0.0


@pytest.mark.parametrize("method", ["qsharp", "cd"])
@pytest.mark.parametrize("eta", [1e-9, 1e-8])
def test_the_smallest_eta_is_the_best_value_with_a_finite_kl(eta, method):
    """Beyond float32's range the losers' mass is 0, which adds nothing to the KL."""
    inv_eta_B = torch.tensor([GuidanceParams("v", 1, eta, 3).inv_eta], dtype=torch.float64)
    logits_BV, temperature_B = torch.tensor([[2.0, 1.0, 0.0, -1.0]]), torch.tensor([0.7])
    candidates, value_logits_BKA = top_candidates(logits_BV, 3, scorable=4), torch.tensor([[[-9.0], [3.0], [-9.0]]])
    distribution = Bernoulli() if method == "cd" else Categorical(0.0, 2.0, 2)
    if method == "qsharp":  # only one candidate may win anything at all
        value_logits_BKA = torch.tensor([[[0.0, -torch.inf], [0.0, -5.0], [0.0, -torch.inf]]])
    offsets_BK = offsets(distribution, value_logits_BKA, inv_eta_B, method)
    arguments = (candidates, offsets_BK, lowest_offset(distribution, inv_eta_B), temperature_B)
    assert tilt(logits_BV, *arguments).softmax(-1).tolist() == [[0.0, 1.0, 0.0, 0.0]]
    expected = -math.log(softmax([x / 0.7 for x in logits_BV[0].tolist()])[1])
    assert kl_divergence(logits_BV, *arguments).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("eta", [1e-3, 1e-6, 1e-9])
@pytest.mark.parametrize("distribution", [Bernoulli(), Categorical(-1.0, 2.0, 2)], ids=["bernoulli", "categorical"])
def test_as_eta_vanishes_candidates_keep_the_odds_of_the_highest_return(distribution, eta, tail):
    """π ∝ π_ref · P(Z = v_max), the limit that tells Q♯ from CD (Fig. 4), is reached and never lost to rounding."""
    inv_eta_B = torch.tensor([GuidanceParams("v", 1, eta, 3).inv_eta], dtype=torch.float64)
    logits_BV, win_K = torch.tensor([[2.0, 1.0, 0.0, -1.0]]), torch.tensor([-3.0, 3.0, 0.0])
    value_logits_KA = win_K.unsqueeze(-1)
    if distribution.num_logits == 2:
        value_logits_KA = torch.stack([torch.zeros(3), win_K], dim=-1)
    candidates = top_candidates(logits_BV, 3, scorable=4)
    offsets_BK = offsets(distribution, value_logits_KA.unsqueeze(0), inv_eta_B, "qsharp")
    floor_B = lowest_offset(distribution, inv_eta_B)
    got_V = tilt(logits_BV, candidates, offsets_BK, floor_B, torch.ones(1), tail)[0].softmax(-1)
    odds = softmax([logit + win.sigmoid().log().item() for logit, win in zip([2, 1, 0], win_K, strict=True)])
    given_a_candidate = got_V[:3] / got_V[:3].sum()
    assert given_a_candidate.tolist() == pytest.approx(odds, rel=1e-5)


@st.composite
def value_logits(draw):
    """A return distribution, and the logits of three candidates' returns."""
    distribution = draw(st.sampled_from([Bernoulli(), Categorical(0.0, 1.0, 5), Categorical(-3.0, 40.0, 3)]))
    one = st.lists(st.floats(-30, 30, width=32), min_size=distribution.num_logits, max_size=distribution.num_logits)
    alike = draw(one)
    return distribution, [draw(st.one_of(one, st.just(alike))) for _ in range(3)]


def exact_offset(distribution, logits: list[float], eta: float, method: str) -> Decimal:
    """Less v_max/η, in 60 digits."""
    logits = [0.0, *logits] if isinstance(distribution, Bernoulli) else logits
    weights = [Decimal(logit).exp() for logit in logits]
    last = len(weights) - 1
    width = Decimal(distribution.v_max) - Decimal(distribution.v_min)
    below = [width * (last - atom) / last for atom in range(len(weights))]
    probabilities = [weight / sum(weights) for weight in weights]
    if method == "cd":
        return -sum(p * drop for p, drop in zip(probabilities, below, strict=True)) / Decimal(eta)
    return sum(p * (-drop / Decimal(eta)).exp() for p, drop in zip(probabilities, below, strict=True)).ln()


@pytest.mark.parametrize("method", ["qsharp", "cd"])
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    values=value_logits(),
    eta=st.one_of(
        st.sampled_from([MIN_ETA, 1e-6, 1.0, 1e30, 1.7976931348623157e308]),
        st.floats(-9, 308).map(lambda exponent: 10.0**exponent),
        st.floats(-4, 3).map(lambda exponent: 10.0**exponent),
    ),
)
def test_whatever_eta_is_accepted_candidates_are_guided_by_it(method, values, eta):
    distribution, value_logits_KA = values
    logits = [2.0, 1.0, 0.0, -1.0]
    with localcontext(prec=60):
        exact = [exact_offset(distribution, each, eta, method) for each in value_logits_KA]
        weights = [(Decimal(logit) + (offset - max(exact))).exp() for logit, offset in zip(logits, exact, strict=False)]
        expected = [float(weight / sum(weights)) for weight in weights]
    logits_BV, candidates = torch.tensor([logits]), candidates_of([[0, 1, 2]])
    inv_eta_B = torch.tensor([GuidanceParams("v", 1, eta, 3).inv_eta], dtype=torch.float64)
    offsets_BK = offsets(distribution, torch.tensor([value_logits_KA]), inv_eta_B, method)
    floor_B = lowest_offset(distribution, inv_eta_B)
    for tail in TAILS:
        arguments = logits_BV, candidates, offsets_BK, floor_B, torch.ones(1), tail
        got_V = tilt(*arguments)[0].double().softmax(-1)
        assert (got_V[:3] / got_V[:3].sum()).tolist() == pytest.approx(expected, abs=2e-5)
        assert all(math.isfinite(column.item()) for column in measured(*arguments))


def test_the_kl_given_a_candidate_is_exact_where_the_candidates_have_hardly_any_mass():
    """A token that can't be scored leads by more than e^x can say."""
    logits_BV, temperature_B = torch.tensor([[20.0, 19.0, 30.0]]), torch.tensor([0.01])
    candidates = top_candidates(logits_BV, 2, scorable=2)
    offsets_BK, floor_B = torch.tensor([[-100.0, 0.0]], dtype=torch.float64), torch.tensor([-2000.0])
    for tail in TAILS:
        # Reference 1 and e^-100 given a candidate, guided ½ and ½.
        got = measured(logits_BV, candidates, offsets_BK, floor_B, temperature_B, tail)
        assert got.kl_candidates_B.item() == pytest.approx(50 - math.log(2), rel=1e-5)
        assert got.mass_B.item() == 0


@pytest.mark.parametrize("inv_eta", [1.0, 40.0, 1000.0])
def test_the_kl_is_exact_where_little_mass_is_scored(inv_eta: float):
    """Unlikely candidates, nearly all mass in the rest: nothing is lost in what remains of 1."""
    torch.manual_seed(2)
    logits_BV = torch.randn(50, 400) * torch.linspace(0.1, 8, 50).unsqueeze(-1)
    ranked_BV = logits_BV.argsort(-1, descending=True)
    candidates = Candidates(ranked_BV[:, 40:60], torch.ones(50, 20, dtype=torch.bool))
    offsets_BK, floor_B = torch.rand(50, 20, dtype=torch.float64) * inv_eta, torch.zeros(50)
    kl_B = kl_divergence(logits_BV, candidates, offsets_BK, floor_B, torch.ones(50))
    shift_BV = torch.zeros(50, 400, dtype=torch.float64).scatter(-1, candidates.token_ids_BK, offsets_BK)
    log_reference_BV = logits_BV.double().log_softmax(-1)
    log_guided_BV = (log_reference_BV + shift_BV).log_softmax(-1)
    expected_B = (log_guided_BV.exp() * (log_guided_BV - log_reference_BV)).sum(-1)
    torch.testing.assert_close(kl_B, expected_B, rtol=1e-5, atol=1e-6)


def test_padding_rows_beyond_the_scorable_vocabulary_are_never_scored():
    logits_BV = torch.tensor([[0.0, 1.0, 9.0, 8.0]])
    assert top_candidates(logits_BV, 4, scorable=2).token_ids_BK.tolist() == [[1, 0]]


def test_a_row_may_ask_for_fewer_candidates_than_the_batch():
    candidates = top_candidates(torch.randn(2, 8), 5, scorable=8, top_k_B=torch.tensor([2, 5]))
    assert candidates.valid_BK.sum(-1).tolist() == [2, 5]


def test_an_unscored_token_gets_the_offset_of_the_lowest_return():
    logits_BV, inv_eta = torch.zeros(1, 3), 2.0
    floor_B = torch.tensor([-1.0 * inv_eta])
    tilted_BV = tilt(logits_BV, candidates_of([[0]]), torch.tensor([[3.0]]), floor_B, torch.ones(1))
    difference = tilted_BV[0, 0] - tilted_BV[0, 1]
    assert difference.item() == pytest.approx(3.0 + 2.0)


CONSTANTS = [0.0, -3.7, 0.1, 12.5, 1e-9, 1e4, 7e29, -1e30]


@pytest.mark.parametrize("top_k", [1, 2, 7, 30, 40])
@pytest.mark.parametrize("constant", CONSTANTS)
def test_a_constant_value_tilts_nothing_with_the_tail_mean_bit_for_bit(constant, top_k):
    """Masked, NaN and −0 logits, rows without a token or a candidate, a vocabulary of which only a part is scorable."""
    torch.manual_seed(3)
    logits_BV = torch.randn(40, 40) * torch.logspace(-6, 2, 40).unsqueeze(-1)
    logits_BV[torch.rand(40, 40) < 0.2] = -INF
    logits_BV[torch.rand(40, 40) < 0.1] = float("nan")
    logits_BV[torch.rand(40, 40) < 0.1] = -0.0
    logits_BV[0] = -INF
    logits_BV[1] = float("nan")
    logits_BV[2, :30] = -INF
    candidates = top_candidates(logits_BV, top_k, scorable=30)
    offsets_BK = torch.full(candidates.valid_BK.shape, constant, dtype=torch.float64)
    temperature_B = torch.linspace(0, 3, 40)
    arguments = (logits_BV, candidates, offsets_BK, torch.full((40,), constant - 1.0), temperature_B, "mean")
    assert torch.equal(tilt(*arguments).view(torch.int32), logits_BV.view(torch.int32))
    divergences = measured(*arguments)
    assert divergences.kl_B.tolist() == pytest.approx([0.0] * 40, abs=1e-6)
    assert divergences.kl_candidates_B.tolist() == pytest.approx([0.0] * 40, abs=1e-12)


def test_candidates_without_a_score_get_what_the_other_tokens_get():
    logits_BV, offsets_BK = torch.zeros(1, 6), torch.tensor([[2.0, 1.0, float("nan"), float("nan")]])
    candidates = candidates_of([[0, 1, 2, 3]])
    scored_BK = torch.tensor([[True, True, False, False]])
    mass = reference_mass(logits_BV, candidates, torch.ones(1))
    for tail, others in (("floor", -3.0), ("mean", math.log((math.exp(2) + math.exp(1)) / 2))):
        dropped = drops(mass, scored_BK, offsets_BK, torch.tensor([-3.0]), tail)
        assert dropped.others_B1.item() == pytest.approx(2 - others)
        assert dropped.candidates_BK[0].tolist() == pytest.approx([0, 1, 2 - others, 2 - others])
        tilted_V = tilt_by_drops(logits_BV, candidates, dropped, torch.ones(1))[0]
        assert tilted_V.tolist() == pytest.approx([0, -1] + [others - 2] * 4)
        divergences = Divergence(*divergence(mass, dropped).unbind(-1))
        guided, reference = tilted_V.softmax(-1).tolist(), [1 / 6] * 6
        assert divergences.mass_B.item() == pytest.approx(4 / 6), "scored or not"
        assert divergences.kl_candidates_B.item() == pytest.approx(kl_given([0, 1, 2, 3], guided, reference))


def test_the_mean_survives_a_huge_inverse_eta():
    """Nothing but the best candidate matters: it takes the mass of all, and the others keep theirs."""
    logits_BV = torch.tensor([[3.0, 2.0, 1.0, 0.0, 4.0]])
    candidates, offsets_BK = candidates_of([[0, 1, 2]]), torch.tensor([[-3e29, 0.3e30, 0.2e30]], dtype=torch.float64)
    arguments = (logits_BV, candidates, offsets_BK, torch.full((1,), -1e30), torch.ones(1), "mean")
    reference = softmax(logits_BV[0].tolist())
    expected = [0.0, sum(reference[:3]), 0.0, *reference[3:]]
    assert tilt(*arguments).softmax(-1)[0].tolist() == pytest.approx(expected, abs=1e-7)
    kl = math.log(sum(reference[:3]) / reference[1])
    divergences = measured(*arguments)
    assert divergences.kl_candidates_B.item() == pytest.approx(kl, rel=1e-6)
    assert divergences.kl_B.item() == pytest.approx(sum(reference[:3]) * kl, rel=1e-6)


def test_the_smallest_mean_survives_where_the_best_candidate_has_hardly_any_mass():
    """e^o of the best counts in the mean however little mass it has; a difference of sums would lose it."""
    logits_BV = torch.tensor([[0.0, -60.0, 1.0]])
    offsets_BK = torch.tensor([[-500.0, 0.0]], dtype=torch.float64)
    dropped = drops_of(logits_BV, candidates_of([[0, 1]]), offsets_BK, torch.full((1,), -1e3), torch.ones(1), "mean")
    assert dropped.others_B1.item() == pytest.approx(60.0, abs=1e-4)


def in_two(counted: list[int], others: list[int], distribution: list[float]) -> list[float]:
    return [sum(distribution[token] for token in some) for some in (counted, others)]


@st.composite
def rows(draw):
    """Logits with masks, candidates of which some don't count, their offsets, and a temperature."""
    vocabulary = draw(st.integers(2, 9))
    scorable = draw(st.integers(1, vocabulary))
    number = st.floats(-30, 30, width=32)
    masked = st.sampled_from([-INF, float("nan")])
    logits = draw(st.lists(st.one_of(number, number, number, masked), min_size=vocabulary, max_size=vocabulary))
    top_k = draw(st.integers(1, vocabulary))
    inv_eta = draw(st.sampled_from([1e-3, 1.0, 20.0, 1e3]))
    values = draw(st.lists(st.floats(-1, 1), min_size=top_k, max_size=top_k))
    temperature = draw(st.sampled_from([0.0, 0.2, 0.8, 1.0, 3.0]))
    return logits, scorable, top_k, [value * inv_eta for value in values], -inv_eta, temperature


@pytest.mark.parametrize("tail", ["floor", "mean"])
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(row=rows())
def test_any_row_equals_the_formula_and_the_parts_of_its_divergence_add_up(tail, row):
    logits, scorable, top_k, q, floor, temperature = row
    logits_BV = torch.tensor([logits])
    candidates = top_candidates(logits_BV, top_k, scorable)
    offsets_BK = torch.tensor([q[: candidates.valid_BK.shape[1]]], dtype=torch.float64)
    floor_B, temperature_B = torch.tensor([floor], dtype=torch.float64), torch.tensor([temperature])
    arguments = logits_BV, candidates, offsets_BK, floor_B, temperature_B, tail
    tilted_V = tilt(*arguments)[0]
    counted = candidates.token_ids_BK[0][candidates.valid_BK[0]].tolist()
    q_over_eta = dict(zip(counted, q, strict=False))
    expected = expected_row(logits, q_over_eta, floor, temperature, tail)
    assert [math.isfinite(x) for x in tilted_V.tolist()] == [math.isfinite(x) for x in logits]
    if any(map(math.isfinite, logits)):
        scaled_V = tilted_V.double().nan_to_num(nan=-INF, neginf=-INF) / (temperature or 1.0)
        # A drop of 1000 nats is rounded to 1e-4 in float32, and decides nothing.
        assert scaled_V.softmax(-1).tolist() == pytest.approx(expected.guided, abs=2e-5)
    kl, kl_candidates, mass = (column.item() for column in measured(*arguments))
    assert kl == pytest.approx(expected.kl, abs=1e-4, rel=1e-5)
    assert kl_candidates == pytest.approx(expected.kl_candidates, abs=1e-4, rel=1e-5)
    assert mass == pytest.approx(expected.mass, abs=1e-5)
    guided_mass = sum(expected.guided[token] for token in counted)
    others = [token for token in range(len(logits)) if token not in counted]
    of_the_tail = kl_of(*(in_two(counted, others, each) for each in (expected.guided, expected.reference)))
    assert kl == pytest.approx(of_the_tail + guided_mass * kl_candidates, abs=2e-4, rel=1e-4)
    if tail == "mean":
        assert guided_mass == pytest.approx(expected.mass)
        for token in others:
            assert expected.guided[token] == pytest.approx(expected.reference[token])
