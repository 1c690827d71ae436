"""What the containers rely on, checked without a Docker engine.

The compose files against the Compose specification's schema (check-jsonschema ships it); the paths and commands of the
Dockerfiles; and the commands themselves, run from our wheel installed the way the images install it.
"""

from __future__ import annotations

import json
import os
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
from importlib.metadata import requires
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
COMPOSE: dict[str, Any] = yaml.safe_load((DOCKER / "compose.yaml").read_text())
COMPOSE_FILES = ["compose.yaml", "compose.cpu.yaml", "compose.monitoring.yaml"]
DOCKERFILES = ["Dockerfile.server", "Dockerfile.trainer", "Dockerfile.cpu"]
WITH_KEYS = DOCKER / "with-keys.sh"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def copied(instruction: str) -> list[str]:
    """What a COPY from the build context copies."""
    return [part for part in instruction.split()[:-1] if not part.startswith("--")]


def instructions(dockerfile: str, keyword: str) -> list[str]:
    text = (DOCKER / dockerfile).read_text().replace("\\\n", " ")
    return [line.removeprefix(f"{keyword} ") for line in text.splitlines() if line.startswith(f"{keyword} ")]


def conforms_to_compose_schema(path: Path) -> bool:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(path)]
    return subprocess.run(command, capture_output=True, timeout=60).returncode == 0


@pytest.mark.parametrize("name", COMPOSE_FILES)
def test_compose_file_conforms_to_the_compose_schema(name: str) -> None:
    assert conforms_to_compose_schema(DOCKER / name)


def test_the_schema_check_notices_a_misspelt_key(tmp_path: Path) -> None:
    misspelt = tmp_path / "compose.yaml"
    misspelt.write_text((DOCKER / "compose.yaml").read_text().replace("depends_on:", "depend_on:"))
    assert not conforms_to_compose_schema(misspelt)


def test_every_variable_of_the_compose_file_is_in_the_example_environment() -> None:
    used = {name for file in COMPOSE_FILES for name in re.findall(r"\$\{(\w+)", (DOCKER / file).read_text())}
    explained = set(re.findall(r"^(\w+)=", (DOCKER / ".env.example").read_text(), flags=re.MULTILINE))
    assert used | {"HF_TOKEN"} == explained


@pytest.mark.parametrize("name", COMPOSE_FILES)
def test_compose_builds_from_files_that_exist_and_uses_what_it_declares(name: str) -> None:
    file = DOCKER / name
    compose = yaml.safe_load(file.read_text())
    volumes, secrets = set(), set()
    for service in compose["services"].values():
        if "build" in service:
            context = (file.parent / service["build"]["context"]).resolve()
            assert (context / service["build"]["dockerfile"]).is_file()
        sources = {re.sub(r"\$\{[^}]*\}", "/variable", volume).split(":")[0] for volume in service.get("volumes", [])}
        volumes |= {source for source in sources if not source.startswith(("/", "."))}
        assert all((file.parent / source).is_file() for source in sources if source.startswith("."))
        secrets |= set(service.get("secrets", []))
    assert volumes == set(compose.get("volumes", {}))
    assert secrets == set(compose.get("secrets", {}))
    assert all((file.parent / included).is_file() for included in compose.get("include", []))


def test_no_port_is_open_to_the_network_unless_somebody_says_so() -> None:
    for name in COMPOSE_FILES:
        for service in yaml.safe_load((DOCKER / name).read_text())["services"].values():
            assert all(re.match(r"\$\{\w+:-127\.0\.0\.1:", port) for port in service.get("ports", []))


def test_every_image_is_pinned() -> None:
    """By digest; vLLM's, whose digest nobody here has seen, by its version."""
    images = [image.split(" AS ")[0] for dockerfile in DOCKERFILES for image in instructions(dockerfile, "FROM")]
    monitoring = yaml.safe_load((DOCKER / "compose.monitoring.yaml").read_text())["services"].values()
    images += [service["image"] for service in monitoring]
    for image in images:
        assert re.search(r":v?\d+\.\d+\.\d+[\w.-]*(@sha256:[0-9a-f]{64})$", image) or image.startswith("vllm/"), image


