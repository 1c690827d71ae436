"""What guidance in a worker has done, for who operates it: numbers the host has anyway, so nothing waits for a device.

JSON-able. Totals are since a version was loaded. On a GPU the host starts work and doesn't wait for it: how long a
forward takes there isn't known here, and said to be None.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypedDict

from qtilt.engine.cache import KVCache

if TYPE_CHECKING:
    from qtilt.vllm_plugin.versions import Residents, ResidentVersion


@dataclass(slots=True)
class StepCounts:
    """Of the engine's steps in which a version had requests. requests: that drew a token under guidance, summed over
    steps. seconds: of the host, in all that guidance does for this version.
    """

    steps: int = 0
    requests: int = 0
    seconds: float = 0.0


class VersionMeasures(TypedDict):
    """running: requests in the batch. pages: of the value cache that it has. first, again, copied: see EngineCounts."""

    name: str
    version: int
    running: int
    pages: int
    steps: int
    step_requests: int
    step_seconds: float
    forward_seconds: float | None
    first: int
    again: int
    copied: int


class CacheMeasures(TypedDict):
    """cache: what models have in common that share it. page_tokens: of one page. dropped: histories, for room."""

    cache: str
    pages: int
    pages_used: int
    page_tokens: int
    dropped: int


class Measures(TypedDict):
    """Of one worker."""

    versions: list[VersionMeasures]
    caches: list[CacheMeasures]


def measure(residents: "Residents") -> Measures:
    """Between two steps."""
    return {
        "versions": [_of_version(version) for version in residents],
        "caches": [_of_cache(cache) for cache in residents.caches],
    }


def _of_version(version: "ResidentVersion") -> VersionMeasures:
    engine, counts = version.engine, version.counts
    on_host = engine.cache.geometry.device.type == "cpu"
    return {
        "name": version.name,
        "version": version.version,
        "running": version.rows,
        "pages": engine.held_pages,
        "steps": counts.steps,
        "step_requests": counts.requests,
        "step_seconds": counts.seconds,
        "forward_seconds": engine.counts.seconds if on_host else None,
        "first": engine.counts.first,
        "again": engine.counts.again,
        "copied": engine.counts.copied,
    }


def _of_cache(cache: KVCache) -> CacheMeasures:
    return {
        "cache": cache.geometry.label,
        "pages": cache.pages.total,
        "pages_used": cache.held_pages,
        "page_tokens": cache.pages.size,
        "dropped": cache.dropped,
    }
