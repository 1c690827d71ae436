"""The guided requests of a batch without vLLM: which rows are touched, what is on record, and which failures count."""

import gc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from guided_vllm.poisoned import POISON, poison
from guided_vllm.tiny_models import REFERENCE_VOCAB, make_value_model, prompt
from qtilt.distributions import Bernoulli
from qtilt.engine import prefixes
from qtilt.vllm_plugin.failure import not_numbers
from qtilt.vllm_plugin.guided import GuidedRequest
from qtilt.vllm_plugin.runner import StepRows
from qtilt.vllm_plugin.step import FORCED
from running_batch import END, LENGTH, RunningBatch, count_tokens, make_residents

pytestmark = pytest.mark.usefixtures("implementation")

SLOTS = 6


class Runner(RunningBatch):
    """Requests for one GPT-2 value model that overflows on POISON."""

    def __init__(self, directory: Path, type_: str = "v", kv_fraction: float = 1.0, *, speculates: bool = True) -> None:
        super().__init__(SLOTS, speculates=speculates)
        path = poison(make_value_model(directory / "value", type_, Bernoulli(), "gpt2", seed=1))
        self.version = make_residents(SLOTS, kv_fraction=kv_fraction).load_at_start("value", str(path))

    def put(self, slot: int, prompt_ids: list[int], output: Sequence[int] = (), **more: object) -> GuidedRequest:
        return self.add(slot, self.version, prompt_ids, output, **more)

    @property
    def free_slots(self) -> int:
        return self.version.engine.cache.free_slots


@pytest.fixture
def runner(tmp_path: Path) -> Runner:
    return Runner(tmp_path, speculates=False)


def test_rows_that_are_not_guided_are_bit_identical(runner: Runner) -> None:
    for slot in range(5):
        runner.add_unguided(slot, prompt(4, seed=1))
    runner.put(1, prompt(4, seed=1))
    runner.put(3, prompt(4, seed=1), output=[7, 8], guided_tokens=2)
    runner.put(4, prompt(4, seed=1), output=[7, 8], guided_tokens=3)
    logits_BV = torch.randn(5, REFERENCE_VOCAB) * 3
    guided_BV = runner.guide(range(5), logits_BV.clone())
    for row, guided in enumerate([False, True, False, False, True]):
        assert torch.equal(guided_BV[row], logits_BV[row]) is not guided
    for slot in (1, 3, 4):
        runner.batch.remove(slot)
    assert runner.free_slots == SLOTS


def test_masked_logits_are_never_raised_and_count_for_nothing(runner: Runner) -> None:
    runner.put(0, prompt(4, seed=1), top_k=64)
    logits_BV = torch.randn(1, REFERENCE_VOCAB)
    masked = torch.randperm(REFERENCE_VOCAB)[: REFERENCE_VOCAB - 3]
    logits_BV[0, masked] = -torch.inf
    logits_BV[0, masked[:5]] = torch.nan
    guided_BV = runner.guide([0], logits_BV.clone())
    assert torch.equal(guided_BV[0, masked].isnan(), logits_BV[0, masked].isnan())
    assert torch.equal(guided_BV[0, masked].isneginf(), logits_BV[0, masked].isneginf())
    runner.requests.commit(0, [1])
    assert 0 <= runner.summary([1])["kl"] < float("inf")


def test_a_request_past_its_guided_tokens_gives_its_slot_back(runner: Runner) -> None:
    runner.put(0, prompt(4, seed=1), output=[3], guided_tokens=2)
    runner.step({0: [5]})
    assert runner.free_slots == SLOTS - 1
    runner.step({0: [5]})
    assert runner.free_slots == SLOTS


