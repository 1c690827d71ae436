"""A client that outlives its server: it waits until a restarted one is ready, publishes again and asks again.

A restarted server has forgotten what was published, and NAME@VERSION may there mean another value model. So after every
guided answer the server is asked whether the version is still the directory that was published; if it isn't, the
answer doesn't count.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace

from qtilt_trainer.client import Completion, Guidance, GuidedClient, Sampling
from qtilt_trainer.config import ServerConfig
from qtilt_trainer.server_errors import (
    GOES_ON,
    PromptRefusedError,
    RequestFailedError,
    ServerAwayError,
    ServerError,
    VersionGoneError,
)
from qtilt_trainer.tasks.problem import Prompt

logger = logging.getLogger(__name__)

Publish = Callable[[], Awaitable[str]]

POLL_SECONDS = 1.0
RECOVERIES = 3
"""How often one request may find the server away, or without its version, before that is its own fault."""


class SteadyClient(GuidedClient):
    """Raises ServerError when the server stays away for longer than `server.wait` seconds."""

    def __init__(self, config: ServerConfig) -> None:
        super().__init__(config)
        self._publish: Publish | None = None
        self._labels: dict[str, str] = {}
        """NAME@VERSION as requests name it -> as it is called now."""
        self._path: str | None = None
        self._recovering = asyncio.Lock()
        self._recoveries = 0
        self._checking = asyncio.Lock()
        self._checked = float("-inf")
        """When the last check that found the version in place began."""

    async def keep_published(self, publish: Publish) -> str:
        """Publishes, and does so again whenever the server has lost it; returns NAME@VERSION, valid from now on."""
        label = await self._published(publish)
        self._publish, self._labels = publish, {label: label}
        self._path = (await self._versions()).get(label)
        return label

    async def complete(
        self, prompt: Prompt, samples: int, seed: int, sampling: Sampling, guidance: Guidance | None
    ) -> list[Completion]:
        """The same as GuidedClient's; `guidance` names the version as `keep_published` did.

        Raises PromptRefusedError too for a request that fails again and again while the server is well.
        """
        failed_alone = 0
        for _ in range(RECOVERIES):
            recoveries, named = self._recoveries, self._named(guidance)
            try:
                completions = await super().complete(prompt, samples, seed, sampling, named)
                if named is not None:
                    await self._check_served(named.value_model)
                return completions
            except (ServerAwayError, VersionGoneError) as error:
                last = error
                failed_alone += isinstance(error, RequestFailedError) and await self.is_healthy()
                await self._recover(recoveries, error)
        if failed_alone == RECOVERIES:
            raise PromptRefusedError(f"{last} ({RECOVERIES} times, while the server was well)") from last
        raise last

    async def _published(self, publish: Publish) -> str:
        for _ in range(RECOVERIES):
            try:
                return await publish()
            except ServerAwayError as error:
                last = error
                logger.warning("%s; waiting for the server for %g s at most", error, self._config.wait)
                await self.wait_until_healthy()
        raise last

    async def wait_until_healthy(self) -> None:
        """Raises ServerAwayError after `server.wait` seconds."""
        began = time.monotonic()
        while not await self.is_healthy():
            if time.monotonic() - began >= self._config.wait:
                raise ServerAwayError(
                    f"the server was away for {self._config.wait:g} s (server.wait): start it; {GOES_ON}"
                )
            await asyncio.sleep(POLL_SECONDS)

    def _named(self, guidance: Guidance | None) -> Guidance | None:
        if guidance is None:
            return None
        return replace(guidance, value_model=self._labels.get(guidance.value_model, guidance.value_model))

    async def _check_served(self, label: str) -> None:
        """Asks once for all answers that wait. Raises VersionGoneError."""
        answered = time.monotonic()
        async with self._checking:
            if self._checked >= answered and label in self._labels.values():
                return
            began = time.monotonic()
            if self._path is None or (await self._versions()).get(label) != self._path:
                raise VersionGoneError(f"the server was restarted, and {label} is not what was published any more")
            self._checked = began

    async def _versions(self) -> dict[str, str]:
        """NAME@VERSION -> directory."""
        return {f"{version.name}@{version.version}": version.path for version in (await self.status()).versions}

    async def _recover(self, seen: int, error: ServerError) -> None:
        """Once for all requests that found the server away in the same life of it."""
        async with self._recovering:
            if self._recoveries != seen:
                return
            logger.warning("%s; waiting for the server for %g s at most", error, self._config.wait)
            began = time.monotonic()
            while True:
                try:
                    await self.wait_until_healthy()
                    await self._make_ready()
                    break
                except ServerAwayError:
                    if time.monotonic() - began >= self._config.wait:
                        raise
                    await asyncio.sleep(POLL_SECONDS)
            self._recoveries += 1
            logger.warning("the server is there after %.0f s", time.monotonic() - began)

    async def _make_ready(self) -> None:
        served = {model["id"] for model in await self._served()}
        if await self.model() not in served:
            raise ServerError(f"the server came back with {sorted(served)} instead of {await self.model()}")
        if self._publish is not None:
            try:
                label = await self._publish()
            except PromptRefusedError as error:  # What is refused is the value model: no prompt's fault.
                raise ServerError(str(error)) from error
            self._labels = dict.fromkeys(self._labels, label)
            self._path = (await self._versions()).get(label)
