"""Signs of degenerate text, which a reward may not see. Pure functions of token ids, and one plain rule.

Repetition inside a completion: seq-rep-n of Welleck et al., "Neural text generation with unlikelihood training" (2020).
Sameness across completions: distinct-n of Li et al., "A diversity-promoting objective function for neural conversation
models" (2016). Both count the end token, so that answers of one word have a bigram too.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qtilt_trainer.evaluate.record import Record

MORE_REPETITION = 0.1
"""Share of repeated 4-grams above the reference's."""
LESS_VARIETY = 0.5
"""Of the reference's distinct-2."""
OTHER_LENGTH = 2.0
"""Times the reference's mean length, or that much shorter."""
RULE = (
    f"this rule: rep-4 more than {MORE_REPETITION:g} above the reference's in the same regime, dist-2 below "
    f"{LESS_VARIETY:g} of its, or a mean length that differs by more than a factor of {OTHER_LENGTH:g}"
)
"""For readers of tables."""


def ngrams(token_ids: Sequence[int], n: int) -> list[tuple[int, ...]]:
    """All runs of n neighbouring tokens."""
    return [tuple(token_ids[start : start + n]) for start in range(len(token_ids) - n + 1)]


def repetition(token_ids: Sequence[int], n: int = 4) -> float:
    """seq-rep-n: the share of a completion's n-grams that occurred in it before; 0 without an n-gram."""
    found = ngrams(token_ids, n)
    return 1 - len(set(found)) / len(found) if found else 0.0


def distinct(completions: Sequence[Sequence[int]], n: int = 2) -> float | None:
    """distinct-n: different n-grams of all completions by the number of all; None without an n-gram.

    It falls with the amount of text: compare equally many completions of similar length.
    """
    found = [gram for token_ids in completions for gram in ngrams(token_ids, n)]
    return len(set(found)) / len(found) if found else None


def signs_of_degeneration(record: "Record", reference: "Record") -> list[str]:
    """What sets a cell's text grossly apart from the reference's in the same regime; empty when nothing does."""
    signs = []
    if record.rep_4 is not None and reference.rep_4 is not None and record.rep_4 > reference.rep_4 + MORE_REPETITION:
        signs.append(f"repeats itself: rep-4 {record.rep_4:.2f}, the reference {reference.rep_4:.2f}")
    if (
        record.distinct_2 is not None
        and reference.distinct_2 is not None
        and record.distinct_2 < LESS_VARIETY * reference.distinct_2
    ):
        signs.append(f"little variety: dist-2 {record.distinct_2:.2f}, the reference {reference.distinct_2:.2f}")
    if record.tokens is not None and reference.tokens is not None:
        shorter, longer = reference.tokens / OTHER_LENGTH, reference.tokens * OTHER_LENGTH
        if not shorter <= record.tokens <= longer:
            signs.append(f"other length: {record.tokens:.1f} tokens, the reference {reference.tokens:.1f}")
    return signs
