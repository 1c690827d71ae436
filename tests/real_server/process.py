"""Start ``qtilt-server`` as a user does, wait until it answers, and stop it."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

COMMAND = Path(sys.executable).parent / "qtilt-server"
QUICK_START = (
    "--enforce-eager",
    "--dtype=float32",
    "--kv-cache-memory-bytes=67108864",
    "--no-enable-log-requests",
    "--disable-uvicorn-access-log",
)
START_LIMIT_S = 240.0
STOP_LIMIT_S = 60.0


@dataclass(frozen=True)
class RunningServer:
    """base_url: of the OpenAI API. model: its id there. log: everything the server printed.

    session: id of the session of processes that the server and all it starts are in.
    """

    base_url: str
    model: str
    value_model_root: Path
    log: Path
    session: int

    @property
    def origin(self) -> str:
        return self.base_url.removesuffix("/v1")

    def get(self, path: str) -> httpx.Response:
        return httpx.get(f"{self.origin}{path}", timeout=30)

    def post(self, path: str, body: object) -> httpx.Response:
        return httpx.post(f"{self.origin}{path}", json=body, timeout=120)

    def wait_until(self, holds: Callable[[], bool], limit_s: float = 15.0) -> None:
        """Ask again and again; fails when it doesn't hold within the limit."""
        deadline = time.monotonic() + limit_s
        while not holds():
            assert time.monotonic() < deadline, f"did not happen within {limit_s:g} s"
            time.sleep(0.05)


@contextmanager
def running_server(
    model: Path,
    value_model_root: Path,
    log: Path,
    *flags: str,
    environment: dict[str, str] | None = None,
    port: int | None = None,
) -> Iterator[RunningServer]:
    """The server, ready; ``flags`` are added to those that make it start quickly. It is stopped afterwards."""
    port = port or free_port()
    arguments = [model, f"--port={port}", "--host=127.0.0.1", f"--value-model-root={value_model_root}", *QUICK_START]
    with log.open("w") as output:
        process = subprocess.Popen(
            [COMMAND, *arguments, *flags],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})},
            start_new_session=True,
        )
    server = RunningServer(f"http://127.0.0.1:{port}/v1", str(model), value_model_root, log, process.pid)
    try:
        _wait_until_ready(process, server)
        yield server
    finally:
        _stop(process)


def _wait_until_ready(process: "subprocess.Popen[bytes]", server: RunningServer) -> None:
    deadline = time.monotonic() + START_LIMIT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with code {process.returncode}:\n{server.log.read_text()[-6000:]}")
        try:
            if server.get("/health").status_code == httpx.codes.OK:
                return
        except httpx.TransportError:
            time.sleep(0.2)
    raise TimeoutError(f"the server isn't ready after {START_LIMIT_S:g} s:\n{server.log.read_text()[-6000:]}")


def _stop(process: "subprocess.Popen[bytes]") -> None:
    """Ask first; then end the whole session, workers included."""
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(STOP_LIMIT_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(STOP_LIMIT_S)
        raise  # Whatever was under way, a server that is told to stop ends.


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
