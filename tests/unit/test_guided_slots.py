"""The slots of Model Runner V2 without vLLM: what is on record, and which failures count, when drafts come true or not.

What vLLM does to its slots is played by :class:`Runner`; tests/vllm_v2 drives the real one.
"""

import gc
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy.typing as npt
import pytest
import torch
from numpy import array, int32, zeros
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from guided_vllm.poisoned import POISON, poison
from guided_vllm.tiny_models import REFERENCE_VOCAB, make_tokenizer, make_value_model, prompt
from qtilt.checkpoint import fingerprint_tokenizer
from qtilt.distributions import Bernoulli
from qtilt.params import GuidanceParams
from qtilt.vllm_plugin.compatibility import Reference
from qtilt.vllm_plugin.failure import not_numbers
from qtilt.vllm_plugin.records import GuidanceSummary
from qtilt.vllm_plugin.step import RowSettings
from qtilt.vllm_plugin.v2.slots import GuidedSlots, SlotRequest
from qtilt.vllm_plugin.v2.stays import Stay, StayLog
from qtilt.vllm_plugin.versions import EngineSettings, Residents

pytestmark = pytest.mark.usefixtures("implementation")

SLOTS, LENGTH = 4, 64
END = 17
CPU = torch.device("cpu")


@dataclass
class OnHost:
    np: npt.NDArray[int32] = field(default_factory=lambda: zeros(SLOTS, int32))


@dataclass
class OnDevice:
    gpu: Tensor


@dataclass
class Requests:
    """What of vLLM's LogitsProcRequestState is read."""

    device: torch.device = CPU
    max_num_reqs: int = SLOTS
    prompt_len: OnHost = field(default_factory=OnHost)
    prefill_len: OnHost = field(default_factory=OnHost)
    all_token_ids: OnDevice = field(default_factory=lambda: OnDevice(torch.zeros(SLOTS, LENGTH, dtype=torch.int32)))
    total_len: OnDevice = field(default_factory=lambda: OnDevice(torch.zeros(SLOTS, dtype=torch.int32)))


@dataclass
class Context:
    """What of vLLM's LogitsContext is read."""

    expanded_idx_mapping: Tensor
    idx_mapping_np: npt.NDArray[int32]
    input_ids: Tensor
    pos: Tensor
    seq_lens_upper_bound_np: npt.NDArray[int32]


