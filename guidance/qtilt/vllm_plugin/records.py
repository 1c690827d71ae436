"""What guidance did per generated token, the KLs(guided ‖ reference) above all, kept until the server asks for it.

A processor sees no request id, and the children of n > 1 share one trace id. So a record is found by what was
generated: the KL of the step that follows n tokens depends on those n tokens only, and equal tokens have equal KL.
A record is indexed by the number of tokens generated before the step. A step counts once its token is in the live list:
vLLM discards the token of a chunk of an unfinished prefill, which then is overwritten by the step that counts, or lost
with the row when a preemption comes first.

A failure of guidance is found in the same way: it concerns the returned tokens if its step drew one of them.
"""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from typing import Generic, Protocol, TypedDict, TypeVar

import torch
from torch import Tensor

from qtilt.vllm_plugin.failure import GuidanceFailure


class GuidanceSummary(TypedDict):
    """What was done to one returned choice, over its guided tokens.

    kl, kl_candidates: summed, in nats; see :class:`qtilt.tilt.Divergence`. mass: the reference's in the candidates, in
    the mean, None without a guided token. candidates: how many were scored for one of them in the mean.
    """

    guided_tokens: int
    kl: float
    kl_candidates: float
    mass: float | None
    candidates: float


def summarise(divergence_N3: Tensor, candidates_N: Tensor) -> GuidanceSummary:
    """Of the guided steps of a choice, on the host: the columns of ``Divergence``, and how many were scored."""
    guided = len(candidates_N)
    kl, kl_candidates, mass = divergence_N3.sum(0).tolist()
    return {
        "guided_tokens": guided,
        "kl": kl,
        "kl_candidates": kl_candidates,
        "mass": mass / guided if guided else None,
        "candidates": float(candidates_N.double().mean()) if guided else 0.0,
    }


class MayFail(Protocol):
    """One request, as far as it was in the batch."""

    @property
    def failure(self) -> GuidanceFailure | None:
        """Why its guidance has failed, as far as the host knows."""


KeptT = TypeVar("KeptT", bound=MayFail)


class TraceLog(ABC, Generic[KeptT]):
    """What requests leave behind, by trace id. A trace stays until it is taken, however its requests ended."""

    def __init__(self) -> None:
        self._traces: dict[str, list[KeptT]] = {}
        # A request may run on for some steps after its trace was taken (a stop string, which only the API process
        # sees), and come back from a preemption: it must not bring the trace back.
        self._taken: deque[str] = deque(maxlen=1000)

    @property
    def held(self) -> int:
        """How many traces haven't been taken yet."""
        return len(self._traces)

    def failures(self) -> dict[str, GuidanceFailure]:
        """The traces, not taken yet, of which a request has failed."""
        return {
            trace_id: kept.failure
            for trace_id, all_kept in self._traces.items()
            for kept in all_kept
            if kept.failure is not None
        }

    def take(
        self, trace_id: str, returned: Sequence[Sequence[int]], more_to_come: bool = False
    ) -> list[GuidanceSummary | GuidanceFailure]:
        """Per returned token sequence its summary, or why its guidance failed.

        The trace is forgotten, also when ``returned`` is empty.

        more_to_come: keep the trace, because other choices of it (a stream with n > 1) haven't finished yet.

        Raises ValueError when a returned sequence was not generated under this trace.
        """
        kept = self._traces.get(trace_id, [])
        if not more_to_come:
            self._traces.pop(trace_id, None)
            self._taken.append(trace_id)
        return self._outcomes(kept, returned, trace_id)

    def _keep(self, trace_id: str, kept: KeptT) -> None:
        if trace_id not in self._taken:
            self._traces.setdefault(trace_id, []).append(kept)

    @abstractmethod
    def _outcomes(
        self, kept: Sequence[KeptT], returned: Sequence[Sequence[int]], trace_id: str
    ) -> list[GuidanceSummary | GuidanceFailure]:
        """As :meth:`take`, of all that is kept of the trace."""


def not_generated(trace_id: str, tokens: Sequence[int]) -> ValueError:
    """To raise when tokens are asked for that were not generated under guidance."""
    return ValueError(f"no guidance record of trace {trace_id!r} has generated these {len(tokens)} tokens")


