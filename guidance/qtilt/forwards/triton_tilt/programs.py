"""What Triton compiles for the device; tilt.py starts it.

A program that reads the vocabulary has one part of a row: ``BLOCK`` tokens, from number ``program_id(1) * BLOCK`` on.
Only finite logits count there. All others have a row, whose ``k`` candidates are padded to ``BLOCK_K``, and compute in
float64. What pads them, and what has no mass, has a logarithm of −inf.
"""

import triton
import triton.language as tl


@triton.jit
def _finite_part(logits, stride, size, BLOCK: tl.constexpr):
    """The part's token ids, and their logits: −inf for what isn't finite, and behind the row's end."""
    token = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = logits + tl.program_id(0).to(tl.int64) * stride
    logit = tl.load(row + token, mask=token < size, other=-float("inf"))
    return token, tl.where(tl.abs(logit) < float("inf"), logit, -float("inf"))


@triton.jit(do_not_specialize=["k"])
def largest(logits, keys, k, stride, size, BLOCK: tl.constexpr):
    """The part's largest ``k`` logits, in falling order, as int64 that compare as they do: see tilt.py."""
    token, logit = _finite_part(logits, stride, size, BLOCK)
    bits = (logit + 0.0).to(tl.int32, bitcast=True)  # −0 + 0 is 0
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    key = (ordered.to(tl.int64) << 32) + (0x7FFFFFFF - token)
    place = (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)) * k
    for rank in range(k):
        most = tl.max(key, 0)
        tl.store(keys + place + rank, most)
        key = tl.where(key == most, -0x8000000000000000, key)


@triton.jit(do_not_specialize_on_alignment=["largests", "sums"])
def log_sum_exp(logits, scales, largests, sums, stride, size, BLOCK: tl.constexpr):
    """The part's largest logit, and its Σ e^((logit − largest)/scale)."""
    _, logit = _finite_part(logits, stride, size, BLOCK)
    most = tl.max(logit, 0)
    scale = tl.load(scales + tl.program_id(0))
    # The largest of a part without any is −inf, and so are all others.
    total = tl.sum(tl.where(logit > -float("inf"), tl.exp((logit - most) / scale), 0.0), 0)
    place = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    tl.store(largests + place, most)
    tl.store(sums + place, total)


@triton.jit(do_not_specialize=["k", "key_stride"])
def choose(
    keys, key_stride, top_ks, tokens, are_valid, k, key_of_nothing, HAS_TOP_KS: tl.constexpr, BLOCK_K: tl.constexpr
):
    """From the row's largest keys, in order: whose they are, and which of them are there and within its own top-k."""
    row, rank = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_K)
    key = tl.load(keys + row * key_stride + rank, mask=rank < k, other=0)
    is_valid = key > key_of_nothing
    if HAS_TOP_KS:
        is_valid &= rank < tl.load(top_ks + row)
    tl.store(tokens + row * k + rank, 0x7FFFFFFF - (key & 0x7FFFFFFF), mask=rank < k)
    tl.store(are_valid + row * k + rank, is_valid, mask=rank < k)


@triton.jit(do_not_specialize=["k", "parts"], do_not_specialize_on_alignment=["largests", "sums"])
def masses(
    logits,
    stride,
    tokens,
    are_valid,
    scales,
    largests,
    sums,
    log_masses,
    rests,
    k,
    parts,
    rounding,
    BLOCK_K: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """From the parts of ``log_sum_exp``: the reference's log-probability of each candidate, and of all other tokens."""
    row, rank, part = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_P)
    scale = tl.load(scales + row).to(tl.float64)
    largest = tl.load(largests + row * parts + part, mask=part < parts, other=-float("inf")).to(tl.float64) / scale
    total = tl.load(sums + row * parts + part, mask=part < parts, other=0.0).to(tl.float64)
    most = tl.max(largest, 0)
    most = tl.where(most > -float("inf"), most, 0.0)
    log_total = tl.log(tl.sum(total * tl.exp(largest - most), 0)) + most
    token = tl.load(tokens + row * k + rank, mask=rank < k, other=0)
    is_valid = tl.load(are_valid + row * k + rank, mask=rank < k, other=0) != 0
    logit = tl.load(logits + row * stride + token, mask=is_valid, other=-float("inf")).to(tl.float64)
    log_mass = tl.where(is_valid, logit / scale - log_total, -float("inf"))
    rest = 1.0 - tl.sum(tl.exp(log_mass), 0)
    tl.store(log_masses + row * k + rank, log_mass, mask=rank < k)
    tl.store(rests + row, tl.where(rest < rounding, -float("inf"), tl.log(rest)))


@triton.jit(do_not_specialize=["k", "atoms"], do_not_specialize_on_alignment=["inv_etas"])
def offsets(
    values, returns, inv_etas, outs, k, atoms, FIRST_IS_ZERO: tl.constexpr, IS_MEAN: tl.constexpr, BLOCK_K: tl.constexpr
):
    """ln E[e^((Z − v_max)/η)], or E[Z − v_max]/η, from logits of ``returns``, less v_max: one after the other."""
    row, rank = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_K)
    inv_eta = tl.load(inv_etas + row)
    logits, given = values + (row * k + rank) * (atoms - FIRST_IS_ZERO), rank < k
    logit = tl.zeros((BLOCK_K,), tl.float64)
    if not FIRST_IS_ZERO:
        logit = tl.load(logits, mask=given, other=0.0).to(tl.float64)
    tilted = logit + tl.load(returns) * inv_eta
    most, most_tilted = logit, tilted
    total, total_tilted = tl.full((BLOCK_K,), 1.0, tl.float64), tl.full((BLOCK_K,), 1.0, tl.float64)
    mean = total * tl.load(returns)
    for atom in range(1, atoms):
        logit = tl.load(logits + atom - FIRST_IS_ZERO, mask=given, other=0.0).to(tl.float64)
        tilted = logit + tl.load(returns + atom) * inv_eta
        higher, higher_tilted = tl.maximum(most, logit), tl.maximum(most_tilted, tilted)
        shrunk, weight = tl.exp(most - higher), tl.exp(logit - higher)
        total = total * shrunk + weight
        mean = mean * shrunk + weight * tl.load(returns + atom)
        total_tilted = total_tilted * tl.exp(most_tilted - higher_tilted) + tl.exp(tilted - higher_tilted)
        most, most_tilted = higher, higher_tilted
    out = mean / total * inv_eta
    if not IS_MEAN:
        out = (most_tilted + tl.log(total_tilted)) - (most + tl.log(total))
    tl.store(outs + row * k + rank, out, mask=given)