class Runner:
    """Slots with requests for one GPT-2 value model that overflows on POISON."""

    def __init__(self, directory: Path, type_: str = "v", kv_fraction: float = 1.0, *, speculates: bool = True) -> None:
        reference = Reference(fingerprint_tokenizer(make_tokenizer()), REFERENCE_VOCAB, LENGTH)
        residents = Residents(reference, EngineSettings(SLOTS, LENGTH, torch.float32, CPU, kv_fraction))
        path = poison(make_value_model(directory / "value", type_, Bernoulli(), "gpt2", seed=1))
        self.version = residents.load_at_start("value", str(path))
        self.requests = Requests()
        self.slots = GuidedSlots(self.requests, speculates=speculates)
        self.log = StayLog()

    def add(
        self,
        slot: int,
        prompt_ids: list[int],
        output: Sequence[int] = (),
        trace: str = "t",
        guided_tokens: int | None = None,
    ) -> Stay:
        """A request, one that comes back with this output, enters a slot; who was there has left."""
        tokens = [*prompt_ids, *output]
        self.requests.prompt_len.np[slot], self.requests.prefill_len.np[slot] = len(prompt_ids), len(tokens)
        params = GuidanceParams("value", 1, 0.1, 5, guided_tokens=guided_tokens, trace_id=trace)
        stay = Stay(self.requests, self.slots.table, slot, guided_tokens)
        request = SlotRequest(slot, params, self.version, stay, len(prompt_ids), len(tokens))
        self.log.open(trace, stay)
        self.slots.put(slot, request, RowSettings.of(params, 1.0, END))
        self.requests.total_len.gpu[slot] = 0
        self._commit(slot, tokens)
        self.slots.flush()
        return stay

    def step(self, drawn: dict[int, list[int]], drafts: dict[int, list[int]] | None = None) -> Tensor:
        """One step of these slots, of which each draws tokens: the first of its drafts that came true, and one more."""
        fed = {slot: [self.tokens(slot)[-1], *(drafts or {}).get(slot, [])] for slot in drawn}
        lengths = {slot: len(self.tokens(slot)) for slot in drawn}
        positions = [lengths[slot] - 1 + row for slot in drawn for row in range(len(fed[slot]))]
        context = Context(
            torch.tensor([slot for slot in drawn for _ in fed[slot]]),
            array(list(drawn), int32),
            torch.tensor([token for slot in drawn for token in fed[slot]], dtype=torch.int32),
            torch.tensor(positions),
            array([lengths[slot] + len(fed[slot]) - 1 for slot in drawn], int32),
        )
        # The reference's logits depend on the position only, so that what is beside a row can't make a difference.
        guided_RV = self.slots.guide(torch.stack(list(map(logits, positions))), context)
        for slot, tokens in drawn.items():
            self._commit(slot, tokens)
        return guided_RV

    def tokens(self, slot: int) -> list[int]:
        return self.requests.all_token_ids.gpu[slot, : self.requests.total_len.gpu[slot]].tolist()

    def _commit(self, slot: int, tokens: list[int]) -> None:
        length = int(self.requests.total_len.gpu[slot])
        self.requests.all_token_ids.gpu[slot, length : length + len(tokens)] = torch.tensor(tokens, dtype=torch.int32)
        self.requests.total_len.gpu[slot] += len(tokens)


def logits(position: int) -> Tensor:
    return torch.randn(REFERENCE_VOCAB, generator=torch.Generator().manual_seed(position)) * 3


def summary(runner: Runner, tokens: list[int], trace: str = "t") -> GuidanceSummary:
    (outcome,) = runner.log.take(trace, [tokens], more_to_come=True)
    assert "kl" in outcome
    return outcome


@pytest.mark.parametrize("type_", ["v", "q"])
@pytest.mark.parametrize("kv_fraction", [1.0, 0.5], ids=["one piece", "pages"])
def test_a_draft_with_nan_values_that_does_not_come_true_fails_nothing(
    tmp_path: Path, type_: str, kv_fraction: float
) -> None:
    """Neither the rows before it in its step, nor those of later steps, of its request or of a longer neighbour."""
    ours, plain = (Runner(tmp_path / name, type_, kv_fraction) for name in ("ours", "plain"))
    for runner in (ours, plain):
        runner.add(0, prompt(8, seed=1))
        runner.add(1, prompt(30, seed=2), trace="neighbour")
    drafted = ours.step({0: [5], 1: [7]}, {0: [POISON, 4], 1: [3]})
    torch.testing.assert_close(drafted[[0, 3]], plain.step({0: [5], 1: [7]}), rtol=1e-5, atol=1e-4)
    assert drafted[1].argmax() == END
    for _ in range(3):
        expected_RV = plain.step({0: [6], 1: [7]})
        torch.testing.assert_close(ours.step({0: [6], 1: [7]}), expected_RV, rtol=1e-5, atol=1e-4)
    ours.slots.look_for_failures()
    assert ours.log.failures() == {}
    for trace, tokens in (("t", [5, 6, 6, 6]), ("neighbour", [7, 7, 7, 7])):
        assert summary(ours, tokens, trace) == pytest.approx(summary(plain, tokens, trace), rel=1e-5)


