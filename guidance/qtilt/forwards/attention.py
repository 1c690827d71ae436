"""Attention of packed, ragged rows over a slot cache, as a transformers attention function.

Shapes: ``T`` packed tokens (see packing.py); ``H`` query heads and ``G`` key/value heads of size ``D``; ``W`` rows of
one attention call, ``P`` cached positions it reads, ``R`` tail tokens of a row, ``Q = R·H/G`` queries of one key/value
head; ``C`` tokens of a span that ends at position ``E``.

Every token of a row attends to the row's cached prefix; a candidate also attends to itself but never to another
candidate, and is never cached. The candidates read the shared prefix in place: attention over the prefix with its
log-sum-exp, then the candidate's own key and value merged in.
"""

from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

ATTENTION_NAME = "qtilt_packed"


class AttentionStep(Protocol):
    """What one packed forward does in each attention layer; it reaches the layers as the keyword ``attention_step``."""

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scaling: float, extras: dict[str, Any]
    ) -> Tensor:
        """``query [1, H, T, D]``, ``key`` and ``value [1, G, T, D]`` → ``[1, T, H, D]``.

        ``extras`` are the layer's other keywords; the exactness probe refuses those that would change the result.
        """


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,  # noqa: ARG001  the signature is theirs; who sees what is the step's business
    scaling: float,
    attention_step: AttentionStep | None = None,
    **extras: Any,
) -> tuple[Tensor, None]:
    """The attention function transformers calls."""
    if attention_step is None:
        raise ValueError(
            f"{type(module).__name__} got no attention_step: its model does not pass the keywords of its forward on "
            "to its attention, so the value engine cannot run it; use another backbone"
        )
    return attention_step.attend(module, query, key, value, scaling, extras), None


def register_attention() -> None:
    """Make the function known to transformers. Idempotent; models that don't name it aren't affected."""
    AttentionInterface.register(ATTENTION_NAME, packed_attention)


def attend_prefix(
    query_WGQD: Tensor, key_WGPD: Tensor, value_WGPD: Tensor, mask_W11P: Tensor | None, scaling: float
) -> tuple[Tensor, Tensor]:
    """Attention of all queries of a row over the same visible positions: output ``[W, G, Q, D]``, lse ``[W, G, Q]``.

    ``mask_W11P`` is added to the scores: 0 where visible, −inf elsewhere, one visible position a row at least; None
    when all are visible. The log-sum-exp is float32. On CPUs only.
    """
    # The public scaled_dot_product_attention drops the log-sum-exp that its own kernel computes.
    out_WGQD, lse_WGQ = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query_WGQD, key_WGPD, value_WGPD, 0.0, False, attn_mask=mask_W11P, scale=scaling
    )
    return out_WGQD, lse_WGQ


def attend_span(
    query_1HCD: Tensor, key_1GED: Tensor, value_1GED: Tensor, visible_CE: Tensor | None, scaling: float
) -> Tensor:
    """Causal attention of ``C`` consecutive tokens over the ``E`` positions up to the last of them: ``[1, H, C, D]``.

    ``visible_CE`` is None when the tokens are the first of their row (C = E), otherwise True where a token may look.
    """
    return scaled_dot_product_attention(
        query_1HCD,
        key_1GED,
        value_1GED,
        attn_mask=visible_CE,
        is_causal=visible_CE is None,
        scale=scaling,
        enable_gqa=query_1HCD.shape[1] != key_1GED.shape[1],
    )


def merge_own_(
    out_HD: Tensor, lse_H: Tensor, query_HD: Tensor, key_GD: Tensor, value_GD: Tensor, scaling: float
) -> None:
    """Add each token's own key and value, in place, to its attention over a prefix: ``(v_self − out)·σ(s_self − lse)``.

    Shapes are those of one token, any others may come before them. Exact: the softmax over prefix and self gives self
    the weight e^s / (e^lse + e^s). Computed in float32.
    """
    groups = query_HD.shape[-2] // key_GD.shape[-2]
    if groups > 1:
        key_GD, value_GD = key_GD.repeat_interleave(groups, -2), value_GD.repeat_interleave(groups, -2)
    own_H = (query_HD.float() * key_GD.float()).sum(-1) * scaling
    weight_H1 = (own_H - lse_H).sigmoid().unsqueeze(-1)
    if out_HD.dtype == torch.float32:
        out_HD.lerp_(value_GD, weight_H1)
    else:
        out_HD.copy_(torch.lerp(out_HD.float(), value_GD.float(), weight_H1))