def test_a_request_past_its_guided_tokens_is_guided_again_when_tokens_are_taken_back(tmp_path: Path) -> None:
    """In a slot of the value cache that it holds, not in one that it has given back."""
    ours, plain = (Runner(tmp_path / name, speculates=False) for name in ("ours", "plain"))
    ours.put(0, prompt(20, seed=1), guided_tokens=2)
    for token in (5, 6, 7):
        ours.step({0: [token]})
    assert ours.free_slots == SLOTS
    ours.requests.total_lens[0] = 21
    plain.put(0, [*prompt(20, seed=1), 5])
    torch.testing.assert_close(ours.step({0: [6]}), plain.step({0: [6]}), rtol=1e-5, atol=1e-4)
    ours.step({0: [7]})
    assert ours.free_slots == SLOTS
    for runner in (ours, plain):
        runner.put(3, prompt(9, seed=2))
    torch.testing.assert_close(ours.step({3: [6]}), plain.step({3: [6]}), rtol=1e-5, atol=1e-4)


def test_tokens_that_were_taken_back_are_forgotten(tmp_path: Path) -> None:
    kept, fresh = (Runner(tmp_path / name, speculates=False) for name in ("kept", "fresh"))
    kept.put(0, prompt(4, seed=1))
    for token in (3, 4, 5):
        kept.step({0: [token]})
    kept.requests.total_lens[0] = 5
    kept.requests.commit(0, [9])
    fresh.put(0, [*prompt(4, seed=1), 3, 9])
    torch.testing.assert_close(kept.step({0: [5]}), fresh.step({0: [5]}))


@pytest.mark.parametrize("type_", ["v", "q"])
def test_the_chunks_of_a_prefill_are_cached_and_nothing_is_scored(tmp_path: Path, type_: str) -> None:
    whole, chunked = (Runner(tmp_path / name, type_, speculates=False) for name in ("whole", "chunked"))
    prompt_ids = prompt(30, seed=1)
    for runner in (whole, chunked):
        runner.put(2, prompt_ids)
    run = count_tokens(chunked.version)
    for length in (7, 20):
        chunked.requests.total_lens[2] = length
        logits_BV = torch.randn(1, REFERENCE_VOCAB)
        assert torch.equal(chunked.guide([2], logits_BV.clone()), logits_BV)
    assert run == [7, 13]
    chunked.requests.total_lens[2] = 30
    torch.testing.assert_close(chunked.step({2: [5]}), whole.step({2: [5]}))
    assert run[2:] == [10 + (5 if type_ == "v" else 0)]
    assert chunked.summary([5]) == pytest.approx(whole.summary([5]))


@pytest.mark.parametrize("type_", ["v", "q"])
def test_with_pages_for_half_of_the_histories_half_of_them_are_computed_again_in_a_step(
    tmp_path: Path, type_: str
) -> None:
    """Not all: what is cached is used before it makes room for the others. And all are as exact as ever."""
    half, whole = (Runner(tmp_path / str(fraction), type_, fraction, speculates=False) for fraction in (0.5, 1.0))
    for slot in range(SLOTS):
        for runner in (half, whole):
            runner.put(slot, prompt(40, seed=slot), trace_id=str(slot))
    assert half.version.engine.cache.pages.total == SLOTS
    run = count_tokens(half.version)
    tails = SLOTS * (6 if type_ == "v" else 1)
    for step in range(5):
        run.clear()
        drawn = {slot: [5 + step] for slot in range(SLOTS)}
        torch.testing.assert_close(half.step(drawn), whole.step(drawn), rtol=1e-5, atol=1e-4)
        again = SLOTS if step == 0 else SLOTS // 2
        assert sum(run) == again * (40 + step - 1) + tails


def test_a_request_costs_its_own_top_k(runner: Runner) -> None:
    """And not that of the requests beside it."""
    for slot, top_k in enumerate([5, 64, 5]):
        runner.put(slot, prompt(4, seed=slot), top_k=top_k, trace_id=str(slot))
    runner.step({slot: [5] for slot in range(3)})
    run = count_tokens(runner.version)
    runner.step({slot: [5] for slot in range(3)})
    assert run == [6 + 65 + 6]
    assert [runner.summary([5, 5], str(slot))["candidates"] for slot in range(3)] == [5, 64, 5]