@triton.jit
def _log_of_sum(logarithm):
    most = tl.max(logarithm, 0)
    most = tl.where(most > -float("inf"), most, 0.0)
    return tl.log(tl.sum(tl.exp(logarithm - most), 0)) + most


@triton.jit(do_not_specialize=["k"])
def drops(log_masses, are_scored, offsets, floors, outs, other_outs, k, IS_MEAN: tl.constexpr, BLOCK_K: tl.constexpr):
    """See :func:`qtilt.method.tilt.drops`."""
    row, rank = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_K)
    place, given = row * k + rank, rank < k
    is_scored = given & (tl.load(are_scored + place, mask=given, other=0) != 0)
    offset = tl.load(offsets + place, mask=given, other=0.0)
    if IS_MEAN:
        largest = tl.max(tl.where(is_scored, offset, -float("inf")), 0)
        drop = tl.where(is_scored, largest - offset, 0.0)
        log_mass = tl.where(is_scored, tl.load(log_masses + place, mask=given, other=0.0), -float("inf"))
        log_total = _log_of_sum(log_mass)
        others = tl.where(log_total > -float("inf"), log_total - _log_of_sum(log_mass - drop), 0.0)
        others = tl.minimum(tl.maximum(others, 0.0), tl.max(drop, 0))
        drop = tl.where(is_scored, drop, others)
    else:
        floor = tl.load(floors + row)
        offset = tl.where(is_scored, offset, floor)
        largest = tl.max(tl.where(given, offset, -float("inf")), 0)
        drop, others = largest - offset, largest - floor
    tl.store(outs + place, drop, mask=given)
    tl.store(other_outs + row, others)


@triton.jit
def _part_of_kl(log_weight, drop, log_z, log_total):
    # What has no mass adds nothing; where nothing has any, log_z is −inf.
    is_there = log_weight > -float("inf")
    weight = tl.exp(tl.where(is_there, log_weight - log_z, 0.0))
    return tl.where(is_there, weight * (log_total - drop - log_z), 0.0)


@triton.jit(do_not_specialize=["k"])
def divergence(log_masses, rests, drops, others, outs, k, BLOCK_K: tl.constexpr):
    """See :func:`qtilt.method.tilt.divergence`."""
    row, rank = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_K)
    place, given = row * k + rank, rank < k
    log_mass = tl.load(log_masses + place, mask=given, other=-float("inf"))
    drop, other = tl.load(drops + place, mask=given, other=0.0), tl.load(others + row)
    log_weight, log_rest = log_mass - drop, tl.load(rests + row) - other
    log_candidates, log_total = _log_of_sum(log_weight), _log_of_sum(log_mass)
    most = tl.maximum(log_candidates, log_rest)
    most = tl.where(most > -float("inf"), most, 0.0)
    log_z = tl.log(tl.exp(log_candidates - most) + tl.exp(log_rest - most)) + most
    kl = tl.sum(_part_of_kl(log_weight, drop, log_z, 0.0), 0) + _part_of_kl(log_rest, other, log_z, 0.0)
    kl_candidates = tl.sum(_part_of_kl(log_weight, drop, log_candidates, log_total), 0)
    # Not maximum: of a value that is no number the divergence isn't one.
    tl.store(outs + row * 3, tl.where(kl < 0.0, 0.0, kl))
    tl.store(outs + row * 3 + 1, tl.where(kl_candidates < 0.0, 0.0, kl_candidates))
    tl.store(outs + row * 3 + 2, tl.minimum(tl.exp(log_total), 1.0))


@triton.jit(do_not_specialize=["k"])
def lower(logits, stride, size, tokens, drops, others, scales, k, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr):
    """Subtract, in place, ``others`` of all logits of the part, but of the candidates what they drop."""
    row, rank = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_K)
    begin, row_logits = tl.program_id(1) * BLOCK, logits + row * stride
    scale = tl.load(scales + row).to(tl.float64)
    token = tl.load(tokens + row * k + rank, mask=rank < k, other=-1)
    is_mine = (token >= begin) & (token < begin + BLOCK)
    drop = (tl.load(drops + row * k + rank, mask=rank < k, other=0.0) * scale).to(tl.float32)
    lowered = tl.load(row_logits + token, mask=is_mine, other=0.0) - drop
    column = begin + tl.arange(0, BLOCK)
    logit = tl.load(row_logits + column, mask=column < size, other=0.0)
    tl.debug_barrier()  # all is read before anything is written
    tl.store(row_logits + column, logit - (tl.load(others + row) * scale).to(tl.float32), mask=column < size)
    tl.debug_barrier()
    tl.store(row_logits + token, lowered, mask=is_mine)
