"""vLLM's kernels, as forwards use them (forwards/fused.py). Only this file knows where vLLM has them."""

from functools import partial

import torch
from torch import Tensor

from qtilt.forwards.memory import CacheGeometry
from qtilt.forwards.paged.kernels import FlashAttention
from vllm import _custom_ops

FLASH_DTYPES = (torch.bfloat16, torch.float16)
FLASH_LARGEST_HEAD = 256
FLASH_HEAD_MULTIPLE = 8


class VllmKernels:
    """See :class:`qtilt.forwards.fused.Kernels`."""

    rms_norm = staticmethod(_custom_ops.rms_norm)
    fused_add_rms_norm = staticmethod(_custom_ops.fused_add_rms_norm)
    rotary_embedding = staticmethod(_custom_ops.rotary_embedding)

    def silu_and_mul(self, out_TI: Tensor, gate_up: Tensor, /) -> None:
        torch.ops._C.silu_and_mul(out_TI, gate_up)

    def flash_attention(self, geometry: CacheGeometry) -> FlashAttention | None:
        """Version 3 on Hopper's GPUs, 2 on others: version 4 isn't known to take pages of our size."""
        fits = geometry.head_size % FLASH_HEAD_MULTIPLE == 0 and geometry.head_size <= FLASH_LARGEST_HEAD
        if geometry.dtype not in FLASH_DTYPES or not fits:
            return None
        try:
            from vllm import vllm_flash_attn
        except ImportError:  # vLLM for other devices than NVIDIA's
            return None
        is_hopper = torch.cuda.get_device_capability(geometry.device)[0] == 9
        versions = (3, 2) if is_hopper else (2,)
        available = [version for version in versions if vllm_flash_attn.is_fa_version_supported(version)]
        if not available:
            return None
        return partial(vllm_flash_attn.flash_attn_varlen_func, fa_version=available[0])
