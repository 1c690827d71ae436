"""The requests of vLLM's V1 model runner, which shows logits processors an index in the batch that changes.

Shapes: ``S`` slots, ``P`` positions of a slot, ``N`` requests of a step. Imports no vLLM.

Here each request gets a slot for as long as it is in the batch, and its tokens go into a table on the device: those
that it came with, then in each step the one that was fed. What this rests on (vLLM 0.32,
``vllm/v1/sample/logits_processor`` and ``gpu_input_batch.py``):

- ``update_state(None)`` means an unchanged batch. Removals come first, then additions, then moves; an index that is
  refilled by an addition or a move is missing from ``removed``.
- The output list of an added request may end in a placeholder for a token that async scheduling doesn't know yet. That
  token is fed in the next step.
- Rows of an unfinished chunked prefill reach ``apply``; the tokens drawn from them are discarded.
- A preempted request is removed, and added again when it resumes; its prefill, in chunks too, starts anew.
"""

import heapq
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from qtilt.forwards.arrays import Int32Array, IntArray, copy_to_device
from qtilt.vllm_plugin.runner import StepRows


class V1Requests:
    """See :class:`qtilt.vllm_plugin.runner.Requests`. Without drafts: V1 excludes them."""

    speculates = False
    total_len_S: Tensor | None = None

    def __init__(self, device: torch.device, slots: int, max_length: int) -> None:
        self.device = device
        self.slots = slots
        self.tokens_SP = torch.zeros(slots, max_length, dtype=torch.int32, device=device)
        self._free = list(range(slots))
        self._slot_of_index: dict[int, int] = {}
        self._prefill_of_slot: dict[int, Int32Array] = {}
        self._prompt_len_S = np.zeros(slots, dtype=np.int64)
        self._prefill_len_S = np.zeros(slots, dtype=np.int64)

    def add(self, index: int) -> int:
        """A request arrives at an index that is free: its slot, the lowest that is free."""
        slot = self._slot_of_index[index] = heapq.heappop(self._free)
        return slot

    def fill(self, slot: int, prompt: Sequence[int], output: Sequence[int]) -> None:
        """The tokens that a guided request came with."""
        tokens = np.array([*prompt, *output], dtype=np.int32)
        self._prompt_len_S[slot] = len(prompt)
        self._prefill_len_S[slot] = len(tokens)
        # A placeholder, behind all others, is read by nobody: the token is fed, and written here, in the next step.
        self._prefill_of_slot[slot] = tokens[: len(tokens) - (tokens[-1] < 0)]
        (self.tokens_SP[slot, : len(tokens)],) = copy_to_device(self.device, tokens)

    def remove(self, index: int) -> int | None:
        """The request at the index, if there is one, has left: the slot that it had."""
        slot = self._slot_of_index.pop(index, None)
        if slot is not None:
            heapq.heappush(self._free, slot)
            self._prefill_of_slot.pop(slot, None)
            self._prefill_len_S[slot] = 0
        return slot

    def swap(self, first: int, second: int) -> None:
        """Exchange the requests of two indices; where there is none, the other moves there."""
        slots = {second: self._slot_of_index.pop(first, None), first: self._slot_of_index.pop(second, None)}
        self._slot_of_index.update({index: slot for index, slot in slots.items() if slot is not None})

    def prompt_len(self, slot: int) -> int:
        return int(self._prompt_len_S[slot])

    def prefill_len(self, slot: int) -> int:
        return int(self._prefill_len_S[slot])

    def prefill(self, slot: int) -> Int32Array:
        return self._prefill_of_slot[slot]

    def step_rows(self, lengths_N: IntArray, token_ids_N: Tensor) -> StepRows:
        """The layout of a step. lengths_N: tokens visible to those that are drawn. token_ids_N: the last of these."""
        slots_N = np.array([self._slot_of_index[index] for index in range(len(lengths_N))])
        ((slots_R, positions_R),) = copy_to_device(self.device, np.stack([slots_N, lengths_N - 1]))
        self.tokens_SP[slots_R, positions_R] = token_ids_N.int()
        return StepRows(slots_N, lengths_N, slots_R, positions_R, token_ids_N.long())
