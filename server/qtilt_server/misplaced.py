"""Guidance that is asked for where nobody reads it: vLLM ignores fields it doesn't know, and would answer unguided."""

import re
from collections.abc import Collection, Mapping
from difflib import SequenceMatcher
from typing import Any

FIELD = "guidance"
SIMILAR = 0.8
"""Of difflib's ratio: a letter or two changed, dropped or exchanged."""
ONLY_OURS = {"value_model", "eta", "guided_tokens", "candidate_mass"}
"""Fields of a guidance block that no other API has."""
CARRIERS = {
    "extra_body",
    "extra_args",
    "sampling_params",
    "vllm_xargs",
    "parameters",
    "options",
    "model_kwargs",
    "nvext",
}
"""Where clients and other servers put what isn't OpenAI's. (The ``openai`` client unpacks its own.)"""
FREE = {"metadata"}
"""What a client writes there is its own."""
DEPTH = 2
"""``extra_body.sampling_params.guidance``. Deeper are JSON schemas, of whose names nothing can be told."""


def misplaced_in(request: Mapping[str, Any], known: Collection[str]) -> str | None:
    """Where a request whose fields are ``known`` asks for guidance that would be ignored, as ``a.b``; None: nowhere."""
    unknown = {key: value for key, value in request.items() if key not in known}
    holders = {key: value for key, value in request.items() if key in CARRIERS or key in unknown.keys() - FREE}
    return _meant_in(unknown, "") or _below(holders, "", DEPTH)


def misplaced_in_carriers(request: Mapping[str, Any]) -> str | None:
    """The same for a request whose fields aren't known: in places that are known to be misused."""
    likely = {key: value for key, value in request.items() if key in CARRIERS or is_like(key)}
    return misplaced_in(likely, CARRIERS)


def is_like(key: str) -> bool:
    """Whether it is ``guidance``, or was meant to be."""
    letters = re.sub(r"[^a-z]", "", key.lower())
    return SequenceMatcher(None, letters, FIELD).ratio() >= SIMILAR


def explain(place: str) -> str:
    """What is wrong with it, and what is right."""
    return (
        f"{place!r} would be ignored: guidance goes into the field 'guidance' at the top level of the body, "
        '{"guidance": {"value_model": …, "eta": …}}; the openai client takes it as extra_body={"guidance": {…}}'
    )


def _meant_in(fields: Mapping[str, Any], place: str) -> str | None:
    meant = (key for key, value in fields.items() if value is not None and (is_like(key) or key in ONLY_OURS))
    return next((f"{place}{key}" for key in meant), None)


def _below(holders: Mapping[str, Any], place: str, depth: int) -> str | None:
    for key, held in holders.items():
        if isinstance(held, dict) and depth:
            inside = f"{place}{key}."
            found = _meant_in(held, inside) or _below(held, inside, depth - 1)
            if found is not None:
                return found
    return None
