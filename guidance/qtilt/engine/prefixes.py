"""Which running histories begin with the same tokens, so that one's cache can be copied instead of computed again.

Everything here is on the host: the tokens that a request came with, its prompt above all.
"""

from collections.abc import Callable

from qtilt.forwards.arrays import Int32Array

# Copying fewer tokens isn't worth an operation of its own.
SHORTEST = 16


class SharedPrefixes:
    """The first tokens, as far as they are known, of every history that holds a slot."""

    def __init__(self) -> None:
        self._known: dict[int, Int32Array] = {}
        self._beginning_alike: dict[bytes, set[int]] = {}

    def hold(self, slot: int, known: Int32Array) -> None:
        """The slot's history begins with these tokens."""
        self._known[slot] = known
        self._beginning_alike.setdefault(_beginning(known), set()).add(slot)

    def release(self, slot: int) -> None:
        """The slot has no history any more."""
        beginning = _beginning(self._known.pop(slot))
        self._beginning_alike[beginning].remove(slot)
        if not self._beginning_alike[beginning]:
            del self._beginning_alike[beginning]

    def longest(self, slot: int, length: int, available: Callable[[int], int]) -> tuple[int, int]:
        """The slot whose history has most of the first ``length`` tokens of this one's, and how many.

        available: how many tokens of another slot may be taken. (slot, 0) when it isn't worth it.
        """
        best = slot, 0
        for other in sorted(self._beginning_alike[_beginning(self._known[slot])]):
            most = min(available(other), length, len(self._known[slot]), len(self._known[other]))
            if other != slot and most >= max(SHORTEST, best[1] + 1):
                differs = self._known[slot][:most] != self._known[other][:most]
                common = int(differs.argmax()) if differs.any() else most
                if common >= max(SHORTEST, best[1] + 1):
                    best = other, common
        return best


def _beginning(known: Int32Array) -> bytes:
    """What histories that are worth comparing have in common."""
    return known[:SHORTEST].tobytes()
