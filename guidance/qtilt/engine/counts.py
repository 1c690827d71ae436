"""What a value engine has done since it was made: plain numbers of the host, which cost a step next to nothing."""

from dataclasses import dataclass


@dataclass(slots=True)
class EngineCounts:
    """seconds: in forwards and head, as long as the host was in them: on a GPU that is only starting the work.

    Of the tokens before those that are drawn on, which cost a forward more than one token a row: first, cached for the
    first time (prompts); again, that their request had in the cache before (its history was dropped for room, or it was
    preempted and has come back); copied, from another history that begins alike, in place of computing them.
    """

    seconds: float = 0.0
    first: int = 0
    again: int = 0
    copied: int = 0

    def note_catch_up(self, start: int, end: int, held_before: int) -> None:
        """Tokens ``start`` to ``end`` of a history are computed, of which it had the first ``held_before`` already."""
        again = max(min(end, held_before) - start, 0)
        self.again += again
        self.first += max(end - start, 0) - again
