"""The load: clients that ask, leave and misbehave, and a publisher that swaps versions. One event loop."""

import asyncio
import itertools
import json
import random
import time
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from soaking.answers import Answer, complaints, json_object, names_a_version_that_left
from soaking.asks import Ask, Asker, Leaving
from soaking.exactness import Sample, compare
from soaking.findings import Findings
from soaking.versions import Published

ANSWER_LIMIT_S = 180.0
MALFORMED_SHARE = 0.06
MOST_WAITING_CHECKS = 12
"""Samples beyond are not taken: checks must keep up with the load."""
SWAP_PAUSE_S = (1.0, 3.0)
HTTP_OK, HTTP_CONFLICT = 200, 409


@dataclass
class Load:
    """What clients and the publisher share. directories: by name, those that its versions are published from."""

    http: httpx.AsyncClient
    published: Published
    findings: Findings
    checker: Executor
    reference: Path
    directories: dict[str, list[Path]]
    checked_share: float
    stop: asyncio.Event
    waiting_checks: int = 0

    @property
    def goes_on(self) -> bool:
        return not self.stop.is_set() and not self.findings.are_too_many

    async def client(self, asker: Asker) -> None:
        """One request after the other until told to stop."""
        while self.goes_on:
            if asker.random.random() < MALFORMED_SHARE:
                await self._misbehave(asker)
                continue
            ask = asker.ask()
            self.findings.counts["asked"] += 1
            if ask.leaves is None:
                await self._ask_and_check(ask, asker.random)
            elif ask.leaves.abort:
                await self._abort(ask, ask.leaves)
            else:
                await self._ask_and_leave(ask, ask.leaves)

    async def publisher(self, rng: random.Random) -> None:
        """Publish the next directory of one name after the other, every few seconds."""
        turns = itertools.cycle(self.directories)
        cycles = {
            name: itertools.cycle([*directories[1:], directories[0]]) for name, directories in self.directories.items()
        }
        while self.goes_on:
            await asyncio.sleep(rng.uniform(*SWAP_PAUSE_S))
            name = next(turns)
            await self._publish(name, next(cycles[name]))

    async def _publish(self, name: str, directory: Path) -> None:
        started = time.monotonic()
        number = self.published[name].try_next(directory, started)
        body = {"name": name, "path": directory.name}
        try:
            response = await self.http.post("/v1/guidance/value_models", json=body)
        except httpx.HTTPError as error:
            self.findings.problem(f"publishing {body} failed: {error!r}")
            return
        if response.status_code == HTTP_CONFLICT:
            self.findings.counts["swaps refused: two versions in use (409)"] += 1
            return
        if response.status_code != HTTP_OK or json_object(response.content).get("version") != number:
            said_so = f"{response.status_code}: {response.text[:300]}"
            self.findings.problem(f"publishing {body} as {number} was answered with {said_so}")
            return
        self.published[name].published(number, time.monotonic())
        self.findings.swap_s.append(time.monotonic() - started)
        self.findings.counts["swaps"] += 1

    async def _ask_and_check(self, ask: Ask, rng: random.Random) -> None:
        answer = Answer(ask, time.monotonic())
        try:
            await self._ask(answer)
        except httpx.HTTPError as error:
            self.findings.problem(_broken_off(answer, error))
            return
        if names_a_version_that_left(answer, self.published):
            self.findings.counts["refused: the version asked for was unloaded (400)"] += 1
            return
        self.findings.counts["answered"] += 1
        self.findings.answer_s.append(answer.ended - answer.sent)
        wrong = complaints(answer, self.published)
        for complaint in wrong:
            self.findings.problem(f"{complaint}: {said(ask)}")
        if not wrong and rng.random() < self.checked_share:
            await self._check_exactness(answer)

    async def _ask(self, answer: Answer) -> None:
        ask = answer.ask
        if ask.body["stream"]:
            async with self.http.stream("POST", ask.path, json=ask.body) as response:
                await self._read_stream(answer, response)
        else:
            response = await self.http.post(ask.path, json=ask.body)
            answer.status = response.status_code
            answer.read(response.content)
            answer.is_complete = True
        answer.ended = time.monotonic()

    async def _read_stream(self, answer: Answer, response: httpx.Response, chunks: int | None = None) -> None:
        """All of it, or so many chunks."""
        answer.status = response.status_code
        if response.status_code != HTTP_OK:
            answer.read(await response.aread())
            return
        events = (line.removeprefix("data: ") async for line in response.aiter_lines() if line.startswith("data: "))
        read = 0
        async for event in events:
            if event == "[DONE]":
                answer.is_complete = True
                return
            answer.read(event)
            read += 1
            if chunks is not None and read >= chunks:
                return

    async def _ask_and_leave(self, ask: Ask, leaves: Leaving) -> None:
        """Close the connection before the answer, or in the middle of a stream."""
        answer = Answer(ask, time.monotonic())
        try:
            async with asyncio.timeout(leaves.after_s):
                if leaves.after_chunks is None:
                    await self._ask(answer)
                else:
                    async with self.http.stream("POST", ask.path, json=ask.body) as response:
                        await self._read_stream(answer, response, leaves.after_chunks)
        except TimeoutError:
            self.findings.counts["left before the answer"] += 1
            return
        except httpx.HTTPError as error:
            self.findings.problem(_broken_off(answer, error))
            return
        answer.ended = time.monotonic()
        if names_a_version_that_left(answer, self.published):
            return
        what = "were to leave, answered before" if answer.is_complete else "left during a stream"
        self.findings.counts[what] += 1
        is_whole = answer.is_complete or leaves.after_chunks is not None
        is_good = answer.status == HTTP_OK and answer.error is None and is_whole
        self.findings.expect(is_good, f"status {answer.status}: {answer.error}, complete: {is_whole}: {said(ask)}")

    async def _abort(self, ask: Ask, leaves: Leaving) -> None:
        """Reset the connection at the given time, whatever has come until then."""
        content = json.dumps(ask.body).encode()
        host, port = self.http.base_url.host, self.http.base_url.port
        assert leaves.after_s is not None
        headers = [f"Host: {host}", "Content-Type: application/json", f"Content-Length: {len(content)}"]
        head = "\r\n".join([f"POST {ask.path} HTTP/1.1", *headers, "", ""])
        try:
            _, writer = await asyncio.open_connection(host, port)
            writer.write(head.encode() + content)
            await asyncio.sleep(leaves.after_s)
            writer.transport.abort()
        except OSError as error:
            self.findings.problem(f"the server took no connection: {error!r}")
            return
        self.findings.counts["reset the connection"] += 1

    async def _misbehave(self, asker: Asker) -> None:
        malformed = asker.malformed()
        said_so = f"{malformed.path} {malformed.content[:300]!r}"
        try:
            response = await self.http.post(
                malformed.path, content=malformed.content, headers={"content-type": "application/json"}
            )
        except httpx.HTTPError as error:
            self.findings.problem(f"{_with_causes(error)}: {said_so}")
            return
        self.findings.counts["malformed, refused"] += 1
        self.findings.expect(
            response.is_client_error and "error" in json_object(response.content),
            f"a malformed request was answered with {response.status_code}, {response.text[:300]}: {said_so}",
        )

    async def _check_exactness(self, answer: Answer) -> None:
        if self.waiting_checks >= MOST_WAITING_CHECKS:
            self.findings.counts["samples not taken: the checker is busy"] += 1
            return
        self.waiting_checks += 1
        try:
            for sample in samples(answer, self.published, self.reference):
                difference = await asyncio.get_running_loop().run_in_executor(self.checker, compare, sample)
                self.findings.checked(difference, said(answer.ask))
        finally:
            self.waiting_checks -= 1


