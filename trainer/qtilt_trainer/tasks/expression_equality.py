"""Whether two expressions are the same, exactly.

Constants are compared as fractions, or to 60 and 400 digits; expressions with variables at points: an identity of
analytic expressions that holds at random points to 30 digits isn't one by chance.
"""

import itertools
from collections.abc import Sequence
from typing import Any

from math_verify.grader import sympy_symbolic_eq
from sympy import Basic, FiniteSet, I, Integer, Product, Rational, S, Set, Sum, Symbol

DIGITS = 60
MORE_DIGITS = 400
POINT_DIGITS = 30
FEWEST_POINTS = 3
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


def same_expression(a: Basic, b: Basic) -> bool:
    """Whether they are equal wherever both have a value."""
    if a == b:
        return True
    if isinstance(a, Set) or isinstance(b, Set):
        return isinstance(a, Set) and isinstance(b, Set) and equal_sets(a, b)
    names = sorted({str(symbol) for symbol in a.free_symbols | b.free_symbols})
    return _same_at_points(a, b, names) if names else _same_constant(a, b)


def _same_constant(a: Basic, b: Basic) -> bool:
    value_a, value_b = number_of(a, DIGITS), number_of(b, DIGITS)
    if value_a is None or value_b is None:
        return bool(a.doit() == b.doit())
    if not _near(value_a, value_b, DIGITS - 10):
        return False
    exact_a, exact_b = a.doit(), b.doit()
    if exact_a.is_Rational and exact_b.is_Rational:
        return bool(exact_a == exact_b)
    # Equal as far as anybody looks; to be told from 1 + 10^-100, look further.
    more_a, more_b = number_of(a, MORE_DIGITS), number_of(b, MORE_DIGITS)
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


def proportional(a: Basic, b: Basic, positive: bool) -> bool:
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


def equal_sets(a: Set, b: Set) -> bool:
    """Whether two sets have the same members."""
    if isinstance(a, FiniteSet) or isinstance(b, FiniteSet):
        return bool(a == b)
    return bool(a == b) or bool(a.symmetric_difference(b).is_empty)


def _points(a: Basic, b: Basic) -> list[list[Rational]]:
    """Where to compare: sums and products have a value, in reasonable time, for whole numbers only."""
    return WHOLE_POINTS if a.has(Sum, Product) or b.has(Sum, Product) else REAL_POINTS + WHOLE_POINTS[:2]


def _at(expression: Basic, place: dict[Symbol, Rational]) -> Any:
    """The number an expression is at a point, to POINT_DIGITS digits; None where it has no finite value."""
    return number_of(expression.subs(place), POINT_DIGITS)


def number_of(expression: Basic, digits: int) -> Any:
    """The number an expression without variables is; None where it has no finite value."""
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
