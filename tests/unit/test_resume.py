"""kill -9 in every stage of the loop, then the same command again: no roll-out lost, none twice, nothing done again.

The trainer is the real command in a process of its own; the server stands in for qtilt-server, so that the kill can
come at an exact request. The result must equal that of a run nobody killed: the stand-in's completions depend on prompt
and seed alone. (Two undisturbed runs against vLLM may differ, since other batches change the last bits of its logits.)
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qtilt_trainer.rollouts import RolloutStore
from stand_in_server import StandInServer, make_tokenizer
from tiny_backbone import write_tiny_backbone

COMMAND = Path(sys.executable).parent / "qtilt-trainer"
STAR_GRAPH = f"{Path(__file__).parents[2]}/examples/toys/star_graph.py:StarGraph"
PROMPTS, SAMPLES, PROMPTS_2, SAMPLES_2 = 120, 6, 70, 5
CELLS = ("iteration-000/reference-t1", "iteration-002/qsharp-10-t1")
CONFIG = f"""
run_dir = "run"
[task]
name = "{STAR_GRAPH}"
[server]
concurrency = 4
retries = 0
value_model_root = "run/value_models"
[value_model]
backbone = "backbone"
[sampling]
max_tokens = 8
[collect]
prompts = {PROMPTS}
samples_per_prompt = {SAMPLES}
[fit]
steps = 12
batch_size = 16
learning_rate = 1e-3
threads = 1
[evaluate]
prompts = 80
samples = 4
inv_eta = [10]
methods = ["qsharp"]
decoding = ["sample"]
sampling = [{{}}]
[[iterations]]
[[iterations]]
collect.prompts = {PROMPTS_2}
collect.samples_per_prompt = {SAMPLES_2}
"""


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("backbone")
    write_tiny_backbone(directory, make_tokenizer(), positions=64)
    return directory


def _hear_interrupts() -> None:
    """A shell's background job ignores SIGINT, and what it starts inherits that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Trainer:
    """`qtilt-trainer loop` in a working directory of its own, as often as it takes."""

    def __init__(self, directory: Path, backbone: Path, server: StandInServer) -> None:
        self.directory, self.server = directory, server
        directory.mkdir(parents=True)
        (directory / "backbone").symlink_to(backbone)
        (directory / "loop.toml").write_text(CONFIG)
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def run_dir(self) -> Path:
        return self.directory / "run"

    def start(self) -> "subprocess.Popen[bytes]":
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        with (self.directory / "log").open("ab") as log:
            command = [COMMAND, "loop", "loop.toml", "--server", self.server.url]
            self.process = subprocess.Popen(
                command, cwd=self.directory, env=environment, stdout=log, stderr=log, preexec_fn=_hear_interrupts
            )
        return self.process

    def kill(self) -> None:
        assert self.process is not None
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait(10)

    def finish(self) -> None:
        code = self.start().wait(120)
        assert code == 0, (self.directory / "log").read_text()

    def start_and_kill_when(self, condition: Callable[[], bool]) -> None:
        process = self.start()
        deadline = time.monotonic() + 90
        while not condition():
            assert process.poll() is None, f"ended before the kill: {(self.directory / 'log').read_text()}"
            assert time.monotonic() < deadline, "the moment to kill never came"
            time.sleep(0.002)
        self.kill()

    def start_and_kill_at_request(self, path: str, number: int) -> None:
        """Killed while request `number` to `path` (counted from now) is in flight; it is answered into the void."""
        reached = threading.Event()
        gone = threading.Event()
        before = len(self.server.bodies(path))

        def hold(asked: str, body: Any) -> None:
            if asked == path and len(self.server.bodies(path)) >= before + number:
                reached.set()
                gone.wait(10)

        self.server.before = hold
        self.start_and_kill_when(reached.is_set)
        gone.set()
        self.server.before = lambda path, body: None

    def outcome(self) -> dict[str, Any]:
        """Everything a run has made, without when and under which version number."""
        stores = {"rollouts": RolloutStore(self.run_dir / "rollouts")}
        stores |= {cell: RolloutStore(self.run_dir / "evaluation" / cell) for cell in CELLS}
        made: dict[str, Any] = {name: [_timeless(row) for row in store.read()] for name, store in stores.items()}
        made["results"] = [_without_version(row) for row in json.loads((self.run_dir / "results.json").read_text())]
        for number in (1, 2):
            record = self.run_dir / "value_models" / f"iteration-{number:03d}.fit.json"
            made[f"labels {number}"] = json.loads(record.read_text())["labels"]
        return made

    def head(self, iteration: int) -> torch.Tensor:
        directory = self.run_dir / "value_models" / f"iteration-{iteration:03d}"
        return load_file(directory / "head.safetensors")["weight"]


