"""Records of guidance: found by what was generated, summed over what was returned, gone once taken."""

import pytest
import torch

from qtilt.vllm_plugin.failure import not_numbers
from qtilt.vllm_plugin.records import GuidanceSummary, Record, RecordStore
from qtilt.vllm_plugin.v1.history import TokenHistory


def write_steps(record: Record, first: int, *kls: float) -> None:
    for step, kl in enumerate(kls, start=first):
        divergence_B3 = torch.tensor([[99.0] * 3, [kl, kl / 4, 1 / (1 + step)]], dtype=torch.float64)
        record.write(step, divergence_B3, torch.tensor([99, 10 + step]), 1)


def summary(guided_tokens: int, kl: float, candidates: float) -> GuidanceSummary:
    """Of steps written by :func:`write_steps`."""
    masses = [1 / (1 + step) for step in range(guided_tokens)]
    return {
        "guided_tokens": guided_tokens,
        "kl": kl,
        "kl_candidates": kl / 4,
        "mass": sum(masses) / guided_tokens if guided_tokens else None,
        "candidates": candidates,
    }


def test_the_sum_covers_the_returned_tokens_and_no_step_after_them() -> None:
    store, tokens = RecordStore(), [5, 6, 7]
    write_steps(store.open("t", tokens, None), 0, 1.0, 2.0, 4.0, 8.0)
    assert store.take("t", [[5, 6]]) == [summary(2, 3.0, 10.5)]
    assert store.held == 0


def test_steps_after_the_guided_tokens_are_not_summed() -> None:
    store, tokens = RecordStore(), [5, 6, 7]
    write_steps(store.open("t", tokens, 2), 0, 1.0, 2.0)
    assert store.take("t", [tokens]) == [summary(2, 3.0, 10.5)]


def test_a_discarded_step_is_overwritten() -> None:
    store, tokens = RecordStore(), []
    record = store.open("t", tokens, None)
    write_steps(record, 0, 50.0)
    write_steps(record, 0, 1.0)
    tokens.append(5)
    assert store.take("t", [[5]]) == [summary(1, 1.0, 10.0)]


def test_a_discarded_step_that_a_preemption_left_behind_does_not_count() -> None:
    """Preempted again amid the prefill of its first resumption: the step after [5, 6] was guided three times."""
    store, tokens = RecordStore(), [5, 6]
    for discarded in (32.0, 64.0):
        record = store.open("t", tokens, 3)
        write_steps(record, 0, 1.0, 2.0, discarded)
        record.close()
    write_steps(store.open("t", tokens, 3), 2, 4.0)
    tokens += [7, 8]
    assert store.take("t", [[5, 6, 7, 8]]) == [summary(3, 7.0, 11.0)]


def test_a_choice_that_resumes_does_not_lend_its_discarded_step_to_an_equal_one() -> None:
    store = RecordStore()
    write_steps(store.open("t", [5, 6], None), 0, 1.0, 2.0, 64.0)  # amid its prefill
    write_steps(store.open("t", [5, 6, 7], None), 0, 1.0, 2.0, 4.0)
    assert store.take("t", [[5, 6, 7]], more_to_come=True) == [summary(3, 7.0, 11.0)]


def test_a_failure_concerns_what_was_returned_from_its_step_on() -> None:
    """Not what a stop string cut off before it, and not a choice that went another way before it."""
    store, failure = RecordStore(), not_numbers()
    failing = store.open("t", [5, 6, 7], None)
    write_steps(failing, 0, 1.0, 2.0, 0.0)
    failing.fail(failure, 2)
    write_steps(store.open("t", [5, 9, 7], None), 0, 1.0, 8.0, 16.0)
    assert store.failures() == {"t": failure}
    assert store.take("t", [[5, 6], [5, 6, 7], [5, 9, 7], []]) == [
        summary(2, 3.0, 10.5),
        failure,
        summary(3, 25.0, 11.0),
        summary(0, 0.0, 0.0),
    ]
    assert store.failures() == {}
    assert store.held == 0


def test_a_request_that_comes_back_has_still_failed() -> None:
    store, failure = RecordStore(), not_numbers()
    earlier = store.open("t", [5, 6], None)
    earlier.fail(failure, 1)
    earlier.close()
    assert store.open("t", [5, 6], None).failure == failure
    assert store.open("t", [5], None).failure is None, "the step that failed is not among these tokens"


@pytest.mark.parametrize("late", [False, True], ids=["known in time", "known when the row has left"])
def test_the_failure_of_a_discarded_step_is_lost_with_a_preemption(late: bool) -> None:
    store = RecordStore()
    earlier = store.open("t", [5, 6], None)
    if not late:
        earlier.fail(not_numbers(), 2)
    earlier.close()
    if late:
        earlier.fail(not_numbers(), 2)
    assert store.failures() == {}
    assert store.open("t", [5, 6], None).failure is None


def test_choices_of_one_trace_are_told_apart_by_their_tokens() -> None:
    store = RecordStore()
    write_steps(store.open("t", [5, 6], None), 0, 1.0, 2.0)
    write_steps(store.open("t", [5, 9], None), 0, 1.0, 2.0)
    write_steps(store.open("t", [7, 6], None), 0, 1.0, 8.0)
    assert store.take("t", [[7, 6], [5, 6], [5, 9]], more_to_come=True) == [
        summary(2, 9.0, 10.5),
        summary(2, 3.0, 10.5),
        summary(2, 3.0, 10.5),
    ]
    assert store.held == 1
    assert store.take("t", []) == []
    assert store.held == 0


@pytest.mark.parametrize("same_list", [True, False])
def test_a_request_that_comes_back_goes_on_with_its_own_steps(same_list: bool) -> None:
    """Without and with async scheduling, which makes a new list and may leave a placeholder in the old one."""
    store, ours = RecordStore(), [5, 6, 7]
    write_steps(store.open("t", [5, 9, 9, 9], None), 0, 1.0, 64.0, 64.0, 64.0)
    write_steps(store.open("t", ours, None), 0, 1.0, 2.0, 4.0)
    resumed = ours if same_list else [5, 6, 7]
    if not same_list:
        ours[-1] = -1
    record = store.open("t", resumed, None)
    write_steps(record, 3, 8.0)
    resumed.append(3)
    assert store.take("t", [[5, 6, 7, 3]]) == [summary(4, 15.0, 11.5)]


def test_a_request_that_outlives_its_trace_does_not_bring_it_back() -> None:
    store = RecordStore()
    store.take("t", [])
    store.open("t", [5], None)
    assert store.held == 0


def test_tokens_that_were_not_generated_are_an_error_and_the_trace_is_gone() -> None:
    store = RecordStore()
    write_steps(store.open("t", [5, 6], None), 0, 1.0, 2.0)
    with pytest.raises(ValueError, match="no guidance record of trace 't'"):
        store.take("t", [[4, 6]])
    assert store.held == 0


def test_a_history_reads_like_the_joined_lists_and_grows_with_them() -> None:
    prompt, output = [1, 2, 3], [4]
    history = TokenHistory(prompt, output, vocab_size=8)
    output += [5, 99]
    joined = [1, 2, 3, 4, 5, 7]
    assert len(history) == len(joined)
    assert list(history) == joined
    assert history[-1] == 7
    for start in range(7):
        for stop in range(7):
            assert history[start:stop] == joined[start:stop]
    with pytest.raises(ValueError, match="step 1"):
        history[::2]
