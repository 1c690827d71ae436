"""Two replicas behind vLLM's own router: what is asked through it, published to both, and when one is killed."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import BadRequestError, OpenAI

from real_server.models import make_reference, make_value_model
from real_server.process import RunningServer, free_port, running_server

ROUTER = Path(sys.executable).parent / "vllm-router"


@dataclass
class Replica:
    """One of the servers, which may be started again in its place."""

    directory: Path
    number: int
    port: int

    @contextmanager
    def running(self, start: int) -> Iterator[RunningServer]:
        """For the ``start``-th time; with the registry of the times before."""
        flags = (
            "--served-model-name=reference",
            f"--value-model=value={self.directory / 'root' / 'start'}",
            f"--value-model-registry={self.directory / f'registry-{self.number}.json'}",
        )
        log = self.directory / f"server-{self.number}-{start}.log"
        place = self.directory / "reference", self.directory / "root"
        with running_server(*place, log, *flags, port=self.port) as server:
            yield server


@contextmanager
def routing(directory: Path, *urls: str) -> Iterator[str]:
    """The router's address."""
    port = free_port()
    command = [
        ROUTER,
        *("--host", "127.0.0.1", "--port", str(port), "--worker-urls", *urls),
        *("--policy", "round_robin", "--prometheus-port", str(free_port()), "--log-level", "warning"),
        *("--health-check-interval-secs", "1", "--health-failure-threshold", "1", "--health-success-threshold", "1"),
    ]
    with (directory / "router.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            _wait_until(lambda: _answers(f"http://127.0.0.1:{port}/v1/models"))
            yield f"http://127.0.0.1:{port}"
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=5).status_code == httpx.codes.OK
    except httpx.TransportError:
        return False


def _wait_until(holds: Any, limit_s: float = 60.0) -> None:
    deadline = time.monotonic() + limit_s
    while not holds():
        assert time.monotonic() < deadline, f"did not happen within {limit_s:g} s"
        time.sleep(0.1)


def publish(server: RunningServer, path: str) -> str:
    answer = server.post("/v1/guidance/value_models", {"name": "value", "path": path})
    assert answer.status_code == httpx.codes.OK, answer.text
    return str(answer.json()["digest"])


def guided_tokens(server: RunningServer) -> float:
    lines = server.get("/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("qtilt_guided_tokens_total{"))


def test_replicas_serve_one_digest_after_a_publication_and_a_kill(tmp_path: Path) -> None:
    directory = tmp_path.resolve()
    make_reference(directory / "reference")
    (directory / "root").mkdir()
    for seed, name in enumerate(("start", "one"), start=1):
        make_value_model(directory / "root" / name, seed=seed)
    replicas = [Replica(directory, number, free_port()) for number in range(2)]
    with ExitStack() as running:
        with ThreadPoolExecutor(2) as pool:
            first, second = pool.map(running.enter_context, [each.running(1) for each in replicas])
        url = running.enter_context(routing(directory, first.origin, second.origin))
        client = running.enter_context(OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=4, timeout=60))

        def ask(value_model: str, **more: Any) -> Any:
            block = {"value_model": value_model, **more}
            return client.completions.create(
                model="reference", prompt="abc", max_tokens=5, seed=1, extra_body={"guidance": block}
            )

        answers = [ask("value") for _ in range(6)]
        assert {answer.guidance["value_model"] for answer in answers} == {"value@1"}
        assert len({answer.choices[0].text for answer in answers}) == 1
        assert guided_tokens(first) > 0
        assert guided_tokens(second) > 0
        with pytest.raises(BadRequestError, match=r"guidance\.top_k"):
            ask("value", top_k=0)
        chunks = list(
            client.completions.create(
                model="reference", prompt="abc", max_tokens=5, stream=True, extra_body={"guidance": {"details": True}}
            )
        )
        assert chunks[-1].choices[0].guidance["kl"] > 0  # type: ignore[attr-defined]
        assert sum(len(chunk.choices[0].guidance["details"]) for chunk in chunks) == 5  # type: ignore[attr-defined]

        digest = publish(first, "one")
        assert publish(second, "one") == digest
        pinned = f"value@{digest}"
        assert {ask(pinned).guidance["value_model"] for _ in range(4)} == {"value@2"}

        os.killpg(second.session, signal.SIGKILL)
        _wait_until(lambda: not _answers(f"{second.origin}/health"))
        assert {ask(pinned).guidance["value_model"] for _ in range(6)} == {"value@2"}

        second = running.enter_context(replicas[1].running(2))
        _wait_until(lambda: [ask(pinned) for _ in range(4)] and guided_tokens(second) > 0)
        assert {ask(pinned).guidance["value_model"] for _ in range(4)} == {"value@2"}
