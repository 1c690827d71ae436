r"""What a mathematical answer *is*: text -> one of answer_kinds.py.

The structure (lists, brackets, relations, bases, units) is read here, because what it means for equality depends on it:
a list has no order and a point has one, 52_8 is no product, n = 3k isn't 3. Units are told from numbers by
answer_units.py; what is left, expressions without any of that, math_expressions.py turns into SymPy.
"""

import re
from dataclasses import replace
from functools import lru_cache

from sympy import MatrixBase, Rational

from qtilt_trainer.tasks.answer_kinds import (
    Answer,
    Chain,
    Choice,
    Collection,
    InBase,
    Matrix,
    Named,
    SetFormula,
    UnreadableError,
    Value,
    Words,
)
from qtilt_trainer.tasks.answer_units import PERCENT, without_unit
from qtilt_trainer.tasks.latex_text import (
    LONGEST_ANSWER,
    balanced,
    enclosed,
    split_outside_brackets,
    text_content,
    tidy,
)
from qtilt_trainer.tasks.math_expressions import expression, quantity
from qtilt_trainer.tasks.plain_numbers import PlainNumber, plain_number

AND_OR = r"(?:\\text\s*\{\s*(?:and|or)\s*\}|\\(?:lor|land|vee|wedge)(?![A-Za-z])|(?<![A-Za-z\\])(?:and|or)(?![a-z]))"
SEPARATOR = re.compile(rf"\s*(?:[,;]\s*)?{AND_OR}\s*|\s*[,;]\s*")
SEMICOLON = re.compile(r"\s*;\s*")
RELATION = re.compile(r"\s*(\\leq|\\geq|\\neq|\\approx|\\equiv|\\in(?![A-Za-z])|=|<|>)\s*")
RELATIONS = {r"\leq": "<=", r"\geq": ">=", r"\neq": "!=", "=": "=", r"\equiv": "=", "<": "<", ">": ">"}
SET_OPERATION = re.compile(r"\s*\\(cup|cap|setminus)(?![A-Za-z])\s*")
BAR = re.compile(r"\s*(?:\\mid(?![A-Za-z])|\||:)\s*")
COLON = re.compile(r"\s*:\s*")
IN_BASE = re.compile(r"([0-9A-Fa-f]+)\s*_\s*(?:\{\s*(\d+)\s*\}|(\d+))")
CHOICE = re.compile(r"\(?\s*([A-J])\s*\)|([A-J])[.:](?!\S)")
SYSTEMS = ("cases", "aligned", "align*")
MATRIX = re.compile(
    r"\\begin\s*\{([pb]?matrix|smallmatrix|array|cases|aligned|align\*)\}(?:\s*\{[^{}]*\})?(.*)\\end\s*\{\1\}",
    re.DOTALL,
)
PLUS_MINUS = re.compile(r"\\(pm|mp)(?![A-Za-z])")
WORD = re.compile(r"[^\W\d_][^\W\d_'\-]*(?:[ \-]+[^\W\d_][^\W\d_'\-]*)*")
SHORT_WORDS = {"yes", "no", "odd", "all"}
_LETTERS = r"(?:(?:\\[A-Za-z]+(?![A-Za-z])|[A-Za-z])'*(?:_(?:\{\w+\}|\w))?|\\text\s*\{[^{}]*\})"
SYMBOL_NAME = re.compile(rf"(?:{_LETTERS}|[\s{{}}()|,:/])+")
r"""What an answer may be named: x, f(x), AB, |AB|, a:b, \frac{NO}{BO}. No digits but in indices: 2x is no name."""
NAME_TUPLE = re.compile(rf"\(\s*({_LETTERS}(?:\s*,\s*{_LETTERS})+)\s*\)")


@lru_cache(maxsize=4096)
def parse_answer(text: str) -> Answer:
    """What the text says. Raises UnreadableError."""
    if len(text) > LONGEST_ANSWER:
        raise UnreadableError(f"it has more than {LONGEST_ANSWER} characters")
    tidied = tidy(text)
    if not tidied:
        raise UnreadableError("it is empty")
    if not balanced(tidied):
        raise UnreadableError("its brackets are not balanced")
    return _parse(tidied)


def _parse(text: str) -> Answer:
    bare, unit = without_unit(text)
    number = plain_number(bare)
    if number is not None:  # Before lists: 58,500 is one number.
        return replace(_value_of(number), unit=unit)
    return _matrix(text) or _words(text) or _list(text) or _single(text)


