"""The running batch of vLLM's V1 model runner: which rows are guided, and by which version. Imports no vLLM.

A row that guidance fails on is ended as failure.py says; nothing that happens in value code reaches the rows beside it.

Shapes: ``B`` rows of the batch, ``G`` rows of one value-model version that are guided in this step, ``V`` vocabulary of
the reference.
"""

import logging
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from qtilt.engine.device_copy import copy_to_device
from qtilt.method.params import GuidanceParams
from qtilt.vllm_plugin.failure import GuidanceFailure, not_numbers, of_exception
from qtilt.vllm_plugin.records import Record
from qtilt.vllm_plugin.step import CERTAIN, RowSettings, StepSettings, guide_step, scores_in_stages
from qtilt.vllm_plugin.v1.finite_check import FiniteCheck
from qtilt.vllm_plugin.v1.history import TokenHistory
from qtilt.vllm_plugin.versions import ResidentVersion

logger = logging.getLogger("vllm.qtilt.batch")  # vLLM configures the loggers below its own name only


@dataclass(eq=False)
class GuidedRow:
    """One request that asked for guidance, for as long as it is in the batch.

    temperature: of the sampling, 0 for greedy. output_token_ids: the model runner's live list. record: None when nobody
    will ask for the KL. ending_token: ends the request when it is sampled, whatever else was asked; None when no token
    does. slot: in the version's value cache, held from the first guided step to the last. failure: why this row isn't
    guided any more.
    """

    params: GuidanceParams
    temperature: float
    output_token_ids: list[int]
    history: TokenHistory
    version: ResidentVersion
    record: Record | None
    ending_token: int | None = None
    slot: int | None = None
    failure: GuidanceFailure | None = None

    def is_guided_now(self) -> bool:
        """Whether the next token is one of those to guide."""
        return self.params.guides(len(self.output_token_ids))

    @cached_property
    def in_stages(self) -> bool:
        """How its candidates are scored."""
        return scores_in_stages(self.version, self.params)

    def leave(self) -> None:
        """The request leaves the batch."""
        self.release()
        self.version.rows -= 1
        if self.record is not None:
            self.record.close()

    def release(self) -> None:
        """Give the slot back; the value cache is recomputed if the row is guided again."""
        if self.slot is not None:
            self.version.engine.release(self.slot)
            self.slot = None

    def fail(self, failure: GuidanceFailure, step: int) -> None:
        """Guidance of the token drawn after ``step`` generated ones has failed: none of this row from here on."""
        if self.failure is not None:
            return
        self.failure = failure
        if self.record is not None:
            self.record.fail(failure, step)
        self.release()

    def ready_slot(self) -> int:
        """The slot, acquired if need be, covering no more than the history.

        Raises RuntimeError when the history ends in a placeholder for a token that isn't known yet.
        """
        if self.output_token_ids and self.output_token_ids[-1] < 0:
            raise RuntimeError("a token history ends in a placeholder: give vLLM the processor by module:Class")
        engine = self.version.engine
        if self.slot is None:
            self.slot = engine.acquire()
        elif engine.covered(self.slot) > len(self.history):
            # vLLM took tokens back (a failed KV transfer).
            engine.rewind(self.slot, len(self.history))
        return self.slot


@dataclass(frozen=True, slots=True)
class Together:
    """Rows of one version that are guided together, and what of it stays while nothing else changes.

    They are all scored in stages, or none is. where: in the batch, in this order; a slice if they lie side by side.
    """

    rows: list[GuidedRow]
    indices: list[int]
    where: slice | Tensor
    settings: StepSettings

    @classmethod
    def of(cls, rows: list[GuidedRow], indices: list[int], device: torch.device) -> "Together":
        """The settings of the rows, and where they are, go to the device."""
        settings = [RowSettings.of(row.params, row.temperature, row.ending_token) for row in rows]
        (rows_GS,) = copy_to_device(device, np.array(settings))
        where: slice | Tensor = slice(indices[0], indices[0] + len(indices))
        if indices != list(range(indices[0], indices[0] + len(indices))):
            (where,) = copy_to_device(device, np.array(indices))
        return cls(rows, indices, where, StepSettings.of(rows_GS, [row.params for row in rows]))


