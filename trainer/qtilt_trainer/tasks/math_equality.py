"""Whether two answers are the same. Exact: no rounding but that of plain_numbers.py.

math-verify's own `verify` rounds to six decimals and drops what is small, so that 1/2004! = 1/2006!, and compares what
it can't solve by comparing empty lists of solutions. Here expressions are compared by expression_equality.py, equations
by the ratio of their sides' differences at points, inequalities and intervals as sets (number_sets.py).
"""

import itertools
from collections.abc import Sequence

from sympy import Basic, Mul, Rational, Set, Symbol

from qtilt_trainer.tasks.answer_kinds import (
    Answer,
    Chain,
    Choice,
    Collection,
    InBase,
    Matrix,
    Named,
    SetFormula,
    Value,
    Words,
)
from qtilt_trainer.tasks.expression_equality import DIGITS, equal_sets, number_of, proportional, same_expression
from qtilt_trainer.tasks.number_sets import as_set, chain_as_set, variables
from qtilt_trainer.tasks.plain_numbers import PlainNumber, same_number

MIRRORED = {"=": "=", "!=": "!=", "<": ">", ">": "<", "<=": ">=", ">=": "<="}


def same_answer(expected: Answer, given: Answer) -> bool:
    """Whether `given` answers what was expected."""
    expected, given = _unwrapped(expected, given)
    if isinstance(expected, Choice) or isinstance(given, Choice):
        return _same_choice(expected, given)
    if isinstance(expected, Named) and isinstance(given, Named):
        return _same_named(expected, given)
    if _is_set(expected) or _is_set(given) or isinstance(expected, Chain) != isinstance(given, Chain):
        return _same_set(expected, given)
    if isinstance(expected, Collection) or isinstance(given, Collection):
        return _same_collection(expected, given)
    if isinstance(expected, Chain) and isinstance(given, Chain):
        return _same_chain(expected, given)
    if isinstance(expected, Matrix) and isinstance(given, Matrix):
        return _same_matrix(expected, given)
    if isinstance(expected, InBase) or isinstance(given, InBase):
        return expected == given
    if isinstance(expected, Words) or isinstance(given, Words):
        return _same_words(expected, given)
    return isinstance(expected, Value) and isinstance(given, Value) and _same_value(expected, given)


def _unwrapped(expected: Answer, given: Answer) -> tuple[Answer, Answer]:
    """A name that only one side has is no part of the answer; an equation 2x = 6 isn't named."""
    expected, given = _spread(expected, given), _spread(given, expected)
    if isinstance(expected, Named) and isinstance(given, Chain) and expected.equation is not None:
        return expected.equation, given
    if isinstance(given, Named) and isinstance(expected, Chain):
        if given.equation is not None and set(expected.relations) == {"="}:
            return expected, given.equation
        return (expected, given.value) if variables(expected) == {given.name} else (expected, given)
    if isinstance(expected, Named) and isinstance(given, Chain):
        return (expected.value, given) if variables(given) == {expected.name} else (expected, given)
    if isinstance(expected, Named) and isinstance(given, Named):
        return expected, given
    if isinstance(expected, Named):
        return _unwrapped(expected.value, given)
    if isinstance(given, Named):
        return _unwrapped(expected, given.value)
    return expected, given


def _spread(answer: Answer, other: Answer) -> Answer:
    """(x, y) = (5, 8) beside y = 8, x = 5 is x = 5, y = 8."""
    if not isinstance(answer, Named) or not isinstance(answer.value, Collection) or answer.value.brackets != "()":
        return answer
    names = answer.name.split(",")
    if len(names) != len(answer.value.items) or not isinstance(other, Collection):
        return answer
    if other.brackets or not all(isinstance(item, Named) for item in other.items):
        return answer
    return Collection("", tuple(Named(name, item) for name, item in zip(names, answer.value.items, strict=True)))


def _same_named(expected: Named, given: Named) -> bool:
    if expected.name.casefold() == given.name.casefold() if len(expected.name) > 1 else expected.name == given.name:
        return same_answer(expected.value, given.value)
    if expected.equation is None or given.equation is None:
        return False
    return _same_chain(expected.equation, given.equation)


