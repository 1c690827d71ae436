"""Value models of a base's first layers and a low-rank update, against Hugging Face's layers and peft's updates."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM

from guided_vllm.tiny_models import make_value_model
from low_rank_models import RANK, write_language_model, write_low_rank
from qtilt.checkpoint import CheckpointError, load_tokenizer, load_unmerged, load_value_model, read_manifest
from qtilt.distributions import Bernoulli
from qtilt.model.backbone import BackboneError, first_layers, read_backbone, read_config
from qtilt.model.low_rank import BaseModels, weights_digest

FAMILIES = ["llama", "qwen3", "gpt2"]
LAYERS = 2
IDS_NT = torch.randint(0, 90, (3, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_language_model(tmp_path / "base", "llama")


@pytest.fixture
def saved(base: Path, tmp_path: Path) -> Path:
    return write_low_rank(tmp_path / "value", base)


def cut(base: Path, layers: int) -> Any:
    """The first layers of Hugging Face's whole model, cut by hand."""
    body = AutoModel.from_pretrained(base)
    name = "layers" if hasattr(body, "layers") else "h"
    setattr(body, name, getattr(body, name)[:layers])
    body.config.num_hidden_layers = layers
    return body.eval()


def head_of(directory: Path, hidden_NTH: Tensor) -> Tensor:
    head = load_file(directory / "head.safetensors")
    return hidden_NTH @ head["weight"].T + head["bias"]


