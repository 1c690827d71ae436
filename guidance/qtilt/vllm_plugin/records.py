"""What guidance did per generated token, the KLs(guided ‖ reference) above all, kept until the server asks for it.

Shapes: ``S`` slots and a scratch slot, ``P`` positions of a slot, ``R`` rows of a step, ``N`` generated tokens.

Each step writes what it measured into one table on the device, by slot and position. A request's *stay* lasts from its
arrival in the batch, or its return after a preemption, until its slot is given to another one; from then on it has a
copy of what was measured and generated.

Who reads what a step measured has seen the token that it drew, and needn't wait for the steps that are queued behind
it. What those write meanwhile isn't asked for, and whether a step was measured is read before what: they are written
the other way round. The last token may still be missing, and makes no difference (``Steps.drawn_like``). With drafts
only the device knows how many tokens there are, and that is written after they have been seen: then readers wait.

A processor sees no request id, and the children of n > 1 share one trace id. So the steps of a choice are found by what
was generated: a step's KL and its failure depend on the tokens before it only, and count for all returned tokens that
begin with these, whichever choice of the trace they were measured for.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, TypedDict

import numpy as np
import torch
from torch import Tensor

from qtilt.forwards.arrays import IntArray
from qtilt.vllm_plugin.details import Details, TokenDetails
from qtilt.vllm_plugin.failure import GuidanceFailure, not_numbers
from qtilt.vllm_plugin.runner import Requests
from qtilt.vllm_plugin.step import NO_TOKEN

UNMEASURED = -1
LEFT_OUT = -2
"""Of a step whose token was forced on the request after guidance: it was drawn from no distribution."""


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


class StepTable:
    """What was measured by the step that drew the token after each position, for the requests in all slots.

    divergence_SP3: the columns of :class:`qtilt.tilt.Divergence`, NaN where guidance failed. candidates_SP: how many
    were scored, UNMEASURED where no step was guided, or LEFT_OUT. longest_S: how many tokens there are at most. These
    28 bytes a position are little beside a value cache, which has kilobytes.
    """

    def __init__(self, requests: Requests) -> None:
        slots, positions = requests.tokens_SP.shape
        shape, device = (slots + 1, positions), requests.device
        self.divergence_SP3 = torch.zeros((*shape, 3), dtype=torch.float64, device=device)
        self.candidates_SP = torch.full(shape, UNMEASURED, dtype=torch.int32, device=device)
        self.longest_S = np.zeros(slots, dtype=np.int64)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @contextmanager
    def reading(self, after: torch.cuda.Event | None = None) -> Iterator[None]:
        """What is copied to the host inside the block waits for ``after`` and for no step that is queued."""
        if self._stream is None:
            yield
            return
        if after is not None:
            self._stream.wait_event(after)
        with torch.cuda.stream(self._stream):
            yield

    def mark(self) -> torch.cuda.Event | None:
        """The steps that are queued, for :meth:`reading`."""
        if self._stream is None:
            return None
        mark = torch.cuda.Event()
        mark.record(torch.cuda.current_stream(self._stream.device))
        return mark

    def clear(self, slot: int, length: int) -> None:
        """Another request takes the slot, with so many tokens."""
        self.candidates_SP[slot].fill_(UNMEASURED)
        self.longest_S[slot] = length

    def note_lengths(self, slots_N: IntArray, lengths_N: IntArray) -> None:
        """The requests in these slots have so many tokens, or fewer."""
        self.longest_S[slots_N] = np.maximum(self.longest_S[slots_N], lengths_N)

    def write(self, slots_R: Tensor, positions_R: Tensor, divergence_R3: Tensor, candidates_R: Tensor) -> None:
        """What a step measured. A position may come again: what follows a rejected draft is drawn anew."""
        self.divergence_SP3[slots_R, positions_R] = divergence_R3
        self.candidates_SP[slots_R, positions_R] = candidates_R.int()

    def leave_out(self, slots_R: Tensor, positions_R: Tensor, is_forced_R: Tensor) -> Tensor:
        """What the last step measured in these rows doesn't count, unless it is a failure. Returns the KLs in nats that
        were measured and don't, ``[R]``.
        """
        candidates_R, kl_R = self.candidates_SP[slots_R, positions_R], self.divergence_SP3[slots_R, positions_R, 0]
        is_left_out_R = is_forced_R & ~kl_R.isnan()
        self.candidates_SP[slots_R, positions_R] = candidates_R.masked_fill(is_left_out_R, LEFT_OUT)
        return kl_R.masked_fill(~is_left_out_R | (candidates_R < 0), 0.0)


class Steps(NamedTuple):
    """The steps that drew a request's generated tokens: these tokens, and what is in the table of each."""

    tokens_N: Tensor
    divergence_N3: Tensor
    candidates_N: Tensor

    def drawn_like(self, tokens: Tensor) -> int:
        """How many first steps drew their tokens after the same ones as the steps that drew ``tokens``.

        The last of ``tokens_N`` doesn't matter, and may not be there yet.
        """
        common = min(len(self.tokens_N), len(tokens))
        different = (self.tokens_N[:common] != tokens[:common]).nonzero()
        return int(different[0]) + 1 if len(different) else common


