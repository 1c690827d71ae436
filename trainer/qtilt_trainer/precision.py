"""In which precision a fit computes: the products of the backbone only, weights, head and loss are float32."""

import torch

from qtilt_trainer.config import Precision


def product_dtype(precision: Precision, device: torch.device) -> torch.dtype:
    """float32 or bfloat16. auto: bfloat16 on GPUs and on CPUs with instructions for it."""
    if precision == "auto":
        return torch.bfloat16 if device.type == "cuda" or _cpu_multiplies_bfloat16() else torch.float32
    return torch.bfloat16 if precision == "bfloat16" else torch.float32


def _cpu_multiplies_bfloat16() -> bool:
    has = torch.cpu.get_capabilities()
    return bool(has.get("amx_bf16") or has.get("avx512_bf16"))
