"""The learning-rate schedule both trainings use."""

import math
from collections.abc import Callable

WARMUP_FRACTION = 0.05
FINAL_FRACTION = 0.1


def warmup_cosine(steps: int) -> Callable[[int], float]:
    """step (from 0) -> factor on the peak rate: linear warm-up over 5 % of the steps, cosine down to 10 %."""
    warmup = max(1, round(WARMUP_FRACTION * steps))

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        progress = min((step - warmup) / max(1, steps - warmup), 1.0)
        return FINAL_FRACTION + (1 - FINAL_FRACTION) * 0.5 * (1 + math.cos(math.pi * progress))

    return factor
