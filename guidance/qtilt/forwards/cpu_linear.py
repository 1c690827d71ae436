"""Matrix products in float32 on CPUs by oneDNN instead of what ``nn.Linear`` takes there.

``nn.Linear`` in float32 is MKL's, which runs 2.3 times slower than oneDNN on AMD's CPUs (docs/performance.md); half
precision is oneDNN's already. Equal up to rounding.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional


def linear(layer: nn.Linear, rows: Tensor) -> Tensor:
    """``layer(rows)``."""
    if _is_slow(layer):
        return _onednn(layer.weight, layer.bias, rows)
    return functional.linear(rows, layer.weight, layer.bias)


def slow_linears(module: nn.Module) -> list[nn.Linear]:
    """The layers that :func:`onednn_linears` makes faster."""
    return [layer for layer in module.modules() if type(layer) is nn.Linear and _is_slow(layer)]


@contextmanager
def onednn_linears(layers: Sequence[nn.Linear]) -> Iterator[None]:
    """Have the layers compute by oneDNN inside the block, and as always after it."""
    for layer in layers:
        layer.forward = partial(_onednn, layer.weight, layer.bias)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _is_slow(layer: nn.Linear) -> bool:
    weight = layer.weight
    return weight.device.type == "cpu" and weight.dtype == torch.float32 and torch.backends.mkldnn.is_available()


def _onednn(weight: Tensor, bias: Tensor | None, rows: Tensor) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    return product
