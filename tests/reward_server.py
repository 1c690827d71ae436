"""A real reward server (FastAPI under uvicorn) in a thread of the test."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from fastapi import FastAPI, Request, Response


class RewardServer:
    """`reply(body, number)` makes the answer to request `number` (from 0): a (status, content, content type)."""

    def __init__(self) -> None:
        self.reply: Callable[[Any, int], tuple[int, str, str]]
        self.requests: list[tuple[dict[str, str], Any]] = []
        self.delay = 0.0
        """Seconds before each answer."""
        self.slow_on: str | None = None
        """The completion that it takes them for; None: every one."""
        self.most_at_once = 0
        self.url = ""
        self._at_once = 0

    async def answer(self, request: Request) -> Response:
        body = await request.json()
        number = len(self.requests)
        self.requests.append((dict(request.headers), body))
        self._at_once += 1
        self.most_at_once = max(self.most_at_once, self._at_once)
        await asyncio.sleep(self.delay if self.slow_on in (None, *body["completions"]) else 0)
        self._at_once -= 1
        status, content, kind = self.reply(body, number)
        return Response(content, status, media_type=kind)


@contextmanager
def running_reward_server() -> Iterator[RewardServer]:
    server = RewardServer()
    app = FastAPI()
    app.post("/get_reward")(server.answer)
    uvicorn_server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
    thread = threading.Thread(target=uvicorn_server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 60
    while not uvicorn_server.started:
        assert thread.is_alive() and time.monotonic() < deadline
        time.sleep(0.01)
    port = uvicorn_server.servers[0].sockets[0].getsockname()[1]
    server.url = f"http://127.0.0.1:{port}/get_reward"
    try:
        yield server
    finally:
        uvicorn_server.should_exit = True
        thread.join(30)
