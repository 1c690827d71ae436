"""What the value model's matrix products alone take on this machine, by the number of rows.

A floor that is measured, not counted: on a CPU 640 rows run at several times the FLOP/s of 32. The products are timed
between runs of the reference's, which empty the caches as they do in a real step; norms, rotations, attention, copies
and the head are left out. The fastest kernel that plain PyTorch has is taken.
"""

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import linear

from serving_speed.shapes import DecoderShape, Pair

# More rows than this take proportionally longer.
MOST_ROWS = 2048
Product = Callable[[Tensor], Tensor]


class MatrixProducts:
    """Random weights of both models' layers, and of the reference's head."""

    def __init__(self, pair: Pair, dtype: str, device: str) -> None:
        self.device, self.dtype = device, getattr(torch, dtype)
        head = torch.randn(pair.reference.vocab, pair.reference.hidden, dtype=self.dtype, device=device)
        self.reference = [*self._weights(pair.reference), head]
        self.value = self._weights(pair.value)
        self._packed: dict[int, list[Tensor]] = {}

    def describe(self) -> dict[str, int]:
        return {"threads": torch.get_num_threads()}

    def _weights(self, shape: DecoderShape) -> list[Tensor]:
        sizes = [size for _ in range(shape.layers) for size in shape.matrices.values()]
        return [torch.randn(outputs, inputs, dtype=self.dtype, device=self.device) for inputs, outputs in sizes]

    @torch.inference_mode()
    def seconds(self, rows: int, evicting_rows: int, repeat: int = 5) -> float:
        """Of one step in which ``rows`` pass the value model, median of ``repeat``."""
        if rows > MOST_ROWS:
            return self.seconds(MOST_ROWS, evicting_rows, repeat) * rows / MOST_ROWS
        medians = []
        for products in self._kernels(rows):
            times = []
            for _ in range(repeat + 1):
                self._run([(weight, lambda x, weight=weight: linear(x, weight)) for weight in self.reference], 1)
                times.append(self._run(products, rows))
            medians.append(statistics.median(times[1:]))
        return min(medians)

    def _kernels(self, rows: int) -> list[list[tuple[Tensor, Product]]]:
        plain = [(weight, lambda x, weight=weight: linear(x, weight)) for weight in self.value]
        if self.device != "cpu" or not torch.backends.mkldnn.is_available():
            return [plain]
        # torch.nn.functional.linear calls MKL for float32, which is slow on processors that aren't Intel's.
        pack, multiply = torch.ops.mkldnn._reorder_linear_weight, torch.ops.mkldnn._linear_pointwise
        packed = [(weight, pack(weight, rows)) for weight in self.value]
        onednn = [(weight, lambda x, p=p: multiply(x, p, None, "none", [], "")) for weight, p in packed]
        return [plain, onednn]

    def _run(self, products: list[tuple[Tensor, Product]], rows: int) -> float:
        inputs = {
            width: torch.randn(rows, width, dtype=self.dtype, device=self.device)
            for width in {weight.shape[1] for weight, _ in products}
        }
        self._synchronise()
        started = time.perf_counter()
        for weight, product in products:
            product(inputs[weight.shape[1]])
        self._synchronise()
        return time.perf_counter() - started

    def _synchronise(self) -> None:
        if self.device != "cpu":
            torch.cuda.synchronize()