def _same_choice(expected: Answer, given: Answer) -> bool:
    if isinstance(expected, Choice) and isinstance(given, Choice):
        return expected.letter == given.letter and same_answer(expected.content, given.content)
    if isinstance(expected, Choice):
        return _letter(given) == expected.letter or same_answer(expected.content, given)
    assert isinstance(given, Choice)
    return _letter(expected) == given.letter


def _letter(answer: Answer) -> str | None:
    if isinstance(answer, Words):
        return answer.text
    if isinstance(answer, Value) and isinstance(answer.expression, Symbol):
        return str(answer.expression.name)
    return None


def _same_words(expected: Answer, given: Answer) -> bool:
    if isinstance(expected, Words) and isinstance(given, Words):
        return _spelling(expected.text) == _spelling(given.text)
    a, b = _letter(expected), _letter(given)
    if a is None or b is None:
        # \text{AB} and AB: the parser reads the latter as a product of letters.
        a, b = _joined_letters(expected), _joined_letters(given)
    return a is not None and a == b


def _spelling(text: str) -> str:
    words = " ".join(text.replace("-", " ").split()).rstrip(".")
    return words.casefold() if len(words) > 1 else words


def _joined_letters(answer: Answer) -> str | None:
    if isinstance(answer, Words):
        return "".join(sorted(answer.text.replace(" ", ""))) if answer.text.isalpha() else None
    if isinstance(answer, Value) and isinstance(answer.expression, Mul):
        names = [str(factor) for factor in answer.expression.args]
        return "".join(sorted(names)) if all(isinstance(factor, Symbol) for factor in answer.expression.args) else None
    return _letter(answer)


def _same_matrix(expected: Matrix, given: Matrix) -> bool:
    if list(map(len, expected.rows)) != list(map(len, given.rows)):
        return False
    entries = zip(itertools.chain(*expected.rows), itertools.chain(*given.rows), strict=True)
    return all(same_answer(a, b) for a, b in entries)


# Collections


def _same_collection(expected: Answer, given: Answer) -> bool:
    if isinstance(expected, Matrix) or isinstance(given, Matrix):
        return _point_as_matrix(expected, given)
    if not isinstance(expected, Collection):
        return isinstance(given, Collection) and _only_item(given) is not None and same_answer(expected, given.items[0])
    if not isinstance(given, Collection):
        return _only_item(expected) is not None and same_answer(expected.items[0], given)
    if len(expected.items) != len(given.items):
        return False
    if expected.brackets == given.brackets and not (expected.is_ordered or given.is_ordered):
        return _same_items(expected.items, given.items)
    if {expected.brackets, given.brackets} == {"", "{}"}:
        return _same_items(expected.items, given.items)
    if expected.brackets == given.brackets or {expected.brackets, given.brackets} == {"", "()"}:
        pairs = zip(expected.items, given.items, strict=True)
        return all(same_answer(a, b) for a, b in pairs)
    return False


def _only_item(collection: Collection) -> Answer | None:
    """{5} is 5."""
    return collection.items[0] if collection.brackets == "{}" and len(collection.items) == 1 else None


def _point_as_matrix(expected: Answer, given: Answer) -> bool:
    """A column or row and a point with the same entries are one vector."""
    a, b = _vector(expected), _vector(given)
    return a is not None and b is not None and len(a) == len(b) and all(map(same_answer, a, b))


def _vector(answer: Answer) -> list[Answer] | None:
    if isinstance(answer, Collection):
        return list(answer.items) if answer.brackets == "()" else None
    if isinstance(answer, Matrix) and (len(answer.rows) == 1 or all(len(row) == 1 for row in answer.rows)):
        return list(itertools.chain(*answer.rows))
    return None


