"""The value engine against plain Hugging Face forwards, whatever the histories do between steps."""

import math

import pytest
import torch
from torch import Tensor

from engine_histories import EXACT, Histories, acquire, value_logits
from hf_oracle import CONFIGS, POSITIONS, VOCABULARY, make_value_model, plain_value_logits
from qtilt.engine import ValueEngine
from qtilt.forwards.attention import attend_prefix


@pytest.fixture(params=["q", "v"])
def type(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=["llama-gqa", "gpt2"])
def histories(request: pytest.FixtureRequest, type: str) -> Histories:
    return Histories(make_value_model(request.param, type))


@pytest.mark.parametrize("distribution", ["bernoulli", "categorical"])
@pytest.mark.parametrize("family", CONFIGS)
def test_catch_up_one_token_none_and_mixed_steps_equal_plain_forwards(family: str, type: str, distribution: str):
    run = Histories(make_value_model(family, type, distribution))
    first, second, third = run.start(3, 17, 1)
    run.check(first, second, third)
    for slot in (first, second, third):
        run.grow(slot, 1)
    run.check(first, second, third)
    run.check(first, second, third)  # nothing new
    run.grow(first, 1)
    run.grow(third, 9)
    (fourth,) = run.start(8)
    run.check(fourth, third, second, first)  # none, one, many and all new in one step, in another order


def test_a_row_scores_the_same_alone_and_beside_others(type: str):
    model = make_value_model("llama-gqa", type)
    alone, beside = Histories(model), Histories(model)
    histories = [alone.draw(length) for length in (4, 30, 11)]
    candidates_BK = torch.tensor([alone.draw(5) for _ in histories])
    together = value_logits(beside.engine, [acquire(beside.engine) for _ in histories], histories, candidates_BK)
    for history, candidates_K, expected_KA in zip(histories, candidates_BK, together, strict=True):
        got_BKA = value_logits(alone.engine, [acquire(alone.engine)], [history], candidates_K[None])
        torch.testing.assert_close(got_BKA[0], expected_KA, **EXACT)


def test_a_rewound_history_may_go_another_way(histories: Histories):
    first, second = histories.start(12, 7)
    histories.check(first, second)
    histories.branch(first, kept=5, count=1)
    histories.grow(second, 1)
    histories.check(first, second)
    histories.branch(first, kept=2, count=6)
    histories.branch(second, kept=1, count=0)
    histories.check(first, second)
    histories.branch(first, kept=0, count=4)
    histories.check(first)


def test_a_history_rewound_without_new_tokens_is_scored_from_its_new_end(histories: Histories):
    (slot,) = histories.start(9)
    histories.check(slot)
    histories.branch(slot, kept=4, count=0)
    histories.check(slot)
    histories.check(slot)


def test_released_slots_start_anew_and_the_lowest_goes_first(histories: Histories):
    slots = histories.start(20, 5, 9)
    histories.check(*slots)
    histories.stop(slots[0])
    histories.stop(slots[1])
    reused = histories.start(4, 6)
    assert reused == slots[:2]
    assert [histories.engine.cache.covered_S[slot] for slot in reused] == [0, 0]
    histories.check(slots[2], *reused)


def test_scattered_slots_are_read_where_they_are(type: str):
    run = Histories(make_value_model("llama-gqa", type), slots=12)
    slots = run.start(*range(3, 15))
    run.check(*slots)
    for slot in slots[1:-1]:
        run.stop(slot)
    for slot in (slots[0], slots[-1]):
        run.grow(slot, 1)
    run.check(slots[-1], slots[0])


def test_what_a_broken_history_leaves_in_a_slot_reaches_nobody(type: str):
    run = Histories(make_value_model("llama-gqa", type))
    long, short = run.start(20, 3)
    run.check(long, short)
    run.engine.cache.memory.keys_LNGPD[:, short, :, 2] = torch.nan
    run.engine.cache.memory.values_LNGPD[:, short, :, 2] = torch.nan
    run.stop(short)
    run.start(1)
    run.check(long, *(slot for slot in run.tokens if slot != long))


