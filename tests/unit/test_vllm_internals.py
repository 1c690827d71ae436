"""What we use of vLLM is listed, and the list holds for every version that we allow, run or only read."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from qtilt.vllm_plugin import vllm_internals
from qtilt.vllm_plugin.vllm_internals import (
    SERVER,
    SUPPORTED,
    WORKER,
    Internal,
    MissingInternalsError,
    missing,
    require_internals,
)
from qtilt.vllm_plugin.vllm_sources import VllmSources
from qtilt_server.cli import main

ROOT = Path(__file__).parents[2]
ALL = (*WORKER, *SERVER)
PACKAGES = (ROOT / "guidance" / "qtilt", ROOT / "server" / "qtilt_server")
CONFIGS = {
    *("vllm_config", "model_config", "cache_config", "parallel_config", "scheduler_config", "device_config"),
    *("speculative_config", "lora_config"),
}


def installed() -> Path:
    spec = importlib.util.find_spec("vllm")
    assert spec is not None and spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0])


def product() -> Iterator[tuple[Path, ast.AST]]:
    for package in PACKAGES:
        for file in package.rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                yield file, node


def test_the_installed_vllm_has_what_is_listed() -> None:
    sources = VllmSources(installed())
    assert SpecifierSet(SUPPORTED).contains(sources.version)
    assert list(missing(sources, ALL)) == []
    require_internals(ALL)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_newest_vllm_that_is_allowed_has_what_is_listed(tmp_path: Path) -> None:
    """It needs a torch that this environment hasn't got, so it is read and not imported."""
    platforms = [f"--platform=manylinux_{version}_x86_64" for version in ("2_35", "2_31", "2_28")]
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", f"--dest={tmp_path}"]
    result = subprocess.run(
        [*command, *platforms, "--python-version=3.11", f"vllm{SUPPORTED}"], capture_output=True, text=True
    )
    if result.returncode != 0:
        pytest.skip(f"vLLM can't be had here: {result.stderr.strip().splitlines()[-1]}")
    (wheel,) = tmp_path.glob("vllm-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path, [name for name in archive.namelist() if name.endswith(".py")])
    sources = VllmSources(tmp_path / "vllm")
    assert SpecifierSet(SUPPORTED).contains(sources.version)
    assert not SpecifierSet("<0.33").contains(sources.version)
    assert list(missing(sources, ALL)) == []


def test_what_is_imported_of_vllm_is_listed() -> None:
    sources = VllmSources(installed())
    names = [(each.module, name) for each in ALL for name in [*each.names, *each.calls, *each.overrides]]
    listed = {sources.find(module, re.split(r"[.(]", name)[0]) for module, name in names}
    modules = {each.module for each in ALL}
    imported = {
        (node.module, alias.name)
        for _, node in product()
        if isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] == "vllm"
        for alias in node.names
    }
    assert len(imported) > 30
    assert None not in listed
    assert not [
        f"{module}.{name}"
        for module, name in imported
        if f"{module}.{name}" not in modules and sources.find(module, name) not in listed
    ]


def test_nothing_imports_a_module_of_vllm_as_a_whole() -> None:
    """What is used of it wouldn't be told by the import."""
    assert not [
        file.name
        for file, node in product()
        if isinstance(node, ast.Import) and any(alias.name.partition(".")[0] == "vllm" for alias in node.names)
    ]


def test_what_is_read_of_configurations_is_listed() -> None:
    (internal,) = [each for each in ALL if each.module == "vllm.config"]
    known = {name.partition(".")[2] for name in internal.names}
    read = {
        node.attr
        for _, node in product()
        if isinstance(node, ast.Attribute)
        and (node.value.attr if isinstance(node.value, ast.Attribute) else getattr(node.value, "id", "")) in CONFIGS
    }
    assert len(read) > 20
    assert read <= known


def test_what_is_allowed_is_what_was_read() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    cuda = {one.name: one for one in map(Requirement, project["optional-dependencies"]["cuda"])}
    assert cuda["vllm"].specifier == SpecifierSet(SUPPORTED)


