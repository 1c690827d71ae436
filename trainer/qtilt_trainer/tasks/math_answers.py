r"""What a mathematical answer *is*: a number, an expression, a list, a set, an interval, an equation, words.

The structure (lists, brackets, relations, bases, units) is read here, because what it means for equality depends on it:
a list has no order and a point has one, 52_8 is no product, n = 3k isn't 3. What is left, expressions without any of
that, math-verify's parser (latex2sympy2-extended) turns into SymPy, unevaluated and exact.
"""

import re
from dataclasses import dataclass, replace
from functools import lru_cache

from latex2sympy2_extended.latex2sympy2 import ConversionConfig, latex2sympy
from math_verify.grader import should_treat_as_complex
from sympy import Basic, Expr, I, MatrixBase, MatrixExpr, Rational, Symbol
from sympy.core.function import AppliedUndef

from qtilt_trainer.tasks.latex_text import (
    DEGREES,
    LONGEST_ANSWER,
    balanced,
    enclosed,
    exact,
    split_outside_brackets,
    text_content,
    tidy,
)
from qtilt_trainer.tasks.plain_numbers import PlainNumber, plain_number


class UnreadableError(ValueError):
    """The text is no answer this file understands."""


@dataclass(frozen=True)
class Value:
    """A number or an expression, exactly; with what is written beside it."""

    expression: Basic
    number: PlainNumber | None = None
    """Set when it is a number written out."""
    percent: bool = False
    unit: str | None = None


@dataclass(frozen=True)
class Words:
    """Text, or a letter that names a choice."""

    text: str


@dataclass(frozen=True)
class InBase:
    """Digits with a base: 52_8. Never compared by value: the question is which digits."""

    digits: str
    base: int


@dataclass(frozen=True)
class Choice:
    """(C) 12: a letter and what stands beside it."""

    letter: str
    content: "Answer"


@dataclass(frozen=True)
class Collection:
    """Several answers."""

    brackets: str
    """"" a list without any, "{}" a set, "()", "[)", … a point or an interval, ":" a ratio."""
    items: tuple["Answer", ...]
    joined_by_or: bool = False

    @property
    def is_ordered(self) -> bool:
        """The order matters: points, ratios, and lists with an ellipsis, which only an order gives a meaning."""
        return self.brackets not in ("", "{}") or Words("...") in self.items


@dataclass(frozen=True)
class Named:
    """x = 5, f(x) = x^2, x in [0, 1]: a value and whose it is."""

    name: str
    value: "Answer"
    equation: "Chain | None" = None
    """The same as an equation; None for "in"."""


@dataclass(frozen=True)
class Chain:
    """a < b <= c, or 2x + 3y = 5: terms and the relations between them (=, !=, <, >, <=, >=)."""

    terms: tuple[Basic, ...]
    relations: tuple[str, ...]


@dataclass(frozen=True)
class SetFormula:
    r"""Sets joined by \cup, \cap and \setminus, from left to right."""

    sets: tuple["Answer", ...]
    operations: tuple[str, ...]


@dataclass(frozen=True)
class Matrix:
    """Rows of entries."""

    rows: tuple[tuple["Answer", ...], ...]


Answer = Value | Words | InBase | Choice | Collection | Named | Chain | SetFormula | Matrix

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
PROSE = re.compile(r"(?<![A-Za-z\\{])[A-Za-z]{4,}(?![A-Za-z}])")
"""Four letters in a row that are no command: the parser would read them as a product."""
WORD = re.compile(r"[^\W\d_][^\W\d_'\-]*(?:[ \-]+[^\W\d_][^\W\d_'\-]*)*")
SHORT_WORDS = {"yes", "no", "odd", "all"}
CURRENCY = re.compile(r"(?:\\?\$|\u20ac|\u00a3|\\pounds(?![A-Za-z]))")
PERCENT = re.compile(r"\s*(?:\\?%|(?:\\text\s*\{\s*)?(?:percent(?:age)?|per cent|pct)\s*\}?)$")
TEXT_UNIT = re.compile(r"\s*\\text\s*\{([^{}]*)\}\s*(?:\^\s*\{?\s*(\d)\s*\}?)?$")
WORD_UNIT = re.compile(r"(?<=[\d}])\s+([A-Za-z]{2,}(?:[ /][A-Za-z]+)*)\s*(?:\^\s*\{?\s*(\d)\s*\}?)?$")
DEGREE_UNIT = re.compile(rf"{DEGREES.pattern}\s*(?:\\text\s*\{{\s*)?([CF]?)\s*\}}?$")
SHORT_UNITS = {
    "cm",
    "mm",
    "km",
    "kg",
    "mg",
    "lb",
    "lbs",
    "oz",
    "ft",
    "in",
    "hr",
    "hrs",
    "ml",
    "mph",
    "kph",
    "min",
    "sec",
    "pm",
    "am",
    "deg",
}
UNIT_NAMES = {
    "dollar": "$",
    "usd": "$",
    "euro": "\u20ac",
    "eur": "\u20ac",
    "pound": "lb",
    "hr": "hour",
    "min": "minute",
    "centimeter": "cm",
    "centimetre": "cm",
    "millimeter": "mm",
    "millimetre": "mm",
    "meter": "m",
    "metre": "m",
    "kilometer": "km",
    "kilometre": "km",
    "kilogram": "kg",
    "gram": "g",
    "sec": "second",
    "deg": "degree",
    "inche": "inch",
    "in": "inch",
    "foot": "feet",
    "ft": "feet",
    "unit": "",
    "sq unit": "",
    "square unit": "",
    "cubic unit": "",
}
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
    without_unit, unit = _without_unit(text)
    number = plain_number(without_unit)
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
    return Chain(tuple(map(_quantity, terms)), tuple(RELATIONS[one] for one in relations))


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
    return Chain(tuple(map(_quantity, terms)), ("=",) * (len(terms) - 1))


