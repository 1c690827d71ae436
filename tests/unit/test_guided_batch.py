"""The running batch without vLLM: rows follow their requests, and only guided rows are touched."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from guided_vllm.tiny_models import REFERENCE_VOCAB, TOKENS, make_tokenizer, make_value_model, prompt
from qtilt.checkpoint import fingerprint_tokenizer
from qtilt.distributions import Bernoulli
from qtilt.params import GuidanceParams
from qtilt.vllm_plugin.compatibility import Reference
from qtilt.vllm_plugin.records import RecordStore
from qtilt.vllm_plugin.v1.batch import GuidedBatch, GuidedRow
from qtilt.vllm_plugin.v1.history import TokenHistory
from qtilt.vllm_plugin.versions import EngineSettings, Residents, ResidentVersion

pytestmark = pytest.mark.usefixtures("implementation")

SLOTS = 6

MakeRow = Callable[..., GuidedRow]


@pytest.fixture
def version(tmp_path: Path) -> ResidentVersion:
    directory = make_value_model(tmp_path / "value", "v", Bernoulli(), "llama", seed=1)
    return _residents().load_at_start("value", str(directory))


def _residents(dtype: torch.dtype = torch.float32) -> Residents:
    reference = Reference(fingerprint_tokenizer(make_tokenizer()), REFERENCE_VOCAB, 64)
    return Residents(reference, EngineSettings(SLOTS, 64, dtype, torch.device("cpu")))


@pytest.fixture
def make_row(version: ResidentVersion) -> MakeRow:
    def make(output: list[int], store: RecordStore | None = None, trace: str = "t", **params: object) -> GuidedRow:
        guidance = GuidanceParams(**{"value_model": "value", "version": 1, "eta": 0.1, "top_k": 5} | params)
        record = store.open(trace, output, guidance.guided_tokens) if store else None
        history = TokenHistory(prompt(4, seed=1), output, version.manifest.vocab_size)
        return GuidedRow(guidance, 1.0, output, history, version, record)

    return make


def free_slots(version: ResidentVersion) -> int:
    return version.engine.cache.free_slots


def test_rows_that_are_not_guided_are_bit_identical(version: ResidentVersion, make_row: MakeRow) -> None:
    batch = GuidedBatch()
    batch.put(1, make_row([]))
    batch.put(3, make_row([7, 8], guided_tokens=2))
    batch.put(4, make_row([7, 8], guided_tokens=3))
    logits_BV = torch.randn(5, REFERENCE_VOCAB) * 3
    before_BV = logits_BV.clone()
    batch.guide(logits_BV)
    for row, guided in enumerate([False, True, False, False, True]):
        assert torch.equal(logits_BV[row], before_BV[row]) is not guided
    for row in (1, 3, 4):
        batch.put(row, None)
    assert free_slots(version) == SLOTS


def test_masked_logits_are_never_raised_and_count_for_nothing(version: ResidentVersion, make_row: MakeRow) -> None:
    store, batch, output = RecordStore(), GuidedBatch(), []
    batch.put(0, make_row(output, store, top_k=64))
    logits_BV = torch.randn(1, REFERENCE_VOCAB)
    masked = torch.randperm(REFERENCE_VOCAB)[: REFERENCE_VOCAB - 3]
    logits_BV[0, masked] = -torch.inf
    logits_BV[0, masked[:5]] = torch.nan
    before_BV = logits_BV.clone()
    batch.guide(logits_BV)
    assert torch.equal(logits_BV[0, masked].isnan(), before_BV[0, masked].isnan())
    assert torch.equal(logits_BV[0, masked].isneginf(), before_BV[0, masked].isneginf())
    output.append(1)
    (summary,) = store.take("t", [[1]])
    assert 0 <= summary["kl"] < float("inf")
    batch.put(0, None)


def test_a_row_past_its_guided_tokens_gives_its_slot_back(version: ResidentVersion, make_row: MakeRow) -> None:
    batch, output = GuidedBatch(), [3]
    batch.put(0, make_row(output, guided_tokens=2))
    batch.guide(torch.randn(1, REFERENCE_VOCAB))
    assert free_slots(version) == SLOTS - 1
    output.append(4)
    batch.guide(torch.randn(1, REFERENCE_VOCAB))
    assert free_slots(version) == SLOTS
    batch.put(0, None)


def test_tokens_that_were_taken_back_are_forgotten(version: ResidentVersion, make_row: MakeRow) -> None:
    kept, fresh, output = GuidedBatch(), GuidedBatch(), [3, 4, 5]
    kept.put(0, make_row(output))
    kept.guide(torch.randn(1, REFERENCE_VOCAB))
    output[1:] = [9]
    fresh.put(0, make_row(list(output)))
    logits_BV = torch.randn(1, REFERENCE_VOCAB)
    output.pop()
    kept.guide(logits_BV.clone())
    output.append(9)
    torch.testing.assert_close(kept.guide(logits_BV.clone()), fresh.guide(logits_BV.clone()))
    kept.put(0, None)
    fresh.put(0, None)
    assert free_slots(version) == SLOTS


def test_a_placeholder_in_the_history_fails_the_request_and_says_what_to_do(make_row: MakeRow) -> None:
    batch, row = GuidedBatch(), make_row([3, -1])
    batch.put(0, row)
    batch.guide(torch.randn(1, REFERENCE_VOCAB))
    assert row.failure is not None
    assert "module:Class" in row.failure["reason"]


def test_rows_follow_their_requests_through_any_removals_moves_and_swaps(
    version: ResidentVersion, make_row: MakeRow
) -> None:
    """Against a plain list of who sits where, with the step run in between so that slots are held."""
    chance, batch = random.Random(0), GuidedBatch()
    seats: list[GuidedRow | None] = [None] * SLOTS
    for _ in range(300):
        source, target = chance.sample(range(SLOTS), 2)
        match chance.choice(["put", "put", "unguided", "leave", "move", "swap", "step"]):
            case "put":
                seats[source] = make_row([chance.randrange(TOKENS)])
                batch.put(source, seats[source])
            case "unguided" | "leave":
                seats[source] = None
                batch.put(source, None)
            case "move":
                seats[target], seats[source] = seats[source], None
                batch.move(source, target)
            case "swap":
                seats[source], seats[target] = seats[target], seats[source]
                batch.swap(source, target)
            case "step":
                before_BV = torch.randn(SLOTS, REFERENCE_VOCAB)
                after_BV = batch.guide(before_BV.clone())
                touched = [not torch.equal(after_BV[seat], before_BV[seat]) for seat in range(SLOTS)]
                assert touched == [row is not None for row in seats]
        assert len(batch) == version.rows == sum(row is not None for row in seats)
        held = [row.slot for row in seats if row is not None and row.slot is not None]
        assert len(set(held)) == len(held) == SLOTS - free_slots(version)
    for seat in range(SLOTS):
        batch.put(seat, None)
    assert free_slots(version) == SLOTS


def test_the_value_model_runs_in_the_dtype_asked_for(tmp_path: Path) -> None:
    directory = make_value_model(tmp_path / "value", "v", Bernoulli(), "llama", seed=1)
    candidates_BK = torch.arange(8).view(2, 4)
    logits = []
    for dtype in (torch.float32, torch.bfloat16):
        engine = _residents(dtype).load_at_start("value", str(directory)).engine
        assert engine.cache.geometry.dtype == dtype
        logits.append(engine.value_logits([engine.acquire(), engine.acquire()], [[1, 2], [3, 4, 5]], candidates_BK))
    assert not torch.equal(*logits)
    torch.testing.assert_close(*logits, rtol=0.1, atol=0.2)


def test_versions_of_equal_geometry_share_one_cache(tmp_path: Path) -> None:
    residents = _residents()
    engines = [
        residents.load_at_start(name, str(make_value_model(tmp_path / name, "q", Bernoulli(), family, seed=2))).engine
        for name, family in (("a", "llama"), ("b", "llama"), ("c", "gpt2"))
    ]
    assert engines[0].cache is engines[1].cache
    assert engines[2].cache is not engines[0].cache


def test_a_value_model_with_too_few_positions_is_refused_with_what_to_do(tmp_path: Path) -> None:
    directory = make_value_model(tmp_path / "short", "v", Bernoulli(), "gpt2", seed=1, positions=63)
    with pytest.raises(ValueError, match=r"covers 63 positions, max_model_len is 64: lower --max-model-len"):
        _residents().load_at_start("short", str(directory))
