"""The systems by name, and what each needs."""

import re
from dataclasses import dataclass
from typing import Literal

DEFAULT_TOP_K = 20
TOLERANCE = 1e-3
"""Of the systems that have one."""


@dataclass(frozen=True)
class System:
    """engine: ``vllm`` without the plugin, ``guided`` with it, or ``hf``. type: of the value model, None unguided.
    tolerance: of each guided step, so that it may score fewer candidates.
    """

    name: str
    engine: Literal["vllm", "guided", "hf"]
    type: Literal["q", "v"] | None = None
    top_k: int = DEFAULT_TOP_K
    tolerance: float = 0.0


UNGUIDED = {
    "plain": System("plain", "vllm"),
    "unguided": System("unguided", "guided"),
    "hf-plain": System("hf-plain", "hf"),
}


def system(name: str) -> System:
    """``plain``, ``unguided``, ``hf-plain``, [hf-](q|v)[top_k], or v[top_k]t with a tolerance.

    Raises ValueError for another name.
    """
    if name in UNGUIDED:
        return UNGUIDED[name]
    if match := re.fullmatch(r"v([1-9]\d*)?t", name):
        return System(name, "guided", "v", int(match[1] or DEFAULT_TOP_K), TOLERANCE)
    if (match := re.fullmatch(r"(hf-)?([qv])([1-9]\d*)?", name)) is None:
        raise ValueError(
            f"system is {name!r}, expected one of {', '.join(UNGUIDED)} or [hf-](q|v)[top_k], as v20, or v20t"
        )
    hf, type, top_k = match.groups()
    return System(name, "hf" if hf else "guided", type, int(top_k or DEFAULT_TOP_K))
