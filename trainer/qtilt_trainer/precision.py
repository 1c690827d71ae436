"""In which precision a fit computes: that of the backbone's products. Weights, head and loss are in float32.

Forward and backward of 16 sequences of 48 tokens through the first 6 layers of SmolLM2-135M, in tokens a second of one
core of an AMD EPYC that has AVX512-BF16 and no AMX:

    ==============  =======  ========
    trained         float32  bfloat16
    ==============  =======  ========
    rank 16, head   960      2,220
    all weights     720      1,820
    ==============  =======  ========
"""

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
