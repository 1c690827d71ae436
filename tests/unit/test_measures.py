"""What a worker counts of guidance: steps, tokens that were computed late or again, pages of the value cache."""

from pathlib import Path
from typing import Any

import pytest
import torch

from guided_vllm.tiny_models import REFERENCE_VOCAB, make_value_model
from qtilt.distributions import Bernoulli
from qtilt.vllm_plugin.measures import measure
from running_batch import LENGTH, RunningBatch, count_tokens, make_residents

SLOTS = 6


class Measured(RunningBatch):
    """Requests for one value model, and what the worker says of it."""

    def __init__(self, directory: Path, type_: str = "v", kv_fraction: float = 1.0, **more: Any) -> None:
        super().__init__(SLOTS, **more)
        path = make_value_model(directory / "value", type_, Bernoulli(), "llama", seed=1)
        self.residents = make_residents(SLOTS, kv_fraction=kv_fraction)
        self.version = self.residents.load_at_start("value", str(path))

    def of_version(self, *names: str) -> list[Any]:
        (measures,) = measure(self.residents)["versions"]
        return [dict(measures)[name] for name in names]

    def of_cache(self, *names: str) -> list[Any]:
        (measures,) = measure(self.residents)["caches"]
        return [dict(measures)[name] for name in names]


def prompt(length: int, seed: int) -> list[int]:
    return torch.randint(1, 17, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.parametrize("type_", ["v", "q"])
def test_steps_and_prompts_are_counted_once(tmp_path: Path, type_: str) -> None:
    runner = Measured(tmp_path, type_)
    assert runner.of_version("steps", "step_requests", "first", "again", "copied", "running") == [0] * 6
    run = count_tokens(runner.version)
    for slot, length in ((0, 10), (3, 20)):
        runner.add(slot, runner.version, prompt(length, seed=slot))
    for token in (3, 4, 5):
        runner.step({0: [token], 3: [token]})
    runner.step({3: [6]})
    assert runner.of_version("steps", "step_requests", "running") == [4, 7, 2]
    assert runner.of_version("first", "again", "copied") == [9 + 19, 0, 0]
    # What the value model ran are those, a token a request and step, and of a V-type the candidates.
    drawn, candidates = 7, 7 * 5 if type_ == "v" else 0
    assert sum(run) == 9 + 19 + drawn + candidates
    step_seconds, forward_seconds = runner.of_version("step_seconds", "forward_seconds")
    assert step_seconds > forward_seconds > 0


def test_the_chunks_of_a_prompt_are_counted_as_they_come(tmp_path: Path) -> None:
    runner = Measured(tmp_path)
    runner.add(2, runner.version, prompt(30, seed=1))
    for length in (7, 20):
        runner.requests.total_lens[2] = length
        runner.guide([2], torch.randn(1, REFERENCE_VOCAB))
    assert runner.of_version("steps", "step_requests", "first", "again") == [2, 0, 20, 0]


@pytest.mark.parametrize("kv_fraction", [1.0, 0.9])
def test_a_dropped_history_is_computed_again_and_a_new_one_is_not(tmp_path: Path, kv_fraction: float) -> None:
    runner = Measured(tmp_path, kv_fraction=kv_fraction)
    runner.add(0, runner.version, prompt(20, seed=1))
    runner.step({0: [3]})
    runner.version.engine.cache.drop(0)
    runner.step({0: [4]})
    assert runner.of_version("first", "again") == [19, 20]
    runner.step({0: [5]})
    runner.add(0, runner.version, prompt(12, seed=2))
    runner.step({0: [5]})
    assert runner.of_version("first", "again") == [19 + 11, 20]


def test_a_preempted_request_that_comes_back_is_computed_again(tmp_path: Path) -> None:
    runner = Measured(tmp_path)
    runner.add(0, runner.version, prompt(20, seed=1))
    for token in (3, 4):
        runner.step({0: [token]})
    runner.add(1, runner.version, prompt(20, seed=1), output=[3, 4], trace_id="back")
    runner.batch.remove(0)
    runner.step({1: [5]})
    assert runner.of_version("first", "again", "copied") == [19, 21, 0]


def test_what_is_copied_from_a_request_that_begins_alike_is_not_computed(tmp_path: Path) -> None:
    runner = Measured(tmp_path)
    for slot in (0, 1):
        runner.add(slot, runner.version, prompt(20, seed=1))
    runner.step({0: [3], 1: [4]})
    assert runner.of_version("first", "again", "copied") == [19, 0, 19]


def test_pages_and_histories_dropped_for_room(tmp_path: Path) -> None:
    runner = Measured(tmp_path, kv_fraction=0.5)
    assert runner.of_cache("pages", "pages_used", "page_tokens", "dropped") == [SLOTS, 0, 32, 0]
    for slot in range(SLOTS):
        runner.add(slot, runner.version, prompt(40, seed=slot), trace_id=str(slot))
    for slot in range(SLOTS // 2):
        runner.step({slot: [3]})
    assert runner.of_cache("pages_used", "dropped") == [SLOTS, 0]
    assert runner.of_version("pages", "again") == [SLOTS, 0]
    runner.step({5: [3]})
    assert runner.of_cache("pages_used", "dropped") == [SLOTS, 1]
    runner.step({0: [4]})
    assert runner.of_version("again") == [40]


def test_in_one_piece_a_page_is_a_slot(tmp_path: Path) -> None:
    runner = Measured(tmp_path)
    runner.add(4, runner.version, prompt(40, seed=1))
    runner.step({4: [3]})
    assert runner.of_cache("pages", "pages_used", "page_tokens") == [SLOTS, 1, LENGTH]
    assert runner.of_version("pages") == [1]


def test_versions_that_share_a_cache_have_pages_of_their_own(tmp_path: Path) -> None:
    runner = Measured(tmp_path, kv_fraction=0.5)
    path = make_value_model(tmp_path / "other", "v", Bernoulli(), "llama", seed=2)
    other = runner.residents.load_at_start("other", str(path))
    runner.add(0, runner.version, prompt(40, seed=0))
    runner.add(1, other, prompt(10, seed=1))
    runner.step({0: [3], 1: [3]})
    assert [version["pages"] for version in measure(runner.residents)["versions"]] == [2, 1]
    assert runner.of_cache("pages_used") == [3]


def test_how_long_a_forward_takes_on_a_gpu_is_not_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = Measured(tmp_path)
    runner.add(0, runner.version, prompt(5, seed=1))
    runner.step({0: [3]})
    assert runner.of_version("forward_seconds")[0] > 0
    geometry = runner.version.engine.cache.geometry
    object.__setattr__(geometry, "device", torch.device("cuda"))
    assert runner.of_version("forward_seconds") == [None]
