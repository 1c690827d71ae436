"""Whether two answers are the same. Exact: no rounding but that of plain_numbers.py.

math-verify's own `verify` rounds to six decimals and drops what is small, so that 1/2004! = 1/2006!, and compares what
it can't solve by comparing empty lists of solutions. Here constants are compared as fractions, or to 60 and 400 digits;
expressions with variables at points (an identity of analytic expressions that holds at random points to 30 digits
isn't one by chance); equations by the ratio of their sides' differences at points; inequalities and intervals as sets.
"""

import itertools
from collections.abc import Sequence
from functools import reduce
from typing import Any

from math_verify.grader import sympy_symbolic_eq
from sympy import (
    And,
    Basic,
    EmptySet,
    Eq,
    FiniteSet,
    Ge,
    Gt,
    I,
    Integer,
    Interval,
    Le,
    Lt,
    Mul,
    Ne,
    Product,
    Rational,
    S,
    Set,
    Sum,
    Symbol,
    Union,
)

from qtilt_trainer.tasks.math_answers import (
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
from qtilt_trainer.tasks.plain_numbers import PlainNumber, same_number

DIGITS = 60
MORE_DIGITS = 400
POINT_DIGITS = 30
FEWEST_POINTS = 3
RELATIONS = {"=": Eq, "!=": Ne, "<": Lt, ">": Gt, "<=": Le, ">=": Ge}
MIRRORED = {"=": "=", "!=": "!=", "<": ">", ">": "<", "<=": ">=", ">=": "<="}
POSITIVE = [Rational(n, 97) for n in (151, 233, 89, 317, 53, 411, 197, 277, 131, 367)]
"""Values of variables, for points that are positive, negative, mixed, or whole numbers (n!, binomials, (-1)^n)."""
REAL_POINTS: list[list[Rational]] = [
    POSITIVE,
    POSITIVE[3:] + POSITIVE[:3],
    [-value for value in POSITIVE],
    [value * (-1) ** n for n, value in enumerate(POSITIVE)],
]
WHOLE_POINTS = [
    [Integer(n) for n in (5, 7, 4, 11, 3, 8, 13, 6, 9, 10)],
    [Integer(n) for n in (6, 3, 8, 5, 9, 4, 7, 12, 10, 11)],
    [Integer(n) for n in (3, 4, 6, 7, 5, 9, 8, 10, 11, 12)],
    [Integer(n) for n in (8, 6, 3, 4, 12, 5, 10, 7, 13, 9)],
]


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
        return (expected, given.value) if _variables(expected) == {given.name} else (expected, given)
    if isinstance(expected, Named) and isinstance(given, Chain):
        return (expected.value, given) if _variables(given) == {expected.name} else (expected, given)
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
    variables = _variables(expected) | _variables(given)
    if len(variables) > 1:
        return expected == given
    a, b = _as_set(expected), _as_set(given)
    return a is not None and b is not None and _equal_sets(a, b)


def _equal_sets(a: Set, b: Set) -> bool:
    if isinstance(a, FiniteSet) or isinstance(b, FiniteSet):
        return bool(a == b)
    return bool(a == b) or bool(a.symmetric_difference(b).is_empty)


def _variables(answer: Answer) -> set[str]:
    if isinstance(answer, Chain):
        return {str(symbol) for term in answer.terms for symbol in term.free_symbols}
    if isinstance(answer, Collection):
        return set().union(*map(_variables, answer.items))
    return set()


def _as_set(answer: Answer) -> Set | None:
    """As a set of real numbers; None if it isn't one."""
    if isinstance(answer, SetFormula):
        parts = [_as_set(part) for part in answer.sets]
        if any(part is None for part in parts):
            return None
        pairs = zip(answer.operations, parts[1:], strict=True)
        return reduce(lambda left, pair: _SET_OPERATIONS[pair[0]](left, pair[1]), pairs, parts[0])
    if isinstance(answer, Collection):
        return _collection_as_set(answer)
    if isinstance(answer, Chain):
        return _chain_as_set(answer)
    if isinstance(answer, Named):
        return _as_set(answer.value)
    if isinstance(answer, Value):
        if isinstance(answer.expression, Set):
            return answer.expression
        return FiniteSet(answer.expression.doit()) if not answer.expression.free_symbols else None
    return None


_SET_OPERATIONS = {
    "cup": lambda a, b: a.union(b),
    "cap": lambda a, b: a.intersect(b),
    "setminus": lambda a, b: a - b,
}


def _collection_as_set(answer: Collection) -> Set | None:
    if answer.brackets in ("", "{}"):
        parts = [_as_set(item) for item in answer.items]
        return None if any(part is None for part in parts) else Union(*parts) if parts else EmptySet
    if len(answer.items) != 2 or answer.brackets == ":":
        return None
    ends = [item.expression.doit() for item in answer.items if isinstance(item, Value)]
    if len(ends) != 2 or any(end.free_symbols for end in ends):
        return None
    return Interval(ends[0], ends[1], answer.brackets[0] == "(", answer.brackets[1] == ")")


def _chain_as_set(chain: Chain) -> Set | None:
    """The numbers that make an inequality in one variable true."""
    symbols = {symbol for term in chain.terms for symbol in term.free_symbols}
    if len(symbols) != 1 or chain.relations == ("=",) * len(chain.relations):
        return None
    variable = Symbol("x", real=True)
    terms = [term.subs(next(iter(symbols)), variable).doit() for term in chain.terms]
    parts = zip(chain.relations, itertools.pairwise(terms), strict=True)
    try:
        return And(*(RELATIONS[relation](left, right) for relation, (left, right) in parts)).as_set()
    except (NotImplementedError, TypeError, AttributeError, ValueError):
        return None


# Equations and inequalities


def _same_chain(expected: Chain, given: Chain) -> bool:
    if set(expected.relations) == {"="} and set(given.relations) == {"="}:
        if len(expected.terms) == len(given.terms) == 2:
            return _proportional(_difference(expected), _difference(given), positive=False)
        return len(expected.terms) == len(given.terms) and all(map(_same_expression, expected.terms, given.terms))
    if _same_terms(expected, given) or _same_terms(expected, _mirrored(given)):
        return True
    if len(expected.terms) == len(given.terms) == 2:
        for other in (given, _mirrored(given)):
            positive = other.relations != ("!=",)
            same = other.relations == expected.relations
            if same and _proportional(_difference(expected), _difference(other), positive):
                return True
    return _same_sets_of(expected, given)


def _same_sets_of(expected: Chain, given: Chain) -> bool:
    if _variables(expected) != _variables(given):
        return False
    a, b = _chain_as_set(expected), _chain_as_set(given)
    return a is not None and b is not None and _equal_sets(a, b)


def _same_terms(expected: Chain, given: Chain) -> bool:
    return expected.relations == given.relations and all(map(_same_expression, expected.terms, given.terms))


def _mirrored(chain: Chain) -> Chain:
    return Chain(chain.terms[::-1], tuple(MIRRORED[one] for one in reversed(chain.relations)))


def _difference(chain: Chain) -> Basic:
    return chain.terms[0] - chain.terms[1]


def _proportional(a: Basic, b: Basic, positive: bool) -> bool:
    """Whether a / b is one non-zero constant (a positive one, for inequalities) wherever both can be computed."""
    names = sorted({str(symbol) for symbol in a.free_symbols | b.free_symbols})
    if not names or {str(s) for s in a.free_symbols} != {str(s) for s in b.free_symbols}:
        return False
    ratios = []
    for point in _points(a, b):
        place = {Symbol(name): value for name, value in zip(names, point, strict=False)}
        value_a, value_b = _at(a, place), _at(b, place)
        if value_a is None or value_b is None:
            continue
        if (abs(value_a) < 1e-25) != (abs(value_b) < 1e-25):
            return False
        if abs(value_b) >= 1e-25:
            ratios.append(value_a / value_b)
    if len(ratios) < FEWEST_POINTS:
        return bool(a == b)
    constant = all(_near(ratios[0], ratio, POINT_DIGITS - 8) for ratio in ratios)
    return constant and (not positive or bool(ratios[0].is_positive))


# Values


def _same_value(expected: Value, given: Value) -> bool:
    if expected.unit is not None and given.unit is not None and expected.unit != given.unit:
        return False
    if expected.number is not None and given.number is not None:
        return same_number(_with_percent(expected.number, expected.percent), _with_percent(given.number, given.percent))
    if _same_expression(expected.expression, given.expression):
        return True
    if expected.percent != given.percent:
        whole, part = (given, expected) if expected.percent else (expected, given)
        return _same_expression(whole.expression, part.expression / 100)
    return _rounded(expected, given)


def _with_percent(number: PlainNumber, percent: bool) -> PlainNumber:
    return PlainNumber(number.value, percent or number.percent, number.half_unit)


def _rounded(expected: Value, given: Value) -> bool:
    """4.123105625617661 is the square root of 17: a long decimal equals the constant that rounds to it."""
    exact, decimal = (expected, given.number) if given.number is not None else (given, expected.number)
    if decimal is None or not decimal.tolerance or exact.expression.free_symbols:
        return False
    value = _number(exact.expression, DIGITS)
    written = Rational(decimal.value.numerator, decimal.value.denominator)
    tolerance = Rational(decimal.tolerance.numerator, decimal.tolerance.denominator)
    return value is not None and bool(abs(value - written) <= tolerance) and not exact.expression.is_integer


def _same_expression(a: Basic, b: Basic) -> bool:
    if a == b:
        return True
    if isinstance(a, Set) or isinstance(b, Set):
        return isinstance(a, Set) and isinstance(b, Set) and _equal_sets(a, b)
    names = sorted({str(symbol) for symbol in a.free_symbols | b.free_symbols})
    return _same_at_points(a, b, names) if names else _same_constant(a, b)


def _same_constant(a: Basic, b: Basic) -> bool:
    value_a, value_b = _number(a, DIGITS), _number(b, DIGITS)
    if value_a is None or value_b is None:
        return bool(a.doit() == b.doit())
    if not _near(value_a, value_b, DIGITS - 10):
        return False
    exact_a, exact_b = a.doit(), b.doit()
    if exact_a.is_Rational and exact_b.is_Rational:
        return bool(exact_a == exact_b)
    # Equal as far as anybody looks; to be told from 1 + 10^-100, look further.
    more_a, more_b = _number(a, MORE_DIGITS), _number(b, MORE_DIGITS)
    return more_a is not None and more_b is not None and _near(more_a, more_b, MORE_DIGITS - 20)


def _same_at_points(a: Basic, b: Basic, names: Sequence[str]) -> bool:
    compared = 0
    for point in _points(a, b):
        place = {Symbol(name): value for name, value in zip(names, itertools.cycle(point), strict=False)}
        value_a, value_b = _at(a, place), _at(b, place)
        if value_a is None or value_b is None:
            continue
        if not _near(value_a, value_b, POINT_DIGITS - 8):
            if compared >= FEWEST_POINTS and not (value_a.is_real and value_b.is_real):
                continue  # Beyond the domain: sqrt(1/n) and 1/sqrt(n) differ at negative n, where neither is real.
            if not compared or (value_a.is_real and value_b.is_real):
                return False
            continue
        compared += 1
    return compared >= FEWEST_POINTS or (compared == 0 and sympy_symbolic_eq(a, b))


def _points(a: Basic, b: Basic) -> list[list[Rational]]:
    """Where to compare: sums and products have a value, in reasonable time, for whole numbers only."""
    return WHOLE_POINTS if a.has(Sum, Product) or b.has(Sum, Product) else REAL_POINTS + WHOLE_POINTS[:2]


def _at(expression: Basic, place: dict[Symbol, Rational]) -> Any:
    """The number an expression is at a point, to POINT_DIGITS digits; None where it has no finite value."""
    return _number(expression.subs(place), POINT_DIGITS)


def _number(expression: Basic, digits: int) -> Any:
    try:
        value = expression.evalf(digits)
    except (ArithmeticError, TypeError, ValueError, AttributeError, NotImplementedError):
        return None
    if not value.is_number or value.has(S.NaN, S.Infinity, S.NegativeInfinity, S.ComplexInfinity):
        return None
    real, imaginary = (_without_noise(part) for part in value.as_real_imag())
    if not (real.is_Float or real.is_Rational) or not (imaginary.is_Float or imaginary.is_Rational):
        return None
    return real + I * imaginary if imaginary else real


def _without_noise(part: Any) -> Any:
    """0 for what a difference of equal numbers leaves: evalf marks it with one bit of precision."""
    return Integer(0) if part.is_Float and part._prec == 1 else part


def _near(a: Any, b: Any, digits: int) -> bool:
    """Equal to `digits` significant digits."""
    if a == b:
        return True
    size = max(abs(a), abs(b))
    return bool(abs(a - b) <= size * Rational(1, 10**digits))
