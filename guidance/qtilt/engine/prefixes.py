"""Which running histories begin with the same tokens, so that one's cache can be copied instead of computed again.

Everything here is on the host: the tokens that a request came with, its prompt above all.
"""

from collections.abc import Mapping

from qtilt.engine.arrays import Int32Array

# Copying fewer tokens isn't worth an operation of its own.
SHORTEST = 16


class SharedPrefixes:
    """The first tokens, as far as they are known, of every history that holds a slot."""

    def __init__(self) -> None:
        self._known: dict[int, Int32Array] = {}

    def hold(self, slot: int, known: Int32Array) -> None:
        """The slot's history begins with these tokens."""
        self._known[slot] = known

    def release(self, slot: int) -> None:
        """The slot has no history any more."""
        del self._known[slot]

    def longest(self, slot: int, length: int, available: Mapping[int, int]) -> tuple[int, int]:
        """The slot whose history has most of the first ``length`` tokens of this one's, and how many.

        available: how many tokens of each other slot may be taken. (slot, 0) when it isn't worth it.
        """
        best = slot, 0
        for other, count in available.items():
            most = min(count, length, len(self._known[slot]), len(self._known[other]))
            if other != slot and most >= max(SHORTEST, best[1] + 1):
                differs = self._known[slot][:most] != self._known[other][:most]
                common = int(differs.argmax()) if differs.any() else most
                if common >= max(SHORTEST, best[1] + 1):
                    best = other, common
        return best
