"""The HTTP surface: what a guidance block may hold, and the JSON schemas frozen."""

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from qtilt_server.schema import (
    ActivateRequest,
    AppliedGuidance,
    ChoiceGuidance,
    DetailedGuidance,
    GuidanceRequest,
    GuidanceStatus,
    PublishedVersion,
    PublishRequest,
    RankedGuidance,
    Readiness,
    ScoreRequest,
    ScoreResponse,
    TotalGuidance,
)

FROZEN = Path(__file__).parent / "http_schema.json"
SURFACE: dict[str, type[BaseModel]] = {
    "request.guidance": GuidanceRequest,
    "response.guidance": AppliedGuidance,
    "response.choices[i].guidance": ChoiceGuidance,
    "response.choices[i].guidance with details": DetailedGuidance,
    "response.choices[i].guidance with best_of": RankedGuidance,
    "response.usage.completion_tokens_details": TotalGuidance,
    "GET /v1/guidance response": GuidanceStatus,
    "GET /v1/guidance/ready response": Readiness,
    "POST /v1/guidance/score request": ScoreRequest,
    "POST /v1/guidance/score response": ScoreResponse,
    "POST /v1/guidance/value_models request": PublishRequest,
    "POST /v1/guidance/value_models response": PublishedVersion,
    "POST /v1/guidance/value_models/NAME/activate request": ActivateRequest,
}


def test_the_http_schema_is_the_frozen_one() -> None:
    """A change of the public surface is deliberate: edit http_schema.json, and the README's HTTP API, along with it."""
    assert {name: model.model_json_schema() for name, model in SURFACE.items()} == json.loads(FROZEN.read_text())


@pytest.mark.parametrize(
    "block",
    [
        {},
        {"value_model": None, "eta": None, "top_k": None, "method": None, "tail": None, "guided_tokens": None},
        {"value_model": "a@1", "eta": 1, "top_k": 1, "method": "cd", "guided_tokens": 0, "candidate_mass": 1},
        {"candidate_mass": None, "tail": "floor"},
        {"tail": "mean", "candidate_mass": 0.1},
        {"eta": 1e-9},
        {"eta": 1e300},
        {"candidate_mass": 5e-324},
        {"candidate_mass": 1.0},
    ],
)
def test_good_blocks(block: dict[str, Any]) -> None:
    GuidanceRequest.model_validate(block)


BAD_BLOCKS: list[Any] = [
    {"etta": 0.1},
    {"eta": 0},
    {"eta": -1.0},
    {"eta": 1e-30},
    {"eta": float("inf")},
    {"eta": float("nan")},
    {"eta": "0.1"},
    {"eta": True},
    {"eta": 10**400},
    {"top_k": 0},
    {"top_k": -3},
    {"top_k": 2.5},
    {"top_k": 2.0},
    {"top_k": "2"},
    {"top_k": True},
    {"method": "QSHARP"},
    {"method": 1},
    {"method": True},
    {"tail": "Mean"},
    {"tail": 1},
    {"tail": ["mean"]},
    {"guided_tokens": -1},
    {"guided_tokens": 1.5},
    {"guided_tokens": True},
    {"guided_tokens": "3"},
    {"guided_tokens": 2**63},
    {"candidate_mass": -1e-300},
    {"candidate_mass": 0},
    {"candidate_mass": 0.0},
    {"candidate_mass": 1.0000000000000002},
    {"candidate_mass": float("inf")},
    {"candidate_mass": float("nan")},
    {"candidate_mass": "0.1"},
    {"candidate_mass": True},
    {"candidate_mass": False},
    {"candidate_mass": [0.1]},
    {"value_model": 1},
    {"value_model": True},
    {"value_model": ["value"]},
    [],
    "qsharp",
    1,
    True,
]


@pytest.mark.parametrize("block", BAD_BLOCKS, ids=repr)
def test_bad_blocks_are_refused(block: Any) -> None:
    with pytest.raises(ValidationError):
        GuidanceRequest.model_validate(block)


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"name": "a"},
        {"path": "a"},
        {"name": "", "path": "a"},
        {"name": "a@1", "path": "a"},
        {"name": "../a", "path": "a"},
        {"name": "a b", "path": "a"},
        {"name": "a" * 65, "path": "a"},
        {"name": "a", "path": ""},
        {"name": "a", "path": 1},
        {"name": "a", "path": "a", "version": 2},
    ],
    ids=repr,
)
def test_bad_publish_requests_are_refused(body: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        PublishRequest.model_validate(body)
