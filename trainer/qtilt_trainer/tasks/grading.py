r"""Is the last `\boxed{...}` of a completion the expected expression? math-verify decides, in a process we can kill.

math-verify parses with ANTLR and compares with SymPy: hostile answers make either run for hours or eat all memory, and
its own time limits need SIGALRM, so they work in a main thread only and not against C code. Here its limits are off
and a worker that is late is killed; its answer counts as wrong.
"""

import atexit
import contextlib
import functools
import json
import logging
import os
import queue
import select
import subprocess
import sys
import time
from typing import Any

logger = logging.getLogger(__name__)

TIMEOUT_S = 10.0
"""Longest time one comparison may take."""
STARTUP_TIMEOUT_S = 180.0
"""Longest time a worker may take to import math-verify and SymPy."""
WORKERS = 2
BOXED = r"\boxed{"


class GradingError(RuntimeError):
    """The grading process can't be started at all."""


def last_boxed(text: str) -> str | None:
    r"""The content of the last complete `\boxed{...}`, braces balanced; None if there is none."""
    start = text.rfind(BOXED)
    while start >= 0:
        depth = 1
        for position in range(start + len(BOXED), len(text)):
            depth += {"{": 1, "}": -1}.get(text[position], 0)
            if depth == 0:
                return text[start + len(BOXED) : position].strip()
        start = text.rfind(BOXED, 0, start)
    return None


def matches_expression(expected: str, completion: str) -> bool:
    """Whether the completion's last boxed expression is mathematically the expected one."""
    given = last_boxed(completion)
    return given is not None and _equal(expected, given)


def canonical_expression(completion: str) -> str | None:
    """The last boxed expression as SymPy prints it, so that spellings of it vote together; None without one."""
    given = last_boxed(completion)
    return None if given is None else _canonical(given)


@functools.lru_cache(maxsize=1 << 16)
def _equal(expected: str, given: str) -> bool:
    if expected.strip() == given:
        return True
    return _default_pool().ask({"expected": expected, "given": given}) is True


@functools.lru_cache(maxsize=1 << 16)
def _canonical(given: str) -> str:
    parsed = _default_pool().ask({"given": given})
    return given if parsed is None else str(parsed)


@functools.cache
def _default_pool() -> "GradingPool":
    pool = GradingPool()
    atexit.register(pool.close)
    return pool


class GradingPool:
    """A few grading processes shared by any number of threads; a process is started when first needed."""

    def __init__(self, workers: int = WORKERS, timeout: float = TIMEOUT_S) -> None:
        """Raises ValueError for less than one worker or a timeout that isn't positive."""
        if workers < 1 or not timeout > 0:
            raise ValueError(f"workers must be >= 1 and timeout > 0 seconds, got {workers} and {timeout}")
        self.timeout = timeout
        self.killed = 0
        """Workers that had to be killed or died so far."""
        self._idle: queue.LifoQueue[GradingProcess | None] = queue.LifoQueue()
        for _ in range(workers):
            self._idle.put(None)
        self._workers = workers

    def ask(self, question: dict[str, str]) -> Any:
        """The worker's answer to one question; None if it was late or died (and was replaced)."""
        process = self._idle.get()
        reusable = None
        try:
            process = process or GradingProcess()
            answer = process.ask(question, self.timeout)
            reusable = process
            return answer
        except (TimeoutError, EOFError) as error:
            self.killed += 1
            logger.warning("grading %r gave no answer (%s): counted as wrong", question, error)
            return None
        finally:
            # A process interrupted in the middle of a question would give its answer to the next one.
            if process is not None and reusable is None:
                process.kill()
            self._idle.put(reusable)

    def close(self) -> None:
        """Ends all processes that are idle."""
        for _ in range(self._workers):
            try:
                process = self._idle.get_nowait()
            except queue.Empty:
                return
            if process is not None:
                process.kill()


class GradingProcess:
    """One `python -m qtilt_trainer.tasks.grading_worker`: a question a line in, an answer a line out."""

    def __init__(self) -> None:
        """Raises GradingError if the worker doesn't come up."""
        self._process = subprocess.Popen(
            [sys.executable, "-m", "qtilt_trainer.tasks.grading_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # A Ctrl-C is ours to handle, not the worker's.
        )
        self._unread = b""
        try:
            self._read_line(STARTUP_TIMEOUT_S)
        except (TimeoutError, EOFError) as error:
            self.kill()
            raise GradingError(f"the grading process did not start ({error}): is math-verify installed?") from error

    def ask(self, question: dict[str, str], timeout: float) -> Any:
        """Raises TimeoutError after `timeout` seconds, EOFError if the process is gone."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(question).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise EOFError("the process is gone") from error
        return json.loads(self._read_line(timeout))

    def kill(self) -> None:
        """Ends the process, whatever it is doing."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            with contextlib.suppress(BrokenPipeError):  # The question it never read.
                stream.close()

    def _read_line(self, timeout: float) -> bytes:
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        deadline = time.monotonic() + timeout
        while b"\n" not in self._unread:
            ready, _, _ = select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise TimeoutError(f"no answer within {timeout:g} s")
            chunk = os.read(descriptor, 1 << 16)
            if not chunk:
                raise EOFError("the process is gone")
            self._unread += chunk
        line, self._unread = self._unread.split(b"\n", 1)
        return line