def samples(answer: Answer, published: Published, reference: Path) -> list[Sample]:
    """The choices of an answer, for the oracle."""
    ask, applied = answer.ask, answer.applied
    has_logprobs = ask.compared == "logprobs"
    return [
        Sample(
            reference=reference,
            directory=published.directory(applied["value_model"]) if applied is not None else None,
            applied=applied,
            guided_tokens=ask.guidance.get("guided_tokens") if ask.guidance is not None else None,
            temperature=float(ask.body.get("temperature", 1.0)),
            prompt=answer.prompt_of(index),
            token_ids=choice.token_ids,
            logprobs=choice.logprobs if has_logprobs else [],
            all_logprobs=choice.all_logprobs if has_logprobs else [],
            kl=choice.guidance["kl"] if choice.guidance is not None else None,
            candidates=choice.guidance["candidates"] if choice.guidance is not None else None,
        )
        for index, choice in sorted(answer.choices.items())
    ]


def said(ask: Ask) -> str:
    """The request, for a problem's text."""
    fields: dict[str, Any] = {key: value for key, value in ask.body.items() if key != "model"}
    return f"{ask.path} {json.dumps(fields)}"


def _broken_off(answer: Answer, error: httpx.HTTPError) -> str:
    seconds, choices = time.monotonic() - answer.sent, list(answer.choices.values())
    got = f"status {answer.status} and {sum(len(choice.token_ids) for choice in choices)} tokens"
    return f"{_with_causes(error)} after {seconds:.1f} s, {got}: {said(answer.ask)}"


def _with_causes(error: BaseException) -> str:
    causes = []
    cause: BaseException | None = error
    while cause is not None:
        causes.append(repr(cause))
        cause = cause.__cause__ or cause.__context__
    return " from ".join(causes)
