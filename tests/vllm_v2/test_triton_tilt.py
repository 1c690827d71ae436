"""The tilt by Triton's kernels, which its interpreter runs here, against torch."""

import pytest
import torch

from qtilt.forwards.triton_tilt import tilt as by_triton
from qtilt.method import tilt as by_torch
from qtilt.method.distributions import Bernoulli, Categorical, ReturnDistribution
from qtilt.method.tilt import Candidates, Drops, ReferenceMass

INF = float("inf")
MASKED = (INF, -INF, float("nan"))


def logits(rows: int, vocabulary: int, *, masked: float = 0.3) -> torch.Tensor:
    """Parts of a larger tensor, as vLLM's may be; none are equal, some are no numbers."""
    torch.manual_seed(0)
    whole = torch.randperm(rows * (vocabulary + 3)).view(rows, -1).float() / (3 * vocabulary) - 0.5
    logits_BV = whole[:, :vocabulary]
    for row, mask in enumerate(MASKED[:rows]):
        logits_BV[row][torch.rand(vocabulary) < masked] = mask
    assert logits_BV.stride(0) != vocabulary
    return logits_BV


@pytest.mark.parametrize(
    ("vocabulary", "scorable", "k"),
    [(7, 7, 3), (7, 7, 20), (100, 60, 1), (2048, 2048, 20), (5000, 4097, 20), (5000, 5000, 128), (5000, 9000, 2100)],
)
def test_the_largest_logits_in_order(vocabulary: int, scorable: int, k: int) -> None:
    logits_BV = logits(4, vocabulary)
    top_k_B = torch.tensor([k, 1, 2, k])
    got, expected = (functions.top_candidates(logits_BV, k, scorable, top_k_B) for functions in (by_triton, by_torch))
    assert torch.equal(got.valid_BK, expected.valid_BK)
    assert torch.equal(got.token_ids_BK[got.valid_BK], expected.token_ids_BK[expected.valid_BK])
    assert got.token_ids_BK.shape == expected.token_ids_BK.shape == (4, min(k, scorable, vocabulary))
    assert 0 <= int(got.token_ids_BK.min()) <= int(got.token_ids_BK.max()) < scorable


def test_of_equal_logits_the_first_are_taken() -> None:
    logits_BV = torch.zeros(1, 5000)
    logits_BV[0, ::2] = -0.0
    assert by_triton.top_candidates(logits_BV, 4, 5000).token_ids_BK.tolist() == [[0, 1, 2, 3]]


def test_a_row_without_any_token_has_no_candidates_and_no_mass() -> None:
    logits_BV = torch.full((1, 3000), -INF)
    candidates = by_triton.top_candidates(logits_BV, 4, 3000)
    assert not candidates.valid_BK.any()
    mass = by_triton.reference_mass(logits_BV, candidates, torch.ones(1))
    assert (mass.candidates_BK == -INF).all()
    assert not mass.rest_B1.isnan().any()


@pytest.mark.parametrize("spread", [1.0, 100.0, 1e5])
@pytest.mark.parametrize("vocabulary", [7, 2048, 5000])
def test_the_references_mass(vocabulary: int, spread: float) -> None:
    logits_BV = spread * logits(4, vocabulary)
    temperature_B = torch.tensor([0.0, 0.7, 1.0, 1.9], dtype=torch.float64)
    candidates = by_torch.top_candidates(logits_BV, 5, vocabulary, torch.tensor([5, 2, 5, 1]))
    got = by_triton.reference_mass(logits_BV, candidates, temperature_B)
    expected = by_torch.reference_mass(logits_BV.double(), candidates, temperature_B)
    torch.testing.assert_close(got.candidates_BK, expected.candidates_BK, atol=1e-5, rtol=1e-6)
    torch.testing.assert_close(got.rest_B1.exp(), expected.rest_B1.exp(), atol=1e-5, rtol=1e-5)


DISTRIBUTIONS = [Bernoulli(), Categorical(-1.0, 2.0, 2), Categorical(0.2, 1.2, 11)]


@pytest.mark.parametrize("method", ["qsharp", "cd"])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS, ids=str)
def test_offsets(distribution: ReturnDistribution, method: str) -> None:
    torch.manual_seed(0)
    logits_BKA = torch.randn(5, 20, distribution.num_logits) * torch.tensor([0.1, 1, 10, 100, 1e4]).view(-1, 1, 1)
    inv_eta_B = torch.tensor([0.0, 1e-3, 1.0, 30.0, 1e4], dtype=torch.float64)
    got, expected = (each.offsets(distribution, logits_BKA, inv_eta_B, method) for each in (by_triton, by_torch))
    assert got.dtype == expected.dtype == torch.float64
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize("method", ["qsharp", "cd"])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS, ids=str)
def test_offsets_of_surely_the_lowest_return_are_the_lowest_to_the_bit(
    distribution: ReturnDistribution, method: str
) -> None:
    logits_BKA = torch.full((1, 3, distribution.num_logits), -1e4)
    if distribution.num_logits > 1:
        logits_BKA[..., 0] = 0.0
    inv_eta_B = torch.tensor([7.3], dtype=torch.float64)
    lowest_B1 = by_torch.lowest_offset(distribution, inv_eta_B).unsqueeze(-1)
    assert torch.equal(by_triton.offsets(distribution, logits_BKA, inv_eta_B, method), lowest_B1.expand(1, 3))


