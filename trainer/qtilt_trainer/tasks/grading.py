r"""Is the boxed answer of a completion the expected one? SymPy decides, in a process we can kill.

The parser (math-verify's, ANTLR) and SymPy run for hours or eat all memory on hostile answers, and math-verify's own
time limits need SIGALRM, so they work in a main thread only and not against C code. Here a worker that computes for too
long, or takes too much memory, ends; its answer counts as wrong. Plain numbers, most answers of most data sets, are
compared without a worker.
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
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from qtilt_trainer.tasks.answer_text import boxed_answer, made_plain
from qtilt_trainer.tasks.plain_numbers import plain_number, same_number

logger = logging.getLogger(__name__)

TIMEOUT_S = 5.0
"""Seconds of computing that one comparison may take. Honest answers take milliseconds."""
PATIENCE = 20
"""How much longer it may take by the clock, on a machine that does other things too."""
STARTUP_TIMEOUT_S = 180.0
"""Longest time a worker may take to import SymPy and the parser."""
WORKERS = 2
WORKER_MODULE = "qtilt_trainer.tasks.grading_worker"
READ_AT_ONCE = 64
"""Expected answers in one question of `unreadable_answers`."""


class GradingError(RuntimeError):
    """The grading process can't be started at all."""


def matches_expression(expected: str, completion: str) -> bool:
    """Whether the completion's boxed answer is mathematically the expected one."""
    given = boxed_answer(completion)
    return given is not None and answers_equal(expected.strip(), given)


@functools.lru_cache(maxsize=1 << 17)
def answers_equal(expected: str, given: str) -> bool:
    """Whether two answers, without their boxes, are the same."""
    if expected == given:
        return True
    numbers = plain_number(made_plain(expected)), plain_number(made_plain(given))
    if numbers[0] is not None and numbers[1] is not None:
        return same_number(numbers[0], numbers[1])
    return _default_pool().ask({"expected": expected, "given": given}) is True


def unreadable_answers(texts: Sequence[str]) -> dict[str, str]:
    """Why, for each of the expected answers that can't be read; nothing for the others.

    About 5 ms for each one that is no plain number; what was read once isn't read again.
    """
    new = [text for text in dict.fromkeys(texts) if text not in _READ]
    plain = {text for text in new if plain_number(made_plain(text)) is not None}
    _READ.update(dict.fromkeys(plain))
    rest = [text for text in new if text not in plain]
    batches = [rest[at : at + READ_AT_ONCE] for at in range(0, len(rest), READ_AT_ONCE)]
    with ThreadPoolExecutor(WORKERS) as threads:
        for batch, reasons in zip(batches, threads.map(_read, batches), strict=True):
            _READ.update(zip(batch, reasons, strict=True))
    return {text: reason for text in texts if (reason := _READ[text]) is not None}


_READ: dict[str, str | None] = {}
"""Why each expected answer can't be read, None if it can."""


def _read(texts: list[str]) -> list[str | None]:
    """Reads a batch; one by one if the batch took too long, to find out which it was."""
    reasons = _default_pool().ask({"unreadable": texts}, READ_AT_ONCE * TIMEOUT_S / 4)
    if reasons is not None:
        return list(reasons)
    return [(_default_pool().ask({"unreadable": [text]}) or ["reading it takes too long"])[0] for text in texts]


@functools.cache
def _default_pool() -> "GradingPool":
    pool = GradingPool()
    atexit.register(pool.close)
    return pool


class GradingPool:
    """A few grading processes shared by any number of threads; a process is started when first needed."""

    def __init__(self, workers: int = WORKERS, timeout: float = TIMEOUT_S, module: str = WORKER_MODULE) -> None:
        """Raises ValueError for less than one worker or a timeout that isn't positive."""
        if workers < 1 or not timeout > 0:
            raise ValueError(f"workers must be >= 1 and timeout > 0 seconds, got {workers} and {timeout}")
        self.timeout = timeout
        self.module = module
        self.killed = 0
        """Workers that had to be killed or died so far."""
        self._idle: queue.LifoQueue[GradingProcess | None] = queue.LifoQueue()
        for _ in range(workers):
            self._idle.put(None)
        self._workers = workers

    def ask(self, question: dict[str, Any], timeout: float | None = None) -> Any:
        """The worker's answer to one question; None if it was late or died (and was replaced)."""
        process = self._idle.get()
        reusable = None
        try:
            process = process or GradingProcess(self.module)
            limit = timeout or self.timeout
            answer = process.ask(question | {"cpu_s": limit}, PATIENCE * limit)
            reusable = process
            return answer
        except (TimeoutError, EOFError) as error:
            self.killed += 1
            logger.warning("grading %.500r gave no answer (%s): counted as wrong", question, error)
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
    """One `python -m MODULE`, a worker like grading_worker.py: a question a line in, an answer a line out."""

    def __init__(self, module: str = WORKER_MODULE) -> None:
        """Raises GradingError if the worker doesn't come up."""
        self._process = subprocess.Popen(
            [sys.executable, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONHASHSEED": "0"},  # What is made of sets is the same in every run.
            start_new_session=True,  # A Ctrl-C is ours to handle, not the worker's.
        )
        self._unread = b""
        try:
            self._read_line(STARTUP_TIMEOUT_S)
        except (TimeoutError, EOFError) as error:
            self.kill()
            raise GradingError(f"the grading process did not start ({error}): does python -m {module} run?") from error

    def ask(self, question: dict[str, Any], timeout: float) -> Any:
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