def with_peft(base: Path, update: dict[str, Tensor]) -> Any:
    """peft's own model with the stored update, not merged."""
    body, names = cut(base, LAYERS), sorted({name[:-2] for name in update})
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=names, fan_in_fan_out="h.0.attn.c_attn" in names)
    inject_adapter_in_model(config, body)
    for name in names:
        layer = body.get_submodule(name)
        layer.lora_A["default"].weight.data.copy_(update[f"{name}.A"])
        layer.lora_B["default"].weight.data.copy_(update[f"{name}.B"])
    return body.eval()


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_low_rank_model_is_the_one_that_peft_computes(tmp_path: Path, family: str) -> None:
    base = write_language_model(tmp_path / "base", family)
    directory = write_low_rank(tmp_path / "value", base)
    body = with_peft(base, load_file(directory / "update.safetensors"))
    logits_NTA = load_value_model(directory).taken_logits(IDS_NT)
    unmerged_NTH = body(IDS_NT).last_hidden_state
    torch.testing.assert_close(logits_NTA, head_of(directory, unmerged_NTH), rtol=1e-5, atol=1e-5)
    for layer in body.modules():
        if hasattr(layer, "lora_A"):
            layer.merge()
    merged_NTH = body(IDS_NT).last_hidden_state
    torch.testing.assert_close(logits_NTA, head_of(directory, merged_NTH), rtol=1e-5, atol=1e-5)
    without_NTH = cut(base, LAYERS)(IDS_NT).last_hidden_state
    assert (head_of(directory, without_NTH) - logits_NTA).abs().mean() > 0.1


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_first_layers_give_the_states_that_the_whole_model_has_there(
    tmp_path: Path, family: str, layers: int
) -> None:
    base = write_language_model(tmp_path / "base", family)
    backbone = read_backbone(base, first_layers(read_config(base), layers), is_part=True).eval()
    whole = AutoModelForCausalLM.from_pretrained(base).base_model
    states_NTH = whole(IDS_NT, output_hidden_states=True).hidden_states[layers]
    norm = whole.norm if hasattr(whole, "norm") else whole.ln_f
    torch.testing.assert_close(backbone(IDS_NT).last_hidden_state, norm(states_NTH), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layers", [0, 4])
def test_layers_that_a_model_does_not_have_are_refused(base: Path, layers: int) -> None:
    with pytest.raises(BackboneError, match=f"layers must be 1 to 3, the layers it has, got {layers}"):
        first_layers(read_config(base), layers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_merged_in_float32_and_then_rounded(saved: Path, base: Path, dtype: torch.dtype) -> None:
    update = load_file(saved / "update.safetensors")
    model = load_value_model(saved, dtype)
    expected = cut(base, LAYERS).state_dict()
    for name in {name[:-2] for name in update}:
        expected[f"{name}.weight"] = expected[f"{name}.weight"] + update[f"{name}.B"] @ update[f"{name}.A"]
    assert {name: p.dtype for name, p in model.named_parameters()} == {n: dtype for n, _ in model.named_parameters()}
    for name, weight in model.backbone.state_dict().items():
        assert torch.equal(weight, expected[name].to(dtype)), name


def test_what_is_loaded_unmerged_is_the_base_and_the_update(saved: Path, base: Path) -> None:
    model, low_rank = load_unmerged(saved)
    for name, weight in cut(base, LAYERS).state_dict().items():
        assert torch.equal(model.backbone.state_dict()[name], weight)
    stored = load_file(saved / "update.safetensors")
    assert stored.keys() == {f"{name}.{letter}" for name in low_rank.factors for letter in "AB"}
    for name, (a_RI, b_OR) in low_rank.factors.items():
        assert torch.equal(a_RI, stored[f"{name}.A"])
        assert torch.equal(b_OR, stored[f"{name}.B"])
    assert len(low_rank.factors) == 7 * LAYERS


def test_the_directory_holds_the_update_only(saved: Path, base: Path) -> None:
    files = {str(path.relative_to(saved)) for path in saved.rglob("*") if path.is_file()}
    assert files == {"value_model.json", "backbone/config.json", "update.safetensors", "head.safetensors"}
    update = load_file(saved / "update.safetensors")
    hidden, inner, query, key = 48, 96, 4 * 48, 2 * 48
    sides = 2 * (hidden + key) + 2 * (hidden + query) + 3 * (hidden + inner)
    assert sum(tensor.numel() for tensor in update.values()) == LAYERS * RANK * sides
    manifest = read_manifest(saved)
    assert (manifest.max_positions, manifest.vocab_size, manifest.rank) == (128, 96, RANK)
    assert load_tokenizer(saved).get_vocab() == load_tokenizer_of(base)


def load_tokenizer_of(base: Path) -> dict[str, int]:
    return dict(json.loads((base / "tokenizer.json").read_text())["model"]["vocab"]) | {"<end>": 88, "<pad>": 89}


def test_the_digest_is_of_the_numbers_not_of_how_they_are_stored(base: Path, tmp_path: Path) -> None:
    config = first_layers(read_config(base), LAYERS)
    whole = AutoModelForCausalLM.from_pretrained(base)
    rounded = whole.to(torch.bfloat16)
    rounded.save_pretrained(tmp_path / "half")
    rounded.float().save_pretrained(tmp_path / "rounded", max_shard_size="40KB")
    digests = [
        weights_digest(read_backbone(tmp_path / name, config, is_part=True)) for name in ("base", "half", "rounded")
    ]
    assert digests[0] != digests[1] == digests[2]


def test_versions_share_their_base_and_read_it_once(base: Path, tmp_path: Path) -> None:
    for seed in range(3):
        write_low_rank(tmp_path / f"value-{seed}", base, seed=seed)
    bases = BaseModels()
    first = load_value_model(tmp_path / "value-0", bases=bases)
    shutil.move(base, tmp_path / "gone")  # whoever reads it again fails
    second = load_value_model(tmp_path / "value-1", bases=bases)
    assert first.base is second.base
    mine, other = dict(first.backbone.named_parameters()), dict(second.backbone.named_parameters())
    same = {name for name in mine if mine[name].data_ptr() == other[name].data_ptr()}
    projected = {name for name in mine if "_proj." in name}
    assert same == mine.keys() - projected
    assert not any(torch.equal(mine[name], other[name]) for name in projected)
    first.base = second.base = None  # as when both are discarded
    del first, second
    with pytest.raises(CheckpointError, match=r"base .*base isn't found"):
        load_value_model(tmp_path / "value-2", bases=bases)


def test_a_second_version_leaves_the_first_as_it_was(base: Path, tmp_path: Path) -> None:
    bases = BaseModels()
    first = load_value_model(write_low_rank(tmp_path / "one", base, seed=1), bases=bases)
    before = first.taken_logits(IDS_NT)
    load_value_model(write_low_rank(tmp_path / "two", base, seed=2), bases=bases)
    assert torch.equal(first.taken_logits(IDS_NT), before)


def test_versions_whose_configs_differ_do_not_share(base: Path, tmp_path: Path) -> None:
    """The digest is of the weights; other rotary frequencies make another function of them."""
    first, second = (write_low_rank(tmp_path / name, base, seed=1) for name in ("one", "two"))
    file = second / "backbone" / "config.json"
    config = json.loads(file.read_text())
    config["rope_parameters"]["rope_theta"] = 50.0
    file.write_text(json.dumps(config))
    bases = BaseModels()
    resident = [load_value_model(directory, bases=bases) for directory in (first, second)]
    beside = [model.taken_logits(IDS_NT) for model in resident]
    assert torch.equal(beside[0], load_value_model(first).taken_logits(IDS_NT))
    assert torch.equal(beside[1], load_value_model(second).taken_logits(IDS_NT))
    assert not torch.allclose(*beside)


def test_versions_of_two_dtypes_do_not_share(saved: Path) -> None:
    bases = BaseModels()
    wide, narrow = load_value_model(saved, bases=bases), load_value_model(saved, torch.bfloat16, bases=bases)
    assert {parameter.dtype for parameter in narrow.parameters()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in wide.parameters()} == {torch.float32}


def test_the_served_model_is_the_base_wherever_the_manifest_says_that_is(base: Path, tmp_path: Path) -> None:
    elsewhere = write_low_rank(tmp_path / "value", base, name="/nowhere/base")
    with pytest.raises(CheckpointError, match=r"value_model.json: its base /nowhere/base isn't found"):
        load_value_model(elsewhere)
    assert load_value_model(elsewhere, bases=BaseModels([str(base)])).type == "v"


@pytest.mark.parametrize(
    ("family", "seed", "why"),
    [("llama", 1, r"digest [0-9a-f]{12}…, not [0-9a-f]{12}…"), ("gpt2", 0, "model_type is 'gpt2', not 'llama'")],
)
def test_a_served_model_that_is_not_the_base_leaves_the_named_one(
    saved: Path, base: Path, tmp_path: Path, family: str, seed: int, why: str
) -> None:
    served = write_language_model(tmp_path / "served", family, seed=seed)
    expected = load_value_model(saved).taken_logits(IDS_NT)
    assert torch.equal(load_value_model(saved, bases=BaseModels([str(served)])).taken_logits(IDS_NT), expected)
    shutil.move(base, tmp_path / "gone")
    with pytest.raises(CheckpointError, match=rf"its base .*base isn't found \(.*served: .*{why}.*base: .*\): restore"):
        load_value_model(saved, bases=BaseModels([str(served)]))


def edit(directory: Path, **changes: Any) -> None:
    path = directory / "value_model.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_base(directory: Path, **changes: Any) -> None:
    edit(directory, base=json.loads((directory / "value_model.json").read_text())["base"] | changes)


def edit_update(directory: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    update = load_file(directory / "update.safetensors")
    change(update)
    save_file(update, directory / "update.safetensors")


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def put_nan(directory: Path, name: str) -> None:
    edit_update(directory, lambda update: update[name].__setitem__((0, 0), torch.nan))


def train_base(directory: Path) -> None:
    """One weight of it changes, in a layer that the value model has."""
    base = directory.parent / "base"
    weights = load_file(base / "model.safetensors")
    weights["model.layers.1.self_attn.q_proj.weight"][0, 0] += 1e-3
    save_file(weights, base / "model.safetensors", {"format": "pt"})


BROKEN = {
    r"value_model.json: its base .*digest [0-9a-f]{12}…, not [0-9a-f]{12}…": train_base,
    r"value_model.json: its base .*base isn't found": lambda d: shutil.rmtree(d.parent / "base"),
    r"value_model.json: its base .*base: the backbone can't be loaded": lambda d: truncate(
        d.parent / "base" / "model.safetensors"
    ),
    r"value_model.json: its base .*digest .*, not 00": lambda d: edit_base(d, sha256="00"),
    r"value_model.json: base.layers is 1, and backbone/config.json has 2": lambda d: edit_base(d, layers=1),
    r"value_model.json: base or low_rank .*a base is a name": lambda d: edit_base(d, layers="2"),
    r"value_model.json: base or low_rank .*unexpected keyword": lambda d: edit_base(d, revision="main"),
    r"value_model.json: base or low_rank .*base is a list": lambda d: edit(d, base=[]),
    r"value_model.json: base or low_rank .*base is a NoneType": lambda d: edit(d, base=None),
    r"value_model.json: base or low_rank .*low_rank is None": lambda d: edit(d, low_rank=None),
    r"value_model.json: base or low_rank .*low_rank is 0, exp": lambda d: edit(d, low_rank=0),
    r"update.safetensors: can't be read": lambda d: truncate(d / "update.safetensors"),
    r"update.safetensors: can't be read .*No such": lambda d: (d / "update.safetensors").unlink(),
    r"update.safetensors: layers.0.mlp.down_proj.A is \(4, 96\), expected \(5, 96\) for rank 5": lambda d: edit(
        d, low_rank=5
    ),
    r"update.safetensors: layers.1.mlp.up_proj.B is missing, expected \(96, 4\)": lambda d: edit_update(
        d, lambda update: update.pop("layers.1.mlp.up_proj.B")
    ),
    r"update.safetensors: norm.A is \(1,\), expected no such tensor": lambda d: edit_update(
        d, lambda update: update.__setitem__("norm.A", torch.zeros(1))
    ),
    r"parameter backbone.layers.1.mlp.up_proj.weight holds values that are not fin": lambda d: put_nan(
        d, "layers.1.mlp.up_proj.A"
    ),
}


@pytest.mark.parametrize("reason", BROKEN)
def test_a_broken_directory_or_base_is_refused_with_file_and_reason(saved: Path, reason: str) -> None:
    BROKEN[reason](saved)
    with pytest.raises(CheckpointError, match=reason) as caught:
        load_value_model(saved)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.0.mlp.up_proj.weight"])
def test_a_base_that_is_not_finite_is_refused(base: Path, tmp_path: Path, name: str) -> None:
    weights = load_file(base / "model.safetensors")
    weights[name].view(-1)[0] = torch.inf
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    directory = write_low_rank(tmp_path / "value", base)
    with pytest.raises(CheckpointError, match=r"parameter .*weight of its base .* holds values that are not finite"):
        load_value_model(directory)


def test_layers_beyond_those_taken_may_change(saved: Path, base: Path) -> None:
    expected = load_value_model(saved).taken_logits(IDS_NT)
    weights = load_file(base / "model.safetensors")
    nn.init.zeros_(weights["model.layers.2.self_attn.q_proj.weight"])
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    assert torch.equal(load_value_model(saved).taken_logits(IDS_NT), expected)


def test_a_full_value_model_has_no_update_to_load(base: Path, tmp_path: Path) -> None:
    full = make_value_model(tmp_path / "full", "v", Bernoulli(), "llama", 0)
    with pytest.raises(CheckpointError, match=r"value_model.json: has no base"):
        load_unmerged(full)
