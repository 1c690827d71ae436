"""What Triton compiles for the device; tilt.py starts it.

A program has one part of a row: ``BLOCK`` tokens, from number ``program_id(1) * BLOCK`` on. Only finite logits count.
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
