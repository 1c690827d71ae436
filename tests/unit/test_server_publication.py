"""Where a published directory may lie, and what stays as it was when a publication fails half way."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from qtilt.checkpoint import fingerprint_tokenizer
from qtilt.vllm_plugin.compatibility import Reference
from qtilt_server.errors import ConflictError, GuidanceRequestError, SwapTimeoutError
from qtilt_server.publication import Publisher, directory_below
from qtilt_server.registry import ValueModelRegistry
from qtilt_server.schema import PublishRequest
from qtilt_server.worker import GuidanceWorker
from real_server.models import VOCAB, make_tokenizer, make_value_model


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "root" / "inside" / "model").mkdir(parents=True)
    (tmp_path / "outside" / "model").mkdir(parents=True)
    (tmp_path / "root" / "file").touch()
    (tmp_path / "root" / "leaves").symlink_to(tmp_path / "outside" / "model")
    (tmp_path / "root" / "stays").symlink_to(tmp_path / "root" / "inside" / "model")
    (tmp_path / "root" / "mixed").mkdir()
    (tmp_path / "root" / "mixed" / "weights").symlink_to(tmp_path / "outside" / "model")
    (tmp_path / "root" / "looping").mkdir()
    (tmp_path / "root" / "looping" / "weights").symlink_to(tmp_path / "root" / "looping" / "weights")
    (tmp_path / "root-sibling").mkdir()
    (tmp_path / "root" / "loop").symlink_to(tmp_path / "root" / "loop")
    return tmp_path / "root"


def test_a_directory_below_the_root_is_found_links_resolved(root: Path) -> None:
    assert directory_below(root, "inside/model") == root / "inside" / "model"
    assert directory_below(root, "stays") == root / "inside" / "model"


OUTSIDE = [
    "../outside/model",
    "../root/inside/model",
    "inside/../../outside/model",
    "/tmp",
    "../root-sibling",
    "leaves",
]


@pytest.mark.parametrize("path", OUTSIDE)
def test_a_directory_outside_the_root_is_refused(root: Path, path: str) -> None:
    with pytest.raises(GuidanceRequestError, match="relative to the value-model root and stay below it"):
        directory_below(root, path)


def test_a_file_that_is_a_link_to_outside_is_refused(root: Path) -> None:
    with pytest.raises(GuidanceRequestError, match="mixed/weights is a link to a place outside"):
        directory_below(root, "mixed")
    with pytest.raises(GuidanceRequestError, match="looping/weights is a link to a place outside"):
        directory_below(root, "looping")


@pytest.mark.parametrize("path", ["nothing", "file", "a\0b", "x" * 5000, "loop"])
def test_what_is_no_directory_is_refused(root: Path, path: str) -> None:
    with pytest.raises(GuidanceRequestError):
        directory_below(root, path)


def test_without_a_root_nothing_is_loaded() -> None:
    with pytest.raises(GuidanceRequestError, match="--value-model-root"):
        directory_below(None, "model")


class ScriptedEngine:
    """The engine's side of the calls: fails where told to, and remembers what is resident."""

    errored = False

    def __init__(self, fail_at: str | None = None, running_rows: int = 0) -> None:
        self.fail_at = fail_at
        """Part of ``method name@version``."""
        self.running_rows = running_rows
        self.prepared: set[tuple[str, int]] = set()
        self.resident: set[tuple[str, int]] = set()

    async def collective_rpc(self, method: str, *, args: tuple[Any, ...] = ()) -> list[Any]:
        call = f"{method} {args[0]}@{args[1]}"
        if self.fail_at is not None and self.fail_at in call:
            raise RuntimeError(f"{method} failed")
        return [getattr(self, method)(*args)]

    def qtilt_prepare_value_model(self, name: str, version: int, path: str) -> None:
        self.prepared.add((name, version))

    def qtilt_prepare_status(self, name: str, version: int) -> dict[str, Any]:
        return {"state": "ready", "error": None}

    def qtilt_commit_value_model(self, name: str, version: int) -> None:
        self.prepared.remove((name, version))
        self.resident.add((name, version))

    def qtilt_discard_value_model(self, name: str, version: int) -> None:
        if (name, version) in self.prepared:
            self.prepared.remove((name, version))
        elif self.running_rows:
            self.running_rows -= 1
            raise ValueError("it guides running requests")
        else:
            self.resident.remove((name, version))


class Told:
    """In place of the metrics: what they were told."""

    def __init__(self) -> None:
        self.loads: list[str] = []
        self.activations: list[tuple[str, int, str | None]] = []
        self.unloads: list[tuple[str, int]] = []

    def load(self, outcome: str) -> None:
        self.loads.append(outcome)

    def active(self, value_model: str, version: int, cause: str | None = None) -> None:
        self.activations.append((value_model, version, cause))

    def unloaded(self, value_model: str, version: int) -> None:
        self.unloads.append((value_model, version))

    def gone(self, value_model: str) -> None: ...


def publisher(root: Path, engine: ScriptedEngine, registry: ValueModelRegistry, told: Told | None = None) -> Publisher:
    reference = Reference(fingerprint_tokenizer(make_tokenizer()), VOCAB, max_model_len=64)
    metrics: Any = Told() if told is None else told
    return Publisher(registry, GuidanceWorker(engine), reference, metrics, root, swap_timeout=0.2)


PUBLISH = PublishRequest(name="value", path="model")


def labels(registry: ValueModelRegistry) -> list[str]:
    return [version.label for version in registry]


