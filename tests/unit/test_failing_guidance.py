"""A value model that raises or gives NaN: what becomes of the rows it concerns, and that the others notice nothing."""

import logging
from pathlib import Path

import pytest
import torch
from torch import Tensor

from guided_vllm.poisoned import POISON, broken_layer, poison
from guided_vllm.tiny_models import REFERENCE_VOCAB, make_value_model, prompt
from qtilt.distributions import Bernoulli, Categorical
from qtilt.tilt import Candidates, top_candidates
from qtilt.vllm_plugin.failure import GuidanceFailure, not_numbers
from qtilt.vllm_plugin.guided import GuidedRequest
from qtilt.vllm_plugin.step import finite_rows
from running_batch import END, RunningBatch, make_residents

pytestmark = pytest.mark.usefixtures("implementation")

SLOTS = 6
HEALTHY, POISONED = prompt(4, seed=1), [*prompt(3, seed=2), POISON, 5]


class Serving(RunningBatch):
    """Two versions in a batch, ``damaged`` and ``healthy``, of equal geometry: they share a cache."""

    def __init__(self, directory: Path, type_: str) -> None:
        super().__init__(SLOTS)
        residents = make_residents(SLOTS)
        paths = {
            name: make_value_model(directory / name, type_, Bernoulli(), "gpt2", seed=seed)
            for seed, name in enumerate(("damaged", "healthy"))
        }
        poison(paths["damaged"])
        self.versions = {name: residents.load_at_start(name, str(path)) for name, path in paths.items()}
        for slot in range(SLOTS):
            self.add_unguided(slot, HEALTHY)

    def put(self, slot: int, name: str, prompt_ids: list[int], ending_token: int | None = END) -> GuidedRequest:
        trace_id = f"{name}-{slot}"
        return self.add(slot, self.versions[name], prompt_ids, ending_token=ending_token, trace_id=trace_id)

    def leave(self) -> None:
        self.batch.keep_only([])
        assert self.versions["healthy"].engine.cache.free_slots == SLOTS
        assert all(version.rows == 0 for version in self.versions.values())


@pytest.fixture(params=["v", "q"])
def serving(tmp_path: Path, request: pytest.FixtureRequest) -> Serving:
    return Serving(tmp_path, request.param)


def logits(rows: int) -> Tensor:
    return torch.randn(rows, REFERENCE_VOCAB, generator=torch.Generator().manual_seed(3)) * 3


def assert_ends(logits_V: Tensor) -> None:
    """The end token is certain at any temperature, also beside the mass of the whole vocabulary."""
    for temperature in (1e-5, 1.0, 100.0):
        pmf_V = (logits_V / temperature).softmax(-1)
        assert pmf_V[END] == 1
        assert pmf_V.sum() == 1


def test_only_rows_with_nan_values_end_and_the_others_are_bit_identical(serving: Serving, tmp_path: Path) -> None:
    """Beside a row of the same version, one of another and one without guidance, over several steps."""
    serving.put(0, "damaged", POISONED)
    serving.put(1, "damaged", HEALTHY)
    serving.put(2, "healthy", POISONED)
    alone = Serving(tmp_path / "alone", serving.versions["damaged"].manifest.type)
    alone.put(1, "damaged", HEALTHY)
    alone.put(2, "healthy", POISONED)
    for _ in range(4):
        guided_BV, expected_BV = serving.draw(logits(4)), alone.draw(logits(4))
        assert_ends(guided_BV[0])
        torch.testing.assert_close(guided_BV[1:3], expected_BV[1:3], rtol=1e-5, atol=1e-5)
        assert not torch.equal(guided_BV[1], logits(4)[1])
        assert torch.equal(guided_BV[3], logits(4)[3])
        serving.batch.look_for_failures()
        assert serving.versions["healthy"].engine.cache.free_slots == SLOTS - 2
    assert serving.records.take("damaged-0", [serving.drawn(0)])[0]["kind"] == "nan"
    for trace_id, index in (("damaged-1", 1), ("healthy-2", 2)):
        (ours,), (expected,) = (which.records.take(trace_id, [serving.drawn(index)]) for which in (serving, alone))
        assert ours["guided_tokens"] == 4
        assert ours["kl"] == pytest.approx(expected["kl"], rel=1e-5)
    serving.leave()
    alone.leave()


