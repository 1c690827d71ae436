"""Making the server load a fitted value model, once."""

import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qtilt_trainer.atomic_file import write_json
from qtilt_trainer.client import GuidedClient, LoadedVersion, ServerStatus

logger = logging.getLogger(__name__)


def path_on_server(directory: Path, value_model_root: Path | None, status: ServerStatus) -> str:
    """`directory` as the server is told of it: relative to its value-model root.

    value_model_root: that root as seen here; None: at the path the server itself reports.
    Raises ValueError when the directory isn't below it, or the server has none.
    """
    return path_below_root(directory, value_model_root or _reported_root(status))


def path_below_root(directory: Path, root: Path) -> str:
    """`directory` relative to the server's value-model root. Raises ValueError when it is not below it."""
    try:
        return directory.resolve().relative_to(root.resolve()).as_posix()
    except ValueError as error:
        raise ValueError(
            f"{directory.resolve()} is not below the server's value-model root {root.resolve()}: put run_dir below it "
            "(server.value_model_root says where this machine sees the root), or start qtilt-server with another root"
        ) from error


async def publish(
    client: GuidedClient, directory: Path, name: str, value_model_root: Path | None, record_file: Path
) -> str:
    """NAME@VERSION under which the server serves the value model in `directory`; loads it unless it does already.

    value_model_root: the server's root as seen here; None: at the path the server itself reports.
    record_file: where the version is noted, so that a resumed run doesn't publish again.
    A server that was restarted, or has another version active meanwhile, gets it again.
    Raises ServerError, and ValueError when the directory isn't below the root.
    """
    status = await client.status()
    path = path_on_server(directory, value_model_root, status)
    stamp = _stamp(directory)
    loaded = _already_loaded(record_file, stamp, status.versions)
    if loaded is None:
        loaded = await client.publish(name, path)
        write_json(record_file, {"loaded": asdict(loaded), "stamp": stamp})
        logger.info("published %s as %s@%d", directory, loaded.name, loaded.version)
    return f"{loaded.name}@{loaded.version}"


def _reported_root(status: ServerStatus) -> Path:
    if status.value_model_root is None:
        raise ValueError("the server has no value-model root: start qtilt-server with --value-model-root")
    return Path(status.value_model_root)


def _stamp(directory: Path) -> dict[str, Any]:
    """Tells a value model from another one written to the same path."""
    manifest = (directory / "value_model.json").stat()
    return {"inode": manifest.st_ino, "modified_ns": manifest.st_mtime_ns}


def _already_loaded(record_file: Path, stamp: dict[str, Any], versions: list[LoadedVersion]) -> LoadedVersion | None:
    if not record_file.exists():
        return None
    record = json.loads(record_file.read_text(encoding="utf-8"))
    published = LoadedVersion(**record["loaded"])
    return published if record["stamp"] == stamp and published in versions else None