@pytest.mark.parametrize("type_", ["v", "q"])
@pytest.mark.parametrize("kv_fraction", [1.0, 0.5], ids=["one piece", "pages"])
def test_a_draft_with_nan_values_that_does_not_come_true_fails_nothing(
    tmp_path: Path, type_: str, kv_fraction: float
) -> None:
    """Neither the rows before it in its step, nor those of later steps, of its request or of a longer neighbour."""
    ours, plain = (Runner(tmp_path / name, type_, kv_fraction) for name in ("ours", "plain"))
    for runner in (ours, plain):
        runner.put(0, prompt(8, seed=1))
        runner.put(1, prompt(30, seed=2), trace_id="neighbour")
    drafted = ours.step({0: [5], 1: [7]}, {0: [POISON, 4], 1: [3]})
    torch.testing.assert_close(drafted[[0, 3]], plain.step({0: [5], 1: [7]}), rtol=1e-5, atol=1e-4)
    assert drafted[1].argmax() == END
    for _ in range(3):
        expected_RV = plain.step({0: [6], 1: [7]})
        torch.testing.assert_close(ours.step({0: [6], 1: [7]}), expected_RV, rtol=1e-5, atol=1e-4)
    ours.batch.look_for_failures()
    assert ours.records.failures() == {}
    for trace, tokens in (("t", [5, 6, 6, 6]), ("neighbour", [7, 7, 7, 7])):
        assert ours.summary(tokens, trace) == pytest.approx(plain.summary(tokens, trace), rel=1e-5)


@pytest.mark.parametrize("kv_fraction", [1.0, 0.5], ids=["one piece", "pages"])
def test_a_draft_with_nan_values_that_comes_true_fails_the_tokens_after_it(tmp_path: Path, kv_fraction: float) -> None:
    runner = Runner(tmp_path, kv_fraction=kv_fraction)
    runner.put(0, prompt(8, seed=1))
    runner.step({0: [POISON, 4, 5]}, {0: [POISON, 4]})
    runner.batch.look_for_failures()
    assert runner.records.failures() == {"t": not_numbers()}
    assert runner.summary([POISON])["guided_tokens"] == 1
    assert runner.records.take("t", [[POISON, 4]]) == [not_numbers()]


def test_what_is_on_record_does_not_depend_on_how_tokens_were_drafted(tmp_path: Path) -> None:
    """Rejected drafts leave their figures at positions that are drawn anew."""
    drafted, plain = (Runner(tmp_path / name) for name in ("drafted", "plain"))
    for runner in (drafted, plain):
        runner.put(0, prompt(8, seed=1), guided_tokens=5)
        runner.put(2, prompt(5, seed=2), trace_id="other")
    drafted.step({0: [5, 6, 7], 2: [3]}, {0: [5, 6, 9], 2: [8, 8]})
    drafted.step({0: [8], 2: [4]}, {0: [9, 9]})
    drafted.step({0: [9, 3, 4], 2: [5, 6]}, {0: [9, 3], 2: [5]})
    for token in [5, 6, 7, 8, 9, 3, 4]:
        plain.step({0: [token]})
    for token in [3, 4, 5, 6]:
        plain.step({2: [token]})
    assert drafted.summary([]) == plain.summary([])
    for count in range(1, 8):
        tokens = [5, 6, 7, 8, 9, 3, 4][:count]
        found = drafted.summary(tokens)
        assert found["guided_tokens"] == min(count, 5)
        assert found == pytest.approx(plain.summary(tokens), rel=1e-5)
    assert drafted.summary([3, 4, 5, 6], "other") == pytest.approx(plain.summary([3, 4, 5, 6], "other"), rel=1e-5)


