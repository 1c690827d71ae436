"""Attention over pages on CUDA: Triton's kernels and FlashAttention's, against float64."""

import pytest
import torch

from paged_oracle import check_attention
from qtilt.forwards.memory import CacheGeometry
from qtilt.forwards.paged.flash_kernels import FlashKernels
from qtilt.forwards.paged.triton_kernels import TritonKernels
from qtilt.vllm_plugin.kernels import VllmKernels

ROUNDING = {torch.float32: 1e-4, torch.bfloat16: 2**-6, torch.float16: 2**-9}


@pytest.mark.parametrize("tails_only", [False, True])
@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize(("head_size", "kv_heads", "group"), [(64, 2, 4), (80, 3, 1), (128, 8, 4), (24, 1, 3)])
@pytest.mark.parametrize("kernels", ["triton", "flash"])
def test_attention_is_the_softmax_over_what_each_token_sees(
    kernels: str, head_size: int, kv_heads: int, group: int, dtype: torch.dtype, tails_only: bool
) -> None:
    geometry = CacheGeometry(2, kv_heads, head_size, dtype, torch.device("cuda"))
    flash = VllmKernels().flash_attention(geometry)
    if kernels == "flash" and flash is None:
        assert dtype == torch.float32
        pytest.skip("FlashAttention has no float32")
    chosen = TritonKernels() if kernels == "triton" else FlashKernels(flash)
    check_attention(chosen, geometry, group, ROUNDING[dtype], tails_only=tails_only)