@pytest.mark.parametrize("distribution", DISTRIBUTIONS, ids=str)
def test_offsets_of_what_is_no_number_are_none(distribution: ReturnDistribution) -> None:
    logits_BKA = torch.zeros(3, 2, distribution.num_logits)
    logits_BKA[0, 1, -1], logits_BKA[1, 0, 0] = torch.nan, INF
    offsets_BK = by_triton.offsets(distribution, logits_BKA, torch.ones(3, dtype=torch.float64), "qsharp")
    assert offsets_BK.isfinite().tolist() == [[True, False], [False, True], [True, True]]


def some_mass(rows: int, candidates: int) -> tuple[ReferenceMass, torch.Tensor]:
    """And what is scored. Some candidates have none; in the last two rows all have none, or there is nothing else."""
    torch.manual_seed(1)
    mass_BK = torch.rand(rows, candidates, dtype=torch.float64) * (torch.rand(rows, candidates) < 0.8)
    mass_BK /= mass_BK.sum(-1, keepdim=True) + torch.rand(rows, 1)
    mass_BK[-1] = 0.0
    rest_B1 = 1 - mass_BK.sum(-1, keepdim=True)
    mass_BK[-2] = 0.0
    rest_B1[-2] = 0.0
    scored_BK = (mass_BK > 0) & (torch.rand(rows, candidates) < 0.9)
    scored_BK[0] = False
    return ReferenceMass(mass_BK.log(), rest_B1.log()), scored_BK


@pytest.mark.parametrize("tail", ["floor", "mean"])
@pytest.mark.parametrize("candidates", [1, 20, 70])
def test_drops_and_the_divergence_they_make(candidates: int, tail: str) -> None:
    mass, scored_BK = some_mass(6, candidates)
    offsets_BK = -torch.rand(6, candidates, dtype=torch.float64) * 50
    offsets_BK[~scored_BK] = torch.nan
    floor_B = torch.full((6,), -50.0, dtype=torch.float64)
    got, expected = (each.drops(mass, scored_BK, offsets_BK, floor_B, tail) for each in (by_triton, by_torch))
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
    assert (got.candidates_BK[0] == 0).all()
    got_B3, expected_B3 = (each.divergence(mass, expected) for each in (by_triton, by_torch))
    assert got_B3.shape == expected_B3.shape == (6, 3)
    torch.testing.assert_close(got_B3, expected_B3, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tail", ["floor", "mean"])
def test_equal_offsets_drop_nothing(tail: str) -> None:
    mass, scored_BK = some_mass(4, 20)
    offsets_BK = torch.full((4, 20), -1.7, dtype=torch.float64)
    dropped = by_triton.drops(mass, scored_BK, offsets_BK, torch.full((4,), -1.7, dtype=torch.float64), tail)
    assert all((part == 0).all() for part in dropped)


def test_a_drop_that_is_no_number_has_a_divergence_that_is_none() -> None:
    mass, _ = some_mass(4, 4)
    dropped = Drops(torch.zeros(4, 4, dtype=torch.float64), torch.zeros(4, 1, dtype=torch.float64))
    dropped.candidates_BK[0] = torch.nan
    got_B3, expected_B3 = (each.divergence(mass, dropped) for each in (by_triton, by_torch))
    assert expected_B3[:, 0].isnan().tolist() == got_B3[:, 0].isnan().tolist() == [True, False, False, False]


@pytest.mark.parametrize("vocabulary", [7, 2048, 5000])
def test_tilted_logits(vocabulary: int) -> None:
    logits_BV = logits(4, vocabulary)
    logits_BV[3, 0] = -0.0
    candidates = by_torch.top_candidates(logits_BV, 5, vocabulary, torch.tensor([5, 2, 5, 1]))
    torch.manual_seed(2)
    drops_BK, others_B1 = torch.rand(4, 5, dtype=torch.float64) * 9, torch.rand(4, 1, dtype=torch.float64) * 9
    drops_BK[3], others_B1[3] = 0.0, 0.0
    temperature_B = torch.tensor([0.0, 0.7, 1.0, 1.9], dtype=torch.float64)
    before_BV, expected_BV = logits_BV.clone(), logits_BV.clone()
    by_torch.tilt_(expected_BV, candidates, Drops(drops_BK, others_B1), temperature_B)
    by_triton.tilt_(logits_BV, candidates, Drops(drops_BK, others_B1), temperature_B)
    assert torch.equal(logits_BV[3].view(torch.int32), before_BV[3].view(torch.int32))
    torch.testing.assert_close(logits_BV, expected_BV, rtol=0, atol=0, equal_nan=True)


def test_other_numbers_than_float32_are_torchs_business() -> None:
    logits_BV = logits(4, 100).double()
    candidates = by_triton.top_candidates(logits_BV, 5, 100)
    assert isinstance(candidates, Candidates)
    assert torch.equal(candidates.token_ids_BK, by_torch.top_candidates(logits_BV, 5, 100).token_ids_BK)
    got, expected = (
        functions.reference_mass(logits_BV, candidates, torch.ones(4)) for functions in (by_triton, by_torch)
    )
    assert torch.equal(got.candidates_BK, expected.candidates_BK)
