"""Intervals, unions and inequalities as sets of real numbers."""

import itertools
from functools import reduce

from sympy import And, EmptySet, Eq, FiniteSet, Ge, Gt, Interval, Le, Lt, Ne, Set, Symbol, Union

from qtilt_trainer.tasks.answer_kinds import Answer, Chain, Collection, Named, SetFormula, Value

RELATIONS = {"=": Eq, "!=": Ne, "<": Lt, ">": Gt, "<=": Le, ">=": Ge}


def variables(answer: Answer) -> set[str]:
    """Names of the variables in relations; an expression alone has none here."""
    if isinstance(answer, Chain):
        return {str(symbol) for term in answer.terms for symbol in term.free_symbols}
    if isinstance(answer, Collection):
        return set().union(*map(variables, answer.items))
    return set()


def as_set(answer: Answer) -> Set | None:
    """As a set of real numbers; None if it isn't one."""
    if isinstance(answer, SetFormula):
        parts = [as_set(part) for part in answer.sets]
        if any(part is None for part in parts):
            return None
        pairs = zip(answer.operations, parts[1:], strict=True)
        return reduce(lambda left, pair: _SET_OPERATIONS[pair[0]](left, pair[1]), pairs, parts[0])
    if isinstance(answer, Collection):
        return _collection_as_set(answer)
    if isinstance(answer, Chain):
        return chain_as_set(answer)
    if isinstance(answer, Named):
        return as_set(answer.value)
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
        parts = [as_set(item) for item in answer.items]
        return None if any(part is None for part in parts) else Union(*parts) if parts else EmptySet
    if len(answer.items) != 2 or answer.brackets == ":":
        return None
    ends = [item.expression.doit() for item in answer.items if isinstance(item, Value)]
    if len(ends) != 2 or any(end.free_symbols for end in ends):
        return None
    return Interval(ends[0], ends[1], answer.brackets[0] == "(", answer.brackets[1] == ")")


def chain_as_set(chain: Chain) -> Set | None:
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
