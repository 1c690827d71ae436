"""One server for all tests of this folder that don't need another: it takes about half a minute to start."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from openai import OpenAI

from real_server.checking import Oracle
from real_server.models import graded, make_reference, make_value_model
from real_server.process import RunningServer, running_server
from real_server.state import running, worker_state

SWAP_TIMEOUT_S = 3


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """reference/: the model served. published/: the value-model root, in it ``start`` and ``graded``."""
    directory = tmp_path_factory.mktemp("models").resolve()
    make_reference(directory / "reference")
    (directory / "published").mkdir()
    rollouts = {"temperature": 1.0, "top_p": 1.0, "top_k": 0}
    make_value_model(directory / "published" / "start", seed=1, provenance={"rollouts": rollouts})
    make_value_model(directory / "published" / "graded", seed=2, type="q", distribution=graded())
    return directory


@pytest.fixture(scope="session")
def server(models: Path) -> Iterator[RunningServer]:
    """Value models ``value`` (V-type, Bernoulli; the default) and ``graded`` (Q-type, categorical)."""
    root = models / "published"
    flags = (
        f"--value-model=value={root / 'start'}",
        f"--value-model=graded={root / 'graded'}",
        "--guidance-eta=0.2",
        "--guidance-top-k=8",
        f"--swap-timeout={SWAP_TIMEOUT_S}",
        "--max-num-seqs=40",
        "--logprobs-mode=processed_logprobs",
        "--enable-prompt-embeds",
        "--enable-auto-tool-choice",
        "--tool-call-parser=hermes",
    )
    # vLLM's development routes include the calls into the worker that show whether anything leaks there.
    environment = {"VLLM_SERVER_DEV_MODE": "1"}
    with running_server(models / "reference", root, models / "server.log", *flags, environment=environment) as server:
        yield server


@pytest.fixture(scope="session")
def client(server: RunningServer) -> Iterator[OpenAI]:
    with OpenAI(base_url=server.base_url, api_key="none", max_retries=0, timeout=120) as client:
        yield client


@pytest.fixture(scope="session")
def oracle(models: Path) -> Oracle:
    """Tests that publish a version add its directory."""
    torch.set_num_threads(1)  # threads that wait for each other beside a busy server are many times slower
    root = models / "published"
    return Oracle(models / "reference", {"value@1": root / "start", "graded@1": root / "graded"})


@pytest.fixture
def idle(server: RunningServer) -> Iterator[RunningServer]:
    """The server; after the test no lease is held and nothing of a guided request is left in the worker."""
    yield server
    server.wait_until(lambda: running(server) == 0 and worker_state(server)["guided_rows"] == 0)
    server.wait_until(lambda: worker_state(server)["traces"] == 0)
