"""Which value-model versions are resident, which one a request gets, and who still uses them.

Pure bookkeeping of the API process on one event loop: it knows nothing of HTTP, vLLM or weights. A lease keeps the
version of a running guided request from being unloaded.
"""

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from qtilt_server.errors import GuidanceRequestError, NotFoundError
from qtilt_server.schema import ValueModelStatus, VersionStatus

MAX_RESIDENT_VERSIONS = 2


@dataclass(eq=False)
class ResidentVersion:
    """One version in the worker.

    path: as clients may see it. scorable_tokens: ids below this can be scored. rollouts: sampling parameters of the
    roll-outs it was fitted on. adapter: the LoRA adapter that these were of, None for the reference itself. digest: of
    its directory's content. leases: guided requests that use it now. failed: guided requests it has failed.
    """

    name: str
    version: int
    path: str
    type: Literal["q", "v"]
    distribution: dict[str, Any]
    scorable_tokens: int
    rollouts: dict[str, Any] = field(default_factory=dict)
    adapter: str | None = None
    digest: str = ""
    leases: int = 0
    failed: int = 0
    draining: bool = False
    drained: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def label(self) -> str:
        return f"{self.name}@{self.version}"


class Lease:
    """Held by one guided request from its admission until nothing of it runs any more; releasing twice is harmless."""

    def __init__(self, version: ResidentVersion) -> None:
        self.version = version
        self._held = True
        version.leases += 1

    def release(self) -> None:
        if not self._held:
            return
        self._held = False
        self.version.leases -= 1
        assert self.version.leases >= 0
        if self.version.leases == 0:
            self.version.drained.set()


class ValueModelRegistry:
    """Names in the order they came; under each name at most two versions, of which one is active."""

    def __init__(self) -> None:
        self._versions: dict[str, list[ResidentVersion]] = {}
        self._active: dict[str, ResidentVersion] = {}
        self._newest: dict[str, int] = {}
        """The highest number that each name ever had, names that are gone too."""

    def __iter__(self) -> Iterator[ResidentVersion]:
        return (version for versions in self._versions.values() for version in versions)

    @property
    def default_name(self) -> str | None:
        """The first value model named."""
        return next(iter(self._versions), None)

    def lease(self, wanted: str | None, field: str = "guidance.value_model") -> Lease:
        """Fix the version of a new request: ``wanted`` is NAME, NAME@VERSION, NAME@DIGEST, or None for the default.

        Raises GuidanceRequestError, which names the ``field`` of the request, when there is no such version, or it no
        longer takes requests.
        """
        try:
            return Lease(self._find(wanted))
        except LookupError as reason:
            raise GuidanceRequestError(f"{field}: {reason}; {_loaded(self)}", field) from reason

    def resident(self, name: str, number: int) -> ResidentVersion:
        """Raises NotFoundError."""
        for version in self._versions.get(name, []):
            if version.version == number:
                return version
        raise NotFoundError(f"{name}@{number} isn't loaded; {_loaded(self)}", "version")

    def next_version(self, name: str) -> int:
        """Numbers grow: none is used twice while the server runs."""
        return self._newest.get(name, 0) + 1

    def restore(self, version: ResidentVersion, newest: int) -> None:
        """A server begins with a version that another one had before. newest: the last number of its name."""
        self._newest[version.name] = version.version - 1
        self.activate(version)
        self._newest[version.name] = newest

    def activate(self, version: ResidentVersion) -> None:
        """From now on the name means this version, a new one or one that is resident."""
        versions = self._versions.setdefault(version.name, [])
        if version not in versions:
            assert version.version == self.next_version(version.name)
            assert len(versions) < MAX_RESIDENT_VERSIONS
            versions.append(version)
            self._newest[version.name] = version.version
        self._active[version.name] = version

    def in_the_way(self, name: str) -> ResidentVersion | None:
        """The version that has to go before another one of this name fits."""
        versions = self._versions.get(name, [])
        if len(versions) < MAX_RESIDENT_VERSIONS:
            return None
        return next(version for version in versions if not self.is_active(version))

    def is_active(self, version: ResidentVersion) -> bool:
        """Whether its name means this version."""
        return self._active[version.name] is version

    def is_alone(self, version: ResidentVersion) -> bool:
        """Whether no other version of its name is resident."""
        return len(self._versions[version.name]) == 1

    async def drain(self, version: ResidentVersion, limit_s: float) -> bool:
        """Admit no more requests to ``version`` and wait until none uses it; False when they outlast the limit.

        The caller ends the drain with :meth:`remove` or :meth:`keep`.
        """
        version.draining = True
        version.drained.clear()
        if version.leases == 0:
            return True
        try:
            async with asyncio.timeout(limit_s):
                await version.drained.wait()
        except TimeoutError:
            return False
        return True

    def keep(self, version: ResidentVersion) -> None:
        """Admit requests again: whatever it was drained for didn't happen."""
        version.draining = False

    def remove(self, version: ResidentVersion) -> None:
        """Forget a drained version that the worker no longer holds; with its last version the name."""
        assert version.leases == 0
        assert self.is_alone(version) or not self.is_active(version)
        self._versions[version.name].remove(version)
        if not self._versions[version.name]:
            del self._versions[version.name], self._active[version.name]

    def describe(self) -> list[ValueModelStatus]:
        return [
            ValueModelStatus(
                name=name,
                active=self._active[name].version,
                versions=[_describe(version, active=self.is_active(version)) for version in versions],
            )
            for name, versions in self._versions.items()
        ]

    def _find(self, wanted: str | None) -> ResidentVersion:
        name, at, number = (wanted if wanted is not None else self.default_name or "").partition("@")
        versions = self._versions.get(name)
        if versions is None:
            raise LookupError("no value model is loaded" if wanted is None else f"unknown value model {name!r}")
        for version in versions:
            if (number != "" and number in (str(version.version), version.digest)) if at else self.is_active(version):
                if version.draining:
                    raise LookupError(f"{version.label} is being unloaded and takes no new requests")
                return version
        raise LookupError(f"value model {name!r} has no version {number!r} loaded")


def _describe(version: ResidentVersion, active: bool) -> VersionStatus:
    return VersionStatus(
        version=version.version,
        path=version.path,
        digest=version.digest,
        type=version.type,
        distribution=version.distribution,
        state="draining" if version.draining else "active" if active else "resident",
        running=version.leases,
        failed=version.failed,
        rollouts=version.rollouts,
        adapter=version.adapter,
    )


def _loaded(registry: ValueModelRegistry) -> str:
    return f"loaded: {', '.join(version.label for version in registry if not version.draining) or 'none'}"
