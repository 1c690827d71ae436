"""The tilt's passes over the vocabulary by Triton's kernels, which its interpreter runs here, against torch."""

import pytest
import torch

from qtilt.forwards.triton_tilt import tilt as by_triton
from qtilt.method import tilt as by_torch
from qtilt.method.tilt import Candidates

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


def test_other_numbers_than_float32_are_torchs_business() -> None:
    logits_BV = logits(4, 100).double()
    candidates = by_triton.top_candidates(logits_BV, 5, 100)
    assert isinstance(candidates, Candidates)
    assert torch.equal(candidates.token_ids_BK, by_torch.top_candidates(logits_BV, 5, 100).token_ids_BK)
    got, expected = (
        functions.reference_mass(logits_BV, candidates, torch.ones(4)) for functions in (by_triton, by_torch)
    )
    assert torch.equal(got.candidates_BK, expected.candidates_BK)
