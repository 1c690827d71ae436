"""Under tensor parallelism: the first rank guides, and all ranks sample from the logits that it has made.

Each rank has the reference's logits, and draws each token itself. Values computed on each could differ by rounding, or
fail on one alone, and then ranks would go on with different tokens. So only the first holds value models and runs them.
The others, which would wait for it anyway, are told where it has moved which tokens, and by how much all others; what
is sent doesn't grow with the vocabulary. Imports no vLLM.

Shapes: ``R`` rows of logits, ``G`` of them that one value-model version guides, ``V`` vocabulary of the reference,
``K`` candidates, ``W`` candidates at most and the token that ends a request.
"""

from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor

from qtilt.method.tilt import scale_of
from qtilt.vllm_plugin.runner import StepRows
from qtilt.vllm_plugin.step import Guided


class Group(Protocol):
    """vLLM's group of tensor-parallel ranks."""

    world_size: int
    rank_in_group: int

    def broadcast(self, input_: Tensor, src: int = 0) -> Tensor:
        """Copy ``input_`` of one rank, in place, to all others; every rank calls it."""


class Ranks:
    """What the ranks of one engine tell each other of a step. max_top_k: most candidates of a row."""

    def __init__(self, group: Group, max_top_k: int, device: torch.device) -> None:
        self._group = group
        self._width = max_top_k + 1  # the token that ends the request, if guidance fails
        # What the first broadcast allocates is there before vLLM shares out what is left.
        group.broadcast(torch.zeros(1, device=device))

    @property
    def guides(self) -> bool:
        """Whether this is the rank that guides."""
        return self._group.rank_in_group == 0

    def begin(self, ending_R: Tensor) -> None:
        """A step begins, on the rank that guides. ending_R: int64, a row's ending token, or a negative number."""
        self._moved_RW = ending_R.clamp(min=0).unsqueeze(-1).repeat(1, self._width)
        self._lowered_R1 = torch.zeros(len(ending_R), 1, device=ending_R.device)

    def note(self, where: slice | Tensor, guided: Guided, temperature_G: Tensor, is_mine_G: Tensor | None) -> None:
        """What a version has done to the rows ``where``: only to those that are mine; None: to all."""
        moved_GK = guided.token_ids_GK
        # As the tilt does it: all logits stay the same to the bit.
        lowered_G1 = (scale_of(temperature_G).double().unsqueeze(-1) * guided.others_G1).float()
        candidates = slice(1, 1 + moved_GK.shape[1])
        if is_mine_G is not None:
            is_mine_G1 = is_mine_G.unsqueeze(-1)
            moved_GK = moved_GK.where(is_mine_G1, self._moved_RW[where, candidates])
            lowered_G1 = lowered_G1.where(is_mine_G1, self._lowered_R1[where])
        self._moved_RW[where, candidates], self._lowered_R1[where] = moved_GK, lowered_G1

    def send(self, logits_RV: Tensor) -> None:
        """The step ends, on the rank that guides."""
        # A float32 holds token ids below 2^24.
        moved_to_RW = logits_RV.gather(-1, self._moved_RW).float()
        self._group.broadcast(torch.cat([self._lowered_R1, self._moved_RW.float(), moved_to_RW], dim=-1))

    def receive(self, logits_RV: Tensor) -> Tensor:
        """The logits, in place, as they are on the rank that guides."""
        told = torch.empty(len(logits_RV), 1 + 2 * self._width, device=logits_RV.device)
        self._group.broadcast(told)
        lowered_R1, moved_RW, moved_to_RW = told.split([1, self._width, self._width], dim=-1)
        logits_RV.sub_(lowered_R1)  # as the tilt does it: a logit of −0 stays one
        return logits_RV.scatter_(-1, moved_RW.long(), moved_to_RW.to(logits_RV.dtype))


class FollowingBatch:
    """The guided requests of the running batch, by slot, on a rank that doesn't guide: see GuidedBatch."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._slots: set[int] = set()

    def __len__(self) -> int:
        return len(self._slots)

    def put(self, slot: int) -> None:
        """A request that asks for guidance takes the slot, whatever comes of it."""
        self._slots.add(slot)

    def remove(self, slot: int) -> None:
        """What is in the slot, if anything, has left."""
        self._slots.discard(slot)

    def keep_only(self, running: Iterable[int]) -> None:
        """Of all slots only these still hold a running request."""
        self._slots.intersection_update(running)

    def flush(self) -> None:
        """Nothing waits to be brought to the device."""

    def leave_out_forced(self, logits_RV: Tensor) -> None:
        """Nothing is on record here."""

    def guide(self, logits_RV: Tensor, rows: StepRows) -> Tensor:
        """The logits, in place, as the first rank has guided them."""
        return self._ranks.receive(logits_RV)
