"""LaTeX without structure -> SymPy, unevaluated and exact, by math-verify's parser (latex2sympy2-extended)."""

import re

from latex2sympy2_extended.latex2sympy2 import ConversionConfig, latex2sympy
from math_verify.grader import should_treat_as_complex
from sympy import Basic, Expr, I, MatrixExpr, Rational, Symbol
from sympy.core.function import AppliedUndef

from qtilt_trainer.tasks.answer_kinds import UnreadableError
from qtilt_trainer.tasks.latex_text import DEGREES, exact
from qtilt_trainer.tasks.plain_numbers import plain_number

PROSE = re.compile(r"(?<![A-Za-z\\{])[A-Za-z]{4,}(?![A-Za-z}])")
"""Four letters in a row that are no command: the parser would read them as a product."""


def quantity(text: str) -> Basic:
    """An expression that can be added and compared: no set, no matrix."""
    parsed = expression(text)
    if not isinstance(parsed, Expr) or isinstance(parsed, MatrixExpr):
        raise UnreadableError("a side of a relation is no quantity")
    return parsed


def expression(text: str) -> Basic:
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