class Stay:
    """One stay of a request in a slot. guided_tokens: how many tokens are guided at most, None for all.

    failed: why guidance has failed and after how many generated tokens, as far as the host knows. details: of a request
    that asks for them.
    """

    def __init__(self, requests: Requests, table: StepTable, slot: int, guided_tokens: int | None = None) -> None:
        self._requests = requests
        self._table = table
        self._slot = slot
        self._prompt_len = requests.prompt_len(slot)
        self._ended: tuple[Steps, Tensor | None, torch.cuda.Event | None] | None = None
        self.guided_tokens = guided_tokens
        self.details: Details | None = None
        self.failed: tuple[GuidanceFailure, int] | None = None

    def fail(self, failure: GuidanceFailure, step: int) -> None:
        """Guidance of the token drawn after ``step`` generated ones has failed, and there is none after it."""
        self.failed = failure, step

    @property
    def failure(self) -> GuidanceFailure | None:
        """Why guidance has failed, as far as the host knows."""
        return self.failed[0] if self.failed is not None else None

    @property
    def has_ended(self) -> bool:
        """Whether the slot is another request's."""
        return self._ended is not None

    def end(self) -> None:
        """The slot goes to another request: keep what is still to be read of this one's."""
        if self._ended is None:
            steps, count, _ = self._on_device()
            self._ended = Steps(*(column.clone() for column in steps)), count, self._table.mark()

    def read(self) -> Steps:
        """The steps that drew tokens, the stay's and the ones before it, on the host; a NaN becomes the failure.

        Copies from the device, once if the stay has ended.
        """
        on_device, count, mark = self._ended or self._on_device()
        with self._table.reading(mark):
            drawn = None if count is None else int(count)
            candidates_N, tokens_N = on_device.candidates_N[:drawn].cpu(), on_device.tokens_N[:drawn].cpu()
            steps = Steps(tokens_N, on_device.divergence_N3[:drawn].cpu(), candidates_N)
        if self._ended is not None:
            self._ended = steps, None, None
        failed = (steps.divergence_N3[:, 0].isnan() & (steps.candidates_N != UNMEASURED)).nonzero()
        if len(failed) and (self.failed is None or int(failed[0]) < self.failed[1]):
            self.fail(not_numbers(), int(failed[0]))
        return steps

    def failure_of(self, steps: Steps, tokens: Tensor) -> GuidanceFailure | None:
        """The failure, if guidance failed on one of these tokens. steps: of :meth:`read`."""
        if self.failed is not None and self.failed[1] < steps.drawn_like(tokens):
            return self.failed[0]
        return None

    def _on_device(self) -> tuple[Steps, Tensor | None, torch.cuda.Event | None]:
        """What the slot has of as many steps as there may have been, how many those are if only the device knows, and
        what to wait for then.
        """
        longest = int(self._table.longest_S[self._slot])
        steps = Steps(
            self._requests.tokens_SP[self._slot, self._prompt_len : longest + 1],
            self._table.divergence_SP3[self._slot, self._prompt_len - 1 : longest],
            self._table.candidates_SP[self._slot, self._prompt_len - 1 : longest],
        )
        if self._requests.total_len_S is None:
            return steps, None, None
        return steps, self._requests.total_len_S[self._slot] - self._prompt_len, self._table.mark()


