"""A system in a process of its own, driven over a pipe: started once, asked once a round, idle in between."""

import multiprocessing
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any


class SystemProcess:
    """``make`` (a picklable callable) builds the object in the new process; its methods are called from this one.

    The process inherits the environment at construction: thread counts are set there, before torch is imported.
    """

    def __init__(self, name: str, make: Callable[[], Any]) -> None:
        self.name = name
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        # Not a daemon: torch's compiler starts processes of its own.
        self._process = context.Process(target=_serve, args=(theirs, make), name=name)
        self._process.start()
        theirs.close()

    def wait_until_ready(self) -> None:
        self._receive()

    def call(self, method: str, *arguments: Any) -> Any:
        """Raises RuntimeError with the other side's traceback."""
        self._pipe.send((method, arguments))
        return self._receive()

    def stop(self) -> None:
        self._pipe.close()
        self._process.join(timeout=20)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def _receive(self) -> Any:
        try:
            failed, result = self._pipe.recv()
        except EOFError:
            self._process.join(timeout=20)
            raise RuntimeError(f"the process of {self.name} ended with code {self._process.exitcode}") from None
        if failed:
            raise RuntimeError(f"{self.name} failed:\n{result}")
        return result


def _serve(pipe: Connection, make: Callable[[], Any]) -> None:
    try:
        target = make()
        pipe.send((False, None))
        while True:
            method, arguments = pipe.recv()
            pipe.send((False, getattr(target, method)(*arguments)))
    except EOFError:
        return
    except Exception:  # noqa: BLE001  the edge of the process: the parent raises it
        pipe.send((True, traceback.format_exc()))
