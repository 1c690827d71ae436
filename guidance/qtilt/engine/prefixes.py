"""Which running histories begin with the same tokens, so that one's cache can be copied instead of computed again.

Shapes: ``S`` slots, ``P`` positions. Everything here is on the host.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

# Copying fewer tokens isn't worth an operation of its own.
SHORTEST = 16


class SharedPrefixes:
    """The tokens of every history that holds a slot."""

    def __init__(self, slots: int, max_length: int) -> None:
        self._tokens_SP = np.zeros((slots, max_length), dtype=np.int32)

    def note(self, slot: int, start: int, token_ids: Sequence[int]) -> None:
        """The slot's history has ``token_ids`` from position ``start`` on."""
        if len(token_ids) == 1:  # in every step, for every history: a slice takes several times as long
            self._tokens_SP[slot, start] = token_ids[0]
        else:
            self._tokens_SP[slot, start : start + len(token_ids)] = token_ids

    def longest(self, slot: int, length: int, available: dict[int, int]) -> tuple[int, int]:
        """The slot whose history has most of the first ``length`` tokens of this one's, and how many.

        available: how many tokens of each other slot may be taken. (slot, 0) when it isn't worth it.
        """
        others = [other for other, count in available.items() if other != slot and count >= SHORTEST]
        if not others or length < SHORTEST:
            return slot, 0
        common = self._common(slot, length, np.array(others))
        common = np.minimum(common, [available[other] for other in others])
        best = int(common.argmax())
        return (others[best], int(common[best])) if common[best] >= SHORTEST else (slot, 0)

    def _common(self, slot: int, length: int, others: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        differs = self._tokens_SP[others, :length] != self._tokens_SP[slot, :length]
        return np.where(differs.any(axis=1), differs.argmax(axis=1), length)