def test_what_a_broken_history_leaves_in_its_pages_reaches_nobody(type: str):
    run = Histories(make_value_model("llama-gqa", type), kv_fraction=0.5)
    broken, short, long = run.start(30, 3, 60)
    run.check(broken)
    run.engine.cache.memory.keys_LNGPD[:, run.engine.cache.pages.of(broken)] = torch.nan
    run.engine.cache.memory.values_LNGPD[:, run.engine.cache.pages.of(broken)] = torch.nan
    run.check(short, long)


@pytest.mark.parametrize("limit", [1, 4, 7])
def test_a_catch_up_longer_than_one_forward_allows_takes_several(histories: Histories, limit: int):
    run = Histories(histories.model, max_new_tokens=limit)
    tokens_of_forwards = forwards_of(run)
    slots = run.start(13, 2, 1, 6)
    candidates_BK = torch.tensor([run.draw(3) for _ in slots])
    got_BKA = value_logits(run.engine, slots, list(run.tokens.values()), candidates_BK)
    # A row's last token isn't put off, however many rows there are.
    candidates = candidates_BK.numel() if run.model.type == "v" else 0
    assert max(tokens_of_forwards) <= max(limit, len(slots)) + candidates
    expected_BKA = plain_value_logits(run.model, list(run.tokens.values()), candidates_BK)
    torch.testing.assert_close(got_BKA, expected_BKA, **EXACT)


def test_two_models_share_one_cache_and_a_swap_recomputes_nothing(type: str):
    old = Histories(make_value_model("qwen3", type, seed=0))
    new = Histories(make_value_model("qwen3", type, seed=1), seed=1)
    new.engine = ValueEngine(new.model, 6, POSITIONS - 1, caches={old.engine.cache.geometry: old.engine.cache})
    (started_before,) = old.start(10)
    old.check(started_before)
    (started_after,) = new.start(12)
    assert started_after != started_before
    for _ in range(2):
        new.check(started_after)
        old.check(started_before)
        old.grow(started_before, 1)
        new.grow(started_after, 1)
    assert not new.engine.holds(started_before)
    old.stop(started_before)
    (reused,) = new.start(5)
    assert reused == started_before
    new.check(started_after, reused)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_random_histories_stay_exact(family: str, type: str):
    run = Histories(make_value_model(family, type, "categorical"), max_new_tokens=24, seed=5)
    run.wander(steps=40)


@pytest.mark.parametrize("fraction", [0.01, 0.3, 0.6])
@pytest.mark.parametrize("family", ["llama-gqa", "gpt2"])
def test_random_histories_stay_exact_with_less_memory_than_they_need(family: str, type: str, fraction: float):
    summed_in_other_parts = {"atol": 5e-5, "rtol": 1e-5}
    run = Histories(
        make_value_model(family, type, "categorical"),
        max_new_tokens=24,
        seed=5,
        exact=summed_in_other_parts,
        kv_fraction=fraction,
    )
    run.wander(steps=40)
    for slot in list(run.tokens):
        run.stop(slot)
    pages = run.engine.cache.pages
    assert pages.free == pages.total == max(pages.per_slot, math.ceil(fraction * 6 * pages.per_slot))
    assert not run.engine.cache.memory.keys_LNGPD.any()


def test_what_was_used_least_recently_is_dropped_and_computed_again(histories: Histories):
    run = Histories(histories.model, slots=3, kv_fraction=2 / 3)
    assert run.engine.cache.pages.total == 6
    first, second, third = slots = run.start(50, 60, 40)
    for slot in slots:
        run.check(slot)
    assert run.engine.cache.pages.free == 0
    run.grow(third, 30)  # a third page
    run.check(third)
    assert [run.engine.cache.covered_S[slot] for slot in slots] == [0, 60, 70]
    run.check(second)
    run.check(first)
    assert [run.engine.cache.covered_S[slot] for slot in slots] == [50, 60, 0]
    run.check(*slots)


