"""The running batch: which rows are guided, by which version, and one guided step. Knows nothing of vLLM.

Shapes: ``B`` rows of the batch, ``G`` rows of one value-model version that are guided in this step, ``K`` candidates,
``A`` logits of one return distribution, ``V`` vocabulary of the reference.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qtilt.params import GuidanceParams
from qtilt.tilt import kl_divergence, offsets, tilt, top_candidates
from qtilt.vllm_plugin.history import TokenHistory
from qtilt.vllm_plugin.records import Record
from qtilt.vllm_plugin.residents import ResidentVersion


@dataclass(eq=False)
class GuidedRow:
    """One request that asked for guidance, for as long as it is in the batch.

    temperature: of the sampling, 0 for greedy. output_token_ids: the model runner's live list. record: None when nobody
    will ask for the KL. slot: in the version's value cache, held from the first guided step to the last.
    """

    params: GuidanceParams
    temperature: float
    output_token_ids: list[int]
    history: TokenHistory
    version: ResidentVersion
    record: Record | None
    slot: int | None = None

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
        """Tilt, in place, the rows that are guided in this step; all others stay bit-identical."""
        by_version: dict[ResidentVersion, list[int]] = {}
        for index, row in sorted(self._rows.items()):
            if row.is_guided_now():
                by_version.setdefault(row.version, []).append(index)
            else:
                row.release()
        for version, indices in by_version.items():
            # The engine reads neighbouring slots together.
            indices.sort(key=lambda index: self._rows[index].ready_slot())
            guide_rows(version, [self._rows[index] for index in indices], indices, logits_BV)
        return logits_BV


def guide_rows(version: ResidentVersion, rows: Sequence[GuidedRow], indices: Sequence[int], logits_BV: Tensor) -> None:
    """History → value → offset → tilted logits for the rows of one version, in place, and their KL on record."""
    device = logits_BV.device
    indices_G = torch.tensor(indices, device=device)
    top_k_G = torch.tensor([row.params.top_k for row in rows], device=device)
    inv_eta_G = torch.tensor([row.params.inv_eta for row in rows], dtype=torch.float64, device=device)
    temperature_G = torch.tensor([row.temperature for row in rows], dtype=torch.float64, device=device)
    logits_GV = logits_BV[indices_G]
    candidates = top_candidates(logits_GV, max(row.params.top_k for row in rows), version.scorable, top_k_G)
    slots = [row.ready_slot() for row in rows]
    values_GKA = version.engine.value_logits(slots, [row.history for row in rows], candidates.token_ids_BK)
    offsets_GK = _offsets_by_method(version, rows, values_GKA, inv_eta_G)
    floor_G = version.distribution.v_min * inv_eta_G
    logits_BV[indices_G] = tilt(logits_GV, candidates, offsets_GK, floor_G, temperature_G)
    kl_G = kl_divergence(logits_GV, candidates, offsets_GK, floor_G, temperature_G)
    for position, row in enumerate(rows):
        if row.record is not None:
            row.record.write(len(row.output_token_ids), kl_G, position)


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
        of_method = torch.tensor(positions, device=values_GKA.device)
        offsets_GK[of_method] = offsets(version.distribution, values_GKA[of_method], inv_eta_G[of_method], method)
    return offsets_GK