def test_a_record_outlives_its_slot_and_goes_on_in_another(tmp_path: Path) -> None:
    """Preempted and resumed elsewhere, while its first slot is given to requests that overwrite what was there."""
    ours, plain = (Runner(tmp_path / name, speculates=False) for name in ("ours", "plain"))
    plain.put(2, prompt(8, seed=1))
    for token in [5, 6, 7, 8]:
        plain.step({2: [token]})
    ours.put(2, prompt(8, seed=1))
    ours.step({2: [5]})
    ours.step({2: [6]})
    ours.put(2, prompt(3, seed=4), trace_id="next")
    for _ in range(10):
        ours.step({2: [3]})
    ours.put(1, prompt(8, seed=1), output=[5, 6])
    ours.step({1: [7], 2: [3]})
    ours.step({1: [8]})
    assert ours.summary([5, 6, 7, 8]) == pytest.approx(plain.summary([5, 6, 7, 8]), rel=1e-5)
    assert ours.summary([3] * 11, "next")["guided_tokens"] == 11
    with pytest.raises(ValueError, match="no guidance record of trace 't' has generated these 3 tokens"):
        ours.records.take("t", [[5, 7, 7]])


def test_tokens_that_were_drawn_unguided_have_no_record(tmp_path: Path) -> None:
    """What was measured in the slot before is not taken for theirs."""
    runner = Runner(tmp_path, speculates=False)
    for trace in ("first", "second"):
        runner.put(0, prompt(8, seed=1), trace_id=trace)
        if trace == "first":
            runner.step({0: [5]})
    runner.batch.table.longest_S[0] = 9
    runner.requests.commit(0, [5])
    assert runner.summary([5], "first")["guided_tokens"] == 1
    with pytest.raises(ValueError, match="no guidance record of trace 'second'"):
        runner.records.take("second", [[5]])


def test_kl_is_summed_in_float64(tmp_path: Path) -> None:
    runner = Runner(tmp_path, speculates=False)
    runner.put(0, prompt(8, seed=1))
    runner.step({0: [5]})
    runner.step({0: [6]})
    divergence_R3 = torch.tensor([[1e10, 1e9, 0.5], [1e-3, 1e-4, 0.75]], dtype=torch.float64)
    runner.batch.table.write(torch.tensor([0, 0]), torch.tensor([7, 8]), divergence_R3, torch.tensor([5, 4]))
    assert runner.summary([5, 6]) == {
        "guided_tokens": 2,
        "kl": 1e10 + 1e-3,
        "kl_candidates": 1e9 + 1e-4,
        "mass": 0.625,
        "candidates": 4.5,
    }


