"""Matrix products in float32 on CPUs by oneDNN instead of what ``nn.Linear`` takes there."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn


def float32_linears(module: nn.Module) -> list[nn.Linear]:
    """The layers that :func:`onednn_linears` makes faster: none but those in float32 on a CPU that has oneDNN."""
    if not torch.backends.mkldnn.is_available():
        return []
    linears = [layer for layer in module.modules() if type(layer) is nn.Linear]
    return [layer for layer in linears if layer.weight.device.type == "cpu" and layer.weight.dtype == torch.float32]


@contextmanager
def onednn_linears(layers: Sequence[nn.Linear]) -> Iterator[None]:
    """Have the layers compute by oneDNN inside the block, and as always after it.

    ``nn.Linear`` in float32 is MKL's, which runs 2.3 times slower than oneDNN on AMD's CPUs (docs/performance.md); half
    precision is oneDNN's already. Equal up to rounding.
    """
    for layer in layers:
        layer.forward = partial(_linear, layer.weight, layer.bias)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _linear(weight: Tensor, bias: Tensor | None, rows: Tensor) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    return product
