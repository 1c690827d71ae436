"""The TOML file: defaults, per-iteration differences, and errors that name the field."""

import re
from pathlib import Path

import pytest
from pydantic import ValidationError

from qtilt_trainer.config import EvaluateConfig, LoopConfig, read_config

MINIMAL = """
run_dir = "runs/x"
[task]
name = "my_task:make"
degree = 3
[value_model]
backbone = "reference"
[sampling]
max_tokens = 12
[collect]
prompts = 100
samples_per_prompt = 8
[fit]
steps = 300
[evaluate]
prompts = 50
samples = 4
"""


def read(tmp_path: Path, text: str) -> LoopConfig:
    file = tmp_path / "run.toml"
    file.write_text(text)
    return read_config(file)


def test_a_minimal_file_has_two_equal_iterations_and_passes_task_fields_on(tmp_path: Path) -> None:
    config = read(tmp_path, MINIMAL)
    assert config.task.model_dump() == {"name": "my_task:make", "degree": 3}
    assert len(config.iterations) == 2
    assert config.collect_of(1) == config.collect_of(2) == config.collect
    assert config.server.url == "http://127.0.0.1:8000"


def test_iterations_may_differ_in_single_fields(tmp_path: Path) -> None:
    text = MINIMAL + "[[iterations]]\n[[iterations]]\ncollect.prompts = 5\nfit.epochs = 2.5\n"
    config = read(tmp_path, text)
    assert (config.collect_of(1).prompts, config.collect_of(2).prompts) == (100, 5)
    assert config.collect_of(2).samples_per_prompt == 8
    assert (config.fit_of(2).steps, config.fit_of(2).epochs) == (None, 2.5)


def test_iterations_may_be_a_number(tmp_path: Path) -> None:
    assert len(read(tmp_path, "iterations = 4\n" + MINIMAL).iterations) == 4


def test_overrides_replace_fields_unless_none(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text(MINIMAL)
    config = read_config(file, {"server.url": "http://host:1/v1/", "run_dir": None})
    assert config.server.url == "http://host:1"
    assert config.run_dir == Path("runs/x")


def test_the_key_is_not_in_the_resolved_configuration(tmp_path: Path) -> None:
    config = read(tmp_path, MINIMAL + '[server]\napi_key = "hush"\n')
    assert "hush" not in config.model_dump_json()
    assert config.server.api_key is not None
    assert config.server.api_key.get_secret_value() == "hush"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("steps = 300", "stepps = 300", "fit.stepps: there is no such field"),
        ("steps = 300", "", "fit: give either steps or epochs"),
        ("steps = 300", "steps = 300\nepochs = 1.0", "fit: give either steps or epochs"),
        ("prompts = 100", "prompts = 0", "collect.prompts: Input should be greater than or equal to 1, got 0"),
        ('backbone = "reference"', "", "value_model.backbone: this field is required"),
        ('backbone = "reference"', 'backbone = "r"\nhigh = 2.0', "a bernoulli value is for rewards 0 and 1"),
        ('backbone = "reference"', 'backbone = "r"\nname = "a@b"', "value_model.name: String should match pattern"),
        ('backbone = "reference"', 'backbone = "r"\nlayers = 0', "value_model.layers: Input should be greater than or"),
        (
            'backbone = "reference"',
            'backbone = "r"\nlow_rank = 0',
            "value_model.low_rank: Input should be greater than",
        ),
        (
            "steps = 300",
            'steps = 300\nprecision = "half"',
            "fit.precision: Input should be 'auto', 'float32' or 'bfloat",
        ),
        ("samples = 4", "samples = 4\nk = 5", "evaluate: k must be at most samples = 4, got 5"),
        ("samples = 4", "inv_eta = [0.0]", "evaluate.inv_eta: every 1/eta must be above 0 and at most 1e+09"),
        ("samples = 4", "inv_eta = [2.0, 2.0]", "evaluate.inv_eta: an entry is repeated"),
        ("samples = 4", 'methods = ["vas"]', "evaluate.methods.0: Input should be 'qsharp' or 'cd', got 'vas'"),
        (
            "max_tokens = 12",
            "max_tokens = 12\ntemperature = inf",
            "sampling.temperature: Input should be a finite number",
        ),
        ('run_dir = "runs/x"', 'run_dir = "x"\n[server]\nurl = "localhost"', "server.url: must begin with http://"),
        ('run_dir = "runs/x"', 'run_dir = "x"\n[server]\nurl = "http://"', "server.url: must name a host"),
        ('run_dir = "runs/x"', 'run_dir = "x"\n[server]\nurl = "http://a:b"', "server.url: Port could not be cast"),
        ('run_dir = "runs/x"', 'run_dir = "x"\niterations = 0', "iterations: "),
        ("[evaluate]", "[[iterations]]\nfit.steps = 0\n[evaluate]", "iterations.1.fit.steps: Input should be"),
        ("[evaluate]", "[[iterations]]\ncollect.x = 0\n[evaluate]", "iterations.1.collect.x: there is no such field"),
        ("[evaluate]", "[evaluate", "not TOML"),
    ],
)
def test_an_error_names_the_file_and_the_field(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in MINIMAL
    with pytest.raises(ValueError, match=r"run\.toml.*" + re.escape(message)):
        read(tmp_path, MINIMAL.replace(old, new, 1))


def test_a_missing_file_is_an_error_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"can't read the configuration .*none\.toml: No such file"):
        read_config(tmp_path / "none.toml")


def test_a_key_of_the_wrong_type_is_not_shown(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"server\.api_key: Input should be a valid string$"):
        read(tmp_path, MINIMAL + "[server]\napi_key = 12345\n")


def test_there_is_no_iteration_beyond_the_last(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="iteration must be 1 to 2, got 3"):
        read(tmp_path, MINIMAL).collect_of(3)


def test_the_smallest_eta_is_allowed() -> None:
    assert EvaluateConfig(prompts=1, inv_eta=(1e9, 1e-300)).inv_eta == (1e9, 1e-300)
    with pytest.raises(ValidationError, match="above 0 and at most"):
        EvaluateConfig(prompts=1, inv_eta=(1.1e9,))
