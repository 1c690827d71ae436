"""What a mathematical answer can be: a number, an expression, a list, a set, an interval, an equation, words.

Made by math_answers.py, compared by math_equality.py.
"""

from dataclasses import dataclass

from sympy import Basic

from qtilt_trainer.tasks.plain_numbers import PlainNumber


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
