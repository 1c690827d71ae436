"""A budget for the KL of a whole response: each step's offsets are scaled by a λ in [0, 1] that it allows.

Shapes: ``B`` rows.

For fixed offsets o the distributions p·e^(λo)/Z(λ) are an exponential family: their KL to p is 0 at λ = 0 and grows
with λ (its derivative is λ·Var[o]). With the tail ``mean`` that holds for the distribution given a candidate, and the
KL is that one's times the candidates' mass. So the largest λ that a step may have is found by halving. The rule is to
spend as it comes: λ = 1 while the step's KL is within what is left, then the λ that spends the rest, then the
reference.
Neither the paper nor its code has this: there η is tuned on whole data sets, and no response is bounded.
"""

from collections.abc import Callable

import torch
from torch import Tensor

HALVINGS = 40
"""λ is exact to 1e-12. What an error of λ leaves unspent goes to the next step, where the KL is quadratic in λ."""
ROUNDING = 1e-9
"""Of a budget, that is kept back: sums of float64 differ by their order."""


def largest_scale(kl: Callable[[Tensor], Tensor], left_B: Tensor) -> Tensor:
    """The largest λ of each row at which its KL isn't above ``left_B``, or a little less: float64 ``[B]``.

    kl: of offsets that are scaled by λ ``[B]``, in nats; it was evaluated at what is returned, or that is 0.
    left_B: infinite for a row without a budget. On a CPU nothing is halved where all rows may spend what they would.
    """
    all_B = torch.ones_like(left_B)
    fits_B = kl(all_B) <= left_B
    if fits_B.device.type == "cpu" and bool(fits_B.all()):
        return all_B
    low_B, high_B = torch.zeros_like(left_B), all_B
    for _ in range(HALVINGS):
        middle_B = (low_B + high_B) / 2
        is_low_B = kl(middle_B) <= left_B
        low_B, high_B = torch.where(is_low_B, middle_B, low_B), torch.where(is_low_B, high_B, middle_B)
    return torch.where(fits_B, all_B, low_B)