def _timeless(rollout: Any) -> Any:
    return {name: getattr(rollout, name) for name in rollout.__slots__ if name != "value_model"}


def _without_version(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name != "value_model"}


@pytest.fixture
def server() -> Iterator[StandInServer]:
    with StandInServer() as server:
        yield server


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, backbone: Path) -> Trainer:
    """A run that nobody killed."""
    with StandInServer() as server:
        trainer = Trainer(tmp_path_factory.mktemp("undisturbed") / "work", backbone, server)
        trainer.finish()
        made = trainer.outcome()
        assert len(made["rollouts"]) == PROMPTS * SAMPLES + PROMPTS_2 * SAMPLES_2
        # Every fit sees the roll-outs of all iterations up to its own.
        assert made["labels 1"]["rollouts"] == PROMPTS * SAMPLES
        assert made["labels 2"]["rollouts"] == PROMPTS * SAMPLES + PROMPTS_2 * SAMPLES_2
        assert len(server.bodies("/v1/guidance/value_models")) == 3  # the initial one, and one an iteration
        requests = len(server.bodies("/v1/completions"))
        trainer.finish()  # Again: nothing is left to do.
        assert len(server.bodies("/v1/completions")) == requests == 1 + PROMPTS + PROMPTS_2 * SAMPLES_2 + 3 * 80
        assert len(server.bodies("/v1/guidance/value_models")) == 3
        assert trainer.outcome() == made
    return trainer


def test_killed_in_every_stage_the_loop_makes_what_it_makes_undisturbed(
    tmp_path: Path, backbone: Path, server: StandInServer, undisturbed: Trainer
) -> None:
    trainer = Trainer(tmp_path / "work", backbone, server)
    completions, publications = "/v1/completions", "/v1/guidance/value_models"
    run_dir = trainer.run_dir

    trainer.start_and_kill_at_request(completions, 70)  # collect 1, after a part was written
    assert len(RolloutStore(run_dir / "rollouts").ids()) in range(1, PROMPTS * SAMPLES)
    trainer.start_and_kill_when((run_dir / "value_models" / "iteration-001.settings.json").exists)  # fit 1
    assert len(RolloutStore(run_dir / "rollouts").read()) == PROMPTS * SAMPLES
    trainer.start_and_kill_at_request(publications, 1)  # publish 1, loaded but never noted
    trainer.start_and_kill_at_request(completions, PROMPTS_2 * SAMPLES_2 - 20)  # collect 2
    assert len(RolloutStore(run_dir / "rollouts").ids()) > PROMPTS * SAMPLES
    trainer.start_and_kill_when((run_dir / "value_models" / "iteration-002.settings.json").exists)  # fit 2
    server.restart()
    trainer.start_and_kill_at_request(completions, 75)  # evaluate, reference
    trainer.start_and_kill_at_request(completions, 90)  # evaluate, the next cell
    trainer.finish()

    made = trainer.outcome()
    for name, value in undisturbed.outcome().items():
        assert made[name] == value, name
    for iteration in (1, 2):
        # Not bit for bit: matrix products may depend on where the memory is aligned.
        torch.testing.assert_close(trainer.head(iteration), undisturbed.head(iteration), atol=2e-3, rtol=0)
    # Nobody noted the first load of 001; the restarted server knew none. Everything else was loaded once.
    assert [body["path"][-3:] for body in server.bodies(publications)] == ["ial", "001", "001", "002"]


