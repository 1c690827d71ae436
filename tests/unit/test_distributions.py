"""Return distributions against their definitions: sums carried to 60 digits, finite differences, fitted frequencies."""

from decimal import Decimal, localcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qtilt.distributions import Bernoulli, Categorical, distribution_from_config

LOGIT = st.floats(-100, 100)
INV_ETA = st.floats(1e-3, 1000)


def exact_log_mgf(log_weights: list[float], values: list[float], inv_eta: float) -> float:
    """ln Σ p_i e^{v_i/η} with p = softmax(log_weights), to 60 digits."""
    with localcontext(prec=60):
        weights = [Decimal(w).exp() for w in log_weights]
        tilted = [w * (Decimal(v) * Decimal(inv_eta)).exp() for w, v in zip(weights, values, strict=True)]
        return float((sum(tilted) / sum(weights)).ln())


@settings(max_examples=200, deadline=None)
@given(logit=LOGIT, inv_eta=INV_ETA)
def test_bernoulli_log_mgf_is_exact_at_extremes(logit, inv_eta):
    expected = exact_log_mgf([0.0, logit], [0.0, 1.0], inv_eta)
    got = Bernoulli().log_mgf(torch.tensor([logit], dtype=torch.float64), inv_eta)
    assert got.item() == pytest.approx(expected, rel=1e-12, abs=1e-12)
    single = Bernoulli().log_mgf(torch.tensor([logit]), inv_eta)
    assert single.item() == pytest.approx(expected, rel=3e-7, abs=3e-5)


@settings(max_examples=300, deadline=None)
@given(logits=st.lists(LOGIT, min_size=2, max_size=11), log_inv_eta=st.floats(-3, 30), low=st.floats(-3, 0))
def test_what_is_left_beside_the_highest_return_is_exact_for_every_eta(logits, log_inv_eta, low):
    """Beside v_max/η = 1e20 the differences between tokens would be rounded off."""
    inv_eta, distribution = 10**log_inv_eta, Categorical(low, low + 1, len(logits))
    logits_A = torch.tensor(logits, dtype=torch.float64)
    below = [value - distribution.high for value in distribution.atom_values(logits_A).tolist()]
    expected = exact_log_mgf(logits, below, inv_eta)
    assert distribution.log_mgf_below_max(logits_A, inv_eta).item() == pytest.approx(expected, rel=1e-11, abs=1e-11)
    expected = exact_log_mgf([0.0, logits[0]], [-1.0, 0.0], inv_eta)
    got = Bernoulli().log_mgf_below_max(logits_A[:1], inv_eta).item()
    assert got == pytest.approx(expected, rel=1e-12, abs=1e-12)


@settings(max_examples=200, deadline=None)
@given(logits=st.lists(LOGIT, min_size=2, max_size=11), inv_eta=INV_ETA, low=st.floats(-3, 0), width=st.floats(0.1, 4))
def test_categorical_log_mgf_is_exact_at_extremes(logits, inv_eta, low, width):
    distribution = Categorical(low, low + width, len(logits))
    logits_A = torch.tensor(logits, dtype=torch.float64)
    expected = exact_log_mgf(logits, distribution.atom_values(logits_A).tolist(), inv_eta)
    assert distribution.log_mgf(logits_A, inv_eta).item() == pytest.approx(expected, rel=1e-12, abs=1e-11)
    single = distribution.log_mgf(logits_A.float(), inv_eta)
    assert single.item() == pytest.approx(expected, rel=1e-6, abs=1e-4)


@pytest.mark.parametrize("distribution", [Bernoulli(), Categorical(-1.0, 2.0, 5)])
def test_results_are_float32_and_finite_for_bfloat16_logits(distribution):
    logits = (torch.randn(64, distribution.num_logits) * 100).clamp(-100, 100).bfloat16()
    returns = torch.full((64,), distribution.v_max)
    for result, exact in (
        (distribution.log_mgf(logits, 1000.0), distribution.log_mgf(logits.double(), 1000.0)),
        (distribution.mean(logits), distribution.mean(logits.double())),
        (distribution.nll(logits, returns), distribution.nll(logits.double(), returns)),
    ):
        assert result.dtype == torch.float32
        assert bool(result.isfinite().all())
        torch.testing.assert_close(result.double(), exact, rtol=1e-6, atol=3e-4)


