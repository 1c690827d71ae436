"""The value-model versions of a worker, without vLLM: their dtype, their cache, and which are refused."""

import time
from pathlib import Path

import pytest
import torch

from engine_histories import acquire, value_logits
from guided_vllm.tiny_models import make_value_model
from low_rank_models import write_language_model, write_low_rank
from qtilt.distributions import Bernoulli
from qtilt.vllm_plugin.reserve import Reserve
from running_batch import CPU, make_residents

SLOTS = 6


def test_the_value_model_runs_in_the_dtype_asked_for(tmp_path: Path) -> None:
    directory = make_value_model(tmp_path / "value", "v", Bernoulli(), "llama", seed=1)
    candidates_BK = torch.arange(8).view(2, 4)
    logits = []
    for dtype in (torch.float32, torch.bfloat16):
        engine = make_residents(SLOTS, dtype).load_at_start("value", str(directory)).engine
        assert engine.cache.geometry.dtype == dtype
        logits.append(value_logits(engine, [acquire(engine), acquire(engine)], [[1, 2], [3, 4, 5]], candidates_BK))
    assert not torch.equal(*logits)
    torch.testing.assert_close(*logits, rtol=0.1, atol=0.2)


@pytest.mark.parametrize(("type", "family"), [("q", "gpt2"), ("v", "llama"), ("low-rank", "llama")])
def test_to_load_draws_no_random_numbers(tmp_path: Path, type: str, family: str) -> None:
    """Requests without a seed are sampled with the same generator, and with it the ranks of an engine agree."""
    if type == "low-rank":
        base = write_language_model(tmp_path / "base", family)
        directory = write_low_rank(tmp_path / "value", base)
    else:
        directory = make_value_model(tmp_path / "value", type, Bernoulli(), family, seed=1)
    before = torch.get_rng_state()
    make_residents(SLOTS).load_at_start("value", str(directory))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_resident_head_is_a_copy_of_its_file(tmp_path: Path) -> None:
    directory = make_value_model(tmp_path / "value", "v", Bernoulli(), "llama", seed=1)
    head = make_residents(SLOTS).load_at_start("value", str(directory)).engine.model.head
    before = head.weight.clone()
    with (directory / "head.safetensors").open("r+b") as file:
        file.seek(-head.weight.numel() * 4 - 4, 2)
        file.write(b"\x7f" * head.weight.numel() * 4)
    assert torch.equal(head.weight, before)


def test_versions_of_equal_geometry_share_one_cache(tmp_path: Path) -> None:
    residents = make_residents(SLOTS)
    engines = [
        residents.load_at_start(name, str(make_value_model(tmp_path / name, "q", Bernoulli(), family, seed=2))).engine
        for name, family in (("a", "llama"), ("b", "llama"), ("c", "gpt2"))
    ]
    assert engines[0].cache is engines[1].cache
    assert engines[2].cache is not engines[0].cache


def test_a_value_model_with_too_few_positions_is_refused_with_what_to_do(tmp_path: Path) -> None:
    directory = make_value_model(tmp_path / "short", "v", Bernoulli(), "gpt2", seed=1, positions=63)
    with pytest.raises(ValueError, match=r"covers 63 positions, max_model_len is 64: lower --max-model-len"):
        make_residents(SLOTS).load_at_start("short", str(directory))


def test_a_prepared_version_that_is_discarded_leaves_room_for_the_next_one(tmp_path: Path) -> None:
    """And one that couldn't be prepared has taken none."""
    residents = make_residents(SLOTS)
    residents.reserve = Reserve(CPU, activations=0, weights=100, versions=2)
    make_value_model(tmp_path / "good", "v", Bernoulli(), "llama", seed=1)
    for version, name in ((1, "good"), (2, "missing")):
        residents.prepare("value", version, str(tmp_path / name))
        while residents.status("value", version)["state"] == "loading":
            time.sleep(0.01)
        assert residents.reserve.held_bytes == (100 if name == "good" else 200)
        residents.discard("value", version)
        residents._loader.submit(lambda: None).result()
        assert residents.reserve.held_bytes == 200