class Records:
    """All stays by trace id, in the order of their beginnings. A trace stays until it is taken, however it ended."""

    def __init__(self) -> None:
        self._traces: dict[str, list[Stay]] = {}
        # A request may run on for some steps after its trace was taken (a stop string, which only the API process
        # sees), and come back from a preemption: it must not bring the trace back.
        self._taken: deque[str] = deque(maxlen=1000)

    @property
    def held(self) -> int:
        """How many traces haven't been taken yet."""
        return len(self._traces)

    def open(self, trace_id: str, stay: Stay) -> None:
        """A request enters the batch, new or back after a preemption."""
        if trace_id not in self._taken:
            self._traces.setdefault(trace_id, []).append(stay)

    def failures(self) -> dict[str, GuidanceFailure]:
        """The traces, not taken yet, of which a request has failed."""
        for stays in self._traces.values():
            for stay in stays:
                if stay.has_ended:
                    stay.read()
        return {
            trace_id: stay.failure
            for trace_id, stays in self._traces.items()
            for stay in stays
            if stay.failure is not None
        }

    def failed(self, trace_id: str, tokens: Sequence[int]) -> GuidanceFailure | None:
        """Why a request of the trace has failed, as far as the host knows, on one of these tokens."""
        failed = (stay for stay in self._traces.get(trace_id, []) if stay.failure is not None)
        returned = torch.tensor(tokens, dtype=torch.int32)
        return next((failure for stay in failed if (failure := stay.failure_of(stay.read(), returned))), None)

    def take(
        self, trace_id: str, returned: Sequence[Sequence[int]], more_to_come: bool = False
    ) -> list[GuidanceSummary | GuidanceFailure]:
        """Per returned token sequence its summary, or why its guidance failed.

        The trace is forgotten, also when ``returned`` is empty.

        more_to_come: keep the trace, because other choices of it (a stream with n > 1) haven't finished yet.

        Raises ValueError when a returned sequence was not generated under this trace.
        """
        stays = self._traces.get(trace_id, [])
        if not more_to_come:
            self._traces.pop(trace_id, None)
            self._taken.append(trace_id)
            for stay in stays:
                if stay.details is not None:
                    stay.details.forget()
        read = [(stay, stay.read()) for stay in stays] if returned else []
        return [_outcome(read, torch.tensor(tokens, dtype=torch.int32), trace_id) for tokens in returned]

    def spent(self, trace_id: str, tokens: Sequence[int], steps: int) -> float:
        """The KL in nats of the first ``steps`` steps of a request that comes back, which have drawn ``tokens`` and
        perhaps one more.
        """
        drawn, kl_N = torch.tensor([*tokens, NO_TOKEN], dtype=torch.int32), torch.zeros(steps, dtype=torch.float64)
        read = [(stay, stay.read()) for stay in self._traces.get(trace_id, [])]
        for _, before in _most_alike_last(read, drawn):
            candidates_N = before.candidates_N[: before.drawn_like(drawn)][:steps]
            measured = (candidates_N != UNMEASURED).nonzero().squeeze(1)
            kl_N[measured] = before.divergence_N3[measured, 0].masked_fill(candidates_N[measured] == LEFT_OUT, 0.0)
        return float(kl_N.sum())

    def details(self, trace_id: str, first: int, tokens: Sequence[int]) -> list[TokenDetails | None]:
        """Of a choice's tokens from ``first`` on, one each; None for one that wasn't drawn from a guided distribution.

        tokens: all that it has so far. Raises ValueError when they weren't generated under this trace.
        """
        generated, known = torch.tensor(tokens, dtype=torch.int32), dict[int, TokenDetails | None]()
        read = [(stay, stay.read()) for stay in self._traces.get(trace_id, [])]
        for stay, steps in _most_alike_last(read, generated):
            alike = steps.drawn_like(generated)
            if stay.details is not None:
                known |= stay.details.read(first, tokens[:alike])
            known |= dict.fromkeys((steps.candidates_N[:alike] == LEFT_OUT).nonzero().squeeze(1).tolist())
            if stay.guided_tokens is not None:
                known |= dict.fromkeys(range(stay.guided_tokens, len(tokens)))
            if stay.failed is not None and stay.failed[1] < alike:
                known |= dict.fromkeys(range(stay.failed[1], len(tokens)))
        if missing := [step for step in range(first, len(tokens)) if step not in known]:
            raise ValueError(f"no details of trace {trace_id!r} for the tokens {missing} of {len(tokens)}")
        return [known[step] for step in range(first, len(tokens))]


def _most_alike_last(stays: Sequence[tuple[Stay, Steps]], tokens: Tensor) -> list[tuple[Stay, Steps]]:
    """A choice's own stay behind those of its siblings, which measured the same first steps but for rounding."""
    return sorted(stays, key=lambda each: each[1].drawn_like(tokens))


def _outcome(stays: Sequence[tuple[Stay, Steps]], tokens: Tensor, trace_id: str) -> GuidanceSummary | GuidanceFailure:
    guided = len(tokens)
    for stay, steps in stays:
        if (failure := stay.failure_of(steps, tokens)) is not None:
            return failure
        guided = guided if stay.guided_tokens is None else min(guided, stay.guided_tokens)
    divergence_N3 = torch.zeros(guided, 3, dtype=torch.float64)
    candidates_N = torch.full((guided,), UNMEASURED)
    for _, steps in _most_alike_last(stays, tokens):
        measured = (steps.candidates_N[: steps.drawn_like(tokens)][:guided] != UNMEASURED).nonzero().squeeze(1)
        divergence_N3[measured] = steps.divergence_N3[measured]
        candidates_N[measured] = steps.candidates_N[measured].long()
    if (candidates_N == UNMEASURED).any():
        raise ValueError(f"no guidance record of trace {trace_id!r} has generated these {len(tokens)} tokens")
    is_drawn_N = candidates_N != LEFT_OUT
    return _summary(divergence_N3[is_drawn_N], candidates_N[is_drawn_N])


def _summary(divergence_N3: Tensor, candidates_N: Tensor) -> GuidanceSummary:
    """Of the guided steps of a choice: the columns of ``Divergence``, and how many were scored."""
    guided = len(candidates_N)
    kl, kl_candidates, mass = divergence_N3.sum(0).tolist()
    return {
        "guided_tokens": guided,
        "kl": kl,
        "kl_candidates": kl_candidates,
        "mass": mass / guided if guided else None,
        "candidates": float(candidates_N.double().mean()) if guided else 0.0,
    }
