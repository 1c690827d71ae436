"""What runs a value model: chosen once, when it is loaded."""

from functools import partial

import torch
from transformers import PreTrainedModel

from qtilt.forwards.compiled import library
from qtilt.forwards.compiled import tilt as compiled_tilt
from qtilt.forwards.compiled.llama_forward import CompiledForward, can_compile
from qtilt.forwards.fused import FusedForward, Kernels, can_fuse
from qtilt.forwards.interface import AttentionOf, Forward
from qtilt.forwards.memory import CacheGeometry
from qtilt.forwards.modules import ModulesForward
from qtilt.forwards.packed_attention import PackedAttention
from qtilt.forwards.paged.attention import PagedAttention
from qtilt.forwards.probe import check_forward
from qtilt.method import tilt as torch_tilt
from qtilt.method.tilt import TiltFunctions


def choose_forward(
    backbone: PreTrainedModel, geometry: CacheGeometry, max_length: int, kernels: Kernels | None
) -> Forward:
    """The fastest that takes the backbone: compiled, if that library has been loaded; fused, on ``kernels``; its own
    modules. max_length: the longest history.

    Raises ValueError when it computes something else than the backbone does.
    """
    attention = choose_attention(geometry, kernels)
    positions = min(max_length + 1, backbone.config.get_text_config().max_position_embeddings)
    forward: Forward
    if library.is_loaded() and can_compile(backbone, geometry):
        forward = CompiledForward(backbone, geometry, positions)
    elif kernels is not None and can_fuse(backbone):
        forward = FusedForward(backbone, kernels, positions, attention, together=geometry.device.type != "cpu")
    else:
        forward = ModulesForward(backbone, attention)
    check_forward(backbone, forward, geometry, max_length)
    return forward


def choose_attention(geometry: CacheGeometry, kernels: Kernels | None) -> AttentionOf:
    """On GPUs over pages in place: by FlashAttention, if there is one for such a cache, else by Triton's kernels."""
    if geometry.device.type == "cpu":
        return PackedAttention
    from qtilt.forwards.paged.flash_kernels import FlashKernels
    from qtilt.forwards.paged.triton_kernels import TritonKernels

    flash = None if kernels is None else kernels.flash_attention(geometry)
    return partial(PagedAttention, kernels=TritonKernels() if flash is None else FlashKernels(flash))


def choose_tilt(device: torch.device) -> TiltFunctions:
    """In C++ on a CPU, if that library has been loaded, else by torch; on GPUs by Triton."""
    if device.type != "cpu":
        from qtilt.forwards.triton_tilt import tilt as triton_tilt

        return triton_tilt
    return compiled_tilt if library.is_loaded() else torch_tilt
