"""What runs a value model: chosen once, when it is loaded."""

import torch
from transformers import PreTrainedModel

from qtilt.forwards.compiled import library
from qtilt.forwards.compiled import tilt as compiled_tilt
from qtilt.forwards.compiled.llama_forward import CompiledForward, can_compile
from qtilt.forwards.fused import FusedForward, Kernels, can_fuse
from qtilt.forwards.interface import Forward
from qtilt.forwards.memory import CacheGeometry
from qtilt.forwards.modules import ModulesForward
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
    positions = min(max_length + 1, backbone.config.get_text_config().max_position_embeddings)
    forward: Forward
    if library.is_loaded() and can_compile(backbone, geometry):
        forward = CompiledForward(backbone, geometry, positions)
    elif kernels is not None and can_fuse(backbone):
        forward = FusedForward(backbone, kernels, positions)
    else:
        forward = ModulesForward(backbone)
    check_forward(backbone, forward, geometry, max_length)
    return forward


def choose_tilt(device: torch.device) -> TiltFunctions:
    """In C++ on a CPU, if that library has been loaded; else by torch."""
    return compiled_tilt if device.type == "cpu" and library.is_loaded() else torch_tilt
