"""What was published, in a file that outlives the server: a server that starts again comes back with what was active.

The file is replaced as a whole after each change, before that is answered: who was told of a version finds it again,
whenever the server is killed. What the command line names goes before what is remembered, if it has changed since.
"""

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from qtilt.model.digest import content_digest
from qtilt.model.durable import flush
from qtilt_server.errors import StartupError
from qtilt_server.flags import GuidanceFlags
from qtilt_server.registry import ValueModelRegistry

logger = logging.getLogger("vllm.qtilt_server.remembered")

FLAG = "--value-model-registry"


class _Stored(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class VersionRecord(_Stored):
    """A version that was active once. path: below the root, or absolute. digest: of its content then."""

    version: int
    path: str
    digest: str


class NameRecord(_Stored):
    """start: the directory that the command line named; None of a name that was published. newest: the last number
    that was given. history: oldest first, the active one included.
    """

    start: str | None
    active: int
    newest: int
    history: list[VersionRecord]

    @property
    def active_version(self) -> VersionRecord:
        return next(each for each in reversed(self.history) if each.version == self.active)


class Remembered(_Stored):
    """The file's content."""

    format: Literal[1] = 1
    names: dict[str, NameRecord]


@dataclass(frozen=True)
class Restored:
    """A version that a server begins with, and the last number of its name. digest: what it must have."""

    version: int
    newest: int
    digest: str


class RegistryFile:
    """``FILE`` of --value-model-registry. started: the directories that the command line names."""

    def __init__(self, file: Path, started: Mapping[str, Path]) -> None:
        self._file = file
        self._started = {name: str(directory) for name, directory in started.items()}
        self._names = {
            name: record for name, record in read(file).names.items() if record.start == self._started.get(name)
        }

    @property
    def names(self) -> dict[str, NameRecord]:
        """What is remembered, without names that the command line has changed or dropped since."""
        return self._names

    def write(self, registry: ValueModelRegistry) -> None:
        """Remember what is active now. Raises OSError."""
        self._names = {name: self._record(name, registry) for name in {version.name: None for version in registry}}
        content = Remembered(names=self._names).model_dump_json(indent=1)
        new = self._file.with_name(f".{self._file.name}.new")
        new.write_text(content)
        flush(new)
        new.replace(self._file)
        flush(self._file.parent)

    def _record(self, name: str, registry: ValueModelRegistry) -> NameRecord:
        active = next(each for each in registry if each.name == name and registry.is_active(each))
        record = VersionRecord(version=active.version, path=active.path, digest=active.digest)
        known = self._names.get(name)
        history = [] if known is None else [each for each in known.history if each.version != active.version]
        newest = registry.next_version(name) - 1
        return NameRecord(
            start=self._started.get(name), active=active.version, newest=newest, history=[*history, record]
        )


def read(file: Path) -> Remembered:
    """Nothing of a file that isn't there. Raises StartupError for one that can't be read, or isn't such a file."""
    try:
        content = file.read_bytes()
    except FileNotFoundError:
        return Remembered(names={})
    except OSError as error:
        raise StartupError(f"{FLAG} {file}: {error.strerror}") from error
    try:
        remembered = Remembered.model_validate_json(content)
        for record in remembered.names.values():
            assert record.active_version.version <= record.newest
    except (ValidationError, AssertionError, StopIteration) as error:
        reason = str(error).splitlines()[0] if str(error) else "its versions don't fit together"
        raise StartupError(f"{FLAG} {file} is none of a server's ({reason}): move it away to start without") from error
    return remembered


def come_back(flags: GuidanceFlags) -> GuidanceFlags:
    """The flags, with what was active where the command line has named nothing else since.

    Raises StartupError for a file that can't be used and a directory that is gone.
    """
    if flags.registry is None:
        return flags
    remembered = RegistryFile(flags.registry, flags.value_models)
    _check_writable(flags.registry)
    directories, restored = dict(flags.value_models), {}
    for name, record in remembered.names.items():
        active = record.active_version
        directory = Path(active.path)
        if not directory.is_absolute():
            if flags.value_model_root is None:
                raise StartupError(f"{FLAG} {flags.registry} has {name} below a root: give --value-model-root")
            directory = flags.value_model_root / active.path
        if not directory.is_dir():
            raise _changed(flags.registry, name, active, "is gone")
        directories[name] = directory.resolve()
        restored[name] = Restored(active.version, record.newest, active.digest)
        logger.info("%s comes back as %s@%d (%s)", name, name, active.version, active.path)
    backbone = None if restored else flags.backbone
    layers = None if backbone is None else flags.backbone_layers
    return replace(flags, value_models=directories, restored=restored, backbone=backbone, backbone_layers=layers)


def check_unchanged(flags: GuidanceFlags) -> None:
    """Raise StartupError for a directory that isn't what was active."""
    for name, restored in flags.restored.items():
        assert flags.registry is not None
        digest = content_digest(flags.value_models[name])
        if digest != restored.digest:
            record = VersionRecord(version=restored.version, path=str(flags.value_models[name]), digest=restored.digest)
            raise _changed(flags.registry, name, record, f"has changed: it is {digest}, not {restored.digest}")


def _changed(file: Path, name: str, record: VersionRecord, what: str) -> StartupError:
    return StartupError(
        f"{name}@{record.version} was active, and its directory {record.path} {what}; put it back, or move {file} away "
        "to start with what the command line names"
    )


def _check_writable(file: Path) -> None:
    if not file.parent.is_dir():
        raise StartupError(f"{FLAG} {file}: no such directory, create it first")
    if not os.access(file.parent, os.W_OK):
        raise StartupError(f"{FLAG} {file}: its directory can't be written to")
