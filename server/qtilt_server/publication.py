"""Loading a further version while requests run: checked, prepared beside the running ones, then swapped in."""

import asyncio
import logging
import time
from pathlib import Path

from qtilt.checkpoint import Manifest, read_manifest
from qtilt.model.digest import content_digest
from qtilt.vllm_plugin.compatibility import Reference, check_fits_reference, scorable_tokens
from qtilt_server.errors import ConflictError, GuidanceRequestError, SwapTimeoutError
from qtilt_server.metrics import GuidanceMetrics
from qtilt_server.registry import ResidentVersion, ValueModelRegistry
from qtilt_server.remembered import RegistryFile
from qtilt_server.schema import PublishedVersion, PublishRequest
from qtilt_server.worker import GuidanceWorker, WorkerError

logger = logging.getLogger("vllm.qtilt_server.publication")

DISCARD_POLL_S = 0.05


class Publisher:
    """Serves what changes the resident versions, one request at a time.

    Nothing that requests see changes before the new version is ready and has a place: a refusal, a failure or a
    timeout leaves the resident versions as they were.
    """

    def __init__(
        self,
        registry: ValueModelRegistry,
        worker: GuidanceWorker,
        reference: Reference,
        metrics: GuidanceMetrics,
        root: Path | None,
        swap_timeout: float,
        file: RegistryFile | None = None,
    ) -> None:
        self._registry = registry
        self._worker = worker
        self._reference = reference
        self._metrics = metrics
        self._root = root
        self._swap_timeout = swap_timeout
        self._file = file
        self._one_at_a_time = asyncio.Lock()

    async def publish(self, request: PublishRequest) -> PublishedVersion:
        """Load the directory as the next version of its name.

        Raises GuidanceRequestError for a directory that can't be used, SwapTimeoutError when the older version doesn't
        drain.
        """
        async with self._one_at_a_time:
            try:
                version = await self._load_and_swap(request)
            except SwapTimeoutError:
                self._metrics.load("timeout")
                raise
            except WorkerError:
                self._metrics.load("failed")
                raise
            except GuidanceRequestError as refusal:
                self._metrics.load("refused")
                logger.warning("refused to load %s as %s: %s", request.path, request.name, refusal)
                raise
            await self._remember()
        self._metrics.load("loaded")
        self._metrics.active(version.name, version.version, cause="publication")
        logger.info("%s is now %s", version.name, version.label)
        return PublishedVersion(
            name=version.name,
            version=version.version,
            path=version.path,
            digest=version.digest,
            type=version.type,
            distribution=version.distribution,
        )

    async def activate(self, name: str, number: int) -> None:
        """Have the name mean a version that is resident: a roll-back. Raises NotFoundError."""
        async with self._one_at_a_time:
            version = self._registry.resident(name, number)
            is_other = not self._registry.is_active(version)
            self._registry.activate(version)
            await self._remember()
        if is_other:
            self._metrics.active(name, number, cause="rollback")
        logger.info("%s is now %s", name, version.label)

    async def unload(self, name: str, number: int) -> None:
        """Drop a version once no request uses it any more, and with the last one the name.

        Raises NotFoundError; ConflictError for the active one of two, SwapTimeoutError when it doesn't drain.
        """
        async with self._one_at_a_time:
            version = self._registry.resident(name, number)
            if self._registry.is_active(version) and not self._registry.is_alone(version):
                raise ConflictError(f"{version.label} is active: activate the other version first", "version")
            try:
                await self._drain(version)
                await self._discard_when_rows_are_gone(version, time.monotonic() + self._swap_timeout)
            except BaseException:
                self._registry.keep(version)
                raise
            self._registry.remove(version)
            await self._remember()
            self._metrics.unloaded(name, number)
            if name not in {other.name for other in self._registry}:
                self._metrics.gone(name)
        logger.info("%s is unloaded", version.label)

    async def _remember(self) -> None:
        """For a server that starts again. It is served all the same if that fails."""
        if self._file is None:
            return
        try:
            await asyncio.to_thread(self._file.write, self._registry)
        except OSError as error:
            logger.error("what is active now can't be remembered, and won't survive a restart: %s", error)

    async def _load_and_swap(self, request: PublishRequest) -> ResidentVersion:
        directory, version = await asyncio.to_thread(self._check, request)
        try:
            await self._worker.prepare(version.name, version.version, str(directory))
        except WorkerError as error:
            raise GuidanceRequestError(self._without_root(error), "path") from error
        older = self._registry.in_the_way(version.name)
        try:
            await self._swap(version, older)
        except BaseException:
            if older is not None:
                self._registry.keep(older)
            await self._worker.discard(version.name, version.version)
            raise
        if older is not None:
            self._registry.remove(older)
        self._registry.activate(version)
        if older is not None:
            self._metrics.unloaded(older.name, older.version)
        return version

    async def _swap(self, version: ResidentVersion, older: ResidentVersion | None) -> None:
        """The prepared version becomes one that requests may name, and only then the older one is dropped."""
        deadline = time.monotonic() + self._swap_timeout
        if older is not None:
            await self._drain(older)
        await self._worker.commit(version.name, version.version)
        if older is not None:
            await self._discard_when_rows_are_gone(older, deadline)

    async def _drain(self, version: ResidentVersion) -> None:
        if not await self._registry.drain(version, self._swap_timeout):
            raise SwapTimeoutError(
                f"{version.label} still guides {version.leases} running request(s) after {self._swap_timeout:g} s "
                f"(--swap-timeout), and two versions are resident at most; try again later"
            )

    def _check(self, request: PublishRequest) -> tuple[Path, ResidentVersion]:
        """Everything but the weights."""
        directory = directory_below(self._root, request.path)
        try:
            manifest = read_manifest(directory)
            warnings = check_fits_reference(manifest, directory, self._reference)
            digest = content_digest(directory)
        except (ValueError, OSError) as error:
            raise GuidanceRequestError(self._without_root(error), "path") from error
        for warning in warnings:
            logger.warning(warning)
        assert self._root is not None
        path = str(directory.relative_to(self._root))
        number = self._registry.next_version(request.name)
        return directory, resident_version(request.name, number, path, digest, manifest, self._reference)

    async def _discard_when_rows_are_gone(self, older: ResidentVersion, deadline: float) -> None:
        """A response ends a step before its row leaves the running batch."""
        while True:
            try:
                return await self._worker.discard(older.name, older.version)
            except WorkerError as error:
                if time.monotonic() >= deadline:
                    raise SwapTimeoutError(f"{older.label} could not be unloaded in time: {error}") from error
            await asyncio.sleep(DISCARD_POLL_S)

    def _without_root(self, error: Exception) -> str:
        """Clients name directories below the root; where that is on this machine isn't their business."""
        return str(error).replace(f"{self._root}/", "")


