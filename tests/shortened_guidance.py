"""Guidance that leaves some candidates unscored, token by token in decimals: no overflow, no cancellation."""

from collections.abc import Collection, Sequence
from decimal import Decimal, localcontext

STAGES = (2,)
"""As documented: how many candidates are scored before all that are left."""
DIGITS = 60

Weights = dict[int, Decimal]


def guided(reference: Sequence[float], offsets: dict[int, float], lowest: float, tail: str = "floor") -> list[float]:
    """The probabilities of all tokens; those without an offset have what the tail gives them."""
    with localcontext(prec=DIGITS):
        return [float(probability) for probability in _normalised(reference, offsets, lowest, tail).values()]


def total_variation(
    reference: Sequence[float], offsets: dict[int, float], scored: Collection[int], lowest: float, tail: str = "floor"
) -> Decimal:
    """½ Σ |g − g'| of guidance by all offsets and by those of the scored tokens.

    reference: unnormalised probabilities of all tokens.
    """
    with localcontext(prec=DIGITS):
        full = _normalised(reference, offsets, lowest, tail)
        shortened = _normalised(reference, {token: offsets[token] for token in scored}, lowest, tail)
        return sum((abs(full[token] - shortened[token]) for token in full), Decimal(0)) / 2


def bound(
    reference: Sequence[float],
    offsets: dict[int, float],
    scored: Collection[int],
    lowest: float,
    highest: float,
    tail: str = "floor",
) -> Decimal:
    """u·(e^hi − e^lo) / (S + u·e^hi), with ``mean`` times the candidates' mass, S being of what is scored only.

    ``offsets`` of candidates that aren't scored are not used.
    """
    with localcontext(prec=DIGITS):
        low, high = Decimal(lowest).exp(), Decimal(highest).exp()
        unscored = sum((Decimal(reference[token]) for token in offsets if token not in scored), Decimal(0))
        if unscored == 0:
            return Decimal(0)
        known = Decimal(0)
        for token, mass in enumerate(reference):
            if token in scored:
                known += Decimal(mass) * Decimal(offsets[token]).exp()
            elif token not in offsets and tail == "floor":
                known += Decimal(mass) * low
        whole = sum(map(Decimal, reference), Decimal(0))
        factor = sum((Decimal(reference[token]) for token in offsets), Decimal(0)) / whole if tail == "mean" else 1
        return factor * unscored * (high - low) / (known + unscored * high)


def greedy_is_certain(
    reference: Sequence[float], offsets: dict[int, float], scored: Collection[int], highest: float
) -> bool:
    """Whether no candidate that isn't scored can win, whatever its offset up to ``highest``."""
    with localcontext(prec=DIGITS):
        best = max((Decimal(reference[token]) * Decimal(offsets[token]).exp() for token in scored), default=Decimal(0))
        return all(
            Decimal(reference[token]) * Decimal(highest).exp() < best
            for token in offsets
            if token not in scored and reference[token] > 0
        )


def scored_in_stages(
    reference: Sequence[float],
    ranked: Sequence[int],
    offsets: dict[int, float],
    lowest: float,
    highest: float,
    tolerance: float,
    *,
    greedy: bool,
    tail: str = "floor",
    stages: Sequence[int] = STAGES,
) -> list[int]:
    """Which of the ``ranked`` candidates are scored, the likeliest first."""
    for count in stages:
        scored = list(ranked[:count])
        if greedy and tail == "mean":
            is_enough = not any(reference[token] for token in ranked[count:])
        elif greedy:
            is_enough = greedy_is_certain(reference, offsets, scored, highest)
        else:
            is_enough = bound(reference, offsets, scored, lowest, highest, tail) <= Decimal(tolerance)
        if is_enough:
            return scored
    return list(ranked)


def _normalised(reference: Sequence[float], offsets: dict[int, float], lowest: float, tail: str) -> Weights:
    others = Decimal(lowest).exp() if tail == "floor" else _mean(reference, offsets)
    factors = {token: Decimal(offset).exp() for token, offset in offsets.items()}
    weights = {token: Decimal(mass) * factors.get(token, others) for token, mass in enumerate(reference)}
    total = sum(weights.values(), Decimal(0))
    return {token: weight / total for token, weight in weights.items()}


def _mean(reference: Sequence[float], offsets: dict[int, float]) -> Decimal:
    """Σ p·e^o / Σ p over what has an offset."""
    mass = sum((Decimal(reference[token]) for token in offsets), Decimal(0))
    weight = sum((Decimal(reference[token]) * Decimal(offset).exp() for token, offset in offsets.items()), Decimal(0))
    return weight / mass if mass else Decimal(1)