class Record:
    """The guided steps of one running request.

    output_token_ids: the model runner's live list. guided_tokens: how many tokens are guided at most, None for all.
    Its numbers stay references into their step's tensors until they are read, so a step never waits for the device.
    """

    def __init__(self, output_token_ids: list[int], guided_tokens: int | None) -> None:
        self.output_token_ids = output_token_ids
        self._guided_tokens = guided_tokens
        self._rows_by_step: dict[int, tuple[Tensor, Tensor, int]] = {}
        self._failed_step = 0
        self._closed_at: int | None = None
        self.failure: GuidanceFailure | None = None

    def write(self, step: int, divergence_B3: Tensor, candidates_B: Tensor, row: int) -> None:
        """The divergence and the number of scored candidates, by row, of the step after ``step`` generated tokens."""
        self._rows_by_step[step] = (divergence_B3, candidates_B, row)

    def fail(self, failure: GuidanceFailure, step: int) -> None:
        """Guidance of the token drawn after ``step`` generated ones has failed, and there is none after it.

        The row may have left in the meantime, as the host learns late of what happened on the device.
        """
        if self._closed_at is None or step < self._closed_at:
            self.failure, self._failed_step = failure, step

    def failure_of(self, tokens: Sequence[int]) -> tuple[GuidanceFailure, int] | None:
        """The failure and its step, if guidance failed on one of these first tokens of this request."""
        step = self._failed_step
        if self.failure is None or step >= len(tokens) or self.output_token_ids[:step] != list(tokens[:step]):
            return None
        return self.failure, step

    def close(self) -> None:
        """The request leaves the batch, to come back or not: what has no token yet never will, in this record."""
        self._closed_at = len(self.output_token_ids)
        for step in [step for step in self._rows_by_step if step >= self._closed_at]:
            del self._rows_by_step[step]
        if self._failed_step >= self._closed_at:
            self.failure = None

    def copy_steps(self, other: "Record", count: int) -> None:
        """Take over the first ``count`` steps of a record of the same tokens."""
        for step in range(count):
            if step in other._rows_by_step:
                self._rows_by_step[step] = other._rows_by_step[step]

    def generated(self, tokens: Sequence[int]) -> bool:
        """Whether these were the first tokens of this request, as far as they decided any KL: all but the last."""
        # With async scheduling the last token of the live list may still be a placeholder.
        decided = max(len(tokens) - 1, 0)
        return self.output_token_ids[:decided] == list(tokens[:decided]) and self._covers(len(tokens))

    def summary(self, tokens_returned: int) -> GuidanceSummary:
        """Over the guided steps of the first ``tokens_returned`` tokens."""
        guided = self._guided_steps(tokens_returned)
        if guided == 0:
            return summarise(torch.zeros(0, 3), torch.zeros(0))
        rows = [self._rows_by_step[step] for step in range(guided)]
        divergence_N3 = torch.stack([divergence_B3[row] for divergence_B3, _, row in rows])
        return summarise(divergence_N3.double(), torch.stack([candidates_B[row] for _, candidates_B, row in rows]))

    def _covers(self, tokens_returned: int) -> bool:
        steps = self._guided_steps(tokens_returned)
        return steps <= len(self.output_token_ids) and all(step in self._rows_by_step for step in range(steps))

    def _guided_steps(self, tokens_returned: int) -> int:
        return tokens_returned if self._guided_tokens is None else min(tokens_returned, self._guided_tokens)


class RecordStore(TraceLog[Record]):
    """All records by trace id."""

    def open(self, trace_id: str, output_token_ids: list[int], guided_tokens: int | None) -> Record:
        """The record of a request that enters the batch, new or back after a preemption.

        A request that comes back finds its earlier steps, and its failure, by its tokens, and it doesn't matter from
        which record of equal tokens.
        """
        record = Record(output_token_ids, guided_tokens)
        records = self._traces.get(trace_id, [])
        for earlier in records:
            if output_token_ids and earlier.generated(output_token_ids):
                record.copy_steps(earlier, len(output_token_ids))
                break
        if (failed := _failure(records, output_token_ids)) is not None:
            record.fail(*failed)
        self._keep(trace_id, record)
        return record

    def _outcomes(
        self, kept: Sequence[Record], returned: Sequence[Sequence[int]], trace_id: str
    ) -> list[GuidanceSummary | GuidanceFailure]:
        return [_outcome(kept, tokens, trace_id) for tokens in returned]


def _outcome(records: Sequence[Record], tokens: Sequence[int], trace_id: str) -> GuidanceSummary | GuidanceFailure:
    if (failed := _failure(records, tokens)) is not None:
        return failed[0]
    return _find(records, tokens, trace_id).summary(len(tokens))


def _failure(records: Sequence[Record], tokens: Sequence[int]) -> tuple[GuidanceFailure, int] | None:
    return next((failed for record in records if (failed := record.failure_of(tokens)) is not None), None)


def _find(records: Sequence[Record], tokens: Sequence[int], trace_id: str) -> Record:
    if not tokens:
        return Record([], None)
    for record in records:
        if record.generated(tokens):
            return record
    raise not_generated(trace_id, tokens)