@pytest.mark.parametrize("dockerfile", DOCKERFILES)
def test_an_image_does_not_run_as_root_and_says_whether_it_is_healthy(dockerfile: str) -> None:
    assert instructions(dockerfile, "USER")[-1] == "10001:10001"
    assert "useradd --uid 10001 --user-group --create-home qtilt" in " ".join(instructions(dockerfile, "RUN"))
    (healthcheck,) = instructions(dockerfile, "HEALTHCHECK")
    assert (healthcheck == "NONE") == (dockerfile == "Dockerfile.trainer")


@pytest.mark.parametrize("dockerfile", ["Dockerfile.server", "Dockerfile.trainer"])
def test_what_builds_the_wheel_is_locked(dockerfile: str) -> None:
    """All that the build backend needs is in the lock that the image reads it from, or the image's other one."""
    (names,) = re.findall(r"grep -E '\^\(([^)]*)\)=='", (DOCKER / dockerfile).read_text())
    locked = set(re.findall(r"^([a-z-]+)==", (ROOT / "requirements" / "cuda.txt").read_text(), flags=re.MULTILINE))
    assert set(names.split("|")) <= locked
    installed = set(names.split("|"))
    if dockerfile == "Dockerfile.trainer":
        installed |= set(re.findall(r"^([a-z-]+)==", (ROOT / "requirements" / "trainer.txt").read_text(), re.MULTILINE))
    needed = {Requirement(line).name for line in requires("hatchling") or [] if "python_version" not in line}
    assert {"hatchling", *needed} <= installed


def test_server_reads_the_value_models_where_the_trainer_writes_them() -> None:
    server, trainer = COMPOSE["services"]["server"], COMPOSE["services"]["trainer"]
    assert "value-models:/value-models:ro" in server["volumes"]
    assert "value-models:/value-models" in trainer["volumes"]
    assert "--value-model-root=/value-models" in server["command"]


def test_a_server_that_is_started_again_remembers_what_was_active() -> None:
    server = COMPOSE["services"]["server"]
    assert "--value-model-registry=/home/qtilt/state/registry.json" in server["command"]
    assert "state:/home/qtilt/state" in server["volumes"]
    dockerfile = (ROOT / "docker" / "Dockerfile.server").read_text()
    assert re.search(r"install -d -o qtilt -g qtilt .*/home/qtilt/state\b", dockerfile), "it belongs to the user"


def test_server_command_of_the_compose_file_is_accepted(tmp_path: Path) -> None:
    from qtilt_server.flags import parse_own_flags

    command = [
        argument.replace("/value-models", str(tmp_path)) for argument in COMPOSE["services"]["server"]["command"]
    ]
    flags = parse_own_flags(command)
    assert flags.value_model_root == tmp_path
    assert flags.backbone is not None


def test_the_servers_keys_are_files_and_in_no_environment_of_the_compose_file() -> None:
    server, trainer = COMPOSE["services"]["server"], COMPOSE["services"]["trainer"]
    assert server["environment"] == {
        "QTILT_ADMIN_KEY_FILE": "/run/secrets/admin_key",
        "VLLM_API_KEY_FILE": "/run/secrets/api_key",
    }
    assert trainer["environment"] == {"QTILT_API_KEY_FILE": "/run/secrets/admin_key"}
    assert {"docker/.env", "docker/secrets"} <= set((ROOT / ".dockerignore").read_text().split())


