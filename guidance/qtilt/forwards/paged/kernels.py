"""What reads and writes pages on a device. Triton's kernels are beside this file, others come with vLLM.

Shapes: ``X`` tokens of one call, in ``W`` rows, whose pages are ``[W, M]``; ``N`` pages of ``P`` positions, ``H`` query
heads and ``G`` key/value heads of size ``D``.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor


class LayerPages(NamedTuple):
    """One layer's part of a :class:`qtilt.forwards.memory.PageMemory`."""

    keys_NGPD: Tensor
    values_NGPD: Tensor


@dataclass(frozen=True, slots=True)
class Rows:
    """Whose tokens a call is about: int32 on the device, and what the host must know of them.

    pages_WM: each row's pages, in order. lengths_W: its history's positions. starts_Y: where its tokens begin among the
    ``X``; one more is at the end (``Y = W + 1``). most_tokens: of a row. longest: at least the longest history.
    has_drafts: see :class:`qtilt.forwards.packing.LastTokens`.
    """

    pages_WM: Tensor
    lengths_W: Tensor
    starts_Y: Tensor
    most_tokens: int
    longest: int
    has_drafts: bool = False


class PagedKernels(Protocol):
    """Of spans a row's tokens are the last of its history. Of tails the first one is, the others are its candidates.

    All tensors have contiguous heads, and may have any other strides; ``out_XHD`` is contiguous.
    """

    def store_spans(self, key_XGD: Tensor, value_XGD: Tensor, pages: LayerPages, rows: Rows) -> None:
        """Write keys and values to their places."""

    def store_tails(self, key_XGD: Tensor, value_XGD: Tensor, pages: LayerPages, rows: Rows) -> None:
        """Write those of each row's first token to their place."""

    def attend_spans(self, out_XHD: Tensor, query_XHD: Tensor, pages: LayerPages, rows: Rows, scaling: float) -> None:
        """Causal attention over histories whose keys and values are all stored."""

    def attend_tails(
        self,
        out_XHD: Tensor,
        query_XHD: Tensor,
        own: tuple[Tensor, Tensor],
        pages: LayerPages,
        rows: Rows,
        scaling: float,
    ) -> None:
        """Attention over whole histories and, for candidates, their ``own`` key and value ``[X, G, D]``."""


class FlashAttention(Protocol):
    """``vllm.vllm_flash_attn.flash_attn_varlen_func``, as far as it is used; keys and values may have any strides."""

    def __call__(
        self,
        *,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        max_seqlen_q: int,
        cu_seqlens_q: Tensor,
        max_seqlen_k: int,
        seqused_k: Tensor,
        block_table: Tensor,
        softmax_scale: float,
        causal: bool,
        num_splits: int,
        return_softmax_lse: bool,
    ) -> tuple[Tensor, Tensor]:
        """``q`` and ``out [X, H, D]``, ``k`` and ``v [N, P, G, D]``; the log-sum-exp is float32 ``[H, X]``."""
