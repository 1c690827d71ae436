"""A value model estimates the reward of roll-outs sampled in one certain way; warn when a request samples otherwise."""

import logging
from typing import TYPE_CHECKING, Any

from qtilt_server.registry import ResidentVersion

if TYPE_CHECKING:
    from vllm.sampling_params import SamplingParams

logger = logging.getLogger("vllm.qtilt_server.sampling_check")

COMPARED = ("temperature", "top_p", "top_k")
TOP_K_OFF = (-1, 0)


class RolloutSamplingCheck:
    """Warns in the log, once per version and sampling parameter that differs."""

    def __init__(self) -> None:
        self._warned: set[tuple[str, str]] = set()

    def __call__(self, version: ResidentVersion, params: "SamplingParams") -> None:
        requested = {name: getattr(params, name) for name in COMPARED if name in version.rollouts}
        recorded = {name: version.rollouts[name] for name in requested}
        differing = {(version.label, name) for name in requested if not _same(name, requested[name], recorded[name])}
        if differing <= self._warned:
            return
        self._warned |= differing
        logger.warning(
            "value model %s was fitted on roll-outs sampled with %s, but requests ask for %s: "
            "its values estimate another policy's reward",
            version.label,
            _listed(recorded),
            _listed(requested),
        )


def _same(name: str, requested: Any, recorded: Any) -> bool:
    if name == "top_k" and requested in TOP_K_OFF:
        return recorded is None or recorded in TOP_K_OFF
    return bool(requested == recorded)


def _listed(parameters: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in parameters.items())
