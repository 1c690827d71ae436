"""What guidance needs of vLLM's model runner: v1/ and v2/ have it from the two that there are. Imports no vLLM.

Shapes: ``S`` slots, ``P`` positions of a slot; ``N`` requests of a step, ``R`` rows of logits, one each without drafts.

A request keeps its slot from its arrival in the batch until it leaves, or is preempted; the slot of its value cache has
the same number. A row of logits is a token that was fed at a position of a slot: a request's last committed token and,
behind it, its drafts. Every token after the prefill is fed once it is committed, or was as a draft that came true. So a
value cache that is written at every row's (slot, position) holds the history whenever a row is scored, and what a
rejected draft left is overwritten before. A step needs no token on the host.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from qtilt.forwards.arrays import Int32Array, IntArray


class Requests(Protocol):
    """The requests that a model runner holds, by slot.

    speculates: whether tokens are drafted. Lengths on the host are then upper bounds once a request has drawn a token.
    total_len_S: tokens of the prompt and drawn ones, on the device; None without drafts, when the host knows.
    tokens_SP: int32, each request's tokens on the device; the last one that was drawn is perhaps not yet there.
    """

    device: torch.device
    slots: int
    speculates: bool
    total_len_S: Tensor | None
    tokens_SP: Tensor

    def prompt_len(self, slot: int) -> int:
        """Tokens of the prompt."""

    def prefill_len(self, slot: int) -> int:
        """Tokens fed before the first is drawn: the prompt, and the earlier output of a resumed request."""

    def prefill(self, slot: int) -> Int32Array:
        """These tokens, of a request that arrives, as far as the host knows them."""


class TakesRequests(ABC):
    """What the interfaces of both model runners have a processor do."""

    @abstractmethod
    def enter(self, slot: int, sampling_params: Any, *, has_tokens: bool) -> bool:
        """A request takes a slot: whether it is guided. has_tokens: its prompt isn't embeddings."""

    @abstractmethod
    def leave(self, slot: int) -> None:
        """The request in the slot, if there is one, has left the batch."""


@dataclass(frozen=True, slots=True)
class StepRows:
    """The rows of logits of one step.

    slots_N, lengths_N: on the host, each request's slot and the tokens visible to the one being drawn, or an upper
    bound. slots_R, positions_R, token_ids_R: int64 on the device, where each row's token was fed, and the token.
    """

    slots_N: IntArray
    lengths_N: IntArray
    slots_R: Tensor
    positions_R: Tensor
    token_ids_R: Tensor

    @property
    def has_drafts(self) -> bool:
        """Whether some rows follow drafts. Else row i is that of request i."""
        return len(self.slots_R) != len(self.slots_N)
