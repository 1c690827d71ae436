"""Pages by FlashAttention, which serving engines bring along: half precision, and heads of some sizes.

Shapes: as in kernels.py.
"""

from torch import Tensor

from qtilt.forwards.paged.kernels import FlashAttention, LayerPages, Rows
from qtilt.forwards.paged.triton_kernels import merge_own_, store

PARALLEL = 128
"""So many pairs of a row and a key/value head keep a GPU busy. Fewer are split, as FlashAttention likes: that takes
memory for all parts' results, which nobody has counted, and here there can't be much of it."""


class FlashKernels:
    """See :class:`qtilt.forwards.paged.kernels.PagedKernels`.

    What lies behind a history's end, in its last page, has a weight of 0, and 0·NaN is NaN: that FlashAttention never
    multiplies them isn't promised. What a draft writes lies there for the tokens before it, and needn't come true: with
    drafts only numbers are stored of tails, and a row whose last token had others gets NaN. The rows after it read
    zeros, but if they come true, so has the one that failed.
    """

    def __init__(self, attention: FlashAttention) -> None:
        self._attention = attention

    def store_spans(self, key_XGD: Tensor, value_XGD: Tensor, pages: LayerPages, rows: Rows) -> None:
        store(key_XGD, value_XGD, pages, rows, tails=False)

    def store_tails(self, key_XGD: Tensor, value_XGD: Tensor, pages: LayerPages, rows: Rows) -> None:
        store(key_XGD, value_XGD, pages, rows, tails=True, only_numbers=rows.has_drafts)

    def attend_spans(self, out_XHD: Tensor, query_XHD: Tensor, pages: LayerPages, rows: Rows, scaling: float) -> None:
        self._attend(out_XHD, query_XHD, pages, rows, scaling, causal=True)

    def attend_tails(
        self,
        out_XHD: Tensor,
        query_XHD: Tensor,
        own: tuple[Tensor, Tensor],
        pages: LayerPages,
        rows: Rows,
        scaling: float,
    ) -> None:
        lse_HX = self._attend(out_XHD, query_XHD, pages, rows, scaling, causal=False)
        if rows.most_tokens > 1 or rows.has_drafts:
            merge_own_(out_XHD, lse_HX, query_XHD, own, rows, scaling)

    def _attend(
        self, out_XHD: Tensor, query_XHD: Tensor, pages: LayerPages, rows: Rows, scaling: float, *, causal: bool
    ) -> Tensor:
        key_NPGD, value_NPGD = (content_NGPD.transpose(1, 2) for content_NGPD in pages)
        _, lse_HX = self._attention(
            q=query_XHD,
            k=key_NPGD,
            v=value_NPGD,
            out=out_XHD,
            max_seqlen_q=rows.most_tokens,
            cu_seqlens_q=rows.starts_Y,
            max_seqlen_k=rows.longest,
            seqused_k=rows.lengths_W,
            block_table=rows.pages_WM,
            softmax_scale=scaling,
            causal=causal,
            num_splits=1 if len(rows.lengths_W) * pages.keys_NGPD.shape[1] >= PARALLEL else 0,
            return_softmax_lse=True,
        )
        return lse_HX
