"""Progress bars that are lively on a terminal and sparse in a log."""

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

TERMINAL_SECONDS, LOG_SECONDS = 0.1, 30.0
"""Shortest time between two states of a bar."""


def progress_bar(label: str, unit: str, total: int, steps: Iterable[Any] | None = None) -> "tqdm[Any]":
    """A bar on stderr: to iterate over when it has `steps`, else to be updated."""
    seconds = TERMINAL_SECONDS if sys.stderr.isatty() else LOG_SECONDS
    return tqdm(steps, total=total, desc=label, unit=unit, mininterval=seconds, maxinterval=max(seconds, 10.0))
