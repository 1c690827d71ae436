"""Texts that are scored take turns, and none is left in the worker, however its request ends."""

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from qtilt_server.errors import UnavailableError
from qtilt_server.registry import ResidentVersion
from qtilt_server.scoring import MOST_TEXTS, Scorer
from qtilt_server.worker import GuidanceWorker

VERSION = ResidentVersion("value", 1, "value", "v", {}, 10)


class Engine:
    """Texts of so many parts as they have tokens; one with the token 13 fails at its second part."""

    errored = False

    def __init__(self) -> None:
        self.texts: dict[str, list[int]] = {}
        self.parts: list[str] = []
        self.most = 0
        self.is_advancing = False
        self.is_on_its_way = asyncio.Event()

    async def collective_rpc(self, method: str, *, args: tuple[Any, ...] = ()) -> list[Any]:
        if method == "qtilt_advance_text":
            assert not self.is_advancing, "one part at a time"
            self.is_advancing = True
        await asyncio.sleep(0)
        self.is_advancing = self.is_advancing and method != "qtilt_advance_text"
        return [getattr(self, method.removeprefix("qtilt_"))(*args)]

    def begin_text(
        self, text: str, name: str, version: int, token_ids: Sequence[int], first: int, wants_all: bool
    ) -> None:
        assert (name, version) == ("value", 1)
        self.texts[text] = list(token_ids[first:])
        self.most = max(self.most, len(self.texts))

    def advance_text(self, text: str) -> Any:
        self.parts.append(text)
        if len(self.parts) == 10:
            self.is_on_its_way.set()
        done = self.parts.count(text)
        if 13 in self.texts[text] and done == 2:
            return {"qtilt_error": "no memory"}
        return (
            {"support": [0.0], "values": [0.0] * done, "distributions": [[1.0]]}
            if done == len(self.texts[text])
            else None
        )

    def end_text(self, text: str) -> None:
        del self.texts[text]


def test_texts_take_turns_a_few_at_once_and_answers_are_in_order() -> None:
    engine = Engine()
    completions = [[1] * (3 + number) for number in range(3 * MOST_TEXTS)]
    values = asyncio.run(Scorer(GuidanceWorker(engine)).score(VERSION, [5, 6], completions))
    assert [len(each["values"]) for each in values] == [len(each) for each in completions]
    assert engine.most == MOST_TEXTS
    assert len(set(engine.parts[:MOST_TEXTS])) == MOST_TEXTS, "none waits for another one's end"
    assert engine.texts == {}


def test_a_text_that_fails_ends_its_request_and_leaves_nothing() -> None:
    engine = Engine()
    with pytest.raises(UnavailableError, match="no memory") as refusal:
        asyncio.run(Scorer(GuidanceWorker(engine)).score(VERSION, [5], [[1] * 50, [13] * 5, [1] * 50]))
    assert refusal.value.status == 503
    assert engine.texts == {}


def test_a_request_that_is_given_up_leaves_nothing() -> None:
    engine = Engine()

    async def scenario() -> None:
        asked = asyncio.ensure_future(Scorer(GuidanceWorker(engine)).score(VERSION, [5], [[1] * 10**6] * 3))
        await engine.is_on_its_way.wait()
        asked.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asked

    asyncio.run(scenario())
    assert engine.texts == {}