def _as_chain(terms: list[str]) -> Chain | None:
    try:
        return Chain(tuple(map(_quantity, terms)), ("=",))
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
    rest, unit = _without_unit(text)
    matrix = _computed_matrix(rest)
    if matrix is not None:
        return matrix
    percent = PERCENT.search(rest)
    if percent:
        return replace(_bare_value(rest[: percent.start()]), percent=True)
    return replace(_bare_value(rest), unit=unit)


def _computed_matrix(text: str) -> Matrix | None:
    """The result of sums and products of matrices."""
    computed = _expression(text).doit() if r"\begin" in text else None
    if not isinstance(computed, MatrixBase):
        return None
    return Matrix(tuple(tuple(Value(entry) for entry in row) for row in computed.tolist()))


def _bare_value(text: str) -> Value:
    number = plain_number(text)
    return _value_of(number) if number is not None else Value(_expression(text))


def _value_of(number: PlainNumber) -> Value:
    expression = Rational(number.value.numerator, number.value.denominator)
    return Value(expression, number=number, percent=number.percent)


def _without_unit(text: str) -> tuple[str, str | None]:
    currency = CURRENCY.search(text)
    if currency:
        text = CURRENCY.sub("", text).strip()
        name = {"\\$": "$", "\\pounds": "\u00a3"}.get(currency.group(), currency.group())
        return _without_unit(text)[0], name
    degree = DEGREE_UNIT.search(text)
    if degree and degree.start() > 0:
        return text[: degree.start()].strip(), "degree" + degree[1].casefold()
    found = TEXT_UNIT.search(text)
    if found and found.start() > 0 and not PERCENT.search(text):
        return text[: found.start()].strip(), _unit_name(found[1], found[2])
    found = WORD_UNIT.search(text)
    if found and _is_unit(found[1]) and plain_number(text[: found.start()].strip()) is not None:
        return text[: found.start()].strip(), _unit_name(found[1], found[2])
    return text, None


def _is_unit(word: str) -> bool:
    if PERCENT.fullmatch(word):
        return False
    first = word.split()[0].casefold()
    return first in SHORT_UNITS or len(first) > 3


def _unit_name(written: str, power: str | None) -> str | None:
    name = written.strip().strip(".").casefold()
    singular = name if name.endswith("ss") or "/" in name or len(name) < 3 else name.removesuffix("s")
    name = UNIT_NAMES.get(name, UNIT_NAMES.get(singular, singular))
    return (name + (f"^{power}" if power else "")) or None


def _quantity(text: str) -> Basic:
    """An expression that can be added and compared: no set, no matrix."""
    parsed = _expression(text)
    if not isinstance(parsed, Expr) or isinstance(parsed, MatrixExpr):
        raise UnreadableError("a side of a relation is no quantity")
    return parsed


def _expression(text: str) -> Basic:
    """SymPy's form of an expression without structure. Raises UnreadableError."""
    if re.search(r"(?<![_^\d])\d\s+\d", text):
        return _mixed_number(text)
    if PROSE.search(text):
        raise UnreadableError("there are words in it")
    latex = exact(DEGREES.sub("", re.sub(r"\\text\s*\{\s*([A-Za-z]\w*)\s*\}", r"\1", text)))
    try:
        parsed = latex2sympy(
            latex,
            is_real=not should_treat_as_complex(latex),
            normalization_config=None,
            conversion_config=ConversionConfig(lowercase_symbols=False),
        )
    except RecursionError as error:
        raise UnreadableError("it is nested too deeply") from error
    except Exception as error:  # The parser's own errors are of any kind.
        raise UnreadableError("it is not an expression") from error
    if not isinstance(parsed, Basic):
        raise UnreadableError("it is not an expression")
    return _with_plain_symbols(parsed)


def _with_plain_symbols(parsed: Basic) -> Basic:
    """f(x) is a quantity with that name, i the imaginary unit; symbols are their names, whatever is assumed of them."""
    named = parsed.replace(lambda part: isinstance(part, AppliedUndef), lambda part: Symbol(str(part)))
    plain = {one: I if one.name == "i" else Symbol(one.name) for one in named.free_symbols if isinstance(one, Symbol)}
    return named.xreplace(plain)


def _mixed_number(text: str) -> Basic:
    found = re.fullmatch(r"\s*(-?)\s*(\d+\s+\d+\s*/\s*\d+)\s*", text)
    number = plain_number(found[2]) if found else None
    if found is None or number is None:
        raise UnreadableError("two numbers stand side by side")
    return Rational(number.value.numerator, number.value.denominator) * (-1 if found[1] else 1)
