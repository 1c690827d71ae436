"""The public path of what lies in :mod:`qtilt.method.params`."""

from qtilt.method.params import (
    DEFAULT_ETA,
    DEFAULT_TAIL,
    DEFAULT_TOP_K,
    EXTRA_ARGS_KEY,
    METHODS,
    MIN_ETA,
    TAILS,
    GuidanceParams,
    asks_for_guidance,
)

__all__ = [
    "DEFAULT_ETA",
    "DEFAULT_TAIL",
    "DEFAULT_TOP_K",
    "EXTRA_ARGS_KEY",
    "METHODS",
    "MIN_ETA",
    "TAILS",
    "GuidanceParams",
    "asks_for_guidance",
]
