"""Initialisation, per-token values, and the figures that judge them, against independent computations."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from qtilt.checkpoint import CheckpointError, load_value_model, read_manifest
from qtilt.distributions import Bernoulli, Categorical
from qtilt.value_model import ValueModel, ValueType
from qtilt_trainer.initialise import initialise_value_model
from qtilt_trainer.metrics import auc, calibration_error
from qtilt_trainer.values import completion_values
from tiny_backbone import write_tiny_backbone
from tiny_reference import build_tokenizer


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("backbone")
    write_tiny_backbone(directory, build_tokenizer("abcd"))
    return directory


CATEGORICAL = {"name": "categorical", "low": -1.0, "high": 3.0, "atoms": 5}


@pytest.mark.parametrize(("type", "rows"), [("v", 5), ("q", 5 * 10)])
def test_a_new_value_model_has_the_backbones_weights_and_one_value(
    backbone: Path, tmp_path: Path, type: ValueType, rows: int
) -> None:
    initialise_value_model(str(backbone), type, CATEGORICAL, tmp_path / "value")
    model = load_value_model(tmp_path / "value")
    assert tuple(model.head.weight.shape) == (rows, 32)
    assert model.distribution == Categorical(-1.0, 3.0, 5)
    assert read_manifest(tmp_path / "value").provenance["backbone"] == str(backbone)
    original = LlamaForCausalLM.from_pretrained(backbone).model.state_dict()
    for name, weight in model.backbone.state_dict().items():
        assert torch.equal(weight, original[name])
    assert completion_values(model, [1, 6], [7, 8, 2]) == pytest.approx([1.0] * 3)


def test_head_std_gives_reproducible_random_heads(backbone: Path, tmp_path: Path) -> None:
    for name in ("first", "second"):
        initialise_value_model(str(backbone), "v", {"name": "bernoulli"}, tmp_path / name, head_std=0.5)
    first, second = load_value_model(tmp_path / "first"), load_value_model(tmp_path / "second")
    assert first.head.weight.std() == pytest.approx(0.5, rel=0.5)
    assert torch.equal(first.head.weight, second.head.weight)


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_damaged_backbone_is_refused(backbone: Path, tmp_path: Path, file: str) -> None:
    damaged = shutil.copytree(backbone, tmp_path / "damaged")
    (damaged / file).write_bytes((damaged / file).read_bytes()[:100])
    with pytest.raises(ValueError, match=r"damaged' is no model directory or hub id that can be read"):
        initialise_value_model(str(damaged), "v", {"name": "bernoulli"}, tmp_path / "value")


def test_a_backbone_that_is_none_and_an_existing_directory_are_refused(backbone: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere"):
        initialise_value_model(str(tmp_path / "nowhere"), "v", {"name": "bernoulli"}, tmp_path / "value")
    with pytest.raises(CheckpointError, match="already exists"):
        initialise_value_model(str(backbone), "v", {"name": "bernoulli"}, tmp_path)


@pytest.mark.parametrize("type", ["q", "v"])
def test_values_are_those_of_a_forward_over_each_prefix(backbone: Path, type: ValueType) -> None:
    torch.manual_seed(1)
    llama = LlamaForCausalLM.from_pretrained(backbone).model
    model = ValueModel.from_backbone(llama, type, Bernoulli(), head_std=0.5).eval()
    prompt, completion = [1, 6, 7], [8, 9, 2]
    expected = []
    for end in range(1, len(completion) + 1):
        *before, token = prompt + completion[:end]
        with torch.no_grad():
            read = torch.tensor([[*before, token] if type == "v" else before])
            hidden = llama(input_ids=read).last_hidden_state[0, -1]
            row = token if type == "q" else 0
            logit = hidden @ model.head.weight[row] + model.head.bias[row]
        expected.append(float(logit.sigmoid()))
    assert completion_values(model, prompt, completion) == pytest.approx(expected, abs=1e-6)


def test_no_completion_has_no_values_and_no_prompt_is_refused(backbone: Path) -> None:
    llama = LlamaForCausalLM.from_pretrained(backbone).model
    model = ValueModel.from_backbone(llama, "v", Bernoulli())
    assert completion_values(model, [1], []) == []
    with pytest.raises(ValueError, match="prompt token"):
        completion_values(model, [], [1])


def test_auc_is_the_share_of_pairs_in_the_right_order() -> None:
    predicted, observed = np.array([0.9, 0.4, 0.6, 0.4]), np.array([1.0, 1.0, 0.0, 0.0])
    # Pairs (good, bad): (0.9, 0.6) and (0.9, 0.4) right, (0.4, 0.6) wrong, (0.4, 0.4) a tie.
    assert auc(predicted, observed, threshold=0.5) == pytest.approx(2.5 / 4)
    assert auc(predicted, np.ones(4), threshold=0.5) is None


def test_calibration_error_is_zero_for_frequencies_and_counts_by_bin() -> None:
    observed = np.array([1.0, 0.0, 0.0, 0.0])
    assert calibration_error(np.full(4, 0.25), observed, 0.0, 1.0) == pytest.approx(0.0)
    assert calibration_error(np.array([1.0, 0.0, 0.0, 0.5]), observed, 0.0, 1.0) == pytest.approx(0.125)
    assert calibration_error(np.full(4, 1.0), np.full(4, -1.0), -1.0, 1.0) == pytest.approx(2.0)
