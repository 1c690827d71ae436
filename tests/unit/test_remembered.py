"""What was published outlives the server: written whole or not at all, and given up for what the command line says."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from qtilt.model.digest import content_digest
from qtilt_server.errors import StartupError
from qtilt_server.flags import GuidanceFlags
from qtilt_server.registry import ResidentVersion, ValueModelRegistry
from qtilt_server.remembered import RegistryFile, Restored, check_unchanged, come_back, read


def resident(name: str, version: int, path: str) -> ResidentVersion:
    return ResidentVersion(name, version, path, "v", {}, 10, digest=f"sha256:{path}")


class Place:
    """A root with directories, and a server's flags there."""

    def __init__(self, directory: Path) -> None:
        self.root = directory / "root"
        for name in ("start", "other", "one", "two"):
            (self.root / name).mkdir(parents=True)
        self.file = directory / "registry.json"

    def flags(self, *names: str, **more: object) -> GuidanceFlags:
        """names: NAME=DIR as on the command line."""
        value_models = {name.partition("=")[0]: self.root / name.partition("=")[2] for name in names}
        return GuidanceFlags(
            value_models=value_models,
            value_model_root=self.root,
            registry=self.file,
            **more,  # type: ignore[arg-type]
        )

    def publish(self, *versions: ResidentVersion, started: GuidanceFlags) -> None:
        """By a server that began with these flags."""
        registry = ValueModelRegistry()
        for name, path in started.value_models.items():
            registry.restore(resident(name, 1, str(path.relative_to(self.root))), 1)
        file = RegistryFile(self.file, started.value_models)
        for version in versions:
            if (older := registry.in_the_way(version.name)) is not None:
                registry.remove(older)
            registry.activate(version)
            file.write(registry)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def test_without_a_file_nothing_changes(place: Place) -> None:
    flags = place.flags("value=start", backbone=None)
    assert come_back(flags) == flags
    assert come_back(replace(flags, registry=None)) == replace(flags, registry=None)


def test_a_server_comes_back_with_what_was_active(place: Place) -> None:
    flags = place.flags("value=start")
    place.publish(
        *(resident("value", 2, "one"), resident("value", 3, "two"), resident("maths", 1, "other")), started=flags
    )
    again = come_back(flags)
    assert again.value_models == {"value": place.root / "two", "maths": place.root / "other"}
    assert again.restored == {
        "value": Restored(3, 3, "sha256:two"),
        "maths": Restored(1, 1, "sha256:other"),
    }
    assert [each.path for each in read(place.file).names["value"].history] == ["one", "two"]


def test_after_a_roll_back_it_is_the_older_one_and_numbers_go_on(place: Place) -> None:
    flags = place.flags("value=start")
    place.publish(resident("value", 2, "one"), started=flags)
    registry = ValueModelRegistry()
    for version in (resident("value", 1, "start"), resident("value", 2, "one")):
        registry.activate(version)
    registry.activate(registry.resident("value", 1))
    RegistryFile(place.file, flags.value_models).write(registry)
    again = come_back(flags)
    assert again.restored["value"] == Restored(1, 2, "sha256:start")
    restarted = ValueModelRegistry()
    restarted.restore(resident("value", 1, "start"), again.restored["value"].newest)
    assert restarted.next_version("value") == 3


@pytest.mark.parametrize("now", [("value=other",), (), ("value=other", "maths=two")])
def test_what_the_command_line_has_changed_or_dropped_isnt_remembered(place: Place, now: tuple[str, ...]) -> None:
    place.publish(resident("value", 2, "one"), resident("news", 1, "two"), started=place.flags("value=start"))
    flags = place.flags(*now)
    again = come_back(flags)
    assert again.restored == {"news": Restored(1, 1, "sha256:two")}
    assert again.value_models == {**flags.value_models, "news": place.root / "two"}


def test_a_backbone_for_what_is_to_come_isnt_needed_any_more(place: Place) -> None:
    flags = place.flags(backbone="meta-llama/Llama-3.2-1B", backbone_layers=4)
    assert come_back(flags).backbone == "meta-llama/Llama-3.2-1B"
    place.publish(resident("value", 1, "one"), started=flags)
    assert (come_back(flags).backbone, come_back(flags).backbone_layers) == (None, None)


def test_a_directory_that_is_gone_or_has_changed_is_refused_in_one_line(place: Place) -> None:
    flags = place.flags("value=start")
    place.publish(replace(resident("value", 2, "one"), digest=content_digest(place.root / "one")), started=flags)
    check_unchanged(come_back(flags))
    (place.root / "one" / "new").touch()
    with pytest.raises(StartupError, match=r"value@2 was active, and its directory .*one has changed: it is sha256:"):
        check_unchanged(come_back(flags))
    check_unchanged(flags)
    shutil.rmtree(place.root / "one")
    with pytest.raises(StartupError, match="value@2 was active, and its directory one is gone") as refusal:
        come_back(flags)
    assert "\n" not in str(refusal.value)
    with pytest.raises(StartupError, match="give --value-model-root"):
        come_back(replace(flags, value_model_root=None))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"\xff",
        b'{"format": 2, "names": {}}',
        b'{"names": {"value": {"start": null, "active": 2, "newest": 2, "history": []}}}',
        b'{"names": {"v": {"start":null,"active":1,"newest":0,"history":[{"version": 1, "path":"","digest":""}]}}}',
    ],
)
def test_another_file_is_refused_in_one_line(place: Place, content: bytes) -> None:
    place.file.write_bytes(content)
    with pytest.raises(StartupError, match="is none of a server's") as refusal:
        come_back(place.flags())
    assert "\n" not in str(refusal.value)


def test_a_place_that_isnt_there_is_refused(place: Place) -> None:
    with pytest.raises(StartupError, match="no such directory"):
        come_back(replace(place.flags(), registry=place.root / "nowhere" / "file"))
    with pytest.raises(StartupError, match="directory"):
        come_back(replace(place.flags(), registry=place.root))


PUBLISHING = """
import sys
from pathlib import Path
from qtilt_server.registry import ResidentVersion, ValueModelRegistry
from qtilt_server.remembered import RegistryFile

registry, file = ValueModelRegistry(), RegistryFile(Path(sys.argv[1]), {})
while True:
    number = registry.next_version("value")
    if (older := registry.in_the_way("value")) is not None:
        registry.remove(older)
    registry.activate(ResidentVersion("value", number, f"iteration-{number}", "v", {}, 10, digest=f"sha256:{number}"))
    file.write(registry)
    print(number, flush=True)
"""


def test_whoever_was_told_of_a_version_finds_it_again_whenever_the_server_is_killed(tmp_path: Path) -> None:
    file = tmp_path / "registry.json"
    for moment in range(30):
        file.unlink(missing_ok=True)
        with subprocess.Popen([sys.executable, "-c", PUBLISHING, str(file)], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(0.0007 * moment)
            os.kill(process.pid, signal.SIGKILL)
            told = process.stdout.read().split()
        record = read(file).names["value"]
        newest = int(told[-1]) if told else 1
        assert record.active in (newest, newest + 1)
        assert record.active_version.path == f"iteration-{record.active}"
        assert [each.version for each in record.history] == list(range(1, record.active + 1))
        assert json.loads(file.read_text())["format"] == 1
