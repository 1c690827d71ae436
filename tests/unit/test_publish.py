"""A value model is loaded once, and again when the server has forgotten it."""

import asyncio
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import qtilt_trainer.client
from qtilt_trainer.client import GuidedClient
from qtilt_trainer.config import ServerConfig
from qtilt_trainer.publish import path_below_root, publish
from qtilt_trainer.server_errors import ServerError
from stand_in_server import StandInServer


@pytest.fixture
def fitted(tmp_path: Path) -> Path:
    directory = tmp_path / "root" / "run" / "value_models" / "iteration-001"
    directory.mkdir(parents=True)
    (directory / "value_model.json").write_text("{}")
    return directory


def run(server: StandInServer, directory: Path, root: Path | None, record: Path, wait: float = 30.0) -> str:
    async def once() -> str:
        async with GuidedClient(ServerConfig(url=server.url, retries=3, wait=wait)) as client:
            return await publish(client, directory, "value", root, record)

    return asyncio.run(once())


def test_a_directory_is_published_once_by_its_path_below_the_root(fitted: Path, tmp_path: Path) -> None:
    record = tmp_path / "published.json"
    with StandInServer() as server:
        assert [run(server, fitted, tmp_path / "root", record) for _ in range(3)] == ["value@1"] * 3
        assert server.bodies("/v1/guidance/value_models") == [
            {"name": "value", "path": "run/value_models/iteration-001"}
        ]


def test_a_restarted_server_gets_it_again(fitted: Path, tmp_path: Path) -> None:
    record = tmp_path / "published.json"
    with StandInServer() as server:
        run(server, fitted, tmp_path / "root", record)
        server.restart()
        assert run(server, fitted, tmp_path / "root", record) == "value@1"
        assert len(server.bodies("/v1/guidance/value_models")) == 2


def test_a_version_that_is_not_active_any_more_is_published_again(fitted: Path, tmp_path: Path) -> None:
    record = tmp_path / "published.json"
    with StandInServer() as server:
        run(server, fitted, tmp_path / "root", record)
        server.versions.append({"version": 2, "path": "other"})
        assert run(server, fitted, tmp_path / "root", record) == "value@3"


def test_another_value_model_at_the_same_path_is_published(fitted: Path, tmp_path: Path) -> None:
    record = tmp_path / "published.json"
    with StandInServer() as server:
        run(server, fitted, tmp_path / "root", record)
        shutil.rmtree(fitted)
        fitted.mkdir()
        (fitted / "value_model.json").write_text("{}")
        assert run(server, fitted, tmp_path / "root", record) == "value@2"


def test_the_servers_own_root_is_used_when_none_is_configured(fitted: Path, tmp_path: Path) -> None:
    with StandInServer(tmp_path / "root" / "run") as server:
        run(server, fitted, None, tmp_path / "published.json")
        assert server.bodies("/v1/guidance/value_models")[0]["path"] == "value_models/iteration-001"
    with StandInServer() as server, pytest.raises(ValueError, match="no value-model root: start qtilt-server with"):
        run(server, fitted, None, tmp_path / "published.json")


def test_a_directory_outside_the_root_is_refused_and_says_what_to_do(fitted: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is not below the server's value-model root .*: put run_dir below it"):
        path_below_root(fitted, tmp_path / "elsewhere")


def test_a_refused_load_is_reported_and_not_repeated(fitted: Path, tmp_path: Path) -> None:
    record = tmp_path / "published.json"
    with StandInServer() as server:
        server.before = answer_loads(400, lambda: True)
        with pytest.raises(ServerError, match=r"answered 400: .*no such directory"):
            run(server, fitted, tmp_path / "root", record)
        assert len(server.bodies("/v1/guidance/value_models")) == 1
        assert not record.exists()


def test_a_busy_server_is_asked_again_until_it_has_room(
    fitted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qtilt_trainer.client, "BUSY_SECONDS", 0.05)
    record = tmp_path / "published.json"
    with StandInServer() as server:
        server.before = answer_loads(409, lambda: len(server.bodies("/v1/guidance/value_models")) < 4)
        assert run(server, fitted, tmp_path / "root", record) == "value@1"
        assert len(server.bodies("/v1/guidance/value_models")) == 4
        server.before = answer_loads(409, lambda: True)
        record.unlink()
        with pytest.raises(ServerError, match=r"answered 409: .*no such directory"):
            run(server, fitted, tmp_path / "root", record, wait=0.3)


def answer_loads(status: int, when: Callable[[], bool]) -> Callable[[str, Any], tuple[int, Any] | None]:
    error = {"error": {"message": "no such directory"}}
    return lambda path, body: (status, error) if path == "/v1/guidance/value_models" and when() else None
