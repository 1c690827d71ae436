"""A server that is killed while versions are published, and one that starts again with its registry."""

import os
import shutil
import signal
import subprocess
import threading
from pathlib import Path

import httpx
import pytest

from real_server.models import make_reference, make_value_model
from real_server.process import COMMAND, QUICK_START, RunningServer, running_server


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """reference/; root/ with ``start`` and three iterations."""
    directory = tmp_path_factory.mktemp("restart").resolve()
    make_reference(directory / "reference")
    (directory / "root").mkdir()
    for seed, name in enumerate(("start", "one", "two", "three"), start=1):
        make_value_model(directory / "root" / name, seed=seed)
    return directory


def publish(server: RunningServer, name: str, path: str) -> dict[str, object]:
    answer = server.post("/v1/guidance/value_models", {"name": name, "path": path})
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def active(server: RunningServer) -> dict[str, tuple[int, str, str]]:
    """By name: version, path and digest."""
    return {
        each["name"]: (version["version"], version["path"], version["digest"])
        for each in server.get("/v1/guidance").json()["value_models"]
        for version in each["versions"]
        if version["state"] == "active"
    }


def test_a_server_that_was_killed_comes_back_with_what_was_active(place: Path) -> None:
    flags = (f"--value-model=value={place / 'root' / 'start'}", f"--value-model-registry={place / 'registry.json'}")
    server_of = (place / "reference", place / "root")
    told: list[dict[str, object]] = []
    with running_server(*server_of, place / "first.log", *flags) as server:
        told += [publish(server, "value", "one"), publish(server, "maths", "three")]

        def go_on_publishing() -> None:
            while True:
                try:
                    told.append(publish(server, "value", ("two", "one")[len(told) % 2]))
                except httpx.TransportError:
                    return

        publishing = threading.Thread(target=go_on_publishing)
        publishing.start()
        while len(told) < 6:
            publishing.join(0.01)
        os.killpg(server.session, signal.SIGKILL)
        publishing.join()
    last = [each for each in told if each["name"] == "value"][-1]
    with running_server(*server_of, place / "second.log", *flags) as server:
        came_back = active(server)
        assert came_back["maths"] == (1, "three", told[1]["digest"])
        version, path, _digest = came_back["value"]
        # The last one may have become active without its answer having been read.
        assert version in (last["version"], last["version"] + 1)  # type: ignore[operator]
        assert version != last["version"] or path == last["path"]
        answer = server.post(
            "/v1/completions", {"model": server.model, "prompt": "abc", "max_tokens": 3, "guidance": {}}
        ).json()
        assert answer["guidance"]["value_model"] == f"value@{version}"
        assert publish(server, "value", "two")["version"] == version + 1


def test_a_version_whose_directory_has_changed_ends_the_start_in_one_line(place: Path) -> None:
    """Runs after the one above: ``two`` was active last."""
    shutil.rmtree(place / "root" / "two")
    make_value_model(place / "root" / "two", seed=99)
    flags = (f"--value-model=value={place / 'root' / 'start'}", f"--value-model-registry={place / 'registry.json'}")
    command = [COMMAND, place / "reference", f"--value-model-root={place / 'root'}", *flags, *QUICK_START]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 2
    *_, line = done.stderr.splitlines()
    assert line.startswith("qtilt-server: value@")
    assert "was active, and its directory" in line
