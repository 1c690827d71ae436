"""Numbers on the host, and their way to the device without either waiting for the other."""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

IntArray = npt.NDArray[np.int64]
Int32Array = npt.NDArray[np.int32]
BoolArray = npt.NDArray[np.bool_]


def copy_to_device(device: torch.device, *arrays: npt.NDArray[Any]) -> list[Tensor]:
    """Copy arrays of one dtype to the device as one transfer, keeping their shapes."""
    flat = torch.from_numpy(np.concatenate([array.reshape(-1) for array in arrays]))
    flat = flat.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else flat.to(device)
    parts = flat.split([array.size for array in arrays])
    return [part.view(array.shape) for array, part in zip(arrays, parts, strict=True)]
