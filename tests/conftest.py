"""Markers by folder, and the settings under which vLLM is quick to start in tests."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

pytest.register_assert_rewrite("guided_vllm")  # tests that several folders run

from guided_vllm import matrix
from guided_vllm.vllm_on_cpu import run_model_runner_v2
from own_process import OwnProcess, ReportsBack, is_of

# Read when torch or vllm is imported, so set before any test module is. A server started by a test inherits them.
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # the first request with logprobs otherwise compiles for 13-20 s
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "agg")

TESTS = Path(__file__).parent
FOLDER_MARKERS = ("unit", "vllm", "vllm_v2", "e2e", "gpu")
V2_FOLDER = TESTS / "vllm_v2"

if is_of(V2_FOLDER):
    run_model_runner_v2()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--matrix-to", metavar="FILE", help="write what the collected tests cover (see guided_vllm.matrix)"
    )


def pytest_collection_finish(session: pytest.Session) -> None:
    if (path := session.config.getoption("--matrix-to")) is not None:
        Path(path).write_text(json.dumps(matrix.report(session.items)))


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(ReportsBack(config) if is_of(V2_FOLDER) else OwnProcess(V2_FOLDER))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items[:] = [item for item in items if matrix.is_meant_to_run(item)]
    for item in items:
        folder = item.path.relative_to(TESTS).parts[0]
        if folder not in FOLDER_MARKERS:
            raise pytest.UsageError(f"{item.path}: put tests in one of tests/{{{','.join(FOLDER_MARKERS)}}}/")
        item.add_marker(folder)
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if gpu_items and not cuda_is_available():
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def cuda_is_available() -> bool:
    import torch

    return torch.cuda.is_available()
