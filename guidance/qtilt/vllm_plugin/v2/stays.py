"""What guidance did per generated token under Model Runner V2, where tokens are on the device only.

Shapes: ``S`` slots and one that is nobody's, ``P`` positions of a slot, ``R`` rows of a step, ``N`` generated tokens.

A request's *stay* lasts from its arrival in the batch, or its return after a preemption, until its slot is given to
another one; nobody says when it leaves. Each step writes what it measured into one table on the device. What was
generated, and what was measured for it, is read when the server asks for it; from its end on, a stay has a copy.

As for the other model runner (records.py), a step's KL and its failure depend on the tokens before it only: they count
for all returned tokens that begin with these, whichever choice of a trace they were measured for.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from qtilt.vllm_plugin.failure import GuidanceFailure, not_numbers
from qtilt.vllm_plugin.records import GuidanceSummary, TraceLog, not_generated, summarise

if TYPE_CHECKING:
    from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcRequestState

UNMEASURED = -1


class StepTable:
    """What was measured by the step that drew the token after each position, for the requests in all slots.

    divergence_SP3: the columns of :class:`qtilt.tilt.Divergence`, NaN where guidance failed. candidates_SP: how many
    were scored, UNMEASURED where no step was guided. These 28 bytes a position are little beside a value cache, which
    has kilobytes.
    """

    def __init__(self, requests: "LogitsProcRequestState") -> None:
        slots, positions = requests.all_token_ids.gpu.shape
        shape, device = (slots + 1, positions), requests.device
        self.divergence_SP3 = torch.zeros((*shape, 3), dtype=torch.float64, device=device)
        self.candidates_SP = torch.full(shape, UNMEASURED, dtype=torch.int32, device=device)

    def clear(self, slot: int) -> None:
        """Another request takes the slot."""
        self.candidates_SP[slot] = UNMEASURED

    def write(self, slots_R: Tensor, positions_R: Tensor, divergence_R3: Tensor, candidates_R: Tensor) -> None:
        """What a step measured. A position may come again: what follows a rejected draft is drawn anew."""
        self.divergence_SP3[slots_R, positions_R] = divergence_R3
        self.candidates_SP[slots_R, positions_R] = candidates_R.int()


class Steps(NamedTuple):
    """The steps that drew a request's generated tokens: these tokens, and what is in the table of each."""

    tokens_N: Tensor
    divergence_N3: Tensor
    candidates_N: Tensor

    def drawn_like(self, tokens: Sequence[int]) -> int:
        """How many first steps drew their tokens after the same ones as the steps that drew ``tokens``."""
        common = min(len(self.tokens_N), len(tokens))
        different = (self.tokens_N[:common] != torch.tensor(tokens[:common])).nonzero()
        return int(different[0]) + 1 if len(different) else common


class Stay:
    """One stay of a request in slot ``slot``. ``longest``: at least how many tokens it has by now.

    failed: why guidance has failed and after how many generated tokens, as far as the host knows.
    """

    def __init__(
        self, requests: "LogitsProcRequestState", table: StepTable, slot: int, guided_tokens: int | None
    ) -> None:
        self._requests = requests
        self._table = table
        self._slot = slot
        self._prompt_len = int(requests.prompt_len.np[slot])
        self._ended: tuple[Steps, Tensor] | None = None
        self.guided_tokens = guided_tokens
        self.longest = int(requests.prefill_len.np[slot])
        self.failed: tuple[GuidanceFailure, int] | None = None

    def fail(self, failure: GuidanceFailure, step: int) -> None:
        """Guidance of the token drawn after ``step`` generated ones has failed, and there is none after it."""
        self.failed = failure, step

    @property
    def failure(self) -> GuidanceFailure | None:
        """Why guidance has failed, as far as the host knows."""
        return self.failed[0] if self.failed is not None else None

    def end(self) -> None:
        """The slot goes to another request: keep what is still to be read of this one's."""
        if self._ended is None:
            steps, count = self._on_device()
            self._ended = Steps(*(column.clone() for column in steps)), count.clone()

    def read(self) -> Steps:
        """The steps that drew tokens, the stay's and the ones before it, on the host; a NaN becomes the failure.

        Waits for the device, once if the stay has ended.
        """
        on_device, count = self._ended or self._on_device()
        drawn = int(count)
        steps = Steps(*(column[:drawn].cpu() for column in on_device))
        if self._ended is not None:
            self._ended = steps, count.cpu()
        failed = (steps.divergence_N3[:, 0].isnan() & (steps.candidates_N != UNMEASURED)).nonzero()
        if len(failed) and (self.failed is None or int(failed[0]) < self.failed[1]):
            self.fail(not_numbers(), int(failed[0]))
        return steps

    def _on_device(self) -> tuple[Steps, Tensor]:
        """What the slot has of as many steps as there may have been, and how many have drawn a token."""
        steps = Steps(
            self._requests.all_token_ids.gpu[self._slot, self._prompt_len : self.longest + 1],
            self._table.divergence_SP3[self._slot, self._prompt_len - 1 : self.longest],
            self._table.candidates_SP[self._slot, self._prompt_len - 1 : self.longest],
        )
        return steps, self._requests.total_len.gpu[self._slot] - self._prompt_len


class StayLog(TraceLog[Stay]):
    """All stays by trace id, in the order of their beginnings."""

    def open(self, trace_id: str, stay: Stay) -> None:
        """A request enters the batch, new or back after a preemption."""
        self._keep(trace_id, stay)

    def failed(self, trace_id: str) -> GuidanceFailure | None:
        """Why a request of the trace has failed, as far as the host knows."""
        return next((stay.failure for stay in self._traces.get(trace_id, []) if stay.failure is not None), None)

    def _outcomes(
        self, kept: Sequence[Stay], returned: Sequence[Sequence[int]], trace_id: str
    ) -> list[GuidanceSummary | GuidanceFailure]:
        stays = [(stay, stay.read()) for stay in kept] if returned else []
        return [_outcome(stays, tokens, trace_id) for tokens in returned]


def _outcome(
    stays: Sequence[tuple[Stay, Steps]], tokens: Sequence[int], trace_id: str
) -> GuidanceSummary | GuidanceFailure:
    guided = len(tokens)
    for stay, steps in stays:
        if stay.failed is not None and stay.failed[1] < steps.drawn_like(tokens):
            return stay.failed[0]
        guided = guided if stay.guided_tokens is None else min(guided, stay.guided_tokens)
    divergence_N3 = torch.zeros(guided, 3, dtype=torch.float64)
    candidates_N = torch.full((guided,), UNMEASURED)
    for _, steps in stays:
        measured = (steps.candidates_N[: steps.drawn_like(tokens)][:guided] != UNMEASURED).nonzero().squeeze(1)
        divergence_N3[measured] = steps.divergence_N3[measured]
        candidates_N[measured] = steps.candidates_N[measured].long()
    if (candidates_N == UNMEASURED).any():
        raise not_generated(trace_id, tokens)
    return summarise(divergence_N3, candidates_N)
