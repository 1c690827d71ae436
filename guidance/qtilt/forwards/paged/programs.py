"""What Triton compiles for the device; triton_kernels.py starts it.

Shapes: as in kernels.py, with ``X`` tokens. A program of attention has ``BLOCK_Q`` queries of one row and key/value
head, a token's heads side by side, and takes ``BLOCK_P`` positions at a time. ``BLOCK_D`` is the head size, rounded up.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["pages_stride"], do_not_specialize_on_alignment=["lengths", "starts"])
def store(
    keys,
    values,
    key_pages,
    value_pages,
    pages_of_rows,
    lengths,
    starts,
    pages_stride,
    key_stride,
    key_head_stride,
    value_stride,
    value_head_stride,
    KV_HEADS: tl.constexpr,
    PAGE: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    TAILS: tl.constexpr,
    ONLY_NUMBERS: tl.constexpr,
):
    """A program stores one token of one row."""
    token, row = tl.program_id(0), tl.program_id(1)
    first, length = tl.load(starts + row), tl.load(lengths + row)
    count = tl.load(starts + row + 1) - first
    if token < count:
        position = length - 1
        if not TAILS:
            position = length - count + token
        page = tl.load(pages_of_rows + row.to(tl.int64) * pages_stride + position // PAGE).to(tl.int64)
        numbers = tl.arange(0, BLOCK)
        head, within = numbers // SIZE, numbers % SIZE
        is_there = head < KV_HEADS
        place = ((page * KV_HEADS + head) * PAGE + position % PAGE) * SIZE + within
        x = (first + token).to(tl.int64)
        key = tl.load(keys + x * key_stride + head * key_head_stride + within, mask=is_there)
        value = tl.load(values + x * value_stride + head * value_head_stride + within, mask=is_there)
        if ONLY_NUMBERS:
            key = tl.where(tl.abs(key.to(tl.float32)) < float("inf"), key, 0.0)
            value = tl.where(tl.abs(value.to(tl.float32)) < float("inf"), value, 0.0)
        tl.store(key_pages + place, key, mask=is_there)
        tl.store(value_pages + place, value, mask=is_there)


@triton.jit(do_not_specialize=["pages_stride"], do_not_specialize_on_alignment=["lengths", "starts"])
def attend(
    outs,
    queries,
    own_keys,
    own_values,
    key_pages,
    value_pages,
    pages_of_rows,
    lengths,
    starts,
    scaling,
    pages_stride,
    query_stride,
    query_head_stride,
    own_key_stride,
    own_key_head_stride,
    own_value_stride,
    own_value_head_stride,
    GROUP: tl.constexpr,
    KV_HEADS: tl.constexpr,
    PAGE: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TAILS: tl.constexpr,
):
    """One softmax, kept up to date from block to block: of tails it begins with the candidate's own key and value."""
    row, kv_head = tl.program_id(0), tl.program_id(1)
    first, length = tl.load(starts + row), tl.load(lengths + row)
    count = tl.load(starts + row + 1) - first
    begin = tl.program_id(2) * BLOCK_Q
    if begin < count * GROUP:
        in_block = begin + tl.arange(0, BLOCK_Q)
        token, head = in_block // GROUP, kv_head * GROUP + in_block % GROUP
        numbers = tl.arange(0, BLOCK_D)
        is_number, is_query = (numbers < SIZE)[None, :], (token < count)[:, None]
        x = (first + token).to(tl.int64)
        query = tl.load(
            queries + (x * query_stride + head * query_head_stride)[:, None] + numbers[None, :],
            mask=is_query & is_number,
            other=0.0,
        )
        highest = tl.full((BLOCK_Q,), -float("inf"), tl.float32)
        total = tl.zeros((BLOCK_Q,), tl.float32)
        out = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
        visible = tl.zeros((BLOCK_Q,), tl.int32) + length
        end = length
        if TAILS:
            has_own = is_query & (token > 0)[:, None]
            own_key = tl.load(
                own_keys + (x * own_key_stride + kv_head * own_key_head_stride)[:, None] + numbers[None, :],
                mask=has_own & is_number,
                other=0.0,
            )
            own = tl.sum(query.to(tl.float32) * own_key.to(tl.float32), 1) * scaling
            highest = tl.where(token > 0, own, highest)
            total = tl.where(token > 0, 1.0, total)
            out = tl.load(
                own_values + (x * own_value_stride + kv_head * own_value_head_stride)[:, None] + numbers[None, :],
                mask=has_own & is_number,
                other=0.0,
            ).to(tl.float32)
        else:
            visible = length - count + token + 1
            end = tl.minimum(length, length - count + (begin + BLOCK_Q - 1) // GROUP + 1)
        for block in range(0, end, BLOCK_P):
            position = block + tl.arange(0, BLOCK_P)
            is_there = position < end
            page = tl.load(
                pages_of_rows + row.to(tl.int64) * pages_stride + position // PAGE, mask=is_there, other=0
            ).to(tl.int64)
            place = ((page * KV_HEADS + kv_head) * PAGE + position % PAGE) * SIZE
            key = tl.load(
                key_pages + place[None, :] + numbers[:, None],
                mask=is_there[None, :] & (numbers < SIZE)[:, None],
                other=0.0,
            )
            value = tl.load(
                value_pages + place[:, None] + numbers[None, :], mask=is_there[:, None] & is_number, other=0.0
            )
            scores = tl.dot(query, key, input_precision="ieee") * scaling
            scores = tl.where(position[None, :] < visible[:, None], scores, -float("inf"))
            higher = tl.maximum(highest, tl.max(scores, 1))
            weights = tl.exp(scores - higher[:, None])
            shrunk = tl.exp(highest - higher)
            total = total * shrunk + tl.sum(weights, 1)
            out = out * shrunk[:, None] + tl.dot(weights.to(value.dtype), value, input_precision="ieee")
            highest = higher
        tl.store(
            outs + ((x * KV_HEADS * GROUP + head) * SIZE)[:, None] + numbers[None, :],
            (out / total[:, None]).to(outs.dtype.element_ty),
            mask=is_query & is_number,
        )


@triton.jit(do_not_specialize=["lse_head_stride"], do_not_specialize_on_alignment=["starts"])
def merge_own(
    outs,
    lses,
    queries,
    own_keys,
    own_values,
    starts,
    scaling,
    lse_head_stride,
    lse_stride,
    query_stride,
    query_head_stride,
    own_key_stride,
    own_key_head_stride,
    own_value_stride,
    own_value_head_stride,
    GROUP: tl.constexpr,
    KV_HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A program has those heads of one token of one row that share a key."""
    token, row, kv_head = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first = tl.load(starts + row).to(tl.int64)
    if token < tl.load(starts + row + 1) - first:
        x = first + token
        numbers, in_group = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_G)
        is_number, head = numbers < SIZE, kv_head * GROUP + in_group
        is_there = (in_group < GROUP)[:, None] & is_number[None, :]
        key_of, value_of = kv_head * own_key_head_stride + numbers, kv_head * own_value_head_stride + numbers
        first_key = tl.load(own_keys + first * own_key_stride + key_of, mask=is_number, other=0.0).to(tl.float32)
        first_value = tl.load(own_values + first * own_value_stride + value_of, mask=is_number, other=0.0).to(
            tl.float32
        )
        are_numbers = (tl.abs(first_key) < float("inf")) & (tl.abs(first_value) < float("inf"))
        spoilt = tl.sum(tl.where(are_numbers, 0.0, float("nan")), 0)
        place = outs + ((x * KV_HEADS * GROUP + head) * SIZE)[:, None] + numbers[None, :]
        out = tl.load(place, mask=is_there, other=0.0).to(tl.float32)
        if token > 0:
            query = tl.load(
                queries + (x * query_stride + head * query_head_stride)[:, None] + numbers[None, :],
                mask=is_there,
                other=0.0,
            ).to(tl.float32)
            lse = tl.load(lses + head * lse_head_stride + x * lse_stride, mask=in_group < GROUP, other=0.0)
            key = tl.load(own_keys + x * own_key_stride + key_of, mask=is_number, other=0.0).to(tl.float32)
            value = tl.load(own_values + x * own_value_stride + value_of, mask=is_number, other=0.0).to(tl.float32)
            own = tl.sum(query * key[None, :], 1) * scaling
            weight = 1.0 / (1.0 + tl.exp(lse - own))
            out += (value[None, :] - out) * weight[:, None]
        tl.store(place, (out + spoilt).to(outs.dtype.element_ty), mask=is_there)
