"""The running batch: which rows are guided, by which version, and one guided step. Knows nothing of vLLM.

A row that guidance fails on is ended as failure.py says; nothing that happens in value code reaches the rows beside it.

Shapes: ``B`` rows of the batch, ``G`` rows of one value-model version that are guided in this step, ``K`` candidates,
``A`` logits of one return distribution, ``V`` vocabulary of the reference.
"""

import logging
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qtilt.params import GuidanceParams
from qtilt.tilt import kl_divergence, offsets, tilt, top_candidates
from qtilt.vllm_plugin.failure import GuidanceFailure, not_numbers, of_exception
from qtilt.vllm_plugin.finite_check import FiniteCheck, finite_rows
from qtilt.vllm_plugin.history import TokenHistory
from qtilt.vllm_plugin.records import Record
from qtilt.vllm_plugin.residents import ResidentVersion

logger = logging.getLogger("vllm.qtilt.batch")  # vLLM configures the loggers below its own name only

CERTAIN = 1e30
"""A logit beside which all others have no probability, at any temperature, and which float32 still divides by one."""
NO_TOKEN = -1


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


class GuidedBatch:
    """Rows by their index in the batch. Requests without guidance have no row, and their logits aren't touched."""

    def __init__(self) -> None:
        self._rows: dict[int, GuidedRow] = {}
        self._checks: deque[FiniteCheck[GuidedRow]] = deque()

    def __len__(self) -> int:
        return len(self._rows)

    def put(self, index: int, row: GuidedRow | None) -> None:
        """The request at ``index`` is now ``row`` (None: one without guidance); what was there has left."""
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
        rows = {second: self._rows.pop(first, None), first: self._rows.pop(second, None)}
        self._rows.update({index: row for index, row in rows.items() if row is not None})

    def guide(self, logits_BV: Tensor) -> Tensor:
        """Tilt, in place, the rows that are guided in this step; all others stay bit-identical.

        Where guidance fails, or has failed before, the row gets logits that end its request.
        """
        self.settle()
        by_version: dict[ResidentVersion, list[int]] = {}
        for index, row in sorted(self._rows.items()):
            if row.failure is None and row.is_guided_now():
                by_version.setdefault(row.version, []).append(index)
            else:
                row.release()
        for version, indices in by_version.items():
            self._guide_version(version, indices, logits_BV)
        self._end_failed(logits_BV)
        return logits_BV

    def settle(self, *, wait: bool = False) -> None:
        """Act on the checks of earlier steps that have come over from the device; ``wait`` for those that haven't."""
        while self._checks and (wait or self._checks[0].has_arrived()):
            for row, step in self._checks.popleft().failed():
                logger.error("the values of %s for a request are not finite numbers: it ends", _label(row.version))
                row.fail(not_numbers(), step)

    def _guide_version(self, version: ResidentVersion, indices: Sequence[int], logits_BV: Tensor) -> None:
        """One version's rows. This is the edge that no error of value code crosses.

        An exception leaves the logits untouched. What a forward that broke off has left in the cache goes with the
        slots: they are given back, and emptied by that.
        """
        rows = [self._rows[index] for index in indices]
        steps = [(row, len(row.output_token_ids)) for row in rows]
        try:
            self._checks.append(FiniteCheck(steps, guide_rows(version, rows, indices, logits_BV)))
        except Exception as error:
            logger.exception("guidance failed in value model %s: %d request(s) end", _label(version), len(rows))
            for row, step in steps:
                row.fail(of_exception(error), step)

    def _end_failed(self, logits_BV: Tensor) -> None:
        failed = [
            (index, row.ending_token)
            for index, row in self._rows.items()
            if row.failure is not None and row.ending_token is not None
        ]
        if failed:
            indices_F, tokens_F = _to_device(failed, torch.int64, logits_BV.device).unbind(1)
            logits_BV[indices_F, tokens_F] = CERTAIN


