"""The least a guided run can cost next to a plain one, counted from the models' shapes.

Per sequence, P prompt tokens and N new tokens: both models run the S = P + N − 1 tokens that precede the last one, and
N times something is sampled. With layers L, heads h of size d, parameters W in the layers' matrices, vocabulary V,
hidden size H, candidates k, B sequences and s bytes a number:

    FLOPs of the reference    B · [2·W·S + 4·L·h·d·(1 + … + S) + 2·V·H·N]
    FLOPs of a Q-type value   B · [2·W·S + 4·L·h·d·(1 + … + S) + 2·k·H·N]
    FLOPs of a V-type value   B · [2·W·(S + k·N) + 4·L·h·d·((1 + … + S) + k·((P + 1) + … + (P + N))) + 2·k·H·N]

A matrix product counts 2 FLOPs a weight and row; V-type has k + 1 rows per sequence and step, the new token and the
candidates, each candidate attending to its history and itself. Attention counts 4 FLOPs per number of a head and
position: scores and weighted sum.

    bytes of the reference    s · [(W + V·H)·N + B·c·(S + P + (P + 1) + … + (P + N − 1))]
    bytes of a value model    s · [W·N + B·c·(S + P + (P + 1) + … + (P + N − 1)) + k·H·B·N (Q-type) or H·N (V-type)]

Weights are read once a step, N steps; c = 2·L·(key/value heads)·d numbers a token are written once and read in every
step; candidates share one read of their history, and their own keys and values never leave the processor. A Q-type
head is read at the candidates' rows only. Activations, logits, norms and embedding look-ups are not counted.

The bound of the time ratio is 1 + value / reference: what guidance costs if both models reach the same FLOP/s (or
bytes/s). The byte bound holds for a single batch whose requests run in step, so for arrivals together. Where many rows
a step make the value model's products run at more FLOP/s than the reference's few rows, the FLOP bound of V-type is too
high, and `matrix_products.py` measures what the products alone add on the machine at hand.
"""

from dataclasses import dataclass

from serving_speed.shapes import DecoderShape, Pair


@dataclass(frozen=True)
class Run:
    """B sequences of P prompt and N new tokens; ``number_bytes`` per weight and cache entry."""

    sequences: int
    prompt: int
    new_tokens: int
    number_bytes: int

    @property
    def history_tokens(self) -> int:
        """Of one sequence, those that are run."""
        return self.prompt + self.new_tokens - 1


@dataclass(frozen=True)
class Cost:
    flops: float
    bytes: float

    def ratio_bounds(self, reference: "Cost") -> "RatioBounds":
        return RatioBounds(1 + self.flops / reference.flops, 1 + self.bytes / reference.bytes)


@dataclass(frozen=True)
class RatioBounds:
    """Time with guidance over time without, if FLOPs alone or bytes alone took time."""

    flops: float
    bytes: float


def reference_cost(shape: DecoderShape, run: Run) -> Cost:
    head = shape.vocab * shape.hidden
    flops = run.sequences * (_history_flops(shape, run) + 2 * head * run.new_tokens)
    numbers = (shape.parameters + head) * run.new_tokens + run.sequences * _history_cache_numbers(shape, run)
    return Cost(flops, run.number_bytes * numbers)


def value_cost(shape: DecoderShape, type: str, top_k: int, run: Run) -> Cost:
    """One logit a candidate (Bernoulli)."""
    flops = _history_flops(shape, run) + 2 * top_k * shape.hidden * run.new_tokens
    head_numbers = run.new_tokens * shape.hidden * (top_k * run.sequences if type == "q" else 1)
    if type == "v":
        seen = top_k * _sum(run.prompt + 1, run.prompt + run.new_tokens)
        flops += 2 * shape.parameters * top_k * run.new_tokens + _attention_flops(shape, seen)
    numbers = shape.parameters * run.new_tokens + run.sequences * _history_cache_numbers(shape, run) + head_numbers
    return Cost(run.sequences * flops, run.number_bytes * numbers)


def ratio_bounds(pair: Pair, type: str | None, top_k: int, run: Run) -> RatioBounds:
    """Of a guided type, or of none: then guidance should cost nothing."""
    if type is None:
        return RatioBounds(1.0, 1.0)
    return value_cost(pair.value, type, top_k, run).ratio_bounds(reference_cost(pair.reference, run))


def _history_flops(shape: DecoderShape, run: Run) -> float:
    tokens = run.history_tokens
    return 2 * shape.parameters * tokens + _attention_flops(shape, _sum(1, tokens))


def _attention_flops(shape: DecoderShape, positions_seen: float) -> float:
    return 4 * shape.layers * shape.heads * shape.head_size * positions_seen


def _history_cache_numbers(shape: DecoderShape, run: Run) -> float:
    """Written once; read by the prefill and by each later step."""
    read = _sum(run.prompt, run.prompt + run.new_tokens - 1)
    return shape.kv_per_token * (run.history_tokens + read)


def _sum(first: int, last: int) -> float:
    return (first + last) * (last - first + 1) / 2