def test_bernoulli_nll_and_mean_match_the_probabilities():
    logits = torch.linspace(-5, 5, 11, dtype=torch.float64).unsqueeze(-1)
    p = 1 / (1 + (-logits.squeeze(-1)).exp())
    torch.testing.assert_close(Bernoulli().mean(logits), p)
    torch.testing.assert_close(Bernoulli().nll(logits, torch.ones(11)), -p.log())
    torch.testing.assert_close(Bernoulli().nll(logits, torch.zeros(11)), -(1 - p).log())


def test_bernoulli_nll_keeps_its_digits_when_the_prediction_is_nearly_certain():
    nll = Bernoulli().nll(torch.tensor([[100.0]]), torch.tensor([1.0]))
    assert nll.item() == pytest.approx(3.720075976020836e-44, rel=0.5)  # e^-100, a float32 denormal


def test_categorical_nll_is_the_log_pmf_on_atoms_and_their_mixture_between():
    distribution, logits = Categorical(0.0, 1.0, 3), torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64)
    pmf = logits.exp() / logits.exp().sum()
    returns = torch.tensor([0.0, 0.5, 1.0, 0.75], dtype=torch.float64)
    expected = torch.stack([-pmf[0].log(), -pmf[1].log(), -pmf[2].log(), -(pmf[1].log() + pmf[2].log()) / 2])
    torch.testing.assert_close(distribution.nll(logits.expand(4, 3), returns), expected)
    assert distribution.mean(logits).item() == pytest.approx((0.5 * pmf[1] + pmf[2]).item())


@pytest.mark.parametrize("distribution", [Bernoulli(), Categorical(-1.0, 2.0, 4)])
def test_gradients_match_finite_differences(distribution):
    torch.manual_seed(0)
    logits = torch.randn(6, distribution.num_logits, dtype=torch.float64, requires_grad=True)
    returns = torch.linspace(distribution.v_min, distribution.v_max, 6, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: distribution.nll(x, returns), logits)
    assert torch.autograd.gradcheck(lambda x: distribution.log_mgf(x, 7.0), logits)
    assert torch.autograd.gradcheck(distribution.mean, logits)


def test_the_fitted_distribution_is_that_of_the_returns():
    """Maximum likelihood recovers the frequencies, so nll is proper."""
    distribution, returns = Categorical(0.0, 1.0, 3), torch.tensor([0.0, 1.0, 1.0, 0.5])
    logits = torch.zeros(3, requires_grad=True)
    optimizer = torch.optim.LBFGS([logits], max_iter=100)

    def loss():
        optimizer.zero_grad()
        value = distribution.nll(logits.expand(4, 3), returns).mean()
        value.backward()
        return value

    optimizer.step(loss)
    torch.testing.assert_close(logits.softmax(-1), torch.tensor([0.25, 0.25, 0.5]), atol=1e-4, rtol=0)


def test_log_mgf_broadcasts_one_eta_per_row():
    logits, inv_eta = torch.randn(2, 3, 5), torch.tensor([[1.0], [10.0]])
    got = Categorical(0, 1, 5).log_mgf(logits, inv_eta)
    torch.testing.assert_close(got[1], Categorical(0, 1, 5).log_mgf(logits[1], 10.0))


@pytest.mark.parametrize("distribution", [Bernoulli(), Categorical(0.0, 2.0, 3)])
@pytest.mark.parametrize("outside", [-0.1, 2.1, float("nan")])
def test_a_return_outside_the_range_is_refused(distribution, outside):
    with pytest.raises(ValueError, match="outside"):
        distribution.nll(torch.zeros(1, distribution.num_logits), torch.tensor([outside]))


@pytest.mark.parametrize("distribution", [Bernoulli(), Categorical(-1.0, 2.0, 4)])
def test_the_config_round_trips(distribution):
    assert distribution_from_config(distribution.to_config()) == distribution


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"name": "gaussian"},
        {"name": "categorical", "low": 0, "high": 1},
        {"name": "categorical", "low": 1, "high": 1, "atoms": 3},
        {"name": "categorical", "low": 0, "high": 1, "atoms": 1},
        {"name": "categorical", "low": 0, "high": float("nan"), "atoms": 3},
        {"name": "bernoulli", "low": 0},
    ],
)
def test_a_wrong_config_is_refused(config):
    with pytest.raises(ValueError, match="distribution"):
        distribution_from_config(config)
