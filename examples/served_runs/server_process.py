"""`qtilt-server` as a child process: started on a free port, awaited, and ended with everything it started."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

START_SECONDS = 600
"""A busy machine takes minutes to import vLLM; an idle one is ready in half a minute."""
STOP_SECONDS = 30
FEW_CORES = 4
"""With so few, vLLM's habit of keeping one free of computing costs more than it gives."""


class ServerFailedError(RuntimeError):
    """The server ended or didn't answer in time; the message has the end of its log."""


def server_environment() -> dict[str, str]:
    """This process's environment, with what a server wants that runs for minutes on a CPU."""
    # torch.compile would take 15 s for the first request, to speed up one that needs no speed.
    environment = {**os.environ, "TORCHDYNAMO_DISABLE": "1", "VLLM_NO_USAGE_STATS": "1"}
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) <= FEW_CORES:
        environment.setdefault("VLLM_CPU_OMP_THREADS_BIND", ",".join(map(str, cores)))
    return environment


@contextmanager
def running_server(model: Path, served_as: str, run_dir: Path, flags: Sequence[str]) -> Iterator[str]:
    """The URL of a server of `model` that may load value models from `run_dir/value_models`."""
    root = run_dir / "value_models"
    root.mkdir(parents=True, exist_ok=True)
    port = _free_port()
    command = [str(Path(sys.executable).parent / "qtilt-server"), str(model), *flags]
    command += [f"--served-model-name={served_as}", f"--value-model-root={root}", "--host=127.0.0.1", f"--port={port}"]
    log = run_dir / "server.log"
    # Its own session: the server has worker processes, and all of them must end with it.
    with log.open("w") as stream:
        environment = {**server_environment(), "HF_HUB_OFFLINE": "1"}
        process = subprocess.Popen(
            command, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True, env=environment
        )
    try:
        url = f"http://127.0.0.1:{port}"
        _wait_until_ready(process, url, log)
        yield url
    finally:
        _stop(process)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_until_ready(process: "subprocess.Popen[bytes]", url: str, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise ServerFailedError(f"the server ended with code {process.returncode}; {log} ends:\n{_end_of(log)}")
        if _answers(f"{url}/health"):
            return
        time.sleep(0.5)
    raise ServerFailedError(f"the server was not ready after {START_SECONDS} s; {log} ends:\n{_end_of(log)}")


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _end_of(log: Path, lines: int = 15) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])


def _stop(process: "subprocess.Popen[bytes]") -> None:
    if process.poll() is None:
        process.terminate()  # not SIGINT: what a shell runs in the background ignores it
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOP_SECONDS)
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()
