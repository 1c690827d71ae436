"""What runs a value model's backbone. Each way is a file beside this one; choice.py takes the best that there is."""

from typing import ClassVar, Protocol

from torch import Tensor

from qtilt.forwards.packing import PackedStep


class Forward(Protocol):
    """One backbone's forward over packed steps.

    All compute the same up to rounding: the backbone's own hidden states under causal attention, in which a candidate
    sees its row's history and itself. Every one is measured when it is made (probe.py).
    """

    name: ClassVar[str]

    def __call__(self, step: PackedStep) -> Tensor:
        """Cache the keys and values of the step's spans and last tokens; hidden states ``[B·R, H]`` of the tails.

        Of spans nothing else is wanted, so the last layer needn't do more than that for them.
        """
