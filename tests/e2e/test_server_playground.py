"""The files of ``/playground`` as the server gives them, without a browser."""

import asyncio
import re
from pathlib import Path

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware

from qtilt_server.endpoint_plugin import GuidanceEndpoints
from qtilt_server.errors import NotFoundError
from qtilt_server.routes.playground import DIRECTORY, MEDIA_TYPES, asset

FILES = sorted(file for file in DIRECTORY.iterdir() if file.is_file())
NAMES = {"index.html", "playground.css", "playground.js", "icon.svg"}


@pytest.fixture
def client() -> TestClient:
    """Behind the server's key check, without the key."""
    app = FastAPI()
    GuidanceEndpoints().attach_router(app)
    app.add_middleware(AuthenticationMiddleware, tokens=["secret"])
    return TestClient(app, follow_redirects=False)


def policy(header: str) -> dict[str, str]:
    return {name: " ".join(sources) for name, *sources in (part.split() for part in header.split(";"))}


def test_the_page_needs_no_key_and_says_what_it_may_load(client: TestClient) -> None:
    answer = client.get("/playground")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    said = policy(answer.headers["content-security-policy"])
    assert said["default-src"] == said["form-action"] == said["base-uri"] == said["frame-ancestors"] == "'none'"
    assert {said[f"{kind}-src"] for kind in ("script", "style", "img", "connect")} == {"'self'"}
    assert said["require-trusted-types-for"] == "'script'"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "no-referrer"


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_each_file_comes_as_what_it_is(client: TestClient, file: Path) -> None:
    answer = client.get(f"/playground/{file.name}")
    assert answer.status_code == 200
    assert answer.content == file.read_bytes()
    assert answer.headers["content-type"].split(";")[0] == MEDIA_TYPES[file.suffix]
    assert answer.headers["content-security-policy"] == client.get("/playground").headers["content-security-policy"]
    assert answer.headers["cache-control"] == "no-cache"


def test_all_that_is_imported_or_linked_is_there() -> None:
    there = {file.name for file in FILES}
    assert there >= NAMES
    page = (DIRECTORY / "index.html").read_text()
    assert set(re.findall(r'(?:src|href)="playground/([^"]+)"', page)) <= there
    imported = {name for file in FILES for name in re.findall(r'from "\./([^"]+)"', file.read_text())}
    assert imported <= there
    assert there == NAMES | imported, "nothing lies there unused"


@pytest.mark.parametrize(
    "name",
    [
        "nothing.js",
        "..",
        "../schema.py",
        "%2e%2e/schema.py",
        "..%2fschema.py",
        "..%5cschema.py",
        "%2fetc%2fpasswd",
        "playground.css%00.py",
        ".%2fplayground.css",
        "__pycache__",
    ],
)
def test_nothing_else_is_given_out(client: TestClient, name: str) -> None:
    answer = client.get(f"/playground/{name}")
    assert answer.status_code == 404
    assert "qtilt_server" not in answer.text


@pytest.mark.parametrize("name", ["..", ".", "", "../schema.py", "../playground/index.html", "/etc/passwd"])
def test_nor_would_be_if_the_route_took_paths(name: str) -> None:
    with pytest.raises(NotFoundError):
        asyncio.run(asset(name))


def test_a_slash_at_the_end_leads_to_the_page_whatever_prefix_a_proxy_took_away(client: TestClient) -> None:
    answer = client.get("/playground/")
    assert (answer.status_code, answer.headers["location"]) == (307, "../playground")


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_no_file_names_another_host_or_a_path_from_the_root(file: Path) -> None:
    text = file.read_text().replace("http://www.w3.org/2000/svg", "")  # a name, not an address
    assert not re.findall(r"https?:|wss?:|['\"(]//", text)
    assert not re.findall(r"""(?:src|href|action)=["']/|(?:get|post|ask|fetch|import)\(["'`]/|from ["']/|url\(""", text)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_no_file_makes_markup_of_a_text(file: Path) -> None:
    """The page's policy forbids it as well; browsers that don't know trusted types rely on this."""
    sinks = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function|localStorage|document\.cookie"
    assert not re.findall(sinks, file.read_text())
    if file.suffix == ".html":
        assert not re.findall(r"<script(?![^>]*src=)|<style|\son\w+=|\sstyle=", file.read_text())
