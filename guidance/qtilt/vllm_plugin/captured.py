"""Guided steps that are captured once and replayed: the host starts a dozen things, where a step has hundreds.

Shapes: ``B`` rows of a captured step, ``G`` of them guided now, ``V`` vocabulary of the reference, ``S`` numbers of
:class:`qtilt.vllm_plugin.step.RowSettings`.

A step is captured where it is a function of what is on the device: each row's last token is all that its cache lacks,
and as many candidates are run of each row, whether or not they count by their mass. What it reads is copied into
tensors of its own, then it is replayed. Rows are rounded up to one of ``ROWS``; those that nobody has are rows of the
scratch slot. The first step of a kind is compared with its replay. Imports no vLLM.
"""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from qtilt.forwards.arrays import copy_to_device
from qtilt.forwards.packing import LastTokens, Span
from qtilt.vllm_plugin.plan import CAPTURED_ROWS, CAPTURED_TOKENS
from qtilt.vllm_plugin.step import Asked, Guided, RowSettings, StepSettings, guide_step
from qtilt.vllm_plugin.versions import ResidentVersion

logger = logging.getLogger("vllm.qtilt.captured")  # vLLM configures the loggers below its own name only

ROWS_OF_HEAD = 6
"""So many rows of a Q-type's head, copied and in float32, take the memory of a token's activations, or less."""
MOST_KINDS = 64
"""Of a version, that are kept: what requests ask for decides how many there are. The device is long done with a replay
of the least recent."""
ROUNDING = 0.02
"""Of what the first replay gives, relative to how far logits were moved."""
ROWS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, CAPTURED_ROWS)


@dataclass(frozen=True, slots=True)
class StepKind:
    """What the host must know of a step before it is captured."""

    rows: int
    asked: Asked


class Graphs(Protocol):
    """What captures: CUDA's graphs."""

    def capture(self, step: Callable[[], Guided]) -> tuple[Guided, Callable[[], None]]:
        """What a step gives that reads and writes the same tensors each time, and what runs it again into these.

        What a replay gives is lost with the next one of any step. Raises RuntimeError for a step that can't be
        captured, or when the memory for it isn't there.
        """


class CudaGraphs:
    """See :class:`Graphs`. One may be replayed at a time: their intermediate results share memory."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()
        self._keeps_pool: torch.cuda.CUDAGraph | None = None
        self._has_failed = False

    def capture(self, step: Callable[[], Guided]) -> tuple[Guided, Callable[[], None]]:
        """After a capture that failed, in what state it has left torch's allocator is unknown: there are no others."""
        if self._has_failed:
            raise RuntimeError("a capture has failed before")
        steps = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(steps)
        try:
            with torch.cuda.stream(self._stream):
                step()  # what is compiled or allocated when it is first met, is before it is captured
                return self._capture(step)
        finally:
            steps.wait_stream(self._stream)

    def _capture(self, step: Callable[[], Guided]) -> tuple[Guided, Callable[[], None]]:
        graph, self._has_failed = torch.cuda.CUDAGraph(), True
        # Threads that load value models go on meanwhile.
        graph.capture_begin(self._pool, capture_error_mode="thread_local")
        try:
            guided = step()
        finally:
            graph.capture_end()
        # A pool that no graph is in can't be used again.
        self._keeps_pool, self._has_failed = graph, False
        return guided, graph.replay


def choose_graphs(device: torch.device, *, enforce_eager: bool) -> Graphs | None:
    """None: steps aren't captured, on CPUs and where vLLM is asked for no graphs."""
    return None if device.type != "cuda" or enforce_eager else CudaGraphs(device)