def _single(text: str) -> Answer:
    """What isn't a list: tried from the outside in."""
    return (
        _plus_minus(text)
        or _choice(text)
        or _relation(text)
        or _set_formula(text)
        or _bracketed(text)
        or _ratio(text)
        or _in_base(text)
        or _value(text)
    )


def _matrix(text: str) -> Answer | None:
    inside = enclosed(text)
    found = MATRIX.fullmatch(inside[1] if inside and inside[0] in "([" else text)
    if found is None or r"\begin" in found[2]:
        return None
    rows = [row.strip(" ,;") for row in re.split(r"\\\\", found[2]) if row.strip(" ,;")]
    if found[1] in SYSTEMS:
        return Collection("", _flattened([_parse(row.replace("&", " ")) for row in rows]))
    return Matrix(tuple(tuple(_parse(entry.strip()) for entry in row.split("&")) for row in rows))


def _words(text: str) -> Answer | None:
    letter = re.fullmatch(r"\(?\s*(?:\\text\s*\{\s*\(?\s*)?([A-Z])\s*\)?\s*\}?\s*\)?", text)
    if letter and text != letter[1]:
        return Words(letter[1])
    content = text_content(text)
    if content is not None:
        inner = re.fullmatch(r"\(\s*([A-Z])\s*\)", content)
        if not inner and SEPARATOR.search(content):
            parts = [part for part in split_outside_brackets(content, SEPARATOR)[0] if part]
            return Collection("", tuple(Words(part) for part in parts))
        return Words(inner[1] if inner else content)
    if re.fullmatch(r"\\ldots\s*", text):
        return Words("...")
    if WORD.fullmatch(text) and (len(max(re.split(r"[ \-]", text), key=len)) > 3 or text.casefold() in SHORT_WORDS):
        if re.search(r"(?<![A-Za-z])(?:and|or)(?![A-Za-z])", text):
            return None
        return Words(text)
    return None


def _list(text: str) -> Answer | None:
    groups = [part for part in split_outside_brackets(text, SEMICOLON)[0] if part]
    if len(groups) > 1 and any(len(split_outside_brackets(group, SEPARATOR)[0]) > 1 for group in groups):
        return Collection("", tuple(_parse(group) for group in groups))  # p=5, q=2; p=7, q=2: two pairs
    parts, separators = split_outside_brackets(text, SEPARATOR)
    parts = [part for part in parts if part]
    if len(parts) < 2:
        if separators and parts:
            return _parse(parts[0])
        return None
    items = _flattened([_parse(part) for part in _with_the_first_name(parts)])
    return Collection("", items, joined_by_or=all("or" in one or "vee" in one for one in separators))


def _with_the_first_name(parts: list[str]) -> list[str]:
    """n = 2, 3, 4 names all three."""
    first, relations = split_outside_brackets(parts[0], RELATION)
    if [one.strip() for one in relations] != ["="] or not SYMBOL_NAME.fullmatch(first[0]):
        return parts
    if any(split_outside_brackets(part, RELATION)[1] for part in parts[1:]):
        return parts
    return [parts[0], *(f"{first[0]} = {part}" for part in parts[1:])]


def _flattened(items: list[Answer]) -> tuple[Answer, ...]:
    flat: list[Answer] = []
    for item in items:
        flat += item.items if isinstance(item, Collection) and item.brackets == "" else [item]
    return tuple(flat)


def _plus_minus(text: str) -> Answer | None:
    if not PLUS_MINUS.search(text) or text.startswith(r"\{"):
        return None
    upper = PLUS_MINUS.sub(lambda found: "+" if found[1] == "pm" else "-", text)
    lower = PLUS_MINUS.sub(lambda found: "-" if found[1] == "pm" else "+", text)
    return Collection("", _flattened([_parse(re.sub(r"(^|[=(,{]\s*)\+", r"\1", side)) for side in (upper, lower)]))


def _choice(text: str) -> Answer | None:
    bare = re.sub(r"^\\text\s*\{([^{}]*)\}", r"\1 ", text)
    found = CHOICE.match(bare)
    if found is None or not bare[found.end() :].strip():
        return None
    if enclosed(text) is not None or not re.match(r"\s*[\d\\$A-Za-z]", bare[found.end() :]):
        return None
    # f(A) = …, (A + B)(C) and the like begin otherwise: a choice is a letter in brackets and an answer behind it.
    return Choice(found[1] or found[2], _parse(bare[found.end() :].strip()))


