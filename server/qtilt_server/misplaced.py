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
CARRIERS = {"extra_body", "extra_args", "sampling_params", "parameters", "options", "model_kwargs", "nvext"}
"""Where clients and other servers put what isn't OpenAI's. (The ``openai`` client unpacks ``extra_body`` itself.)"""
XARGS = "vllm_xargs"
"""What users' own logits processors are told: of ours it can be only by the field's name."""
DEPTH = 2
"""``extra_body.sampling_params.guidance``. Deeper are JSON schemas, of whose names nothing can be told."""


def misplaced_in(request: Mapping[str, Any], known: Collection[str]) -> str | None:
    """Where a request whose fields are ``known`` asks for guidance that would be ignored, as ``a.b``; None: nowhere."""
    unknown = {key: value for key, value in request.items() if key not in known}
    holders = {key: value for key, value in request.items() if key in CARRIERS}
    return _meant_in(unknown, "") or _below(holders, "", DEPTH) or _in_xargs(request)


def misplaced_in_carriers(request: Mapping[str, Any]) -> str | None:
    """The same for a request whose fields aren't known: in places that are known to be misused."""
    likely = {key: value for key, value in request.items() if key in CARRIERS or key == XARGS or is_like(key)}
    return misplaced_in(likely, {*CARRIERS, XARGS})


def is_like(key: str) -> bool:
    """Whether it is ``guidance``, or was meant to be."""
    letters = re.sub(r"[^a-z]", "", key.lower())
    # Of most keys this much is enough to know.
    if len({*letters} & {*FIELD}) < len(FIELD) // 2 + 1:
        return False
    return SequenceMatcher(None, letters, FIELD).ratio() >= SIMILAR


def explain(place: str) -> str:
    """What is wrong with it, and what is right."""
    return (
        f"{place!r} would be ignored: guidance goes into the field 'guidance' at the top level of the body, "
        '{"guidance": {"value_model": …, "eta": …}}; the openai client takes it as extra_body={"guidance": {…}}'
    )


def _meant_in(fields: Mapping[str, Any], place: str) -> str | None:
    asked = (key for key, value in fields.items() if value is not None and value is not False)
    meant = (key for key in asked if is_like(key) or key in ONLY_OURS)
    return next((f"{place}{key}" for key in meant), None)


def _below(holders: Mapping[str, Any], place: str, depth: int) -> str | None:
    for key, held in holders.items():
        if isinstance(held, dict) and depth:
            inside = f"{place}{key}."
            found = _meant_in(held, inside) or _below(held, inside, depth - 1)
            if found is not None:
                return found
    return None


def _in_xargs(request: Mapping[str, Any]) -> str | None:
    xargs = request.get(XARGS)
    keys = xargs if isinstance(xargs, dict) else {}
    return next((f"{XARGS}.{key}" for key in keys if key.lower() == FIELD), None)
