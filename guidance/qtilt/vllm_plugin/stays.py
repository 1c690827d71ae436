"""What guidance did per generated token under Model Runner V2, where tokens are on the device only.

Shapes: ``R`` rows of a step, ``P`` positions.

A request's *stay* lasts from its arrival in the batch, or its return after a preemption, until its slot is given to
another one; nobody says when it leaves. A stay keeps references into the tensors of its steps and, from its end on, a
copy of its tokens; what was generated, and at which step what was measured, is read when the server asks for it.
What then happens is the same as for the other model runner: see records.py.
"""

import math
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from qtilt.vllm_plugin.failure import GuidanceFailure, not_numbers
from qtilt.vllm_plugin.records import GuidanceSummary, RecordStore

if TYPE_CHECKING:
    from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcRequestState


class StepRows(NamedTuple):
    """The rows of one step: slot and position of the token before the one that is drawn, the KL, NaN if guidance
    failed, and how many candidates were scored.

    A position may come again: what follows a rejected draft is drawn anew. The last time counts.
    """

    slots_R: Tensor
    positions_R: Tensor
    kl_R: Tensor
    candidates_R: Tensor


class Stay:
    """One stay of a request in slot ``slot``. ``longest``: at least how many tokens it has by now."""

    def __init__(self, requests: "LogitsProcRequestState", slot: int, guided_tokens: int | None) -> None:
        self._requests = requests
        self._slot = slot
        self._guided_tokens = guided_tokens
        self._prompt_len = int(requests.prompt_len.np[slot])
        self._prefill_len = int(requests.prefill_len.np[slot])
        self.longest = self._prefill_len
        self._steps: list[StepRows] = []
        self._ended: tuple[Tensor, Tensor] | None = None
        self._failed: tuple[GuidanceFailure, int] | None = None

    def write(self, step: StepRows) -> None:
        """The stay has had rows in this step."""
        self._steps.append(step)

    def fail(self, failure: GuidanceFailure, step: int) -> None:
        """Guidance of the token drawn after ``step`` generated ones has failed, and there is none after it."""
        self._failed = failure, step

    @property
    def failure(self) -> GuidanceFailure | None:
        """Why guidance has failed, as far as the host knows."""
        return self._failed[0] if self._failed is not None else None

    def end(self) -> None:
        """The slot goes to another request: keep what is still to be read of this one's."""
        if self._ended is None:
            tokens_P, length = self._on_device()
            self._ended = tokens_P[: self.longest + 1].clone(), length.clone()

    def look_for_failure(self) -> None:
        """Have a NaN among the KLs of generated tokens become the failure. Waits for the device."""
        tokens, measured = self._read()
        failed = [step for step, (kl, _) in measured.items() if math.isnan(kl) and self._counts(step, tokens)]
        if failed and self._failed is None:
            self.fail(not_numbers(), min(failed))

    def replay(self, store: RecordStore, trace_id: str) -> None:
        """Write this stay into a store as the other model runner does while it happens. Waits for the device."""
        self.look_for_failure()
        tokens, measured = self._read()
        known = self._prefill_len - self._prompt_len
        record = store.open(trace_id, tokens[:known], self._guided_tokens)
        record.output_token_ids.extend(tokens[known:])
        if measured:
            kl_R, candidates_R = torch.tensor(list(measured.values()), dtype=torch.float64).unbind(1)
            for row, step in enumerate(measured):
                record.write(step, kl_R, candidates_R, row)
        if self._failed is not None:
            record.fail(*self._failed)
        record.close()

    def _counts(self, step: int, tokens: Sequence[int]) -> bool:
        return step < len(tokens) and (self._guided_tokens is None or step < self._guided_tokens)

    def _on_device(self) -> tuple[Tensor, Tensor]:
        """Token ids ``[P]`` of the slot's request and how many of them there are."""
        if self._ended is not None:
            return self._ended
        return self._requests.all_token_ids.gpu[self._slot], self._requests.total_len.gpu[self._slot]

    def _read(self) -> tuple[list[int], dict[int, tuple[float, int]]]:
        """The generated tokens, and KL and scored candidates by the number of tokens generated before the step."""
        tokens_P, length = self._on_device()
        tokens = tokens_P[self._prompt_len : int(length)].tolist()
        if not self._steps:
            return tokens, {}
        columns = (torch.cat(parts).tolist() for parts in zip(*self._steps, strict=True))
        first = self._prompt_len - 1
        return tokens, {
            position - first: (kl, candidates)
            for slot, position, kl, candidates in zip(*columns, strict=True)
            if slot == self._slot and position >= first
        }


class StayLog:
    """All stays by trace id, in the order of their beginnings. A trace stays until it is taken."""

    def __init__(self) -> None:
        self._traces: dict[str, list[Stay]] = {}
        # A request may run on for some steps after its trace was taken, and come back from a preemption.
        self._taken: deque[str] = deque(maxlen=1000)

    @property
    def held(self) -> int:
        """How many traces haven't been taken yet."""
        return len(self._traces)

    def open(self, trace_id: str, stay: Stay) -> None:
        """A request enters the batch, new or back after a preemption."""
        if trace_id not in self._taken:
            self._traces.setdefault(trace_id, []).append(stay)

    def failed(self, trace_id: str) -> GuidanceFailure | None:
        """Why a request of the trace has failed, as far as the host knows."""
        return next((stay.failure for stay in self._traces.get(trace_id, []) if stay.failure is not None), None)

    def failures(self) -> dict[str, GuidanceFailure]:
        """The traces, not taken yet, of which a request is known to have failed."""
        found = {trace_id: self.failed(trace_id) for trace_id in self._traces}
        return {trace_id: failure for trace_id, failure in found.items() if failure is not None}

    def take(
        self, trace_id: str, returned: Sequence[Sequence[int]], more_to_come: bool = False
    ) -> list[GuidanceSummary | GuidanceFailure]:
        """As :meth:`RecordStore.take`."""
        store = RecordStore()
        if returned:
            for stay in self._traces.get(trace_id, []):
                stay.replay(store, trace_id)
        if not more_to_come:
            self._traces.pop(trace_id, None)
            self._taken.append(trace_id)
        return store.take(trace_id, returned)
