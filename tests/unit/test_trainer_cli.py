"""The command line: quick help, frozen help, bad input in one line."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from qtilt_trainer.cli import main
from tiny_backbone import write_tiny_backbone
from tiny_reference import build_tokenizer

COMMAND = Path(sys.executable).parent / "qtilt-trainer"
CONFIG = """
run_dir = "run"
[task]
name = "star_graph:StarGraph"
[server]
url = "http://127.0.0.1:9"
retries = 0
value_model_root = "."
[value_model]
backbone = "none"
[sampling]
max_tokens = 8
[collect]
prompts = 2
samples_per_prompt = 2
[fit]
steps = 1
"""


def test_help_needs_nothing_heavy() -> None:
    heavy = "torch", "transformers", "numpy", "pydantic", "openai", "pyarrow"
    program = f"import sys, qtilt_trainer.cli as c; c.build_parser(); print([m for m in {heavy} if m in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=30)
    assert shown.stdout.strip() == "[]"
    subprocess.run([COMMAND, "--help"], capture_output=True, check=True, timeout=30)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["loop", "none.toml"], r"can't read the configuration none\.toml: No such file"),
        (["collect", "run.toml", "--iteration", "3"], r"--iteration must be 1 to 2, got 3"),
        (["publish", "run.toml"], r"there is no run/value_models/iteration-002: fit iteration 2 first"),
        (["fit", "run.toml", "--iteration", "1"], r"iteration 1 lacks 4 roll-outs: collect --iteration 1 first"),
        (["collect", "run.toml", "--run-dir", "run.toml/below"], r"Not a directory: 'run\.toml/below'"),
        (["loop", "flat.toml", "--server", "http://127.0.0.1:9"], r"server: Input should be a valid dictionary"),
        (["loop", "latin.toml"], r"latin\.toml: not TOML: .*utf-8"),
        (["evaluate", "run.toml"], r"the configuration has no \[evaluate\] table"),
        (["collect", "run.toml", "--server", "localhost:1"], r"server\.url: must begin with http://"),
        (
            [
                "init",
                "--backbone",
                "none",
                "--type",
                "v",
                "--distribution",
                "categorical",
                "--atoms",
                "1",
                "--out",
                "x",
            ],
            r"init\.atoms: Input should be greater than or equal to 2, got 1",
        ),
        (
            ["init", "--backbone", "./none", "--type", "v", "--distribution", "bernoulli", "--out", "x"],
            r"backbone './none' is no model directory or hub id that can be read",
        ),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run.toml").write_text(CONFIG)
    Path("flat.toml").write_text('server = "here"\n' + CONFIG.replace("[server]", "[server_]"))
    Path("latin.toml").write_bytes('run_dir = "é"'.encode("latin-1"))
    assert main(arguments) == 2
    complaint = [line for line in capfd.readouterr().err.splitlines() if line.startswith("qtilt-trainer:")]
    assert len(complaint) == 1
    assert re.search(message, complaint[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train"], r"invalid choice: 'train' \(choose from "),
        (["loop"], r"qtilt-trainer loop: the following arguments are required: CONFIG"),
        (["fit", "run.toml", "--iteration", "one"], r"--iteration: invalid int value: 'one'"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_exit_code_2(
    arguments: list[str], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    (complaint,) = capfd.readouterr().err.splitlines()
    assert re.match(r"qtilt-trainer.*: ", complaint)
    assert re.search(message, complaint)


def test_a_server_that_is_away_is_one_line_and_exit_code_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run.toml").write_text(CONFIG)
    assert main(["loop", "run.toml"]) == 1
    assert re.search(
        r"^qtilt-trainer: no server answers at http://127.0.0.1:9 .*start qtilt-server", capfd.readouterr().err, re.M
    )


def test_a_task_whose_rewards_the_value_model_can_not_represent_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    narrow = 'backbone = "none"\ndistribution = "categorical"\nlow = 0.0\nhigh = 0.5'
    Path("run.toml").write_text(CONFIG.replace('backbone = "none"', narrow))
    assert main(["collect", "run.toml"]) == 2
    assert "gives rewards in [0, 1], and value_model covers [0, 0.5]" in capfd.readouterr().err


def test_debug_shows_the_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="can't read"):
        main(["--debug", "loop", "none.toml"])


def test_a_value_model_is_made_from_a_backbone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_tiny_backbone(Path("reference"), build_tokenizer("ab"))
    graded = ["--distribution", "categorical", "--atoms", "5", "--low", "-1", "--high", "1"]
    assert main(["init", "--backbone", "reference", "--type", "q", *graded, "--out", "value"]) == 0
    manifest = json.loads(Path("value/value_model.json").read_text())
    assert manifest["type"] == "q"
    assert manifest["distribution"] == {"name": "categorical", "low": -1.0, "high": 1.0, "atoms": 5}
    capfd.readouterr()
    assert main(["init", "--backbone", "reference", "--type", "q", *graded, "--out", "value"]) == 2
    assert "value" in capfd.readouterr().err
