"""The locks are complete: what is pinned needs nothing that isn't, on any Python from 3.11 on."""

from __future__ import annotations

import re
import tomllib
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.markers import Environment, default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# Left out of the CPU lock on purpose: the Makefile installs torch itself, and the other three break the CPU build.
NOT_IN_CPU_LOCK = {"torch", "torchvision", "torchaudio", "torchcodec"}


def locked_versions(name: str) -> dict[str, str]:
    pins = re.findall(r"^([\w.\-]+)==(\S+)$", (ROOT / "requirements" / name).read_text(), flags=re.MULTILINE)
    return {canonicalize_name(package): version for package, version in pins}


def environment(python: str) -> Environment:
    target = default_environment()
    target.update(python_version=python, python_full_version=f"{python}.0", sys_platform="linux")
    return target


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13", "3.14"])
def test_cpu_lock_is_closed_under_dependencies(python: str) -> None:
    locked = locked_versions("cpu.txt")
    missing = []
    for package in locked:
        for line in distribution(package).requires or []:
            requirement = Requirement(line)
            name = canonicalize_name(requirement.name)
            if requirement.marker and not requirement.marker.evaluate({**environment(python), "extra": ""}):
                continue
            if name in NOT_IN_CPU_LOCK:
                continue
            if name not in locked or not requirement.specifier.contains(locked[name], prereleases=True):
                missing.append(f"{package} needs {line}, locked: {locked.get(name)}")
    assert not missing


@pytest.mark.parametrize(
    ("lock", "extras"),
    [("cpu.txt", ["cpu", "demo", "dev"]), ("cuda.txt", ["cuda", "demo", "dev"]), ("trainer.txt", [])],
)
def test_lock_fulfils_the_project_file(lock: str, extras: list[str]) -> None:
    locked = locked_versions(lock)
    lines = [*PROJECT["dependencies"], *(line for extra in extras for line in PROJECT["optional-dependencies"][extra])]
    for requirement in map(Requirement, lines):
        name = canonicalize_name(requirement.name)
        if lock == "cpu.txt" and name in NOT_IN_CPU_LOCK:
            continue
        assert name in locked, f"{lock} lacks {name}: run make lock"
        assert requirement.specifier.contains(locked[name]), f"{lock} pins {name} {locked[name]}, asked: {requirement}"


BESIDE_CPU = pytest.mark.parametrize(("lock", "extra"), [("tasks.txt", "reasoning-gym"), ("clients.txt", "clients")])


@BESIDE_CPU
def test_a_lock_beside_the_cpu_lock_fulfils_the_project_file_and_adds_nothing_that_is_there(
    lock: str, extra: str
) -> None:
    locked, beside = locked_versions(lock), locked_versions("cpu.txt")
    assert not locked.keys() & beside.keys()
    for requirement in map(Requirement, PROJECT["optional-dependencies"][extra]):
        assert requirement.specifier.contains(locked[canonicalize_name(requirement.name)])


def test_the_lock_of_the_docs_fulfils_the_project_file() -> None:
    locked = locked_versions("docs.txt")
    for requirement in map(Requirement, PROJECT["optional-dependencies"]["docs"]):
        assert requirement.specifier.contains(locked[canonicalize_name(requirement.name)])


def test_locks_beside_the_cpu_lock_agree() -> None:
    tasks, clients = locked_versions("tasks.txt"), locked_versions("clients.txt")
    assert {name for name in tasks.keys() & clients.keys() if tasks[name] != clients[name]} == set()


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13", "3.14"])
@pytest.mark.parametrize("lock", ["tasks.txt", "clients.txt"])
def test_the_cpu_lock_and_one_beside_it_are_closed_together(python: str, lock: str) -> None:
    locked = {**locked_versions("cpu.txt"), **locked_versions(lock)}
    for package in locked_versions(lock):
        for requirement in map(Requirement, distribution(package).requires or []):
            if requirement.marker and not requirement.marker.evaluate({**environment(python), "extra": ""}):
                continue
            version = locked.get(canonicalize_name(requirement.name))
            assert version is not None, f"{package} needs {requirement}"
            assert requirement.specifier.contains(version, prereleases=True), f"{package}: {requirement}"


def test_server_and_trainer_images_agree_on_every_shared_version() -> None:
    cuda, trainer = locked_versions("cuda.txt"), locked_versions("trainer.txt")
    assert {name: cuda.get(name) for name in trainer} == trainer


def test_value_models_meet_the_same_transformers_on_cpu_and_gpu() -> None:
    assert locked_versions("cpu.txt")["transformers"] == locked_versions("cuda.txt")["transformers"]
