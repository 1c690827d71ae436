r"""The ways a task of data files reads an answer out of a completion and compares it: exact, numeric, boxed, regex."""

import logging
import operator
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import regex

from qtilt_trainer.tasks.answer_text import boxed_answer
from qtilt_trainer.tasks.grading import answers_equal, matches_expression, unreadable_answers
from qtilt_trainer.tasks.latex_text import LONGEST_ANSWER, tidy
from qtilt_trainer.tasks.numeric_answer import answered_number
from qtilt_trainer.tasks.plain_numbers import PlainNumber, same_number

logger = logging.getLogger(__name__)

PATTERN_TIMEOUT_S = 1.0
"""Longest time one search for a user's regular expression may take."""


@dataclass(frozen=True, slots=True)
class Matcher:
    """How one kind of answer is judged."""

    matches: Callable[[str, str, str | None], bool]
    """(expected answer, completion, pattern) -> right or wrong."""
    extract: Callable[[str, str | None], Hashable | None]
    """(completion, pattern) -> what it answers, for votes."""
    same: Callable[[Hashable, Hashable], bool] = operator.eq
    """Whether two extracted answers are the same one."""
    unreadable: Callable[[Sequence[str], str | None], dict[str, str]] = lambda _answers, _pattern: {}
    """(expected answers, pattern) -> why, for each that nothing could ever match."""


def last_group(pattern: str, text: str) -> str | None:
    """What the pattern's first group (or the whole pattern) matched last; None without a match.

    Raises TimeoutError when the search takes longer than PATTERN_TIMEOUT_S.
    """
    matches = list(regex.finditer(pattern, text, timeout=PATTERN_TIMEOUT_S))
    if not matches:
        return None
    captured = matches[-1].group(1) if matches[-1].re.groups else matches[-1].group()
    return captured.strip() if captured is not None else None


def bad_pattern(pattern: str) -> str | None:
    """Why this is no regular expression; None if it is one."""
    try:
        regex.compile(pattern)
    except regex.error as error:
        return f"not a regular expression: {error}"
    return None


def _match_numeric(expected: str, completion: str, _pattern: str | None) -> bool:
    wanted, given = answered_number(expected), answered_number(completion)
    return wanted is not None and given is not None and same_number(wanted, given)


def _same_numbers(one: Hashable, other: Hashable) -> bool:
    assert isinstance(one, PlainNumber)
    assert isinstance(other, PlainNumber)
    return same_number(one, other) or same_number(other, one)


def _unreadable_numbers(answers: Sequence[str], _pattern: str | None) -> dict[str, str]:
    return {answer: "there is no number in it" for answer in answers if answered_number(answer) is None}


def _extract_boxed(completion: str, _pattern: str | None) -> str | None:
    box = boxed_answer(completion)
    return None if box is None else tidy(box[:LONGEST_ANSWER])


def _same_boxed(one: Hashable, other: Hashable) -> bool:
    return answers_equal(str(one), str(other)) or answers_equal(str(other), str(one))


def _match_regex(expected: str, completion: str, pattern: str | None) -> bool:
    try:
        if pattern is None:
            return regex.search(expected, completion, timeout=PATTERN_TIMEOUT_S) is not None
        return last_group(pattern, completion) == expected.strip()
    except TimeoutError:
        _log_timeout(expected if pattern is None else pattern)
        return False


def _extract_regex(completion: str, pattern: str | None) -> str | None:
    if pattern is None:
        return completion.strip()
    try:
        return last_group(pattern, completion)
    except TimeoutError:
        _log_timeout(pattern)
        return None


def _log_timeout(pattern: str) -> None:
    logger.warning("searching for %.200r took more than %g s: counted as no match", pattern, PATTERN_TIMEOUT_S)


def _unreadable_patterns(answers: Sequence[str], pattern: str | None) -> dict[str, str]:
    if pattern is not None:
        return {}
    return {answer: reason for answer in answers if (reason := bad_pattern(answer)) is not None}


MATCHERS = {
    "exact": Matcher(
        matches=lambda expected, completion, _pattern: completion.strip() == expected.strip(),
        extract=lambda completion, _pattern: completion.strip(),
    ),
    "numeric": Matcher(
        matches=_match_numeric,
        extract=lambda completion, _pattern: answered_number(completion),
        same=_same_numbers,
        unreadable=_unreadable_numbers,
    ),
    "boxed": Matcher(
        matches=lambda expected, completion, _pattern: matches_expression(expected, completion),
        extract=_extract_boxed,
        same=_same_boxed,
        unreadable=lambda answers, _pattern: unreadable_answers(answers),
    ),
    "regex": Matcher(matches=_match_regex, extract=_extract_regex, unreadable=_unreadable_patterns),
}