@pytest.mark.parametrize("kv_fraction", [1.0, 0.5], ids=["one piece", "pages"])
def test_a_draft_with_nan_values_that_comes_true_fails_the_tokens_after_it(tmp_path: Path, kv_fraction: float) -> None:
    runner = Runner(tmp_path, kv_fraction=kv_fraction)
    runner.add(0, prompt(8, seed=1))
    runner.step({0: [POISON, 4, 5]}, {0: [POISON, 4]})
    runner.slots.look_for_failures()
    assert runner.log.failures() == {"t": not_numbers()}
    assert summary(runner, [POISON])["guided_tokens"] == 1
    assert runner.log.take("t", [[POISON, 4]]) == [not_numbers()]


def test_what_is_on_record_does_not_depend_on_how_tokens_were_drafted(tmp_path: Path) -> None:
    """Rejected drafts leave their figures at positions that are drawn anew."""
    drafted, plain = (Runner(tmp_path / name) for name in ("drafted", "plain"))
    for runner in (drafted, plain):
        runner.add(0, prompt(8, seed=1), guided_tokens=5)
        runner.add(2, prompt(5, seed=2), trace="other")
    drafted.step({0: [5, 6, 7], 2: [3]}, {0: [5, 6, 9], 2: [8, 8]})
    drafted.step({0: [8], 2: [4]}, {0: [9, 9]})
    drafted.step({0: [9, 3, 4], 2: [5, 6]}, {0: [9, 3], 2: [5]})
    for token in [5, 6, 7, 8, 9, 3, 4]:
        plain.step({0: [token]})
    for token in [3, 4, 5, 6]:
        plain.step({2: [token]})
    assert summary(drafted, []) == summary(plain, [])
    for count in range(1, 8):
        tokens = [5, 6, 7, 8, 9, 3, 4][:count]
        found = summary(drafted, tokens)
        assert found["guided_tokens"] == min(count, 5)
        assert found == pytest.approx(summary(plain, tokens), rel=1e-5)
    assert summary(drafted, [3, 4, 5, 6], "other") == pytest.approx(summary(plain, [3, 4, 5, 6], "other"), rel=1e-5)


def test_a_record_outlives_its_slot_and_goes_on_in_another(tmp_path: Path) -> None:
    """Preempted and resumed elsewhere, while its first slot is given to requests that overwrite what was there."""
    ours, plain = (Runner(tmp_path / name, speculates=False) for name in ("ours", "plain"))
    plain.add(2, prompt(8, seed=1))
    for token in [5, 6, 7, 8]:
        plain.step({2: [token]})
    ours.add(2, prompt(8, seed=1))
    ours.step({2: [5]})
    ours.step({2: [6]})
    ours.add(2, prompt(3, seed=4), trace="next")
    for _ in range(10):
        ours.step({2: [3]})
    ours.add(1, prompt(8, seed=1), output=[5, 6])
    ours.step({1: [7], 2: [3]})
    ours.step({1: [8]})
    assert summary(ours, [5, 6, 7, 8]) == pytest.approx(summary(plain, [5, 6, 7, 8]), rel=1e-5)
    assert summary(ours, [3] * 11, "next")["guided_tokens"] == 11
    with pytest.raises(ValueError, match="no guidance record of trace 't' has generated these 3 tokens"):
        ours.log.take("t", [[5, 7, 7]])


def test_tokens_that_were_drawn_unguided_have_no_record(tmp_path: Path) -> None:
    """What was measured in the slot before is not taken for theirs."""
    runner = Runner(tmp_path, speculates=False)
    for trace in ("first", "second"):
        stay = runner.add(0, prompt(8, seed=1), trace=trace)
        if trace == "first":
            runner.step({0: [5]})
    stay.longest = 9
    runner._commit(0, [5])
    assert summary(runner, [5], "first")["guided_tokens"] == 1
    with pytest.raises(ValueError, match="no guidance record of trace 'second'"):
        runner.log.take("second", [[5]])


