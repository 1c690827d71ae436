"""Memory that guidance will need, held so that vLLM doesn't count it as its own. Imports no vLLM.

vLLM measures what is free when it sizes its key-value cache. It never calls a logits processor before that, and value
models may be published later: so tensors of the same size stand in for them.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

logger = logging.getLogger("vllm.qtilt.reserve")  # vLLM configures the loggers below its own name only


class Reserve:
    """activations: bytes of a step, until the first guided request. weights: bytes of each of ``versions`` value-model
    versions that may yet be loaded.
    """

    def __init__(self, device: torch.device, activations: int, weights: int, versions: int) -> None:
        self._device = device
        self._weight_bytes = weights
        self._activations: Tensor | None = self._hold(activations)
        self._versions = [self._hold(weights) for _ in range(versions)]

    @property
    def held_bytes(self) -> int:
        """What is held now."""
        activations = 0 if self._activations is None else self._activations.numel()
        return activations + sum(version.numel() for version in self._versions)

    def begin_to_serve(self) -> None:
        """vLLM has its cache: a step may take what it needs."""
        self._activations = None

    @contextmanager
    def room_for_a_version(self) -> Iterator[None]:
        """A version is loaded in the block; if that fails, its memory is held again."""
        room = self._versions.pop().numel() if self._versions else None
        try:
            yield
        except BaseException:
            if room is not None:
                self.hold_again()
            raise

    def hold_again(self) -> None:
        """A version is gone."""
        if self._weight_bytes == 0:
            return
        try:
            self._versions.append(self._hold(self._weight_bytes))
        except RuntimeError as error:
            logger.warning("the memory of a discarded value-model version is used otherwise already: %s", error)

    def _hold(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, device=self._device)
