r"""Which number of a text is its answer: the box's, what follows `####`, what follows "answer", otherwise the last one.

A text that goes on with a question of its own is read up to there. A "-" is a sign where no operand stands before it:
`x = -5`, `to -3`, `-$5` and `$-5` are negative, `10-5`, `x - 5` and `$200,000 - $130,000` end in a positive number.
"5 or 6" answers nothing; "1/2 or 0.5" does.
"""

import re
from collections.abc import Iterator

from qtilt_trainer.tasks.answer_text import before_next_question, boxed_answer, made_plain
from qtilt_trainer.tasks.plain_numbers import NUMBER, PlainNumber, number_of, plain_number, same_number

LONGEST_LINE = 1000
"""Characters after "answer is" in which the number is looked for."""

_MARKUP = r"(?:\\?[$\u20ac\u00a3\u00a5\u20b9]|\\text\s*\{[^{}]*\}|\\[(\[]|[*_`{(]|\\mathbf\s*\{)"
_CODES = r"(?:(?:USD|EUR|GBP|INR|Rs\.?|RM|US)\s?\$?)"
_FOUND = re.compile(
    rf"(?P<sign>[-+]\s?)?(?P<markup>(?:\\?[$\u20ac\u00a3\u00a5\u20b9]\s?|{_CODES})?)(?P<inner>[-+])?(?:{NUMBER})"
)
_NUMBER_IS_PART = re.compile(r"(?:[A-Za-z\\_]|[\d][.,]?|\^\s*\{?|_\s*\{?)$")
"""Before a digit: then it belongs to a name, a longer number, an exponent or an index (H2, m^2, a_1)."""
_OPERAND = re.compile(r"[\w)\]}%!]$")
_NEGATIVE = re.compile(r"(?:\bnegative|(?:\b(?:is|was|to|at|of|by|equals)|[=:])\s+minus)\s+(?=\\?\$?\d)", re.IGNORECASE)
_POINTED_GROUPS = re.compile(r"(?<![\d.,])(\d{1,3}(?:\.\d{3})+),(\d{1,2})(?![\d,])")
"""1.000,50"""
_DECIMAL_COMMA = re.compile(r"(?<![\d.,])(?:\d+,(?=(?:\d{1,2}|\d{4,})(?![\d,]|\.\d))|0,(?=\d+(?![\d,]|\.\d)))")
"""1000,99 and 0,125: a comma that can't be a thousands separator, nor one of several."""
_MARKER = re.compile(r"\banswer\b[^\n\d=:]{0,60}?(?:\bis\b|[:=])|####", re.IGNORECASE)
_OR = re.compile(r"[^\w.]*\bor\b[^\w.]*")
_BETWEEN = re.compile(rf"(?:\s|:|{_MARKUP}|[}}])*[-+]?(?:\s|{_MARKUP})*")


def answered_number(text: str) -> PlainNumber | None:
    """The number that the text answers; None if there is none in it."""
    answered = _readable(before_next_question(text))
    if _first(answered) is None:
        answered = _readable(text)
    box = boxed_answer(answered)
    if box is not None:
        return plain_number(box.strip("$ ")) or _last(box)
    marked = (_marked(answered, marker) for marker in reversed(list(_MARKER.finditer(answered))))
    try:
        return next((number for number in marked if number is not None), None) or _last(answered)
    except _HedgedError:
        return None


class _HedgedError(Exception):
    """The text leaves open which of two numbers it is."""


def _readable(text: str) -> str:
    """One way to write minus and decimal points."""
    text = _NEGATIVE.sub(lambda found: re.sub(r"(?i)(?:negative|minus)\s+$", "-", found.group()), made_plain(text))
    text = _POINTED_GROUPS.sub(lambda found: f"{found[1].replace('.', '')}.{found[2]}", text)
    return _DECIMAL_COMMA.sub(lambda found: found.group().replace(",", "."), text)


def _marked(text: str, marker: re.Match[str]) -> PlainNumber | None:
    """The number that a marker announces: right after it, or behind the last "=" of its line, or its line's last."""
    line = text[marker.end() : marker.end() + LONGEST_LINE].lstrip(" \t*:$\n").split("\n", 1)[0]
    numbers = [found for found in _written_numbers(line) if _number(line, found) is not None]
    if not numbers:
        return None
    equals = line.rfind("=", 0, numbers[-1].start())
    if equals >= 0:
        chosen = next(found for found in numbers if found.start() > equals)
    else:
        chosen = numbers[0] if _BETWEEN.fullmatch(line[: numbers[0].start()]) else numbers[-1]
    return _unhedged(line, chosen)


def _first(text: str) -> PlainNumber | None:
    numbers = (_number(text, found) for found in _written_numbers(text))
    return next((number for number in numbers if number is not None), None)


def _last(text: str) -> PlainNumber | None:
    from_the_end = reversed(list(_written_numbers(text)))
    chosen = next((found for found in from_the_end if _number(text, found) is not None), None)
    return None if chosen is None else _unhedged(text, chosen)


def _unhedged(text: str, chosen: re.Match[str]) -> PlainNumber | None:
    """The number of this match. Raises _HedgedError if it is one of two different ones with an "or" between them."""
    number = _number(text, chosen)
    for found in _written_numbers(text):
        first, second = sorted((found, chosen), key=lambda match: match.start())
        if _OR.fullmatch(text, first.end(), second.start()):
            other = _number(text, found)
            if number is not None and other is not None and not same_number(number, other):
                raise _HedgedError
    return number


def _written_numbers(text: str) -> Iterator[re.Match[str]]:
    """What looks like a number and isn't part of something else."""
    return (found for found in _FOUND.finditer(text) if not _is_part(text, found))


def _number(text: str, found: re.Match[str]) -> PlainNumber | None:
    return number_of(found, _is_negative(text, found))


def _is_part(text: str, found: re.Match[str]) -> bool:
    if found["sign"] or found["markup"]:
        return False
    return _NUMBER_IS_PART.search(text[max(0, found.start() - 4) : found.start()]) is not None


def _is_negative(text: str, found: re.Match[str]) -> bool:
    if found["inner"] is not None:
        return found["inner"] == "-"
    sign = found["sign"]
    if sign is None or sign[0] == "+":
        return False
    before = text[max(0, found.start() - 40) : found.start()].rstrip(" \t")
    if len(sign) > 1:  # "- 5" with a space: a bullet or an operator, except behind "=" and ":".
        return before.endswith(("=", ":"))
    touching = found.start() > 0 and _OPERAND.search(text[found.start() - 1]) is not None
    # "10 -5" has an operand before its sign, "to -5" a word.
    return not touching and re.search(r"[\d)\]}%]$", before) is None
