"""Records of guidance: found by what was generated, summed over what was returned, gone once taken."""

from collections.abc import Sequence

import pytest
import torch

from qtilt.vllm_plugin.failure import not_numbers
from qtilt.vllm_plugin.records import GuidanceSummary, Records, Stay, StepTable
from running_batch import PlayedRequests

SLOTS = 4
PROMPT = [1, 2, 3]


class Recording:
    """Requests of one trace, each step of which measures what it is told: the same after the same tokens."""

    def __init__(self) -> None:
        self.requests = PlayedRequests(SLOTS, speculates=False)
        self.table, self.records = StepTable(self.requests), Records()

    def stay(self, slot: int, output: Sequence[int] = (), guided_tokens: int | None = None) -> Stay:
        """A request enters, or comes back with this output."""
        self.requests.enter(slot, PROMPT, output)
        self.table.clear(slot, self.requests.total_lens[slot])
        stay = Stay(self.requests, self.table, slot, guided_tokens)
        self.records.open("t", stay)
        return stay

    def step(self, slot: int, kl: float, token: int | None) -> None:
        """token: None if what is drawn is discarded."""
        position = torch.tensor([self.requests.total_lens[slot] - 1])
        generated = int(position) - len(PROMPT) + 1
        divergence_13 = torch.tensor([[kl, kl / 4, 1 / (1 + generated)]], dtype=torch.float64)
        self.table.note_lengths(torch.tensor([slot]).numpy(), (position + 1).numpy())
        self.table.write(torch.tensor([slot]), position, divergence_13, torch.tensor([10 + generated]))
        if token is not None:
            self.requests.commit(slot, [token])

    def run(self, slot: int, tokens: Sequence[int], *kls: float) -> None:
        for token, kl in zip(tokens, kls, strict=True):
            self.step(slot, kl, token)


@pytest.fixture
def recording() -> Recording:
    return Recording()


def summary(guided_tokens: int, kl: float) -> GuidanceSummary:
    """Of first steps as Recording measures them."""
    masses = [1 / (1 + step) for step in range(guided_tokens)]
    return {
        "guided_tokens": guided_tokens,
        "kl": kl,
        "kl_candidates": kl / 4,
        "mass": sum(masses) / guided_tokens if guided_tokens else None,
        "candidates": 10 + (guided_tokens - 1) / 2 if guided_tokens else 0.0,
    }


def test_the_sum_covers_the_returned_tokens_and_no_step_after_them(recording: Recording) -> None:
    recording.stay(0)
    recording.run(0, [5, 6, 7, 8], 1.0, 2.0, 4.0, 8.0)
    assert recording.records.take("t", [[5, 6]]) == [summary(2, 3.0)]
    assert recording.records.held == 0


def test_steps_after_the_guided_tokens_are_not_summed(recording: Recording) -> None:
    recording.stay(0, guided_tokens=2)
    recording.run(0, [5, 6, 7], 1.0, 2.0, 64.0)
    assert recording.records.take("t", [[5, 6, 7]]) == [summary(2, 3.0)]


def test_a_discarded_step_is_overwritten(recording: Recording) -> None:
    recording.stay(0)
    recording.step(0, 50.0, None)
    recording.run(0, [5], 1.0)
    assert recording.records.take("t", [[5]]) == [summary(1, 1.0)]


def test_a_request_that_comes_back_goes_on_with_its_own_steps(recording: Recording) -> None:
    """Beside another choice with equal first tokens, and while its first slot is given to a further one."""
    recording.stay(0)
    recording.run(0, [5, 9, 9, 9], 1.0, 2.0, 64.0, 64.0)
    first = recording.stay(1)
    recording.run(1, [5, 6, 7], 1.0, 2.0, 4.0)
    first.end()
    recording.stay(1)
    recording.run(1, [8], 1.0)
    recording.stay(2, output=[5, 6, 7])
    recording.run(2, [3], 8.0)
    assert recording.records.take("t", [[5, 6, 7, 3], [8]]) == [summary(4, 15.0), summary(1, 1.0)]


def test_a_step_whose_token_a_preemption_discarded_is_measured_again(recording: Recording) -> None:
    stay = recording.stay(0)
    recording.run(0, [5, 6], 1.0, 2.0)
    recording.step(0, 4.0, None)
    stay.end()
    recording.stay(3, output=[5, 6])
    recording.run(3, [7], 4.0)
    assert recording.records.take("t", [[5, 6, 7]]) == [summary(3, 7.0)]


def test_a_failure_concerns_what_was_returned_from_its_step_on(recording: Recording) -> None:
    """Not what a stop string cut off before it, and not a choice that went another way before it."""
    failing = recording.stay(0)
    recording.run(0, [5, 6, 7], 1.0, 2.0, 0.0)
    failing.fail(not_numbers(), 2)
    recording.stay(1)
    recording.run(1, [5, 9, 7], 1.0, 2.0, 16.0)
    assert recording.records.failures() == {"t": not_numbers()}
    assert recording.records.take("t", [[5, 6], [5, 6, 7], [5, 9, 7], []]) == [
        summary(2, 3.0),
        not_numbers(),
        summary(3, 19.0),
        summary(0, 0.0),
    ]
    assert recording.records.failures() == {}
    assert recording.records.held == 0


def test_a_nan_in_the_table_is_a_failure(recording: Recording) -> None:
    recording.stay(0)
    recording.run(0, [5, 6, 7], 1.0, float("nan"), 4.0)
    assert recording.records.take("t", [[5], [5, 6], [5, 9]], more_to_come=True) == [
        summary(1, 1.0),
        not_numbers(),
        not_numbers(),
    ], "what was drawn doesn't matter to the step that drew it"
    assert recording.records.failures() == {"t": not_numbers()}


def test_the_failure_of_a_request_that_has_left_is_found(recording: Recording) -> None:
    """A grammar may have ended it in the step that failed, before anybody asked."""
    stay = recording.stay(0)
    recording.run(0, [5, 6], 1.0, float("nan"))
    assert recording.records.failures() == {}
    stay.end()
    assert recording.records.failures() == {"t": not_numbers()}


def test_choices_of_one_trace_are_told_apart_by_their_tokens(recording: Recording) -> None:
    for slot, (tokens, kl) in enumerate([([5, 6], 2.0), ([5, 9], 2.0), ([7, 6], 8.0)]):
        recording.stay(slot)
        recording.run(slot, tokens, 1.0, kl)
    expected = [summary(2, 9.0), summary(2, 3.0), summary(2, 3.0)]
    assert recording.records.take("t", [[7, 6], [5, 6], [5, 9]], more_to_come=True) == expected
    assert recording.records.held == 1
    assert recording.records.take("t", []) == []
    assert recording.records.held == 0


def test_a_request_that_outlives_its_trace_does_not_bring_it_back(recording: Recording) -> None:
    recording.records.take("t", [])
    recording.stay(0, output=[5])
    assert recording.records.held == 0


def test_tokens_that_were_not_generated_are_an_error_and_the_trace_is_gone(recording: Recording) -> None:
    recording.stay(0)
    recording.run(0, [5, 6], 1.0, 2.0)
    with pytest.raises(ValueError, match="no guidance record of trace 't'"):
        recording.records.take("t", [[4, 6]])
    assert recording.records.held == 0
