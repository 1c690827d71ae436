"""What CUDA's graphs do to a step, on a CPU: it runs again, as the host knew it then, on the same tensors.

While it runs, nothing may come from the host, nor go there: a graph would repeat what came, and never ask again. What a
replay doesn't write is NaN, as if another graph had used the memory.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from qtilt.forwards import packing
from qtilt.forwards.paged import attention
from qtilt.vllm_plugin.step import Guided

TO_THE_HOST = ("aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::equal")


class HostStaysOut(TorchDispatchMode):
    """Raises AssertionError where the host reads a number of a tensor."""

    def __torch_dispatch__(self, func: Any, types: object, args: Any = (), kwargs: Any = None) -> Any:
        assert func.name() not in TO_THE_HOST, f"{func.name()} in a captured step"
        return func(*args, **(kwargs or {}))


class PlayedGraphs:
    """See :class:`qtilt.vllm_plugin.captured.Graphs`. is_strict: the above holds; else a step may do on CPUs what only
    kernels of GPUs do without the host.
    """

    def __init__(self, *, is_strict: bool = False) -> None:
        self.is_strict = is_strict
        self.captured = self.replayed = 0

    def capture(self, step: Callable[[], Guided]) -> tuple[Guided, Callable[[], None]]:
        def run() -> Guided:
            if not self.is_strict:
                return step()
            with pytest.MonkeyPatch.context() as patch, HostStaysOut():
                for module in (packing, attention):
                    patch.setattr(module, "copy_to_device", _refused)
                patch.setattr(torch, "from_numpy", _refused)
                patch.setattr(torch, "tensor", _refused)
                return step()

        run()
        guided = Guided(*(part.clone() for part in run()))
        self.captured += 1

        def replay() -> None:
            self.replayed += 1
            guided.divergence_G3.fill_(torch.nan)
            guided.candidates_G.fill_(np.iinfo(np.int64).min)
            for mine, again in zip(guided, run(), strict=True):
                mine.copy_(again)

        return guided, replay


def _refused(*_args: object, **_kwargs: object) -> None:
    raise AssertionError("a captured step takes something from the host")