class GuidedBatch:
    """Rows by their index in the batch. Requests without guidance have no row, and their logits aren't touched."""

    def __init__(self) -> None:
        self._rows: dict[int, GuidedRow] = {}
        self._checks: deque[FiniteCheck[GuidedRow]] = deque()
        self._together: dict[tuple[ResidentVersion, bool], Together] = {}

    def __len__(self) -> int:
        return len(self._rows)

    def put(self, index: int, row: GuidedRow | None) -> None:
        """The request at ``index`` is now ``row`` (None: one without guidance); what was there has left."""
        self._together.clear()
        if (previous := self._rows.pop(index, None)) is not None:
            previous.leave()
        if row is not None:
            row.version.rows += 1
            self._rows[index] = row

    def move(self, source: int, target: int) -> None:
        """The request at ``source`` goes to ``target``; what was there has left."""
        row = self._rows.pop(source, None)
        self.put(target, None)
        if row is not None:
            self._rows[target] = row

    def swap(self, first: int, second: int) -> None:
        """Exchange the requests of two indices."""
        self._together.clear()
        rows = {second: self._rows.pop(first, None), first: self._rows.pop(second, None)}
        self._rows.update({index: row for index, row in rows.items() if row is not None})

    def guide(self, logits_BV: Tensor) -> Tensor:
        """Tilt, in place, the rows that are guided in this step; all others stay bit-identical.

        Where guidance fails, or has failed before, the row gets logits that end its request.
        """
        self.settle()
        together: dict[tuple[ResidentVersion, bool], list[int]] = {}
        for index, row in sorted(self._rows.items()):
            if row.failure is None and row.is_guided_now():
                together.setdefault((row.version, row.in_stages), []).append(index)
            else:
                row.release()
        for key, indices in together.items():
            self._guide_version(key, indices, logits_BV)
        self._end_failed(logits_BV)
        return logits_BV

    def settle(self, *, wait: bool = False) -> None:
        """Act on the checks of earlier steps that have come over from the device; ``wait`` for those that haven't."""
        while self._checks and (wait or self._checks[0].has_arrived()):
            for row, step in self._checks.popleft().failed():
                logger.error("the values of %s for a request are not finite numbers: it ends", row.version.label)
                row.fail(not_numbers(), step)

    def _guide_version(self, key: tuple[ResidentVersion, bool], indices: Sequence[int], logits_BV: Tensor) -> None:
        """Rows of one version that are scored in one way. This is the edge that no error of value code crosses.

        An exception leaves the logits untouched. What a forward that broke off has left in the cache goes with the
        slots: they are given back, and emptied by that.
        """
        version = key[0]
        try:
            # The engine reads neighbouring slots together.
            indices = sorted(indices, key=lambda index: self._rows[index].ready_slot())
            together = self._find_together(key, indices, logits_BV.device)
            finite_G = guide_rows(version, together, logits_BV)
            self._checks.append(FiniteCheck([(row, len(row.output_token_ids)) for row in together.rows], finite_G))
        except Exception as error:
            logger.exception("guidance failed in value model %s: %d request(s) end", version.label, len(indices))
            for row in (self._rows[index] for index in indices):
                row.fail(of_exception(error), len(row.output_token_ids))

    def _find_together(self, key: tuple[ResidentVersion, bool], indices: list[int], device: torch.device) -> Together:
        """From step to step it is mostly the same rows."""
        found = self._together.get(key)
        if found is None or found.indices != indices:
            found = Together.of([self._rows[index] for index in indices], indices, device)
            self._together[key] = found
        return found

    def _end_failed(self, logits_BV: Tensor) -> None:
        failed = [
            (index, row.ending_token)
            for index, row in self._rows.items()
            if row.failure is not None and row.ending_token is not None
        ]
        if failed:
            (failed_F2,) = copy_to_device(logits_BV.device, np.array(failed))
            indices_F, tokens_F = failed_F2.unbind(1)
            logits_BV[indices_F, tokens_F] = CERTAIN


def guide_rows(version: ResidentVersion, together: Together, logits_BV: Tensor) -> Tensor:
    """History → value → offset → tilted logits for rows of one version, in place, and what was done on record.

    Returns which rows' guidance was finite, bool ``[G]`` on the device: the others get logits that end their requests.
    """
    rows = together.rows
    slots = [row.ready_slot() for row in rows]
    histories = [row.history for row in rows]

    def score(candidates_RK: Tensor, rows_R: Tensor | None = None) -> Tensor:
        if rows_R is None:
            return version.engine.value_logits(slots, histories, candidates_RK)
        positions = rows_R.tolist()
        some = [slots[position] for position in positions], [histories[position] for position in positions]
        return version.engine.value_logits(*some, candidates_RK)

    guided = guide_step(version, logits_BV[together.where], together.settings, score, in_stages=rows[0].in_stages)
    logits_BV[together.where] = guided.logits_GV
    for position, row in enumerate(rows):
        if row.record is not None:
            row.record.write(len(row.output_token_ids), guided.divergence_G3, guided.candidates_G, position)
    return ~guided.failed