def test_a_row_that_no_token_ends_is_left_to_the_reference(serving: Serving) -> None:
    serving.put(0, "damaged", POISONED, ending_token=None)
    for _ in range(3):
        assert torch.equal(serving.draw(logits(1)), logits(1))
    serving.batch.look_for_failures()
    assert serving.records.failures() == {"damaged-0": not_numbers()}
    serving.leave()


def test_a_masked_token_ends_a_failed_row_all_the_same(serving: Serving) -> None:
    serving.put(0, "damaged", POISONED)
    masked_BV = logits(1)
    masked_BV[0, END] = -torch.inf
    for _ in range(2):
        assert_ends(serving.draw(masked_BV)[0])
    serving.leave()


def test_a_row_that_failed_once_is_not_guided_again(serving: Serving) -> None:
    """Values that were NaN in one step only: the row goes on failing although the next ones are numbers."""
    serving.put(0, "damaged", HEALTHY)
    head = serving.versions["damaged"].engine.model.head.bias
    healthy_bias = head.detach().clone()
    head.data.fill_(torch.nan)
    assert_ends(serving.draw(logits(1))[0])
    head.data.copy_(healthy_bias)
    serving.batch.look_for_failures()
    assert_ends(serving.draw(logits(1))[0])
    assert not serving.versions["damaged"].engine.holds(0)
    serving.leave()