def with_keys(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": os.environ["PATH"], **environment}
    return subprocess.run([WITH_KEYS, *command], capture_output=True, text=True, timeout=30, env=environment)


def test_keys_are_read_from_files(tmp_path: Path) -> None:
    for name in ("admin", "api"):
        (tmp_path / name).write_text(f"key of {name}\n")
    files = {"QTILT_ADMIN_KEY_FILE": str(tmp_path / "admin"), "VLLM_API_KEY_FILE": str(tmp_path / "api")}
    result = with_keys("env", **files, HF_TOKEN="as it is")
    lines = result.stdout.splitlines()
    assert {"QTILT_ADMIN_KEY=key of admin", "VLLM_API_KEY=key of api", "HF_TOKEN=as it is"} <= set(lines)
    assert not any("_FILE=" in line for line in lines)


def test_arguments_and_the_exit_code_are_the_commands_own() -> None:
    result = with_keys("sh", "-c", 'echo "$#: $1"; exit 3', "sh", "two words")
    assert (result.stdout, result.returncode) == ("1: two words\n", 3)


@pytest.mark.parametrize("content", [None, ""])
def test_nothing_starts_without_the_key_that_was_meant(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "admin").write_text(content)
    result = with_keys("echo", "started", QTILT_ADMIN_KEY_FILE=str(tmp_path / "admin"))
    assert result.returncode != 0
    assert "started" not in result.stdout
    assert str(tmp_path / "admin") in result.stderr


@pytest.mark.parametrize("dockerfile", DOCKERFILES)
def test_dockerfile_copies_only_what_the_build_context_holds(dockerfile: str) -> None:
    ignored = (ROOT / ".dockerignore").read_text().split()
    for copy in instructions(dockerfile, "COPY"):
        if copy.startswith("--from="):
            continue
        for source in copied(copy):
            assert (ROOT / source).exists(), f"{dockerfile} copies {source}"
            assert source not in ignored


@pytest.mark.parametrize("dockerfile", DOCKERFILES)
def test_dockerfile_starts_a_command_of_the_project(dockerfile: str) -> None:
    (entry_point,) = instructions(dockerfile, "ENTRYPOINT")
    first, *command = json.loads(entry_point)
    assert f"docker/with-keys.sh /usr/local/bin/{first}" in " ".join(instructions(dockerfile, "COPY"))
    if dockerfile == "Dockerfile.cpu":
        assert command == [".venv/bin/python", "examples/demo/serve.py", "--host=0.0.0.0"]
    else:
        assert command[0] in PROJECT["scripts"]


def test_server_image_has_the_vllm_that_is_locked() -> None:
    (version,) = re.findall(r"^vllm==(\S+)", (ROOT / "requirements" / "cuda.txt").read_text(), flags=re.MULTILINE)
    assert f"vllm/vllm-openai:v{version}" in instructions("Dockerfile.server", "FROM")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that nothing but the files the Dockerfiles copy can end up in it."""
    source = tmp_path_factory.mktemp("source")
    for copy in instructions("Dockerfile.server", "COPY"):
        for name in [] if copy.startswith("--from=") else copied(copy):
            if name.startswith(("docker/", "requirements/")):
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
        self.send_response(self.status if self.path in ("/health", "/v1/guidance/ready") else 404)
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


@pytest.mark.parametrize("dockerfile", ["Dockerfile.server", "Dockerfile.cpu"])
@pytest.mark.parametrize(("status", "healthy"), [(200, True), (503, False)])
def test_healthcheck_follows_the_health_route(
    health_port: int, monkeypatch: pytest.MonkeyPatch, status: int, healthy: bool, dockerfile: str
) -> None:
    monkeypatch.setattr(HealthHandler, "status", status)
    (instruction,) = instructions(dockerfile, "HEALTHCHECK")
    _python, *arguments = json.loads(instruction.partition(" CMD ")[2])
    command = [sys.executable, *(argument.replace(":8000/", f":{health_port}/") for argument in arguments)]
    assert (subprocess.run(command, capture_output=True, timeout=30).returncode == 0) == healthy