def _label(version: ResidentVersion) -> str:
    return f"{version.name}@{version.version}"


def guide_rows(
    version: ResidentVersion, rows: Sequence[GuidedRow], indices: Sequence[int], logits_BV: Tensor
) -> Tensor:
    """History → value → offset → tilted logits for the rows of one version, in place, and their KL on record.

    Returns which rows' guidance was finite, bool ``[G]`` on the device. The others are not tilted and get logits that
    end their requests, in this same step and without the host knowing.
    """
    device = logits_BV.device
    top_k = [row.params.top_k for row in rows]
    endings = [NO_TOKEN if row.ending_token is None else row.ending_token for row in rows]
    indices_G, top_k_G, ending_G = _to_device([indices, top_k, endings], torch.int64, device).unbind()
    per_row = [[row.params.inv_eta for row in rows], [row.temperature for row in rows]]
    inv_eta_G, temperature_G = _to_device(per_row, torch.float64, device).unbind()
    logits_GV = logits_BV[indices_G]
    candidates = top_candidates(logits_GV, max(top_k), version.scorable, top_k_G)
    slots = [row.ready_slot() for row in rows]
    values_GKA = version.engine.value_logits(slots, [row.history for row in rows], candidates.token_ids_BK)
    offsets_GK = _offsets_by_method(version, rows, values_GKA, inv_eta_G)
    floor_G = version.distribution.v_min * inv_eta_G
    finite_G = finite_rows(values_GKA, offsets_GK, candidates.valid_BK)
    # Offsets that are all the floor's tilt nothing: such a row keeps the reference's logits.
    offsets_GK = torch.where(finite_G.unsqueeze(-1), offsets_GK, floor_G.unsqueeze(-1))
    tilted_GV = tilt(logits_GV, candidates, offsets_GK, floor_G, temperature_G)
    kl_G = kl_divergence(tilted_GV, logits_GV, temperature_G)
    finite_G = finite_G & kl_G.isfinite()
    logits_BV[indices_G] = _end_unless(finite_G, tilted_GV, ending_G)
    for position, row in enumerate(rows):
        if row.record is not None:
            row.record.write(len(row.output_token_ids), kl_G, position)
    return finite_G


def _end_unless(goes_on_G: Tensor, logits_GV: Tensor, ending_G: Tensor) -> Tensor:
    """Make the ending token certain, in place, in the rows that don't go on; rows without one stay as they are."""
    token_G1 = ending_G.clamp(min=0).unsqueeze(-1)
    ends_G1 = (~goes_on_G & (ending_G != NO_TOKEN)).unsqueeze(-1)
    return logits_GV.scatter_(-1, token_G1, logits_GV.gather(-1, token_G1).masked_fill_(ends_G1, CERTAIN))


def _to_device(numbers: Sequence[Any], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers of the host as a tensor on the device, without waiting for it."""
    return torch.tensor(numbers, dtype=dtype, pin_memory=device.type == "cuda").to(device, non_blocking=True)


def _offsets_by_method(
    version: ResidentVersion, rows: Sequence[GuidedRow], values_GKA: Tensor, inv_eta_G: Tensor
) -> Tensor:
    """Q/η ``[G, K]``: one forward serves all methods of the step."""
    by_method: dict[str, list[int]] = {}
    for position, row in enumerate(rows):
        by_method.setdefault(row.params.method, []).append(position)
    if len(by_method) == 1:
        return offsets(version.distribution, values_GKA, inv_eta_G, rows[0].params.method)
    offsets_GK = torch.empty(values_GKA.shape[:2], dtype=torch.float64, device=values_GKA.device)
    for method, positions in by_method.items():
        of_method = _to_device(positions, torch.int64, values_GKA.device)
        offsets_GK[of_method] = offsets(version.distribution, values_GKA[of_method], inv_eta_G[of_method], method)
    return offsets_GK