def test_an_exception_ends_the_rows_of_that_version_and_no_other(
    serving: Serving, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    damaged = serving.versions["damaged"]
    serving.put(0, "damaged", HEALTHY)
    serving.put(2, "damaged", HEALTHY, ending_token=None)
    serving.put(1, "healthy", HEALTHY)
    alone = Serving(tmp_path / "alone", damaged.manifest.type)
    alone.put(1, "healthy", HEALTHY)
    serving.draw(logits(4))
    alone.draw(logits(4))
    with broken_layer(damaged.engine.model.backbone.h[1].mlp.c_proj), caplog.at_level(logging.ERROR, "vllm"):
        for _ in range(3):
            guided_BV, expected_BV = serving.draw(logits(4)), alone.draw(logits(4))
            assert_ends(guided_BV[0])
            assert torch.equal(guided_BV[2:], logits(4)[2:])
            torch.testing.assert_close(guided_BV[1], expected_BV[1], rtol=1e-5, atol=1e-5)
            assert serving.versions["healthy"].engine.cache.free_slots == SLOTS - 1
    assert [record.message for record in caplog.records] == [
        "guidance failed in value model damaged@1: 2 request(s) end"
    ], "once per failure, not once per step"
    assert caplog.records[0].exc_info is not None
    for trace_id, index in (("damaged-0", 0), ("damaged-2", 2)):
        (failure,) = serving.records.take(trace_id, [serving.drawn(index)])
        assert failure["kind"] == "exception"
        assert failure["reason"].startswith("RuntimeError: ")
        assert "\n" not in failure["reason"]
    serving.leave()
    alone.leave()


def test_after_an_exception_the_version_guides_new_requests_exactly(serving: Serving, tmp_path: Path) -> None:
    """What a half-done forward wrote into the cache reaches nobody, whoever gets the slots."""
    damaged = serving.versions["damaged"]
    for index, prompt_ids in enumerate([POISONED, HEALTHY, prompt(40, seed=9)]):
        serving.put(index, "damaged", prompt_ids)
    with broken_layer(damaged.engine.model.backbone.h[1].mlp.c_proj):
        serving.draw(logits(3))
    serving.leave()
    fresh = Serving(tmp_path / "fresh", damaged.manifest.type)
    for which in (serving, fresh):
        for index, name in enumerate(["damaged", "healthy", "damaged"]):
            which.put(index, name, prompt(5 + 3 * index, seed=20 + index))
    for _ in range(3):
        torch.testing.assert_close(serving.draw(logits(3)), fresh.draw(logits(3)), rtol=1e-5, atol=1e-5)
    serving.leave()


def test_a_failing_row_lets_a_new_one_take_its_slot(serving: Serving) -> None:
    """Slots are enough for as many rows as the batch has: a failed row that kept its own would starve the next."""
    for index in range(SLOTS):
        serving.put(index, "damaged", POISONED)
    serving.draw(logits(SLOTS))
    for index in range(SLOTS):
        serving.put(index, "damaged", HEALTHY)
    guided_BV = serving.draw(logits(SLOTS))
    serving.batch.look_for_failures()
    assert serving.versions["damaged"].rows == SLOTS
    assert not torch.equal(guided_BV, logits(SLOTS))
    serving.leave()


@pytest.mark.parametrize("distribution", [Bernoulli(), Categorical(0.0, 1.0, 3)], ids=["bernoulli", "categorical"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_row_is_finite_if_the_values_of_its_own_candidates_are(distribution: Bernoulli, bad: float) -> None:
    values_GKA = torch.zeros(3, 4, distribution.num_logits)
    values_GKA[1, 2, 0] = bad
    values_GKA[2, 3, 0] = bad
    valid_GK = torch.ones(3, 4, dtype=torch.bool)
    valid_GK[2, 3] = False
    offsets_GK = distribution.log_mgf_below_max(values_GKA.double(), 10.0)
    assert finite_rows(values_GKA, offsets_GK, valid_GK).tolist() == [True, False, True]


def test_masks_of_the_reference_are_no_failure(serving: Serving) -> None:
    masked_BV = logits(1)
    masked_BV[0, 3:] = -torch.inf
    masked_BV[0, 1] = torch.nan
    serving.put(0, "healthy", HEALTHY)
    candidates: Candidates = top_candidates(masked_BV, 5, 90)
    assert candidates.valid_BK.sum() == 2
    serving.draw(masked_BV)
    assert serving.summary([5], "healthy-0")["candidates"] == 2
    serving.leave()


def test_offsets_beyond_float32_are_no_failure(tmp_path: Path) -> None:
    """The smallest η on a reward of huge range: other tokens are infinitely far away, which is what was asked for."""
    path = make_value_model(tmp_path / "huge", "v", Categorical(-1e9, 1e9, 3), "llama", seed=1)
    version = make_residents(SLOTS).load_at_start("huge", str(path))
    running = RunningBatch(SLOTS)
    running.add(0, version, HEALTHY, eta=1e-9)
    guided_BV = running.draw(logits(1))
    assert running.summary([5])["guided_tokens"] == 1
    assert not guided_BV.isnan().any()


def test_a_request_that_comes_back_has_still_failed(tmp_path: Path) -> None:
    """Its failure is found by its tokens: of another choice of its trace that went another way it says nothing."""
    serving = Serving(tmp_path, "v")
    failure: GuidanceFailure = {"kind": "exception", "reason": "because"}
    stay = serving.add(0, serving.versions["healthy"], HEALTHY, output=[5, 6]).stay
    serving.step({0: [7]})
    stay.fail(failure, 2)
    serving.batch.remove(0)
    assert serving.records.failed("t", [5, 6, 7]) == failure
    assert serving.records.failed("t", [5, 6, 7, 8]) == failure
    assert serving.records.failed("t", [5, 6]) is None, "the step that failed is not among these tokens"
    assert serving.records.failed("t", [5, 9, 7]) is None
    assert serving.records.failed("another", [5, 6, 7]) is None
