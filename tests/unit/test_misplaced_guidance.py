"""Guidance that stands where vLLM would ignore it is found, and nothing else is taken for it."""

from typing import Any

import pytest

from qtilt_server.misplaced import explain, is_like, misplaced_in

KNOWN = {"model", "prompt", "messages", "tools", "top_k", "guidance", "vllm_xargs", "chat_template_kwargs"}
BLOCK = {"eta": 0.1}
FOUND: dict[str, Any] = {
    "Guidance": {"Guidance": BLOCK},
    "guidence": {"guidence": BLOCK},
    "guid-ance": {"guid-ance": {}},
    "guidances": {"guidances": "strong"},
    "eta": {"eta": 0.1},
    "value_model": {"guidance": BLOCK, "value_model": "value"},
    "extra_body.guidance": {"extra_body": {"guidance": BLOCK}},
    "extra_body.eta": {"extra_body": {"eta": 0.1}},
    "extra_body.extra_body.guidance": {"extra_body": {"extra_body": {"guidance": BLOCK}}},
    "sampling_params.extra_args.guidance": {"sampling_params": {"extra_args": {"guidance": BLOCK}}},
    "vllm_xargs.guidance": {"vllm_xargs": {"guidance": "{}"}},
}
LEFT_ALONE: list[dict[str, Any]] = [
    {"guidance": BLOCK, "top_k": 3},
    {"Guidance": None, "extra_body": {"guidance": None}},
    {"metadata": {"guidance": "be kind", "eta": 3}, "context": {"guidance": "be kind"}, "trace": {"eta": "2026"}},
    {"use_guidance": False, "vllm_xargs": {"eta": 3e-4, "my_guidance": 1}},
    {"chat_template_kwargs": {"guidance": "be kind"}},
    {"tools": [{"function": {"parameters": {"properties": {"guidance": {}}}}}]},
    {"functions": [{"parameters": {"properties": {"guidance": {}}}}]},
    {"guided_json": {}, "guided_choice": ["a"], "guide": 1, "guidelines": "x", "guidance_scale": 7.5},
]


@pytest.mark.parametrize("place", FOUND)
def test_its_place_is_named(place: str) -> None:
    assert misplaced_in({"model": "m", **FOUND[place]}, KNOWN) == place
    assert place in explain(place)
    assert "'guidance' at the top level" in explain(place)


@pytest.mark.parametrize("request_", LEFT_ALONE)
def test_what_is_not_guidance_or_is_in_its_place_passes(request_: dict[str, Any]) -> None:
    assert misplaced_in(request_, KNOWN) is None


def test_a_slip_is_like_it_and_other_words_are_not() -> None:
    assert all(map(is_like, ("guidance", "GUIDANCE", "Guidence", "gudiance", "guidanc", "guidnace")))
    assert not any(map(is_like, ("guided", "audience", "variance", "guardrails", "", "ид")))
