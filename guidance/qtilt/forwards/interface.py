"""What runs a value model's backbone. Each way is a file beside this one; choice.py takes the best that there is."""

from collections.abc import Callable
from typing import Any, ClassVar, Protocol

from torch import Tensor, nn

from qtilt.forwards.packing import PackedStep


class StepAttention(Protocol):
    """What attention layers do in one packed forward, of transformers' models and of others."""

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float,
        extras: dict[str, Any],
        *,
        tails_only: bool = False,
    ) -> Tensor:
        """Cache the histories' new keys and values, then attend: ``[1, T, H, D]``.

        See :class:`qtilt.forwards.attention.AttentionStep`. tails_only: spans are cached, and nobody wants their own
        states: ``[1, X, H, D]``.
        """


AttentionOf = Callable[[PackedStep], StepAttention]


class Forward(Protocol):
    """One backbone's forward over packed steps.

    All compute the same up to rounding: the backbone's own hidden states under causal attention, in which a candidate
    sees its row's history and itself. Every one is measured when it is made (probe.py).
    """

    name: ClassVar[str]
    is_capturable: ClassVar[bool]
    """Whether a step without spans, with tails of one length, does the same to what is on the device each time."""

    def __call__(self, step: PackedStep) -> Tensor:
        """Cache the keys and values of the step's spans and last tokens; hidden states ``[X, H]`` of the tails.

        Of spans nothing else is wanted, so the last layer needn't do more than that for them.
        """
