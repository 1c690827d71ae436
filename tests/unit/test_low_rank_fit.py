"""Fits of a low-rank update and the head: what changes, what does not, and that the stored model has the lower loss."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import binary_cross_entropy_with_logits

from low_rank_models import write_language_model
from qtilt.checkpoint import CheckpointError, load_value_model, read_manifest
from qtilt.distributions import Bernoulli
from qtilt.value_model import ValueModel, ValueType
from qtilt_trainer.cli import main
from qtilt_trainer.config import FitConfig, LoopConfig
from qtilt_trainer.fit import fit_record_path, fit_value_model
from qtilt_trainer.initialise import initialise_value_model
from qtilt_trainer.loop import Run
from qtilt_trainer.low_rank_fit import load_for_fit
from qtilt_trainer.precision import product_dtype
from qtilt_trainer.rollouts import Rollout
from stored_rollouts import as_table, make_rollout

RANK = 4
CONFIG = FitConfig(
    steps=40, batch_size=32, learning_rate=1e-2, drop_unanimous=False, held_out=0.0, threads=1, precision="float32"
)
TABLES = {
    "run_dir": "run",
    "task": {"name": "letters:Letters"},
    "sampling": {"max_tokens": 8},
    "collect": {"prompts": 1, "samples_per_prompt": 1},
    "fit": {"steps": 1},
}


def rollouts(count: int = 128) -> list[Rollout]:
    """Eight of 60 tokens; right are those that have the token 7."""
    tokens = np.random.default_rng(0).integers(1, 60, (count, 8))
    tokens[::2, 2] = 7
    like = replace(make_rollout(), prompt_token_ids=[61], switch_point=0, guided_tokens=0, value_model=None)
    return [
        replace(like, rollout_id=f"1/p{n}/0", prompt_id=f"p{n}", token_ids=row.tolist(), reward=float(7 in row))
        for n, row in enumerate(tokens)
    ]


def loss(directory: Path, of: list[Rollout]) -> float:
    """Mean negative log-likelihood of the returns after each token, from the stored model."""
    model = load_value_model(directory)
    ids_NT = torch.tensor([[*each.prompt_token_ids, *each.token_ids] for each in of])
    logits_NT = model.taken_logits(ids_NT)[:, 1:, 0]
    rewards_NT = torch.tensor([[each.reward] for each in of]).expand(logits_NT.shape)
    return float(binary_cross_entropy_with_logits(logits_NT, rewards_NT))


def initial(directory: Path, family: str = "llama", type: ValueType = "v") -> Path:
    base = write_language_model(directory / "base", family)
    initialise_value_model(str(base), type, {"name": "bernoulli"}, directory / "initial", layers=2, low_rank=RANK)
    return directory / "initial"


def content(directory: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.iterdir()}


@pytest.mark.parametrize("type", ["v", "q"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_a_fit_changes_update_and_head_only_and_lowers_the_loss(tmp_path: Path, family: str, type: ValueType) -> None:
    start, data = initial(tmp_path, family, type), rollouts()
    base_before = content(tmp_path / "base")
    result = fit_value_model(start, as_table(data), tmp_path / "fitted", CONFIG)
    assert content(tmp_path / "base") == base_before
    before, after = (load_file(path / "update.safetensors") for path in (start, result.directory))
    assert before.keys() == after.keys()
    assert all(not torch.equal(before[name], after[name]) for name in before)
    assert all(bool((weight == 0).all()) for name, weight in before.items() if name.endswith(".B"))
    heads = [load_file(path / "head.safetensors")["weight"] for path in (start, result.directory)]
    assert not torch.equal(*heads)
    assert read_manifest(result.directory).base == read_manifest(start).base
    assert loss(start, data) == pytest.approx(np.log(2), abs=1e-6)
    assert loss(result.directory, data) < 0.5
    biases = {
        name
        for name, weight in load_value_model(result.directory).backbone.named_parameters()
        if not torch.equal(weight, dict(load_value_model(start).backbone.named_parameters())[name])
    }
    assert biases == {f"{name[:-2]}.weight" for name in after}


def test_a_fit_goes_on_from_the_update_it_is_given(tmp_path: Path) -> None:
    start, data = initial(tmp_path), rollouts()
    once = fit_value_model(start, as_table(data), tmp_path / "once", CONFIG)
    again = fit_value_model(once.directory, as_table(data), tmp_path / "again", CONFIG.model_copy(update={"steps": 1}))
    assert again.history[0].train_loss == pytest.approx(loss(once.directory, data[:]), abs=0.15)
    model, low_rank = load_for_fit(once.directory, torch.device("cpu"))
    assert low_rank is not None
    ids_NT = torch.tensor([data[0].token_ids])
    torch.testing.assert_close(model.taken_logits(ids_NT), load_value_model(once.directory).taken_logits(ids_NT))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {"head.weight", "head.bias"} == {name for name in trained if "lora_" not in name}
    assert len(trained) == 2 + 2 * 7 * 2


def test_without_low_rank_the_first_layers_are_a_whole_value_model(tmp_path: Path) -> None:
    base = write_language_model(tmp_path / "base", "llama")
    initialise_value_model(str(base), "v", {"name": "bernoulli"}, tmp_path / "value", layers=2, adapter="support")
    assert (tmp_path / "value" / "backbone" / "model.safetensors").exists()
    manifest = read_manifest(tmp_path / "value")
    assert (manifest.base, manifest.provenance["layers"], manifest.adapter) == (None, 2, "support")
    result = fit_value_model(tmp_path / "value", as_table(rollouts()), tmp_path / "fitted", CONFIG)
    assert read_manifest(result.directory).adapter == "support"
    stored = load_file(base / "model.safetensors")
    fitted = load_value_model(result.directory).backbone.state_dict()
    assert len(fitted) == 2 * 9 + 2
    assert all(not torch.equal(weight, stored[f"model.{name}"]) for name, weight in fitted.items())


def test_new_value_models_are_reproducible_and_constant(tmp_path: Path) -> None:
    first = initial(tmp_path)
    initialise_value_model(
        str(tmp_path / "base"), "v", {"name": "bernoulli"}, tmp_path / "again", layers=2, low_rank=RANK
    )
    same = (load_file(path / "update.safetensors") for path in (first, tmp_path / "again"))
    for one, other in zip(*(each.values() for each in same), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("low_rank", [None, RANK])
def test_layers_that_the_backbone_does_not_have_are_refused_in_one_line(tmp_path: Path, low_rank: int | None) -> None:
    base = write_language_model(tmp_path / "base", "llama")
    with pytest.raises(ValueError, match=r"value_model.layers must be 1 to 3, the layers it has, got 4") as caught:
        initialise_value_model(str(base), "v", {"name": "bernoulli"}, tmp_path / "value", layers=4, low_rank=low_rank)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "value").exists()


def test_command_and_configuration_make_the_same_low_rank_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    base = write_language_model(Path("base"), "llama")
    config = {"backbone": str(base), "layers": 2, "low_rank": RANK}
    Run(LoopConfig.model_validate({**TABLES, "value_model": config})).initialise()
    command = ["init", "--backbone", str(base), "--type", "v", "--distribution", "bernoulli", "--low-rank", str(RANK)]
    assert main([*command, "--layers", "2", "--out", "made"]) == 0
    for file in ("value_model.json", "update.safetensors", "head.safetensors"):
        assert Path("made", file).read_bytes() == Path("run/value_models/initial", file).read_bytes()
    stored = json.loads(Path("run/value_models/initial.settings.json").read_text())
    assert (stored["layers"], stored["low_rank"]) == (2, RANK)
    capfd.readouterr()
    assert main([*command, "--layers", "4", "--out", "deeper"]) == 2
    assert "layers must be 1 to 3, the layers it has, got 4" in capfd.readouterr().err.splitlines()[-1]


def test_a_fit_without_its_base_says_so(tmp_path: Path) -> None:
    start = initial(tmp_path)
    (tmp_path / "base").rename(tmp_path / "gone")
    with pytest.raises(CheckpointError, match=r"value_model.json: its base .*base isn't found"):
        fit_value_model(start, as_table(rollouts()), tmp_path / "fitted", CONFIG)


def test_a_bfloat16_fit_keeps_weights_in_float32_and_says_what_it_computed_in(tmp_path: Path) -> None:
    config, data = CONFIG.model_copy(update={"precision": "bfloat16"}), rollouts()
    result = fit_value_model(initial(tmp_path), as_table(data), tmp_path / "fitted", config)
    assert json.loads(fit_record_path(result.directory).read_text())["precision"] == "bfloat16"
    for file in ("update.safetensors", "head.safetensors"):
        assert {tensor.dtype for tensor in load_file(result.directory / file).values()} == {torch.float32}
    assert loss(result.directory, data) < 0.5


@pytest.mark.parametrize("type", ["v", "q"])
@torch.no_grad()
def test_under_autocast_the_head_is_in_float32(tmp_path: Path, type: ValueType) -> None:
    backbone = load_value_model(initial(tmp_path, type=type)).backbone
    torch.manual_seed(0)
    model = ValueModel.from_backbone(backbone, type, Bernoulli(), head_std=1.0)
    ids_NT = torch.randint(0, 60, (2, 9))
    with torch.autocast("cpu", torch.bfloat16):
        logits_NTA = model.taken_logits(ids_NT)
        hidden_NTH = backbone(ids_NT).last_hidden_state
    with torch.autocast("cpu", enabled=False):
        products_NTR = (hidden_NTH.double() @ model.head.weight.double().T).float()
    expected_NT = products_NTR[..., 0] if type == "v" else products_NTR[:, :-1].gather(2, ids_NT[:, 1:, None])[..., 0]
    torch.testing.assert_close(logits_NTA[:, 0 if type == "v" else 1 :, 0], expected_NT, rtol=1e-5, atol=1e-5)
    exact_NTH = backbone(ids_NT).last_hidden_state
    assert (hidden_NTH.float() - exact_NTH).abs().max() > 1e-3  # the backbone's products are in bfloat16


@pytest.mark.parametrize(
    ("precision", "device", "has", "expected"),
    [
        ("auto", "cpu", {"amx_bf16": True}, torch.bfloat16),
        ("auto", "cpu", {"avx512_bf16": True, "amx_bf16": False}, torch.bfloat16),
        ("auto", "cpu", {"avx512_f": True, "amx_bf16": False}, torch.float32),
        ("auto", "cuda", {}, torch.bfloat16),
        ("float32", "cuda", {}, torch.float32),
        ("float32", "cpu", {"amx_bf16": True}, torch.float32),
        ("bfloat16", "cpu", {}, torch.bfloat16),
    ],
)
def test_auto_is_bfloat16_where_the_processor_multiplies_it(
    monkeypatch: pytest.MonkeyPatch, precision, device: str, has: dict[str, bool], expected: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has)
    assert product_dtype(precision, torch.device(device)) == expected
