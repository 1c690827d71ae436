"""What attention over pages is, token by token in float64."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from qtilt.forwards.memory import CacheGeometry, PageMemory
from qtilt.forwards.packing import LastTokens, Span, pack
from qtilt.forwards.paged.attention import PagedAttention
from qtilt.forwards.paged.kernels import PagedKernels

SCALING = 0.3


def exact_attention(
    query_CHD: Tensor, keys_EGD: Tensor, values_EGD: Tensor, visible: Sequence[Sequence[int]]
) -> Tensor:
    """One query after the other, over the positions that it sees, in float64."""
    group = query_CHD.shape[1] // keys_EGD.shape[1]
    keys_EHD, values_EHD = (each.double().repeat_interleave(group, 1) for each in (keys_EGD, values_EGD))
    outs = []
    for query_HD, seen in zip(query_CHD.double(), visible, strict=True):
        weights_HE = torch.einsum("hd,ehd->he", query_HD * SCALING, keys_EHD[seen]).softmax(-1)
        outs.append(torch.einsum("he,ehd->hd", weights_HE, values_EHD[seen]))
    return torch.stack(outs)


class Layer:
    """Of a backbone, as far as attention asks."""

    layer_idx = 1


def check_attention(
    kernels: PagedKernels, geometry: CacheGeometry, group: int, rounding: float, *, tails_only: bool
) -> None:
    """Of a step with spans and tails, over a cache of two layers."""
    torch.manual_seed(0)
    kv_heads, head_size, dtype, device = geometry.kv_heads, geometry.head_size, geometry.dtype, geometry.device
    table_SM = torch.randperm(20, device=device).view(5, 4)
    memory = PageMemory(geometry, 20, 32, table_SM, in_one_piece=False)
    for content_LNGPD in memory.content:
        content_LNGPD.normal_()
    pages_S = table_SM.tolist()

    def cached(slot: int, length: int) -> list[Tensor]:
        return [
            torch.cat([content_LNGPD[1, page].transpose(0, 1) for page in pages_S[slot]])[:length]
            for content_LNGPD in memory.content
        ]

    spans = [Span(0, 30, torch.arange(40, device=device)), Span(3, 0, torch.arange(5, device=device))]
    lengths, tails = [71, 33, 1], [3, 1, 2]
    slots_B, positions_B, tokens_B = torch.tensor([[0, 2, 1], [length - 1 for length in lengths], [1, 2, 3]]).to(device)
    last = LastTokens(slots_B, positions_B, tokens_B, longest=71)
    step = pack(memory, spans, last, torch.ones(3, 2, dtype=torch.long, device=device), np.array(tails) - 1)
    tokens = len(step.input_ids_T)
    # Parts of one product, as a forward has them.
    packed = 3 * torch.randn(1, tokens, (group + 2) * kv_heads, head_size, device=device).to(dtype).transpose(1, 2)
    query, key, value = packed.split([group * kv_heads, kv_heads, kv_heads], 1)
    attention = PagedAttention(step, kernels)
    got_1THD = attention.attend(Layer(), query, key, value, SCALING, {}, tails_only=tails_only)  # type: ignore[arg-type]
    query_THD, key_TGD, value_TGD = (each[0].transpose(0, 1) for each in (query, key, value))
    expected, first = [], 0
    for span in spans:
        part = slice(first, first + len(span.token_ids_C))
        first = part.stop
        keys, values = cached(span.slot, span.end)
        assert torch.equal(keys[span.start :], key_TGD[part])
        assert torch.equal(values[span.start :], value_TGD[part])
        if not tails_only:
            seen = [range(position + 1) for position in range(span.start, span.end)]
            expected.append(exact_attention(query_THD[part], keys, values, seen))
    for slot, length, tail in zip(last.slots_B.tolist(), lengths, tails, strict=True):
        row = slice(first, first + tail)
        first = row.stop
        keys, values = cached(slot, length)
        assert torch.equal(keys[-1], key_TGD[row][0])
        keys, values = torch.cat([keys, key_TGD[row][1:]]), torch.cat([values, value_TGD[row][1:]])
        seen = [range(length), *([*range(length), length + candidate] for candidate in range(tail - 1))]
        expected.append(exact_attention(query_THD[row], keys, values, seen))
    assert got_1THD.is_contiguous()
    torch.testing.assert_close(got_1THD[0].double(), torch.cat(expected), atol=rounding, rtol=rounding)
