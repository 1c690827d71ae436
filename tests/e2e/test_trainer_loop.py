"""The whole loop on real parts: qtilt-trainer against the real server, with a task whose optimum has a closed form."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from letters import REFERENCE_ACCURACY, STEPS, Letters, make_letters_backbone, make_letters_reference, optimum
from qtilt_trainer.rollouts import RolloutStore
from real_server.process import RunningServer, running_server

COMMAND = Path(sys.executable).parent / "qtilt-trainer"
TESTS = Path(__file__).parents[1]
CONFIG = """
run_dir = "run"
[task]
name = "letters:Letters"
[server]
value_model_root = "."
[value_model]
backbone = "backbone"
[sampling]
max_tokens = 6
[collect]
prompts = 64
samples_per_prompt = 80
eta = 0.2
[reward]
truncated = "grade"  # Letters never end by themselves.
[fit]
steps = 600
batch_size = 128
learning_rate = 6e-3
threads = 1
[evaluate]
prompts = 60
samples = 8
inv_eta = [5.0]
sampling = [{}]
[[iterations]]
fit.steps = 200
[[iterations]]
collect.samples_per_prompt = 4
"""


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trainer's working directory, which is the server's value-model root too."""
    directory = tmp_path_factory.mktemp("loop")
    make_letters_reference(directory / "reference")
    make_letters_backbone(directory / "backbone")
    (directory / "loop.toml").write_text(CONFIG)
    return directory


@pytest.fixture(scope="module")
def letters_server(work: Path) -> Iterator[RunningServer]:
    with running_server(work / "reference", work, work / "server.log", "--max-num-seqs=128") as server:
        yield server


def start(work: Path, server: RunningServer) -> "subprocess.Popen[bytes]":
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS)}
    with (work / "trainer.log").open("ab") as log:
        command = [COMMAND, "loop", "loop.toml", "--server", server.origin]
        return subprocess.Popen(command, cwd=work, env=environment, stdout=log, stderr=log)


def kill_when(process: "subprocess.Popen[bytes]", file: Path, log: Path) -> None:
    deadline = time.monotonic() + 120
    while not file.exists():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait(10)


@pytest.fixture(scope="module")
def run_dir(work: Path, letters_server: RunningServer) -> Path:
    """A finished run that was killed while the guided roll-outs were collected, and started again."""
    collecting = work / "run" / "rollouts" / "iteration-002" / "settings.json"
    kill_when(start(work, letters_server), collecting, work / "trainer.log")
    assert start(work, letters_server).wait(200) == 0, (work / "trainer.log").read_text()
    return work / "run"


def test_guided_completions_reach_the_closed_form_optimum(run_dir: Path) -> None:
    results = {(row["method"], row["regime"]): row for row in json.loads((run_dir / "results.json").read_text())}
    best, kl = optimum(5.0)
    reference, guided = results["reference", "T 1"], results["qsharp", "T 1"]
    assert reference["accuracy"] == pytest.approx(REFERENCE_ACCURACY, abs=0.08)
    assert reference["kl"] == 0.0
    assert guided["accuracy"] == pytest.approx(best, abs=0.05)
    assert guided["kl"] == pytest.approx(kl, abs=0.25)
    assert guided["low"] <= guided["accuracy"] <= guided["high"]
    assert guided["n"] == 60
    assert guided["value_model"] == "value@3"
    assert results["qsharp", "greedy"]["accuracy"] == 1.0
    # Any six letters without a repetition are right for every prompt.
    assert results["constant", None]["accuracy"] == 1.0


def test_roll_outs_are_complete_and_graded_and_unique(run_dir: Path) -> None:
    store, task = RolloutStore(run_dir / "rollouts"), Letters()
    first, second = store.read(1), store.read(2)
    assert (len(first), len(second)) == (64 * 80, 64 * 4)
    assert all(len(rollout.token_ids) == STEPS for rollout in [*first, *second])
    problems = {problem.id: problem for problem in task.problems("train", 64)}
    assert all(
        rollout.reward == task.reward(problems[rollout.prompt_id], rollout.text) for rollout in [*first, *second]
    )
    assert np.mean([rollout.reward for rollout in first]) == pytest.approx(REFERENCE_ACCURACY, abs=0.03)
    assert {(rollout.switch_point, rollout.kl, rollout.value_model) for rollout in first} == {(0, 0.0, None)}


def test_later_roll_outs_are_guided_for_exactly_g_tokens_by_the_version_before(run_dir: Path) -> None:
    rollouts = RolloutStore(run_dir / "rollouts").read(2)
    assert {rollout.switch_point for rollout in rollouts} == set(range(STEPS))
    for rollout in rollouts:
        assert rollout.guided_tokens == rollout.switch_point
        assert rollout.value_model == ("value@2" if rollout.switch_point else None)
        assert (rollout.kl > 0) == (rollout.switch_point > 0)


def test_the_server_has_the_versions_of_both_iterations(run_dir: Path, letters_server: RunningServer) -> None:
    (model,) = letters_server.get("/v1/guidance").json()["value_models"]
    assert model["active"] == 3
    assert [version["path"].split("/")[-1] for version in model["versions"]] == ["iteration-001", "iteration-002"]


def test_the_run_has_its_report(run_dir: Path) -> None:
    assert "<html" in (run_dir / "report.html").read_text()[:500].lower()


def test_single_stages_find_everything_done(run_dir: Path, work: Path, letters_server: RunningServer) -> None:
    def run(*arguments: str) -> str:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS)}
        command = [COMMAND, *arguments, "--server", letters_server.origin]
        done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout

    parts = {part: part.stat().st_mtime_ns for part in run_dir.rglob("part-*.parquet")}
    assert run("collect", "loop.toml", "--iteration", "2") == ""
    assert run("fit", "loop.toml") == ""
    assert run("publish", "loop.toml") == "value@3\n"
    assert run("evaluate", "loop.toml").startswith("T 1 (60 prompts × 8 completions)\n")
    assert {part: part.stat().st_mtime_ns for part in run_dir.rglob("part-*.parquet")} == parts