def _same_items(expected: Sequence[Answer], given: Sequence[Answer]) -> bool:
    """Whether the items can be paired, in any order. Names count unless one side has none at all."""
    if any(isinstance(item, Named) for item in expected) != any(isinstance(item, Named) for item in given):
        named = expected if any(isinstance(item, Named) for item in expected) else given
        if len({item.name for item in named if isinstance(item, Named)}) > 1:
            # x = 1, y = 2 and 1, 2: without names only the order tells them apart.
            return all(map(same_answer, expected, given))
    left = list(given)
    for item in expected:
        found = next((n for n, other in enumerate(left) if same_answer(item, other)), None)
        if found is None:
            return False
        del left[found]
    return True


# Sets of numbers


def _is_set(answer: Answer) -> bool:
    """Intervals, unions and inequalities: what can only be compared as a set. Points are (a, b) too: see _same_set."""
    if isinstance(answer, SetFormula) or (isinstance(answer, Value) and isinstance(answer.expression, Set)):
        return True
    if isinstance(answer, Collection):
        return answer.joined_by_or and all(isinstance(item, (Chain, SetFormula)) for item in answer.items)
    return False


def _same_set(expected: Answer, given: Answer) -> bool:
    if len(variables(expected) | variables(given)) > 1:
        return expected == given
    a, b = as_set(expected), as_set(given)
    return a is not None and b is not None and equal_sets(a, b)


# Equations and inequalities


def _same_chain(expected: Chain, given: Chain) -> bool:
    if set(expected.relations) == {"="} and set(given.relations) == {"="}:
        if len(expected.terms) == len(given.terms) == 2:
            return proportional(_difference(expected), _difference(given), positive=False)
        return len(expected.terms) == len(given.terms) and all(map(same_expression, expected.terms, given.terms))
    if _same_terms(expected, given) or _same_terms(expected, _mirrored(given)):
        return True
    if len(expected.terms) == len(given.terms) == 2:
        for other in (given, _mirrored(given)):
            positive = other.relations != ("!=",)
            same = other.relations == expected.relations
            if same and proportional(_difference(expected), _difference(other), positive):
                return True
    return _same_sets_of(expected, given)


def _same_sets_of(expected: Chain, given: Chain) -> bool:
    if variables(expected) != variables(given):
        return False
    a, b = chain_as_set(expected), chain_as_set(given)
    return a is not None and b is not None and equal_sets(a, b)


def _same_terms(expected: Chain, given: Chain) -> bool:
    return expected.relations == given.relations and all(map(same_expression, expected.terms, given.terms))


def _mirrored(chain: Chain) -> Chain:
    return Chain(chain.terms[::-1], tuple(MIRRORED[one] for one in reversed(chain.relations)))


def _difference(chain: Chain) -> Basic:
    return chain.terms[0] - chain.terms[1]


# Values


def _same_value(expected: Value, given: Value) -> bool:
    if expected.unit is not None and given.unit is not None and expected.unit != given.unit:
        return False
    if expected.number is not None and given.number is not None:
        return same_number(_with_percent(expected.number, expected.percent), _with_percent(given.number, given.percent))
    if same_expression(expected.expression, given.expression):
        return True
    if expected.percent != given.percent:
        whole, part = (given, expected) if expected.percent else (expected, given)
        return same_expression(whole.expression, part.expression / 100)
    return _rounded(expected, given)


def _with_percent(number: PlainNumber, percent: bool) -> PlainNumber:
    return PlainNumber(number.value, percent or number.percent, number.half_unit)


def _rounded(expected: Value, given: Value) -> bool:
    """4.123105625617661 is the square root of 17: a long decimal equals the constant that rounds to it."""
    exact, decimal = (expected, given.number) if given.number is not None else (given, expected.number)
    if decimal is None or not decimal.tolerance or exact.expression.free_symbols:
        return False
    value = number_of(exact.expression, DIGITS)
    written = Rational(decimal.value.numerator, decimal.value.denominator)
    tolerance = Rational(decimal.tolerance.numerator, decimal.tolerance.denominator)
    return value is not None and bool(abs(value - written) <= tolerance) and not exact.expression.is_integer
