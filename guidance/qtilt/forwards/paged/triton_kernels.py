"""Pages by Triton: any head size, float32 too, and nothing behind a history's end is read.

Shapes: as in kernels.py.

Sizes of blocks are fixed by shapes: what autotuning chose might differ between the ranks of tensor parallelism. And
there are few of them, for each is compiled when it is first met, for about a second: at load, by probe.py.
"""

import triton
from torch import Tensor

from qtilt.forwards.paged import programs
from qtilt.forwards.paged.kernels import LayerPages, Rows

MOST_BYTES = 2**14
"""Of the queries, and of the keys, that a program of attention holds, padding included. With more of them numbers spill
from the registers of its warps, or there isn't enough shared memory on cards that have 99 KiB of it."""
MOST_POSITIONS = 32
LEAST_BLOCK = 16
"""That Triton multiplies."""
WARPS = 8


class TritonKernels:
    """See :class:`qtilt.forwards.paged.kernels.PagedKernels`."""

    def store_spans(self, key_XGD: Tensor, value_XGD: Tensor, pages: LayerPages, rows: Rows) -> None:
        store(key_XGD, value_XGD, pages, rows, tails=False)

    def store_tails(self, key_XGD: Tensor, value_XGD: Tensor, pages: LayerPages, rows: Rows) -> None:
        store(key_XGD, value_XGD, pages, rows, tails=True)

    def attend_spans(self, out_XHD: Tensor, query_XHD: Tensor, pages: LayerPages, rows: Rows, scaling: float) -> None:
        attend(out_XHD, query_XHD, None, pages, rows, scaling)

    def attend_tails(
        self,
        out_XHD: Tensor,
        query_XHD: Tensor,
        own: tuple[Tensor, Tensor],
        pages: LayerPages,
        rows: Rows,
        scaling: float,
    ) -> None:
        # A last token alone is a span of one.
        attend(out_XHD, query_XHD, own if rows.most_tokens > 1 else None, pages, rows, scaling)


def store(
    key_XGD: Tensor, value_XGD: Tensor, pages: LayerPages, rows: Rows, *, tails: bool, only_numbers: bool = False
) -> None:
    """Of spans all tokens, of tails the first ones. only_numbers: write 0 for what is infinite or no number."""
    kv_heads, page_size, head_size = pages.keys_NGPD.shape[1:]
    programs.store[1 if tails else rows.most_tokens, len(rows.lengths_W)](
        *(key_XGD, value_XGD, *pages),
        *(rows.pages_WM, rows.lengths_W, rows.starts_Y),
        *(rows.pages_WM.stride(0), *key_XGD.stride()[:2], *value_XGD.stride()[:2]),
        KV_HEADS=kv_heads,
        PAGE=page_size,
        SIZE=head_size,
        BLOCK=triton.next_power_of_2(kv_heads * head_size),
        TAILS=tails,
        ONLY_NUMBERS=only_numbers,
    )


def attend(
    out_XHD: Tensor,
    query_XHD: Tensor,
    own: tuple[Tensor, Tensor] | None,
    pages: LayerPages,
    rows: Rows,
    scaling: float,
) -> None:
    """Of tails if there are their ``own`` keys and values, of spans otherwise."""
    blocks = attention_blocks(query_XHD, pages, rows.most_tokens, tails=own is not None)
    kv_heads, queries = blocks["KV_HEADS"], rows.most_tokens * blocks["GROUP"]
    own_key_XGD, own_value_XGD = own or (query_XHD, query_XHD)  # which is then not read
    programs.attend[len(rows.lengths_W), kv_heads, triton.cdiv(queries, blocks["BLOCK_Q"])](
        *(out_XHD, query_XHD, own_key_XGD, own_value_XGD, *pages),
        *(rows.pages_WM, rows.lengths_W, rows.starts_Y, scaling),
        *(rows.pages_WM.stride(0), *query_XHD.stride()[:2]),
        *(*own_key_XGD.stride()[:2], *own_value_XGD.stride()[:2]),
        **blocks,
        num_warps=WARPS,
    )


def merge_own_(
    out_XHD: Tensor,
    lse_HX: Tensor,
    query_XHD: Tensor,
    own: tuple[Tensor, Tensor],
    rows: Rows,
    scaling: float,
) -> None:
    """Add candidates' own keys and values, in place, to attention over their histories with log-sum-exp ``lse_HX``.

    See :func:`qtilt.forwards.attention.merge_own_`. Where a row's first key or value isn't a number, no out of it is.
    """
    own_key_XGD, own_value_XGD = own
    kv_heads, head_size = own_key_XGD.shape[1:]
    group = query_XHD.shape[1] // kv_heads
    programs.merge_own[rows.most_tokens, len(rows.lengths_W), kv_heads](
        *(out_XHD, lse_HX, query_XHD, own_key_XGD, own_value_XGD, rows.starts_Y, scaling),
        *(*lse_HX.stride(), *query_XHD.stride()[:2], *own_key_XGD.stride()[:2], *own_value_XGD.stride()[:2]),
        GROUP=group,
        KV_HEADS=kv_heads,
        SIZE=head_size,
        BLOCK_G=triton.next_power_of_2(group),
        BLOCK_D=triton.next_power_of_2(head_size),
    )


def attention_blocks(query_XHD: Tensor, pages: LayerPages, most_tokens: int, *, tails: bool) -> dict[str, int | bool]:
    """The constants that the kernel of attention is compiled for."""
    kv_heads, page_size, head_size = pages.keys_NGPD.shape[1:]
    group = query_XHD.shape[1] // kv_heads
    block_d = max(triton.next_power_of_2(head_size), LEAST_BLOCK)
    most = MOST_BYTES // (block_d * query_XHD.element_size())
    return {
        "GROUP": group,
        "KV_HEADS": kv_heads,
        "PAGE": page_size,
        "SIZE": head_size,
        "BLOCK_Q": LEAST_BLOCK if most_tokens * group <= LEAST_BLOCK and not tails else max(most, LEAST_BLOCK),
        "BLOCK_P": max(min(MOST_POSITIONS, most), LEAST_BLOCK),
        "BLOCK_D": block_d,
        "TAILS": tails,
    }