def _relation(text: str) -> Answer | None:
    terms, relations = split_outside_brackets(text, RELATION)
    relations = [one.strip() for one in relations]
    if not relations:
        return None
    if not all(terms):
        raise UnreadableError("a relation has only one side")
    terms, relations = _without_approximation(terms, relations)
    if not relations:
        return _parse(terms[0])
    if relations[0] == r"\in":
        return Named(_name(terms[0]), _parse(text.split(r"\in", 1)[1].strip()))
    if r"\in" in relations:
        raise UnreadableError("a membership among other relations")
    if set(relations) <= {"=", r"\equiv"}:
        return _equation(terms)
    return Chain(tuple(map(quantity, terms)), tuple(RELATIONS[one] for one in relations))


def _without_approximation(terms: list[str], relations: list[str]) -> tuple[list[str], list[str]]:
    """x \\approx 11 says 11, x = 1/3 \\approx 0.33 says 1/3."""
    if r"\approx" not in relations:
        return terms, relations
    first = relations.index(r"\approx")
    if first == 0 and SYMBOL_NAME.fullmatch(terms[0]):
        return terms[:2], ["="]
    return terms[: first + 1], relations[:first]


def _equation(terms: list[str]) -> Answer:
    if SYMBOL_NAME.fullmatch(terms[0]):
        return Named(_name(terms[0]), _parse(terms[-1]), _as_chain([terms[0], terms[-1]]))
    return Chain(tuple(map(quantity, terms)), ("=",) * (len(terms) - 1))


def _as_chain(terms: list[str]) -> Chain | None:
    try:
        return Chain(tuple(map(quantity, terms)), ("=",))
    except UnreadableError:
        return None


def _name(text: str) -> str:
    return re.sub(r"[\s{}()]" if NAME_TUPLE.fullmatch(text) else r"[\s{}]", "", text)


def _set_formula(text: str) -> Answer | None:
    parts, operations = split_outside_brackets(text, SET_OPERATION)
    if not operations:
        return None
    return SetFormula(tuple(_parse(part) for part in parts), tuple(one.strip().lstrip("\\") for one in operations))


def _bracketed(text: str) -> Answer | None:
    found = enclosed(text)
    if found is None:
        return None
    opening, inside, closing = found
    if opening == r"\{" and closing == r"\}":
        return _braces(inside)
    parts = [part for part in split_outside_brackets(inside, re.compile(r"\s*[,;]\s*"))[0] if part]
    if opening in ("(", "[", r"\langle") and closing in (")", "]", r"\rangle") and len(parts) > 1:
        brackets = ("[" if opening == "[" else "(") + ("]" if closing == "]" else ")")
        return Collection(brackets, tuple(_parse(part) for part in parts))
    if (opening, closing) == ("{", "}") and len(parts) > 1:
        return _braces(inside)
    if (opening, closing) in (("(", ")"), ("{", "}")):
        return _parse(inside)
    return None


def _braces(inside: str) -> Answer:
    if not inside:
        return Collection("{}", ())
    before, bars = split_outside_brackets(inside, BAR)
    if len(bars) == 1 and re.match(r"\\?[A-Za-z]+(?:\s*\\in.*)?$", before[0]):
        return _parse(before[1])
    parts = [part for part in split_outside_brackets(inside, SEPARATOR)[0] if part]
    return Collection("{}", _flattened([_parse(part) for part in parts]))


def _ratio(text: str) -> Answer | None:
    parts, colons = split_outside_brackets(text, COLON)
    return Collection(":", tuple(_parse(part) for part in parts)) if colons and all(parts) else None


def _in_base(text: str) -> Answer | None:
    found = IN_BASE.fullmatch(text)
    if found is None or not (found[1][0].isdigit() or len(found[1]) > 1):
        return None
    return InBase(found[1].upper().lstrip("0") or "0", int(found[2] or found[3]))


def _value(text: str) -> Answer:
    rest, unit = without_unit(text)
    matrix = _computed_matrix(rest)
    if matrix is not None:
        return matrix
    percent = PERCENT.search(rest)
    if percent:
        return replace(_bare_value(rest[: percent.start()]), percent=True)
    return replace(_bare_value(rest), unit=unit)


def _computed_matrix(text: str) -> Matrix | None:
    """The result of sums and products of matrices."""
    computed = expression(text).doit() if r"\begin" in text else None
    if not isinstance(computed, MatrixBase):
        return None
    return Matrix(tuple(tuple(Value(entry) for entry in row) for row in computed.tolist()))


def _bare_value(text: str) -> Value:
    number = plain_number(text)
    return _value_of(number) if number is not None else Value(expression(text))


def _value_of(number: PlainNumber) -> Value:
    expression = Rational(number.value.numerator, number.value.denominator)
    return Value(expression, number=number, percent=number.percent)
