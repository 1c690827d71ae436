"""The routes as vLLM's API server gets them, behind its own key check."""

import pytest
from fastapi import FastAPI
from fastapi.routing import APIRoute
from fastapi.testclient import TestClient
from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware

from qtilt_server.endpoint_plugin import GuidanceEndpoints


@pytest.fixture
def app() -> FastAPI:
    """Middleware in vLLM's order: first the plugin's, around it the key check."""
    app = FastAPI()
    GuidanceEndpoints().attach_router(app)
    app.add_middleware(AuthenticationMiddleware, tokens=["secret"])
    return app


OPEN = {"/playground", "/playground/", "/playground/{name}"}
"""Files that are the same for everyone; what the page shows it asks for with a key (test_server_playground.py)."""


def test_every_route_but_the_files_of_the_page_needs_the_api_key(app: FastAPI) -> None:
    client = TestClient(app)
    routes = [route for route in app.routes if isinstance(route, APIRoute) and route.path not in OPEN]
    assert {route.path for route in app.routes if isinstance(route, APIRoute)} - OPEN == {
        "/v1/completions",
        "/v1/chat/completions",
        "/v1/models",
        "/v1/guidance",
        "/v1/guidance/ready",
        "/v1/guidance/score",
        "/v1/guidance/value_models",
        "/v1/guidance/value_models/{name}/activate",
        "/v1/guidance/value_models/{name}/{version}",
    }
    for route in routes:
        for method in route.methods:
            assert client.request(method, route.path, json={"guidance": {}}).status_code == 401


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_the_openapi_document_shows_the_guidance_of_a_request(app: FastAPI, path: str) -> None:
    document = app.openapi()
    schemas = document["components"]["schemas"]
    body = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    request = schemas[body["$ref"].rsplit("/", 1)[1]]
    assert {"$ref": "#/components/schemas/GuidanceRequest"} in request["properties"]["guidance"]["anyOf"]
    fields = {
        "value_model",
        "eta",
        "top_k",
        "method",
        "tail",
        "guided_tokens",
        "candidate_mass",
        "kl_budget",
        "best_of",
        "details",
    }
    assert set(schemas["GuidanceRequest"]["properties"]) == fields


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_the_openapi_document_shows_what_an_answer_says_of_guidance(app: FastAPI, path: str) -> None:
    document = app.openapi()
    schemas = document["components"]["schemas"]
    content = document["paths"][path]["post"]["responses"]["200"]["content"]
    answer = schemas[content["application/json"]["schema"]["$ref"].rsplit("/", 1)[1]]
    choice = schemas[answer["properties"]["choices"]["items"]["$ref"].rsplit("/", 1)[1]]
    assert {"$ref": "#/components/schemas/AppliedGuidance"} in answer["properties"]["guidance"]["anyOf"]
    assert {"$ref": "#/components/schemas/DetailedGuidance"} in choice["properties"]["guidance"]["anyOf"]
    assert "text/event-stream" in content
