"""What the two model runners tell of their requests, without vLLM: slots, and the layout of a step."""

import random
from types import SimpleNamespace

import numpy as np
import torch

from qtilt.vllm_plugin.v1.requests import V1Requests
from qtilt.vllm_plugin.v2.requests import step_rows
from running_batch import CPU, LENGTH

SLOTS = 6


def test_requests_of_v1_keep_their_slot_through_any_removals_moves_and_swaps() -> None:
    """Against a plain list of who sits where."""
    chance, requests = random.Random(0), V1Requests(CPU, SLOTS, LENGTH)
    seats: list[int | None] = [None] * SLOTS
    for number in range(500):
        source, target = chance.sample(range(SLOTS), 2)
        match chance.choice(["add", "add", "remove", "move", "swap"]):
            case "add":
                assert requests.remove(source) == seats[source]
                seats[source] = requests.add(source)
                requests.fill(seats[source], [number, 2], [3, -1])
                assert requests.prefill(seats[source]).tolist() == [number, 2, 3], "without the placeholder"
                assert requests.prefill_len(seats[source]) == 4
            case "remove":
                assert requests.remove(source) == seats[source]
                seats[source] = None
            case "move":
                assert requests.remove(target) == seats[target]
                requests.swap(source, target)
                seats[target], seats[source] = seats[source], None
            case "swap":
                requests.swap(source, target)
                seats[source], seats[target] = seats[target], seats[source]
        held = [slot for slot in seats if slot is not None]
        assert len(set(held)) == len(held)
        if None not in seats:
            lengths = torch.randint(3, LENGTH, (SLOTS,))
            rows = requests.step_rows(lengths.numpy(), torch.arange(SLOTS))
            assert rows.slots_N.tolist() == rows.slots_R.tolist() == seats
            assert requests.tokens_SP[rows.slots_R, lengths - 1].tolist() == list(range(SLOTS))


def test_a_step_of_v2_for_a_captured_graph_of_more_requests() -> None:
    """vLLM pads what it tells of lengths, and nothing else."""
    context = SimpleNamespace(
        idx_mapping_np=np.array([4, 1, 3], dtype=np.int32),
        seq_lens_upper_bound_np=np.array([9, 5, 7, 0], dtype=np.int32),
        expanded_idx_mapping=torch.tensor([4, 1, 3]),
        pos=torch.tensor([8, 4, 6]),
        input_ids=torch.tensor([1, 2, 3]),
    )
    rows = step_rows(context)
    assert rows.lengths_N.tolist() == [9, 5, 7]
    assert not rows.has_drafts
