"""The value-model directory: what is written is read back, and nothing broken is ever accepted."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import AutoModel, LlamaConfig, LlamaModel, PreTrainedTokenizerFast

from qtilt.checkpoint import (
    CheckpointError,
    check_same_ordinary_tokens,
    fingerprint_tokenizer,
    load_value_model,
    read_manifest,
    remove_unfinished,
    save_value_model,
)
from qtilt.distributions import Bernoulli, Categorical
from qtilt.model import checkpoint
from qtilt.value_model import ValueModel


def make_tokenizer(words=("a", "b", "c"), eos="<eos>") -> PreTrainedTokenizerFast:
    vocabulary = {word: index for index, word in enumerate([*words, "<unk>"])}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>")), unk_token="<unk>", eos_token=eos
    )


def make_model(type="v", distribution=None) -> ValueModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    return ValueModel.from_backbone(LlamaModel(config), type, distribution or Bernoulli(), head_std=0.3)


@pytest.fixture
def saved(tmp_path):
    save_value_model(make_model(), tmp_path / "value", make_tokenizer(), {"rollouts": {"temperature": 0.8}})
    return tmp_path / "value"


@pytest.mark.parametrize("distribution", [Bernoulli(), Categorical(-1.0, 1.0, 5)], ids=["bernoulli", "categorical"])
@pytest.mark.parametrize("type", ["q", "v"])
def test_a_saved_model_predicts_the_same_when_loaded(tmp_path, type, distribution):
    model = make_model(type, distribution)
    save_value_model(model, tmp_path / "value", make_tokenizer())
    loaded = load_value_model(tmp_path / "value")
    input_ids = torch.randint(0, 8, (2, 9))
    assert torch.equal(loaded.taken_logits(input_ids), model.taken_logits(input_ids).detach())
    assert (loaded.type, loaded.distribution) == (type, distribution)
    head = load_file(tmp_path / "value" / "head.safetensors")
    assert head["weight"].shape == (distribution.num_logits * (8 if type == "q" else 1), 16)


def test_the_adapter_it_was_fitted_to_is_kept(tmp_path):
    save_value_model(make_model(), tmp_path / "adapted", make_tokenizer(), adapter="support")
    save_value_model(make_model(), tmp_path / "plain", make_tokenizer())
    assert [read_manifest(tmp_path / name).adapter for name in ("adapted", "plain")] == ["support", None]


def test_the_backbone_is_a_plain_transformers_checkpoint(saved):
    assert isinstance(AutoModel.from_pretrained(saved / "backbone"), LlamaModel)


def test_the_manifest_tells_all_without_reading_weights(saved):
    (saved / "backbone" / "model.safetensors").unlink()
    manifest = read_manifest(saved)
    assert (manifest.type, manifest.distribution) == ("v", Bernoulli())
    assert (manifest.max_positions, manifest.vocab_size) == (64, 8)
    assert manifest.provenance == {"rollouts": {"temperature": 0.8}}
    assert manifest.tokenizer == fingerprint_tokenizer(make_tokenizer())


def test_a_directory_of_version_1_is_read(saved):
    """It is as a whole value model still is."""
    written = json.loads((saved / "value_model.json").read_text())
    assert written.keys() == {"format_version", "type", "distribution", "tokenizer", "provenance"}
    assert written["format_version"] == 2
    edit_manifest(saved, format_version=1)
    assert read_manifest(saved).base is None
    assert load_value_model(saved).type == "v"


def test_a_head_without_bias_is_fine(saved):
    weight = load_file(saved / "head.safetensors")["weight"]
    save_file({"weight": weight}, saved / "head.safetensors")
    assert load_value_model(saved).head.bias is None


def test_loading_in_bfloat16_leaves_the_default_dtype_alone(saved):
    model = load_value_model(saved, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.backbone.rotary_emb.inv_freq.dtype == torch.float32
    assert torch.get_default_dtype() == torch.float32


def edit_manifest(directory, **changes):
    path = directory / "value_model.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_config(directory, **changes):
    path = directory / "backbone" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def fingerprint(**changes):
    return {"ordinary_sha256": "ab", "ordinary_count": 4, "added": {}} | changes


def truncate(path):
    path.write_bytes(path.read_bytes()[:-7])


def put_nan(directory):
    head = load_file(directory / "head.safetensors")
    head["weight"][0, 0] = float("nan")
    save_file(head, directory / "head.safetensors")


BROKEN = {
    "value_model.json: can't be read": lambda d: (d / "value_model.json").unlink(),
    "value_model.json: not valid JSON": lambda d: truncate(d / "value_model.json"),
    "value_model.json: holds a list": lambda d: (d / "value_model.json").write_text("[]"),
    "value_model.json: adapter is 7, expected the name": lambda d: edit_manifest(d, adapter=7),
    "value_model.json: adapter is ''": lambda d: edit_manifest(d, adapter=""),
    "value_model.json: format_version is 3": lambda d: edit_manifest(d, format_version=3),
    "value_model.json: format_version is True": lambda d: edit_manifest(d, format_version=True),
    "value_model.json: type is 'x'": lambda d: edit_manifest(d, type="x"),
    "value_model.json: distribution, tokenizer or prov": lambda d: edit_manifest(d, distribution={"name": "beta"}),
    "value_model.json: .*atoms is 2.5": lambda d: edit_manifest(
        d, distribution={"name": "categorical", "low": 0, "high": 1, "atoms": 2.5}
    ),
    "value_model.json: .*a fingerprint is a": lambda d: edit_manifest(d, tokenizer=fingerprint(added={"<eos>": "4"})),
    "value_model.json: .*fingerprint is a.* count": lambda d: edit_manifest(
        d, tokenizer=fingerprint(ordinary_count="4")
    ),
    "value_model.json: .*provenance is a list": lambda d: edit_manifest(d, provenance=[]),
    "head.safetensors: can't be read": lambda d: truncate(d / "head.safetensors"),
    "head.safetensors: holds": lambda d: save_file({"weight": torch.zeros(2, 16)}, d / "head.safetensors"),
    "backbone: the backbone can't be loaded": lambda d: truncate(d / "backbone" / "model.safetensors"),
    "backbone: weights missing": lambda d: save_file({}, d / "backbone" / "model.safetensors", {"format": "pt"}),
    "config.json: can't be read": lambda d: (d / "backbone" / "config.json").unlink(),
    "config.json: not valid JSON": lambda d: truncate(d / "backbone" / "config.json"),
    "config.json: .*'hidden_size' expected int": lambda d: edit_config(d, hidden_size="16"),
    "config.json: .*not a multiple": lambda d: edit_config(d, num_attention_heads=3),
    "config.json: .*contains custom code": lambda d: edit_config(
        d, model_type="own", auto_map={"AutoConfig": "own.Config", "AutoModel": "own.Model"}
    ),
    "config.json: max_position_embeddings is missing": lambda d: (d / "backbone" / "config.json").write_text(
        '{"model_type": "mamba"}'
    ),
    "backbone: weights unknown to config.json: layers.0": lambda d: edit_config(d, num_hidden_layers=0),
    r"backbone: weights of another shape .* embed_tokens.weight \[8, 16\], not \[9, 16\]": lambda d: edit_config(
        d, vocab_size=9
    ),
    "parameter head.weight holds values that are not finite": put_nan,
}


@pytest.mark.parametrize("reason", BROKEN)
def test_a_broken_directory_is_refused_with_file_and_reason(saved, reason):
    BROKEN[reason](saved)
    with pytest.raises(CheckpointError, match=reason) as caught:
        load_value_model(saved)
    assert "\n" not in str(caught.value)


def test_a_head_over_another_vocabulary_is_refused(tmp_path):
    save_value_model(make_model("q"), tmp_path / "value", make_tokenizer())
    save_file({"weight": torch.zeros(7, 16)}, tmp_path / "value" / "head.safetensors")
    with pytest.raises(CheckpointError, match="over 8 tokens"):
        load_value_model(tmp_path / "value")


def test_only_ordinary_tokens_must_agree(tmp_path):
    mine, same = fingerprint_tokenizer(make_tokenizer()), fingerprint_tokenizer(make_tokenizer(eos="</s>"))
    assert mine.added != same.added
    check_same_ordinary_tokens(mine, same, tmp_path)
    with pytest.raises(CheckpointError, match="ordinary tokens"):
        check_same_ordinary_tokens(mine, fingerprint_tokenizer(make_tokenizer(("a", "c", "b"))), tmp_path)
    with pytest.raises(CheckpointError, match=r"ordinary tokens \(0\)"):
        check_same_ordinary_tokens(replace(mine, ordinary_count=0), same, tmp_path)


def test_what_a_killed_save_left_is_removed_and_nothing_else(tmp_path):
    names = [".one.x7", ".one.k2", ".one-b.x7", "one", "two"]
    for name in names:
        (tmp_path / name / "backbone").mkdir(parents=True)
    remove_unfinished(tmp_path / "one")
    assert {path.name for path in tmp_path.iterdir()} == set(names[2:])


def test_a_directory_is_written_once(saved):
    with pytest.raises(CheckpointError, match="already exists"):
        save_value_model(make_model(), saved, make_tokenizer())


def test_of_two_writers_of_one_name_the_slower_fails_and_changes_nothing(tmp_path, monkeypatch):
    flush_tree = checkpoint._flush_tree

    def slow_flush(staging):
        monkeypatch.setattr(checkpoint, "_flush_tree", flush_tree)
        save_value_model(make_model("v"), tmp_path / "value", make_tokenizer())
        flush_tree(staging)

    monkeypatch.setattr(checkpoint, "_flush_tree", slow_flush)
    with pytest.raises(CheckpointError, match="value: can't be put in place"):
        save_value_model(make_model("q"), tmp_path / "value", make_tokenizer())
    assert [path.name for path in tmp_path.iterdir()] == ["value"]
    assert load_value_model(tmp_path / "value").type == "v"


def test_every_file_and_directory_reaches_the_disk_before_its_name_does(tmp_path, monkeypatch):
    flushed, fsync, rename = [], os.fsync, Path.rename
    monkeypatch.setattr(os, "fsync", lambda file: (flushed.append(os.fstat(file).st_ino), fsync(file)))
    monkeypatch.setattr(Path, "rename", lambda path, target: (flushed.append("rename"), rename(path, target))[1])
    save_value_model(make_model(), tmp_path / "value", make_tokenizer())
    before, after = flushed[: flushed.index("rename")], flushed[flushed.index("rename") + 1 :]
    assert {path.stat().st_ino for path in [tmp_path / "value", *(tmp_path / "value").rglob("*")]} <= set(before)
    assert after == [tmp_path.stat().st_ino]


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    def full_disk(*_args, **_kwargs):
        raise OSError("no space left")

    monkeypatch.setattr(checkpoint, "save_file", full_disk)
    with pytest.raises(OSError, match="no space"):
        save_value_model(make_model(), tmp_path / "value", make_tokenizer())
    assert list(tmp_path.iterdir()) == []


def test_a_writer_killed_half_way_never_shows_half_a_model(tmp_path):
    """SIGKILL right before the rename: the name doesn't exist, and a later write under it succeeds."""
    script = textwrap.dedent(
        """
        import sys, time
        from pathlib import Path
        sys.path.insert(0, sys.argv[2])
        from qtilt.model import checkpoint
        from test_checkpoint import make_model, make_tokenizer
        def stall(path):
            print("written", flush=True)
            time.sleep(60)
        checkpoint._flush_tree = stall
        checkpoint.save_value_model(make_model(), Path(sys.argv[1]) / "value", make_tokenizer())
        """
    )
    arguments = [sys.executable, "-c", script, str(tmp_path), str(Path(__file__).parent)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as writer:
        assert writer.stdout.readline() == "written\n"
        writer.send_signal(signal.SIGKILL)
    assert not (tmp_path / "value").exists()
    save_value_model(make_model(), tmp_path / "value", make_tokenizer())
    assert load_value_model(tmp_path / "value").type == "v"