class CapturedStep:
    """One kind of step of one version. logits_BV: its rows' logits, which the version's other steps may share.

    Raises RuntimeError: see :class:`Graphs`.
    """

    def __init__(self, version: ResidentVersion, kind: StepKind, logits_BV: Tensor, graphs: Graphs) -> None:
        device = logits_BV.device
        (self._nobody_31,) = copy_to_device(device, np.array([[version.engine.cache.scratch_slot], [0], [0]]))
        (self._nobodys_S,) = copy_to_device(device, np.array(RowSettings.ending(None), dtype=np.float64))
        self._asked = kind.asked
        self._name = f"{kind.rows} rows of {version.label}"
        self._logits_BV = logits_BV
        self._last_3B = self._nobody_31.repeat(1, kind.rows)
        self._numbers_BS = self._nobodys_S.repeat(kind.rows, 1)
        self._guided, self._replay = graphs.capture(lambda: self._run(version))
        self._verdict = torch.tensor(False)
        self._is_there = torch.cuda.Event() if device.type == "cuda" else None

    @cached_property
    def agrees(self) -> bool:
        """Whether the replay that was compared gave what the step did. Waits for that step, once."""
        if self._is_there is not None:
            self._is_there.synchronize()
        agrees = bool(self._verdict)
        if not agrees:
            logger.error("replayed steps of %s differ from what they replay: they aren't used", self._name)
        return agrees

    def __call__(self, logits_GV: Tensor, settings: StepSettings, last: LastTokens) -> Guided:
        """As :func:`guide_step`. What is returned is lost with the next step."""
        self._take(logits_GV, settings, last)
        self._replay()
        return self._give(logits_GV, self._guided)

    def compare(self, version: ResidentVersion, logits_GV: Tensor, settings: StepSettings, last: LastTokens) -> Guided:
        """The same, replayed only to see whether that gives what the step does. version: that was captured."""
        self._take(logits_GV, settings, last)
        before_BV = self._logits_BV.clone()
        self._replay()
        replayed_BV = self._logits_BV.clone()
        self._logits_BV.copy_(before_BV)
        guided = self._run(version)
        self._verdict = are_alike(before_BV, self._logits_BV, replayed_BV).to("cpu", non_blocking=True)
        if self._is_there is not None:
            self._is_there.record()
        return self._give(logits_GV, guided)

    def _run(self, version: ResidentVersion) -> Guided:
        engine = version.engine
        slots_B, positions_B, tokens_B = self._last_3B.unbind(0)
        last = LastTokens(slots_B, positions_B, tokens_B, longest=engine.cache.max_length)
        settings = StepSettings.of(self._numbers_BS, self._asked)
        return guide_step(version, self._logits_BV, settings, lambda tokens_BK, _: engine.score(last, tokens_BK))

    def _take(self, logits_GV: Tensor, settings: StepSettings, last: LastTokens) -> None:
        rows = len(logits_GV)
        self._logits_BV[:rows].copy_(logits_GV)
        for mine_B, given_G in zip(self._last_3B, (last.slots_B, last.positions_B, last.token_ids_B), strict=True):
            mine_B[:rows].copy_(given_G)
        self._numbers_BS[:rows].copy_(settings.numbers_GS)
        if rows < len(self._numbers_BS):
            self._last_3B[:, rows:].copy_(self._nobody_31)
            self._numbers_BS[rows:].copy_(self._nobodys_S)

    def _give(self, logits_GV: Tensor, guided: Guided) -> Guided:
        logits_GV.copy_(self._logits_BV[: len(logits_GV)])
        return Guided(*(measured_B[: len(logits_GV)] for measured_B in guided))


class CapturedSteps:
    """Those of a batch, captured when they are first met; each version holds its own."""

    def __init__(self, graphs: Graphs, slots: int) -> None:
        self._graphs, self._slots = graphs, slots
        self._logits_BV: Tensor | None = None

    def guide(
        self,
        version: ResidentVersion,
        logits_GV: Tensor,
        settings: StepSettings,
        last: LastTokens,
        spans: Sequence[Span],
    ) -> Guided | None:
        """As :func:`guide_step`, after ``spans`` have been cached; None, and nothing has been done, where the step
        can't be captured, or its replay has differed. What is returned is lost with the next step.
        """
        if not is_capturable(version, settings.asked, logits_GV):
            return None
        kind = StepKind(min(rows for rows in ROWS if rows >= len(logits_GV)), settings.asked)
        is_new = kind not in version.captured
        captured = self._capture(version, kind, logits_GV.shape[1]) if is_new else version.captured.pop(kind)
        version.captured[kind] = captured  # the last one used is the last one here
        if len(version.captured) > MOST_KINDS:
            del version.captured[next(iter(version.captured))]
        if captured is None or not (is_new or captured.agrees):
            return None
        version.engine.extend(spans)
        return captured.compare(version, logits_GV, settings, last) if is_new else captured(logits_GV, settings, last)

    def _capture(self, version: ResidentVersion, kind: StepKind, vocabulary: int) -> CapturedStep | None:
        if self._logits_BV is None:
            device = version.engine.cache.geometry.device
            most = min(rows for rows in ROWS if rows >= min(self._slots, ROWS[-1]))
            self._logits_BV = torch.zeros(most, vocabulary, device=device)
        try:
            return CapturedStep(version, kind, self._logits_BV[: kind.rows], self._graphs)
        except RuntimeError:
            logger.exception("steps of %d rows of %s can't be captured, and take longer", kind.rows, version.label)
            return None


def are_alike(before_BV: Tensor, tilted_BV: Tensor, again_BV: Tensor) -> Tensor:
    """Whether logits were tilted alike twice: bool, on the device. Up to rounding, though the kernels are the same."""
    moved_B1 = (tilted_BV - before_BV).nan_to_num().abs().amax(-1, keepdim=True)
    differ_BV = (again_BV - tilted_BV).nan_to_num(nan=0.0)  # −inf less −inf
    same_numbers = (again_BV.isfinite() == tilted_BV.isfinite()).all()
    return same_numbers & (differ_BV.abs() <= ROUNDING * (1 + moved_B1)).all()


def is_capturable(version: ResidentVersion, asked: Asked, logits_GV: Tensor) -> bool:
    """Whether such a step is a function of what is on the device, and short enough for that to pay."""
    if not version.engine.forward.is_capturable or logits_GV.dtype != torch.float32:
        return False
    model = version.engine.model
    if model.type == "v":
        if asked.differ_in_top_k:  # each row then runs as many candidates as it asks for
            return False
        tokens_of_row = 1 + asked.max_top_k
    else:
        tokens_of_row = 1 + math.ceil(asked.max_top_k * model.distribution.num_logits / ROWS_OF_HEAD)
    return len(logits_GV) <= ROWS[-1] and len(logits_GV) * tokens_of_row <= CAPTURED_TOKENS