class NothingWaits(TorchDispatchMode):
    """Refuses what has the host wait for a device: reading a number, or a result whose shape depends on numbers."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "unique")

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        assert not name.startswith(self.WAITING), f"{name} waits for the device"
        if name.startswith("index"):
            indices = [index for index in args[1] if index is not None] if isinstance(args[1], list | tuple) else []
            assert not any(index.dtype == torch.bool for index in indices), f"a mask in {name} waits for the device"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("type_", ["v", "q"])
def test_no_step_waits_for_the_device(tmp_path: Path, type_: str) -> None:
    """Of pages, which are read on CPUs as on GPUs; how slots in one piece are read there depends on their lengths."""
    runner = Runner(tmp_path, type_, kv_fraction=0.5)
    for slot in range(SLOTS):
        runner.put(slot, prompt(4, seed=slot), trace_id=str(slot))
    guide = runner.batch.guide

    def watched(logits_RV: Tensor, rows: StepRows) -> Tensor:
        with NothingWaits():
            return guide(logits_RV, rows)

    runner.batch.guide = watched
    runner.step({0: [5], 1: [5]})
    runner.step({0: [5, 6], 1: [5], 2: [5]}, {0: [5, 9], 1: [POISON]})
    with NothingWaits(), pytest.raises(AssertionError, match="waits for the device"):
        runner.batch.look_for_failures()


def test_no_memory_is_taken_by_a_step(tmp_path: Path) -> None:
    runner = Runner(tmp_path, speculates=False)
    for slot in range(SLOTS):
        runner.put(slot, prompt(4, seed=slot), trace_id=str(slot))
    counts = []
    for _ in range(3):
        for _ in range(5):
            runner.step({slot: [5] for slot in range(SLOTS)})
        gc.collect()
        counts.append(sum(isinstance(thing, Tensor) for thing in gc.get_objects()))
    assert counts[0] == counts[1] == counts[2]


def test_choices_of_one_trace_are_told_apart_and_read_once_they_have_ended(tmp_path: Path) -> None:
    runner = Runner(tmp_path, speculates=False)
    choices = [[5, 6], [5, 9], [7, 6]]
    stays = [runner.put(slot, prompt(4, seed=1)).stay for slot in range(3)]
    for step in range(2):
        runner.step({slot: [choices[slot][step]] for slot in range(3)})
    each = [runner.summary(tokens) for tokens in choices]
    assert runner.records.take("t", choices, more_to_come=True) == each
    assert each[0] == each[1] != each[2], "what follows 5 is measured alike in both"
    runner.batch.keep_only([])
    assert runner.records.take("t", choices, more_to_come=True) == each
    for slot in range(3):
        runner.batch.remove(slot)
    runner.requests.tokens_SP.zero_()
    assert runner.records.take("t", choices, more_to_come=True) == each
    on_host = [stay.read().tokens_N.data_ptr() for stay in stays]
    assert on_host == [stay.read().tokens_N.data_ptr() for stay in stays], "an ended stay is copied to the host once"
    assert runner.records.take("t", choices) == each
    assert runner.records.held == 0


@pytest.mark.parametrize("kv_fraction", [1.0, 0.8])
@pytest.mark.parametrize("type_", ["v", "q"])
def test_samples_of_one_prompt_compute_it_once(
    tmp_path: Path, type_: str, kv_fraction: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt_ids = prompt(20, seed=3)

    def guided(name: str) -> tuple[list[Tensor], int]:
        """Of three requests of which two arrive together, one comes back after a preemption, and one is dropped."""
        runner = Runner(tmp_path / name, type_, kv_fraction)
        run = count_tokens(runner.version)
        for slot in (2, 0):
            runner.put(slot, prompt_ids, trace_id=str(slot))
        steps = [runner.step({2: [5], 0: [6]})]
        runner.put(1, prompt_ids, trace_id="1")
        steps.append(runner.step({2: [7], 0: [8], 1: [9]}))
        runner.put(0, prompt_ids, output=[6, 8], trace_id="0")
        steps.append(runner.step({0: [1], 1: [2]}))
        runner.version.engine.cache.drop(2)
        steps.append(runner.step({0: [3], 2: [4]}))
        return steps, sum(run)

    shared, tokens_shared = guided("shared")
    monkeypatch.setattr(prefixes, "SHORTEST", LENGTH)
    alone, tokens_alone = guided("alone")
    for of_alone, of_shared in zip(alone, shared, strict=True):
        torch.testing.assert_close(of_shared, of_alone)
    # A new one runs its prompt's last token again, to draw.
    assert tokens_alone - tokens_shared == 19 + 19 + 20 + 20


@pytest.mark.parametrize("speculates", [False, True])
def test_a_forced_token_counts_for_nothing_but_a_failure_stays_one(tmp_path: Path, speculates: bool) -> None:
    """vLLM makes a token certain behind all processors. The row that fails has no token that could end it."""
    runner = Runner(tmp_path, speculates=speculates)
    runner.put(0, prompt(4, seed=1), trace_id="healthy")
    runner.put(1, [4, POISON, 5], trace_id="failing", ending_token=None)
    logits_BV = torch.randn(2, REFERENCE_VOCAB)
    measured = []
    for step in range(3):
        guided_BV = runner.guide([0, 1], logits_BV.clone())
        if step == 1:
            guided_BV[:, 9] = FORCED
        runner.batch.leave_out_forced(guided_BV)
        for slot in (0, 1):
            runner.requests.commit(slot, [9])
        measured.append(runner.summary([9] * (step + 1), "healthy"))
    assert [summary["guided_tokens"] for summary in measured] == [1, 1, 2]
    assert measured[0] == measured[1]
    assert measured[2]["kl"] > measured[1]["kl"] > 0
    assert runner.outcome([9, 9], "failing") == not_numbers()