def resident_version(
    name: str, version: int, path: str, digest: str, manifest: Manifest, reference: Reference
) -> ResidentVersion:
    """The registry's entry for a checked directory."""
    rollouts = manifest.provenance.get("rollouts")
    return ResidentVersion(
        name=name,
        version=version,
        path=path,
        digest=digest,
        type=manifest.type,
        distribution=manifest.distribution.to_config(),
        scorable_tokens=scorable_tokens(manifest, reference),
        rollouts=rollouts if isinstance(rollouts, dict) else {},
        adapter=manifest.adapter,
    )


def directory_below(root: Path | None, path: str) -> Path:
    """The directory ``path`` below ``root``, symbolic links resolved.

    Raises GuidanceRequestError when there is no root, or when the directory or a file in it is elsewhere.
    """
    if root is None:
        raise GuidanceRequestError(
            "this server was started without --value-model-root and loads no further value models"
        )
    try:
        directory = (root / path).resolve()
        is_directory = directory.is_dir()
    except (OSError, RuntimeError, ValueError) as error:  # too long, a loop of links, a null character
        raise GuidanceRequestError(f"path can't be followed ({type(error).__name__})", "path") from error
    if Path(path).is_absolute() or ".." in Path(path).parts or not directory.is_relative_to(root):
        raise GuidanceRequestError(f"path {path!r} must be relative to the value-model root and stay below it", "path")
    if not is_directory:
        raise GuidanceRequestError(f"path {path!r}: no such directory below the value-model root", "path")
    for file in directory.rglob("*"):
        if not _is_below(root, file):
            raise GuidanceRequestError(
                f"{file.relative_to(root)} is a link to a place outside the value-model root", "path"
            )
    return directory


def _is_below(root: Path, file: Path) -> bool:
    try:
        return file.resolve().is_relative_to(root)
    except (OSError, RuntimeError):  # A loop of links leads nowhere.
        return False
