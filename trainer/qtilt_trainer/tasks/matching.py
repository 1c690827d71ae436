r"""The ways a jsonl task reads an answer out of a completion and compares it: exact, numeric, boxed, regex."""

import re
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from decimal import Decimal

from qtilt_trainer.tasks.grading import canonical_expression, matches_expression

NUMBER = re.compile(
    r"(?:(?<![\w)])[-+])?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d{1,3}(?!\d))?"
)
"""A decimal number. A sign after a digit is an operator; larger exponents than 999 are no answer and no Decimal."""
NUMERIC_TOLERANCE = Decimal("1e-6")
"""Relative difference below which two numbers are equal: 0.333333 answers 1/3 written as 0.3333333."""


@dataclass(frozen=True, slots=True)
class Matcher:
    """How one kind of answer is judged."""

    matches: Callable[[str, str, str | None], bool]
    """(expected answer, completion, pattern) -> right or wrong."""
    extract: Callable[[str, str | None], Hashable | None]
    """(completion, pattern) -> what it answers, for votes."""


def last_number(text: str) -> Decimal | None:
    """The last decimal number in a text; thousands separators are read, units and signs of currency skipped."""
    found = NUMBER.findall(text)
    return Decimal(found[-1].replace(",", "")) if found else None


def last_group(pattern: str, text: str) -> str | None:
    """What the pattern's first group (or the whole pattern) matched last; None without a match."""
    found = list(re.finditer(pattern, text))
    if not found:
        return None
    match = found[-1]
    captured = match.group(1) if match.re.groups else match.group()
    return captured.strip() if captured is not None else None


def _match_numeric(expected: str, completion: str, _pattern: str | None) -> bool:
    wanted, given = last_number(expected), last_number(completion)
    if wanted is None or given is None:
        return False
    return abs(wanted - given) <= NUMERIC_TOLERANCE * max(abs(wanted), abs(given))


def _extract_numeric(completion: str, _pattern: str | None) -> Decimal | None:
    number = last_number(completion)
    return None if number is None else number.normalize()


def _match_regex(expected: str, completion: str, pattern: str | None) -> bool:
    if pattern is None:
        return re.search(expected, completion) is not None
    return last_group(pattern, completion) == expected.strip()


def _extract_regex(completion: str, pattern: str | None) -> str | None:
    return completion.strip() if pattern is None else last_group(pattern, completion)


MATCHERS = {
    "exact": Matcher(
        matches=lambda expected, completion, _pattern: completion.strip() == expected.strip(),
        extract=lambda completion, _pattern: completion.strip(),
    ),
    "numeric": Matcher(matches=_match_numeric, extract=_extract_numeric),
    "boxed": Matcher(
        matches=lambda expected, completion, _pattern: matches_expression(expected, completion),
        extract=lambda completion, _pattern: canonical_expression(completion),
    ),
    "regex": Matcher(matches=_match_regex, extract=_extract_regex),
}