def test_kl_is_summed_in_float64(tmp_path: Path) -> None:
    runner = Runner(tmp_path, speculates=False)
    runner.add(0, prompt(8, seed=1))
    runner.step({0: [5]})
    runner.step({0: [6]})
    divergence_R3 = torch.tensor([[1e10, 1e9, 0.5], [1e-3, 1e-4, 0.75]], dtype=torch.float64)
    runner.slots.table.write(torch.tensor([0, 0]), torch.tensor([7, 8]), divergence_R3, torch.tensor([5, 4]))
    assert summary(runner, [5, 6]) == {
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
        runner.add(slot, prompt(4, seed=slot), trace=str(slot))
    guide = runner.slots.guide

    def watched(logits_RV: Tensor, context: Context) -> Tensor:
        with NothingWaits():
            return guide(logits_RV, context)

    runner.slots.guide = watched
    runner.step({0: [5], 1: [5]})
    runner.step({0: [5, 6], 1: [5], 2: [5]}, {0: [5, 9], 1: [POISON]})
    with NothingWaits(), pytest.raises(AssertionError, match="waits for the device"):
        runner.slots.look_for_failures()


def test_no_memory_is_taken_by_a_step(tmp_path: Path) -> None:
    runner = Runner(tmp_path, speculates=False)
    for slot in range(SLOTS):
        runner.add(slot, prompt(4, seed=slot), trace=str(slot))
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
    stays = [runner.add(slot, prompt(4, seed=1)) for slot in range(3)]
    for step in range(2):
        runner.step({slot: [choices[slot][step]] for slot in range(3)})
    each = [summary(runner, tokens) for tokens in choices]
    assert runner.log.take("t", choices, more_to_come=True) == each
    assert each[0] == each[1] != each[2], "what follows 5 is measured alike in both"
    runner.slots.drop_absent([])
    runner.requests.all_token_ids.gpu.zero_()
    assert runner.log.take("t", choices, more_to_come=True) == each
    on_host = [stay.read().tokens_N.data_ptr() for stay in stays]
    assert on_host == [stay.read().tokens_N.data_ptr() for stay in stays], "an ended stay is copied to the host once"
    assert runner.log.take("t", choices) == each
    assert runner.log.held == 0


@pytest.mark.parametrize("kv_fraction", [1.0, 0.8])
@pytest.mark.parametrize("type_", ["v", "q"])
def test_samples_of_one_prompt_compute_it_once(tmp_path: Path, type_: str, kv_fraction: float) -> None:
    prompt_ids = prompt(20, seed=3)

    def guided(traces: list[str]) -> tuple[list[Tensor], int]:
        """Of three requests of which two arrive together, one comes back after a preemption, and one is dropped."""
        runner = Runner(tmp_path / "-".join(traces), type_, kv_fraction)
        run = count_tokens(runner)
        for slot in (2, 0):
            runner.add(slot, prompt_ids, trace=traces[slot])
        steps = [runner.step({2: [5], 0: [6]})]
        runner.add(1, prompt_ids, trace=traces[1])
        steps.append(runner.step({2: [7], 0: [8], 1: [9]}))
        runner.add(0, prompt_ids, output=[6, 8], trace=traces[0])
        steps.append(runner.step({0: [1], 1: [2]}))
        runner.version.engine.cache.drop(2)
        steps.append(runner.step({0: [3], 2: [4]}))
        return steps, sum(run)

    alone, tokens_alone = guided(["a", "b", "c"])
    shared, tokens_shared = guided(["t", "t", "t"])
    for of_alone, of_shared in zip(alone, shared, strict=True):
        torch.testing.assert_close(of_shared, of_alone)
    # A new one runs its prompt's last token again, to draw.
    assert tokens_alone - tokens_shared == 19 + 19 + 20 + 20


def count_tokens(runner: Runner) -> list[int]:
    """Appended to: how many tokens each forward of the value model runs."""
    run: list[int] = []
    embedding = runner.version.engine.model.backbone.get_input_embeddings()
    embedding.register_forward_pre_hook(lambda _, inputs: run.append(inputs[0].numel()))
    return run