def test_two_models_that_share_a_small_cache_drop_each_others_histories(type: str):
    old = Histories(make_value_model("qwen3", type, seed=0), kv_fraction=0.3)
    new = Histories(make_value_model("qwen3", type, seed=1), seed=1)
    new.engine = ValueEngine(new.model, 6, POSITIONS - 1, caches={old.engine.cache.geometry: old.engine.cache})
    ours, theirs = old.start(60, 60), new.start(50, 40)
    for _ in range(3):
        old.check(*ours)
        new.check(*theirs)
        for slot in ours:
            old.grow(slot, 1)


@pytest.mark.parametrize("together", [1, 2])
def test_no_attention_call_copies_more_of_a_cache_in_pages_than_it_may(
    type: str, together: int, monkeypatch: pytest.MonkeyPatch
):
    run = Histories(make_value_model("llama-gqa", type), kv_fraction=0.9)
    geometry = run.engine.cache.geometry
    copied_of_calls = []

    def note(query_WGQD: Tensor, key_WGPD: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
        copied_of_calls.append(key_WGPD.numel())
        return attend_prefix(query_WGQD, key_WGPD, *rest)

    slots = run.start(3, 60, 9, 30, 1)
    most = together * 60 * geometry.kv_heads * geometry.head_size
    monkeypatch.setattr("qtilt.forwards.packed_attention.COPIED_ELEMENTS", most)
    monkeypatch.setattr("qtilt.forwards.packed_attention.attend_prefix", note)
    run.check(*slots)
    assert max(copied_of_calls) == most


def forwards_of(run: Histories) -> list[int]:
    """The list that gets the number of tokens of each forward of the engine from now on."""
    tokens: list[int] = []

    def note(module: object, args: object, kwargs: dict[str, Tensor]) -> None:
        if "attention_step" in kwargs:  # else it is the oracle's
            tokens.append(kwargs["input_ids"].shape[1])

    run.model.backbone.register_forward_pre_hook(note, with_kwargs=True)
    return tokens


def test_one_forward_a_step_with_what_the_cache_lacks_and_the_last_token_of_each_row(type: str):
    run = Histories(make_value_model("llama", type))
    first, second = run.start(10, 20)
    run.check(first, second)
    tokens_of_forwards = forwards_of(run)
    run.grow(first, 3)
    value_logits(run.engine, [first, second], [run.tokens[first], run.tokens[second]], torch.zeros(2, 5).long())
    assert tokens_of_forwards == [3 + 1 + (2 * 5 if type == "v" else 0)]
    value_logits(run.engine, [first, second], [run.tokens[first], run.tokens[second]], torch.zeros(2, 5).long())
    assert tokens_of_forwards[1:] == [2 + (2 * 5 if type == "v" else 0)]


@pytest.mark.parametrize("beside", [True, False])
def test_a_history_that_begins_as_another_computes_the_rest_only(histories: Histories, beside: bool):
    run = histories
    (other,) = run.start(30)
    run.check(other)
    prompt = run.draw(40)
    slots = [
        run.start_with(tokens)
        for tokens in (prompt, [*prompt, *run.draw(5)], [*prompt[:25], *run.draw(16)], run.tokens[other][:20])
    ]
    tokens_of_forwards = forwards_of(run)
    if beside:
        run.check(*slots, other)
    else:
        for slot in slots:
            run.check(slot)
    # Beside each other, a row's last token isn't there yet to be copied; the fifth row is `other`.
    expected = 40 + 6 + 16 + 1 + 1 if beside else 40 + 5 + 16 + 1
    candidates = (5 if beside else 4) * 5 if run.model.type == "v" else 0
    assert sum(tokens_of_forwards) == expected + candidates
    for slot in slots:
        run.grow(slot, 1)
    run.check(*slots)


def test_histories_with_little_or_nothing_in_common_share_nothing(histories: Histories):
    slots = histories.start(15, 40)
    slots.append(histories.start_with(histories.tokens[slots[0]]))
    tokens_of_forwards = forwards_of(histories)
    histories.check(*slots)
    assert sum(tokens_of_forwards) == 15 + 15 + 40 + (15 if histories.model.type == "v" else 0)


def test_a_prefix_is_not_taken_from_a_history_that_was_rewound_before_it(histories: Histories):
    (first,) = histories.start(30)
    second = histories.start_with(histories.tokens[first])
    histories.check(first)
    histories.branch(first, kept=20, count=4)
    tokens_of_forwards = forwards_of(histories)
    histories.check(second)
    assert sum(tokens_of_forwards) == 30 - 20 + (5 if histories.model.type == "v" else 0)
    histories.check(first, second)


def test_candidates_are_never_cached():
    run = Histories(make_value_model("gpt2", "v"))
    first, second = run.start(6, 9)
    run.check(first, second, columns=20)
    assert run.engine.cache.memory.keys_LNGPD[:, first, :, 5].all()
    assert not run.engine.cache.memory.keys_LNGPD[:, first, :, 6:].any()
    assert not run.engine.cache.memory.keys_LNGPD[:, second, :, 9:].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama-gqa", "gpt2"])
def test_half_precision_is_as_close_to_float32_as_the_plain_forward_is(family: str, type: str, dtype: torch.dtype):
    exact = make_value_model(family, type)
    histories = [Histories(exact).draw(length) for length in (5, 23)]
    candidates_BK = torch.tensor([[1, 2, 3], [4, 5, 6]])
    expected_BKA = plain_value_logits(exact, histories, candidates_BK)
    half = make_value_model(family, type).to(dtype)
    half.load_state_dict(exact.state_dict())
    plain_error = (plain_value_logits(half, histories, candidates_BK) - expected_BKA).abs().max()
    engine = ValueEngine(half, 2, POSITIONS - 1)
    got_BKA = value_logits(engine, [acquire(engine), acquire(engine)], histories, candidates_BK)
    assert (got_BKA - expected_BKA).abs().max() < 2 * plain_error + 0.05


def test_the_backbone_keeps_its_own_attention_outside_the_engine(histories: Histories):
    model = histories.model
    ids_1T = torch.tensor([[1, 2, 3, 4]])
    before = model.taken_logits(ids_1T).detach()
    histories.check(*histories.start(5))
    assert model.backbone.config._attn_implementation == "eager"
    assert torch.equal(model.taken_logits(ids_1T).detach(), before)


def test_a_slot_is_rewound_to_what_it_holds_only(histories: Histories):
    (slot,) = histories.start(4)
    histories.check(slot)
    with pytest.raises(ValueError, match="holds 4 tokens and cannot be rewound to 5"):
        histories.engine.cache.rewind(slot, 5)
    histories.check(slot)


def test_tokens_that_the_value_model_lacks_are_read_as_its_last(histories: Histories):
    slot = histories.start_with([1, VOCABULARY - 1, 2, VOCABULARY - 1, 5])
    expected_BKA = plain_value_logits(histories.model, [histories.tokens[slot]], torch.tensor([[3, 4]]))
    tokens = [1, VOCABULARY, 2, VOCABULARY + 7, 5]
    got_BKA = value_logits(histories.engine, [slot], [tokens], torch.tensor([[3, 4]]))
    torch.testing.assert_close(got_BKA, expected_BKA, **EXACT)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_last_position_is_left_for_the_candidates_of_a_v_type(family: str, type: str):
    engine = ValueEngine(make_value_model(family, type), 1, POSITIONS)
    slot, candidates_BK = acquire(engine), torch.tensor([[3, 5]])
    longest = Histories(engine.model).draw(POSITIONS if type == "q" else POSITIONS - 1)
    got_BKA = value_logits(engine, [slot], [longest], candidates_BK)
    torch.testing.assert_close(got_BKA, plain_value_logits(engine.model, [longest], candidates_BK), **EXACT)


def test_a_slot_in_use_is_refused(histories: Histories):
    (slot,) = histories.start(1)
    with pytest.raises(ValueError, match=f"cache slot {slot} of 6 is in use"):
        histories.engine.acquire(slot)