def test_two_trainers_do_not_work_in_one_directory(tmp_path: Path, backbone: Path, server: StandInServer) -> None:
    trainer = Trainer(tmp_path / "work", backbone, server)
    reached, go_on = threading.Event(), threading.Event()

    def hold(path: str, body: Any) -> None:
        reached.set()
        go_on.wait(30)

    server.before = hold
    first = trainer.start()
    assert reached.wait(90)
    second = subprocess.run(
        [COMMAND, "loop", "loop.toml", "--server", server.url], cwd=trainer.directory, capture_output=True, timeout=60
    )
    first.kill()
    go_on.set()
    first.wait(10)
    assert second.returncode == 2
    assert b"another qtilt-trainer is working in run" in second.stderr


def test_other_settings_for_a_begun_stage_are_refused(tmp_path: Path, backbone: Path, server: StandInServer) -> None:
    trainer = Trainer(tmp_path / "work", backbone, server)
    trainer.start_and_kill_at_request("/v1/completions", 5)
    seven = CONFIG.replace("max_tokens = 8", "max_tokens = 7")  # Nothing is stored yet: this may change.
    (trainer.directory / "loop.toml").write_text(seven)
    trainer.start_and_kill_at_request("/v1/completions", 70)
    for text, complaint in (
        (CONFIG, "has other settings (sampling.max_tokens: 7 then, 8 now)"),
        (seven.replace('"backbone"', '"./backbone"'), "initial.settings.json has other settings (backbone: 'backbone'"),
        (seven.replace("[server]", '[server]\nmodel = "x"'), "holds roll-outs of stand-in, and the server serves x"),
    ):
        (trainer.directory / "loop.toml").write_text(text)
        assert trainer.start().wait(60) == 2
        assert complaint in (trainer.directory / "log").read_text()


def test_a_refused_evaluation_leaves_the_configuration_of_the_results_alone(
    server: StandInServer, undisturbed: Trainer
) -> None:
    undisturbed.server = server
    (undisturbed.directory / "loop.toml").write_text(CONFIG.replace("prompts = 80", "prompts = 81"))
    assert undisturbed.start().wait(60) == 2
    assert "has other settings (evaluate.prompts: 80 then, 81 now)" in (undisturbed.directory / "log").read_text()
    assert json.loads((undisturbed.run_dir / "config.json").read_text())["evaluate"]["prompts"] == 80


def test_a_fit_of_roll_outs_that_are_not_complete_is_refused(
    tmp_path: Path, backbone: Path, server: StandInServer
) -> None:
    trainer = Trainer(tmp_path / "work", backbone, server)
    trainer.start_and_kill_at_request("/v1/completions", 70)
    fit = subprocess.run(
        [COMMAND, "fit", "loop.toml", "--iteration", "1"], cwd=trainer.directory, capture_output=True, timeout=60
    )
    assert fit.returncode == 2
    assert b"iteration 1 lacks" in fit.stderr
    assert not (trainer.run_dir / "value_models" / "iteration-001").exists()


def test_an_interrupt_stores_what_had_arrived_and_says_how_to_go_on(
    tmp_path: Path, backbone: Path, server: StandInServer
) -> None:
    trainer = Trainer(tmp_path / "work", backbone, server)
    reached = threading.Event()

    def hold(path: str, body: Any) -> None:
        if len(server.bodies("/v1/completions")) > 1 + 9:  # The first one was the rehearsal's.
            reached.set()
            time.sleep(2)

    server.before = hold
    process = trainer.start()
    assert reached.wait(90)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 130
    assert "interrupted; the same command goes on from here" in (trainer.directory / "log").read_text()
    # Four requests at a time: nine are answered, the others held.
    assert len(RolloutStore(trainer.run_dir / "rollouts").ids()) == 9 * SAMPLES