@pytest.fixture
def model_root(tmp_path: Path) -> Path:
    make_value_model(tmp_path / "model", seed=0)
    return tmp_path.resolve()


def test_versions_follow_each_other_and_two_stay_resident(model_root: Path) -> None:
    async def publish() -> None:
        engine, registry = ScriptedEngine(running_rows=2), ValueModelRegistry()
        publish = publisher(model_root, engine, registry).publish
        versions = [published.version for published in await asyncio.gather(*(publish(PUBLISH) for _ in range(4)))]
        assert versions == [1, 2, 3, 4]
        assert labels(registry) == ["value@3", "value@4"]
        assert engine.resident == {("value", 3), ("value", 4)}
        assert not engine.prepared

    asyncio.run(publish())


@pytest.mark.parametrize("step", ["prepare_value_model", "prepare_status", "commit"])
def test_a_failure_at_any_step_leaves_what_is_served(model_root: Path, step: str) -> None:
    async def publish() -> None:
        engine, registry, told = ScriptedEngine(), ValueModelRegistry(), Told()
        publish = publisher(model_root, engine, registry, told).publish
        await publish(PUBLISH)
        engine.fail_at = step
        with pytest.raises(Exception, match="failed"):
            await publish(PUBLISH)
        assert (labels(registry), engine.resident, engine.prepared) == (["value@1"], {("value", 1)}, set())
        engine.fail_at = None
        assert (await publish(PUBLISH)).version == 2
        assert told.loads == ["loaded", "failed" if step == "commit" else "refused", "loaded"]

    asyncio.run(publish())


@pytest.mark.parametrize("step", ["prepare_value_model", "commit", "discard_value_model value@1"])
def test_a_failure_at_any_step_leaves_the_older_version_too(model_root: Path, step: str) -> None:
    async def publish() -> None:
        engine, registry = ScriptedEngine(), ValueModelRegistry()
        publish = publisher(model_root, engine, registry).publish
        await publish(PUBLISH)
        await publish(PUBLISH)
        engine.fail_at = step
        with pytest.raises(Exception, match="failed"):
            await publish(PUBLISH)
        engine.fail_at = None
        assert labels(registry) == ["value@1", "value@2"]
        assert (engine.resident, engine.prepared) == ({("value", 1), ("value", 2)}, set())
        registry.lease("value@1").release()
        assert (await publish(PUBLISH)).version == 3

    asyncio.run(publish())


def test_after_a_roll_back_the_version_that_was_rolled_back_makes_room(model_root: Path) -> None:
    async def publish() -> None:
        engine, registry, told = ScriptedEngine(), ValueModelRegistry(), Told()
        publisher_ = publisher(model_root, engine, registry, told)
        await publisher_.publish(PUBLISH)
        await publisher_.publish(PUBLISH)
        await publisher_.activate("value", 1)
        assert registry.lease("value").version.label == "value@1"
        registry.lease("value").release()
        lease = registry.lease("value")
        assert (await publisher_.publish(PUBLISH)).version == 3
        assert labels(registry) == ["value@1", "value@3"]
        assert engine.resident == {("value", 1), ("value", 3)}
        assert registry.lease("value").version.label == "value@3"
        lease.release()
        assert told.activations == [
            ("value", 1, "publication"),
            ("value", 2, "publication"),
            ("value", 1, "rollback"),
            ("value", 3, "publication"),
        ]
        assert told.unloads == [("value", 2)]

    asyncio.run(publish())


@pytest.mark.parametrize("fails", [False, True])
def test_a_version_is_unloaded_when_nothing_uses_it(model_root: Path, fails: bool) -> None:
    async def unload() -> None:
        engine, registry = ScriptedEngine(), ValueModelRegistry()
        publisher_ = publisher(model_root, engine, registry)
        await publisher_.publish(PUBLISH)
        await publisher_.publish(PUBLISH)
        with pytest.raises(ConflictError, match=r"value@2 is active: activate the other"):
            await publisher_.unload("value", 2)
        lease = registry.lease("value@1")
        with pytest.raises(SwapTimeoutError, match=r"value@1 still guides 1"):
            await publisher_.unload("value", 1)
        lease.release()
        engine.fail_at = "discard" if fails else None
        if fails:
            with pytest.raises(SwapTimeoutError, match="could not be unloaded"):
                await publisher_.unload("value", 1)
            registry.lease("value@1").release()
            assert labels(registry) == ["value@1", "value@2"]
            return
        await publisher_.unload("value", 1)
        assert (labels(registry), engine.resident) == (["value@2"], {("value", 2)})
        await publisher_.unload("value", 2)
        assert (labels(registry), engine.resident) == ([], set())
        assert (await publisher_.publish(PUBLISH)).version == 3

    asyncio.run(unload())


def test_a_version_in_use_outlasts_the_timeout_and_is_served_again(model_root: Path) -> None:
    async def publish() -> None:
        engine, registry = ScriptedEngine(), ValueModelRegistry()
        publish = publisher(model_root, engine, registry).publish
        await publish(PUBLISH)
        await publish(PUBLISH)
        lease = registry.lease("value@1")
        with pytest.raises(SwapTimeoutError, match=r"value@1 still guides 1 running request.*try again later"):
            await publish(PUBLISH)
        assert labels(registry) == ["value@1", "value@2"]
        assert not engine.prepared
        registry.lease("value@1").release()
        lease.release()
        assert (await publish(PUBLISH)).version == 3

    asyncio.run(publish())