TREE = {
    "_version.py": "__version__ = version = '9.9'",
    "__init__.py": "",
    "a/__init__.py": "from .b import *\nfrom vllm.a.c import Other as Renamed",
    "a/b.py": """
if True:
    class Base:
        field: int

        def __init__(self, size):
            self.kept = self.twice = size
            other.lost = size

        def called(self, first, second=2, *, third, fourth=4): ...

class Heir(Base):
    KIND = 1
""",
    "a/c.py": "def make(app):\n    app.state = 1\nclass Other:\n    def run(self, /, given, **rest): ...",
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name, text in TREE.items():
        file = tmp_path / "vllm" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return tmp_path / "vllm"


def lacks(root: Path, module: str = "vllm.a", **used: object) -> list[str]:
    return list(missing(VllmSources(root), [Internal(module, "why", **used)]))  # type: ignore[arg-type]


def test_names_are_found_where_they_are_imported_from_inherited_and_assigned(root: Path) -> None:
    assert not lacks(root, has={"Base": "field kept twice called", "Heir": "KIND kept field", "Renamed": "run"})
    assert not lacks(root, "vllm.a.c", has={"make": "state", "Other": ""})
    assert VllmSources(root).version == "9.9"


@pytest.mark.parametrize("name", ["Nobody", "Base.lost", "Heir.kind", "Other", "Renamed.given", "make"])
def test_a_name_that_is_not_there_is_missing(root: Path, name: str) -> None:
    owner, _, attribute = name.partition(".")
    assert lacks(root, has={owner: attribute}) == [f"vllm.a has no {name} (why)"]
    assert lacks(root, "vllm.gone", has={owner: attribute}) == [f"vllm.gone has no {name} (why)"]


@pytest.mark.parametrize(
    ("call", "fits"),
    [
        ("Base.called(self, first, *, third)", True),
        ("Heir.called(self, first, second, *, third, fourth)", True),
        ("Base.called(self, *, first, second, third)", True),
        ("Base.called(self, first)", False),
        ("Base.called(self, *, third)", False),
        ("Base.called(self, second, first, *, third)", False),
        ("Base.called(self, first, *, third, fifth)", False),
        ("Base.called(self, first, second, third)", False),
        ("Base(self, size)", True),
        ("Base(self)", False),
        ("Renamed.run(self, given, *, anything)", True),
        ("Renamed.gone(self)", False),
    ],
)
def test_a_call_fits_what_takes_it_and_needs_no_more(root: Path, call: str, fits: bool) -> None:
    assert (lacks(root, calls=(call,)) == []) == fits


@pytest.mark.parametrize(
    ("method", "fits"),
    [
        ("Base.called(self, first, second, *, third, fourth)", True),
        ("Base.called(self, first, second, *, third)", False),
        ("Base.called(self, first, second, *, fourth, third)", False),
        ("Base.called(self, second, first, *, third, fourth)", False),
        ("Renamed.run(self, given)", False),
    ],
)
def test_what_vllm_calls_has_exactly_its_parameters(root: Path, method: str, fits: bool) -> None:
    assert (lacks(root, overrides=(method,)) == []) == fits


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("v1/worker/gpu/buffer_utils.py", "_staged_write_contents", "_staged_contents"),
        ("v1/worker/gpu/sample/logits_processor/interface.py", "req_idx: int,", "req_idx: int, prompt: int,"),
        ("v1/worker/gpu/sample/logits_processor/interface.py", "seq_lens_upper_bound_np", "seq_lens_np"),
        ("v1/worker/gpu_model_runner.py", "def _sample(", "def _sample_tokens("),
        ("v1/sample/logits_processor/interface.py", 'batch_update: "BatchUpdate | None",', ""),
        ("entrypoints/launchers/api_server/entry.py", "serve_http, ", ""),
        ("entrypoints/serve/engine/serving.py", "self.models = models", "self.registry = models"),
        ("v1/engine/async_llm.py", "request_id: str,\n        *,", "request_id: str,\n        user: str,\n        *,"),
    ],
)
def test_a_change_of_vllms_sources_is_noticed(tmp_path: Path, file: str, old: str, new: str) -> None:
    """Each a change that a new version may bring."""
    text = (installed() / file).read_text()
    assert old in text
    changed = tmp_path / file
    changed.parent.mkdir(parents=True)
    changed.write_text(text.replace(old, new))

    class Changed(VllmSources):
        def _file(self, module: str) -> Path | None:
            found = super()._file(module)
            return changed if found == installed() / file else found

    assert list(missing(Changed(installed()), ALL))


@pytest.fixture
def another_vllm(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = ModuleSpec("vllm", None, is_package=True)
    spec.submodule_search_locations = [str(root)]
    monkeypatch.setattr(vllm_internals.importlib.util, "find_spec", lambda name: spec)


def test_all_that_is_missing_is_one_error(another_vllm: None) -> None:
    used = [Internal("vllm.a", "for this", has={"Gone": ""}), Internal("vllm.a.c", "for that", calls=("make()",))]
    with pytest.raises(MissingInternalsError) as raised:
        require_internals(used)
    assert str(raised.value) == (
        f"this is vLLM 9.9, and guidance is made for {SUPPORTED}: vllm.a has no Gone (for this); "
        "vllm.a.c has make with other parameters than make() (for that)"
    )


def test_the_server_does_not_start_on_a_vllm_that_lacks_something(
    another_vllm: None, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["any-model"])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"qtilt-server: this is vLLM 9.9, and guidance is made for {SUPPORTED}: vllm.")
    assert "GPUModelRunner._sample" in line and "serve_http" in line


def test_without_vllm_the_server_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_internals.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingInternalsError, match="vLLM isn't installed"):
        require_internals(ALL)
