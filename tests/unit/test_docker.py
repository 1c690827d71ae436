"""What the containers rely on, checked without a Docker engine.

The compose file against the Compose specification's schema (check-jsonschema ships it); the paths and commands of the
Dockerfiles; and the commands themselves, run from our wheel installed the way the images install it.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import sysconfig
import threading
import tomllib
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
COMPOSE: dict[str, Any] = yaml.safe_load((DOCKER / "compose.yaml").read_text())
DOCKERFILES = ["Dockerfile.server", "Dockerfile.trainer"]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def instructions(dockerfile: str, keyword: str) -> list[str]:
    text = (DOCKER / dockerfile).read_text().replace("\\\n", " ")
    return [line.removeprefix(f"{keyword} ") for line in text.splitlines() if line.startswith(f"{keyword} ")]


def conforms_to_compose_schema(path: Path) -> bool:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(path)]
    return subprocess.run(command, capture_output=True, timeout=60).returncode == 0


def test_compose_file_conforms_to_the_compose_schema() -> None:
    assert conforms_to_compose_schema(DOCKER / "compose.yaml")


def test_the_schema_check_notices_a_misspelt_key(tmp_path: Path) -> None:
    misspelt = tmp_path / "compose.yaml"
    misspelt.write_text((DOCKER / "compose.yaml").read_text().replace("healthcheck:", "health_check:"))
    assert not conforms_to_compose_schema(misspelt)


def test_every_variable_of_the_compose_file_is_in_the_example_environment() -> None:
    used = set(re.findall(r"\$\{(\w+)", (DOCKER / "compose.yaml").read_text()))
    explained = set(re.findall(r"^(\w+)=", (DOCKER / ".env.example").read_text(), flags=re.MULTILINE))
    assert used | {"HF_TOKEN"} == explained


def test_compose_builds_from_files_that_exist_and_uses_the_volumes_it_declares() -> None:
    declared = set(COMPOSE["volumes"])
    for service in COMPOSE["services"].values():
        context = (DOCKER / service["build"]["context"]).resolve()
        assert (context / service["build"]["dockerfile"]).is_file()
        sources = {re.sub(r"\$\{[^}]*\}", "/variable", volume).split(":")[0] for volume in service["volumes"]}
        named = {source for source in sources if not source.startswith(("/", "."))}
        assert named == declared


def test_server_reads_the_value_models_where_the_trainer_writes_them() -> None:
    server, trainer = COMPOSE["services"]["server"], COMPOSE["services"]["trainer"]
    assert "value-models:/value-models:ro" in server["volumes"]
    assert "value-models:/value-models" in trainer["volumes"]
    assert "--value-model-root=/value-models" in server["command"]


def test_server_command_of_the_compose_file_is_accepted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from qtilt_server.flags import parse_own_flags

    command = [
        argument.replace("/value-models", str(tmp_path)) for argument in COMPOSE["services"]["server"]["command"]
    ]
    assert parse_own_flags(command).value_model_root == tmp_path


@pytest.mark.parametrize("dockerfile", DOCKERFILES)
def test_dockerfile_copies_only_what_the_build_context_holds(dockerfile: str) -> None:
    ignored = (ROOT / ".dockerignore").read_text().split()
    for copy in instructions(dockerfile, "COPY"):
        if copy.startswith("--from="):
            continue
        for source in copy.split()[:-1]:
            assert (ROOT / source).exists(), f"{dockerfile} copies {source}"
            assert source not in ignored


@pytest.mark.parametrize("dockerfile", DOCKERFILES)
def test_dockerfile_starts_a_command_of_the_project(dockerfile: str) -> None:
    (entry_point,) = instructions(dockerfile, "ENTRYPOINT")
    assert json.loads(entry_point)[0] in PROJECT["scripts"]


def test_server_image_has_the_vllm_that_is_locked() -> None:
    (version,) = re.findall(r"^vllm==(\S+)", (ROOT / "requirements" / "cuda.txt").read_text(), flags=re.MULTILINE)
    assert f"vllm/vllm-openai:v{version}" in instructions("Dockerfile.server", "FROM")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that nothing but the files the Dockerfiles copy can end up in it."""
    source = tmp_path_factory.mktemp("source")
    for copy in instructions("Dockerfile.server", "COPY"):
        for name in copy.split()[:-1]:
            if copy.startswith("--from="):
                continue
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(source / "dist")]
    subprocess.run(command, cwd=source, check=True, capture_output=True, timeout=120)
    (built,) = (source / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def image_bin(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Commands of an environment like the images': our wheel without its dependencies, above the installed ones."""
    environment = tmp_path_factory.mktemp("image") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True, timeout=60)
    (site_packages,) = environment.glob("lib/python*/site-packages")
    # A plain path line: the .pth files in that folder, our editable installation among them, are not read.
    (site_packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    python = environment / "bin" / "python"
    command = [
        sys.executable,
        "-m",
        "uv",
        "pip",
        "install",
        "--offline",
        "--no-deps",
        "--python",
        str(python),
        str(wheel),
    ]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    return environment / "bin"


def test_wheel_holds_the_files_of_the_three_packages_and_nothing_else(wheel: Path) -> None:
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    folders = [ROOT / "guidance", ROOT / "server", ROOT / "trainer"]
    files = {(folder, path) for folder in folders for path in folder.rglob("*") if path.is_file()}
    assert packed == {path.relative_to(folder).as_posix() for folder, path in files if path.suffix != ".pyc"}


def test_packages_come_from_the_wheel(image_bin: Path) -> None:
    code = "import qtilt, qtilt_server, qtilt_trainer as t; print(qtilt.__file__, qtilt_server.__file__, t.__file__)"
    result = subprocess.run([image_bin / "python", "-c", code], capture_output=True, text=True, timeout=60, cwd="/")
    assert all(path.startswith(str(image_bin.parent)) for path in result.stdout.split()), result.stderr


@pytest.mark.parametrize("command", ["qtilt-server", "qtilt-trainer"])
def test_image_command_shows_its_help(image_bin: Path, command: str) -> None:
    result = subprocess.run([image_bin / command, "--help"], capture_output=True, text=True, timeout=120, cwd="/")
    assert result.returncode == 0, result.stderr
    assert command in result.stdout


class HealthHandler(BaseHTTPRequestHandler):
    status = 200

    def do_GET(self) -> None:
        self.send_response(self.status if self.path == "/health" else 404)
        self.end_headers()

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def health_port() -> Iterator[int]:
    server = HTTPServer(("127.0.0.1", 0), HealthHandler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server.server_port
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.parametrize(("status", "healthy"), [(200, True), (503, False)])
def test_healthcheck_follows_the_health_route(
    health_port: int, monkeypatch: pytest.MonkeyPatch, status: int, healthy: bool
) -> None:
    monkeypatch.setattr(HealthHandler, "status", status)
    kind, _python, *arguments = COMPOSE["services"]["server"]["healthcheck"]["test"]
    assert kind == "CMD"
    command = [sys.executable, *(argument.replace(":8000/", f":{health_port}/") for argument in arguments)]
    assert (subprocess.run(command, capture_output=True, timeout=30).returncode == 0) == healthy
