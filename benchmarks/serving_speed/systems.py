"""The systems by name, and what each needs."""

import re
from dataclasses import dataclass
from typing import Literal

DEFAULT_TOP_K = 20


@dataclass(frozen=True)
class System:
    """engine: ``vllm`` without the plugin, ``guided`` with it, or ``hf``. type: of the value model, None unguided."""

    name: str
    engine: Literal["vllm", "guided", "hf"]
    type: Literal["q", "v"] | None = None
    top_k: int = DEFAULT_TOP_K


UNGUIDED = {
    "plain": System("plain", "vllm"),
    "unguided": System("unguided", "guided"),
    "hf-plain": System("hf-plain", "hf"),
}


def system(name: str) -> System:
    """``plain``, ``unguided``, ``hf-plain``, or [hf-](q|v)[top_k].

    Raises ValueError for another name.
    """
    if name in UNGUIDED:
        return UNGUIDED[name]
    if (match := re.fullmatch(r"(hf-)?([qv])([1-9]\d*)?", name)) is None:
        raise ValueError(f"system is {name!r}, expected one of {', '.join(UNGUIDED)} or [hf-](q|v)[top_k], as v20")
    hf, type, top_k = match.groups()
    return System(name, "hf" if hf else "guided", type, int(top_k or DEFAULT_TOP_K))
