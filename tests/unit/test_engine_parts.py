"""The attention over a prefix and its merge with the own key; which backbones and caches the engine refuses."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    BertConfig,
    BloomConfig,
    Gemma2Config,
    GptOssConfig,
    Lfm2Config,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
)

from engine_histories import acquire, value_logits
from hf_oracle import CONFIGS, POSITIONS, SIZES, VOCABULARY, make_backbone, make_value_model
from qtilt.distributions import Bernoulli
from qtilt.engine import ValueEngine
from qtilt.engine.cache import KVCache
from qtilt.forwards.attention import attend_prefix, merge_own_
from qtilt.forwards.memory import PAGE_TOKENS, CacheGeometry
from qtilt.forwards.probe import measure_geometry
from qtilt.value_model import ValueModel

ROWS, KV_HEADS, QUERIES, PREFIX, SIZE = 3, 2, 10, 7, 8
LENGTHS_W = torch.tensor([3, PREFIX, 1])
SCALING = 0.3


def prefix_inputs(query_size: float = 1.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    query = query_size * torch.randn(ROWS, KV_HEADS, QUERIES, SIZE)
    # Slices of a larger cache, as the engine reads it.
    keys, values = torch.randn(2, ROWS + 2, KV_HEADS, PREFIX + 5, SIZE).unbind(0)
    mask = torch.zeros(ROWS, PREFIX).masked_fill_(torch.arange(PREFIX) >= LENGTHS_W[:, None], -torch.inf)
    return query, keys[1:-1, :, :PREFIX], values[1:-1, :, :PREFIX], mask[:, None, None]


# What the sums of float32 differ by, and what rounding an output of about 1 to the dtype does.
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}


@pytest.mark.parametrize("dtype", ROUNDING)
def test_attention_over_a_prefix_is_the_softmax_over_its_visible_positions(dtype: torch.dtype):
    # Scores of about 30: in half precision they would be rounded by more than the weights may be.
    query, keys, values, mask = (tensor.to(dtype) for tensor in prefix_inputs(query_size=40))
    out, lse = attend_prefix(query, keys, values, mask, SCALING)
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    for row, length in enumerate(LENGTHS_W.tolist()):
        scores = query[row].double() @ keys[row, :, :length].double().mT * SCALING
        torch.testing.assert_close(lse[row].double(), scores.logsumexp(-1), atol=1e-5, rtol=1e-5)
        expected = scores.softmax(-1) @ values[row, :, :length].double()
        torch.testing.assert_close(out[row].double(), expected, atol=ROUNDING[dtype], rtol=ROUNDING[dtype])


@pytest.mark.parametrize("own_size", [1.0, 60.0])
def test_merging_the_own_key_is_the_softmax_over_prefix_and_self(own_size: float):
    torch.manual_seed(1)
    tokens, heads = 4, 6
    query, keys, values = (torch.randn(tokens, n, SIZE) for n in (heads, PREFIX, PREFIX))
    own_key, own_value = own_size * torch.randn(tokens, KV_HEADS, SIZE), torch.randn(tokens, KV_HEADS, SIZE)
    scores = query @ keys.mT * SCALING
    merged = scores.softmax(-1) @ values
    merge_own_(merged, scores.logsumexp(-1), query, own_key, own_value, SCALING)
    for head in range(heads):
        group = head // (heads // KV_HEADS)
        own = (query[:, head] * own_key[:, group]).sum(-1, keepdim=True) * SCALING
        weights = torch.cat([scores[:, head], own], dim=-1).softmax(-1)
        expected = (weights[:, :-1, None] * values).sum(1) + weights[:, -1:] * own_value[:, group]
        torch.testing.assert_close(merged[:, head], expected, atol=1e-5, rtol=1e-5)


HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": VOCABULARY}
DYNAMIC_ROPE = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
TOY = {"hidden_size": 32, "vocab_size": VOCABULARY}
REFUSED: dict[str, tuple[PretrainedConfig, str]] = {
    "sliding window": (MistralConfig(sliding_window=16, **HEADS, **SIZES), "sliding window of 16"),
    "some sliding layers": (
        Qwen2Config(use_sliding_window=True, sliding_window=16, max_window_layers=1, **HEADS, **SIZES),
        "sliding_attention layers",
    ),
    "soft cap": (Gemma2Config(head_dim=8, sliding_window=128, **HEADS, **SIZES), "softcap"),
    "sinks": (
        GptOssConfig(
            head_dim=8,
            num_local_experts=2,
            num_experts_per_tok=1,
            sliding_window=128,
            rope_parameters=None,
            **HEADS,
            **SIZES,
        ),
        "s_aux",
    ),
    "layers without attention": (
        Lfm2Config(layer_types=["full_attention", "conv", "conv"], **HEADS, **SIZES),
        "conv layers",
    ),
    "both directions": (BertConfig(num_attention_heads=4, vocab_size=VOCABULARY, **SIZES), "not causal"),
    "attention of its own": (BloomConfig(n_head=4, n_layer=2, **TOY), "does not let its attention be replaced"),
    "dynamic frequencies": (LlamaConfig(rope_parameters=DYNAMIC_ROPE, **HEADS, **SIZES), "rope_type is 'dynamic'"),
}


@pytest.mark.parametrize(("config", "reason"), REFUSED.values(), ids=REFUSED)
def test_backbones_the_engine_is_not_exact_on_are_refused(config: PretrainedConfig, reason: str):
    with pytest.raises(ValueError, match=reason):
        measure_geometry(make_backbone(config), POSITIONS)


def test_a_backbone_that_mixes_tokens_outside_its_attention_is_refused():
    backbone = make_backbone(CONFIGS["llama"])
    backbone.layers[1].register_forward_hook(lambda module, args, out: out + 0.1 * out.roll(1, dims=1))
    with pytest.raises(ValueError, match="something else than causal attention over each sequence"):
        measure_geometry(backbone, POSITIONS)


def test_special_tokens_on_which_a_backbone_blows_up_what_it_rounds_are_no_reason_to_refuse_it():
    """Noise stands for what a deep model makes of rounding there; it differs from one forward to the next."""
    backbone = make_backbone(CONFIGS["llama"]).bfloat16()
    blow_up = lambda module, args, out: out + torch.randn_like(out) * (args[0] < 3).unsqueeze(-1)  # noqa: E731
    backbone.embed_tokens.register_forward_hook(blow_up)
    assert measure_geometry(backbone, POSITIONS).dtype == torch.bfloat16


def test_half_precision_hides_no_other_function():
    backbone = make_backbone(CONFIGS["llama"]).bfloat16()
    backbone.layers[1].register_forward_hook(lambda module, args, out: out + 0.3 * out.roll(1, dims=1))
    with pytest.raises(ValueError, match=r"something else than causal attention .* differ by .* allowed 1e-01"):
        measure_geometry(backbone, POSITIONS)


PACKED = "qtilt.forwards.packed_attention"
SPOILT: dict[str, tuple[str, Any]] = {
    "a candidate doesn't see itself": (f"{PACKED}.merge_own_", lambda *args: None),
    "padding is seen": (
        f"{PACKED}.prefix_mask",
        lambda *args: torch.zeros(len(args[0]), 1, 1, args[1]),
    ),
    "a later span sees what follows it": (f"{PACKED}._visible", lambda span, device: torch.ones(1, 1).bool()),
    "pages are read in another order": (
        "qtilt.forwards.memory.PageMemory._read",
        lambda memory, content_NGPD, window, length: (
            content_NGPD[memory.table_SM.flip(1)[window, : math.ceil(length / memory.page_size)]]
            .transpose(1, 2)
            .flatten(2, 3)[:, :, :length]
        ),
    ),
    "heads read the keys of another group": (
        f"{PACKED}.attend_prefix",
        lambda query_WGQD, *rest: (
            tuple(out.flip(1) for out in attend_prefix(query_WGQD.flip(1), *rest)[:1])
            + attend_prefix(query_WGQD, *rest)[1:]
        ),
    ),
}


@pytest.mark.parametrize(("place", "spoilt"), SPOILT.values(), ids=SPOILT)
def test_a_forward_that_attends_to_something_else_is_refused_when_it_is_made(
    place: str, spoilt: Any, monkeypatch: pytest.MonkeyPatch
):
    ValueEngine(make_value_model("llama-gqa", "v"), 2, POSITIONS)
    monkeypatch.setattr(place, spoilt)
    with pytest.raises(ValueError, match="run by transformers, computes something else"):
        ValueEngine(make_value_model("llama-gqa", "v"), 2, POSITIONS)


def test_a_sliding_window_no_history_outgrows_is_accepted():
    backbone = make_backbone(MistralConfig(sliding_window=POSITIONS, **HEADS, **SIZES))
    assert measure_geometry(backbone, POSITIONS).kv_heads == 2


@pytest.mark.parametrize("family", CONFIGS)
def test_the_cache_has_the_shape_the_backbone_asks_for(family: str):
    model = make_value_model(family, "v")
    engine = ValueEngine(model, slots=3, max_length=40)
    attention = model.backbone.config
    kv_heads = getattr(attention, "num_key_value_heads", attention.num_attention_heads)
    head_size = getattr(attention, "head_dim", attention.hidden_size // attention.num_attention_heads)
    assert (
        engine.cache.memory.keys_LNGPD.shape
        == engine.cache.memory.values_LNGPD.shape
        == (3, 3 + 1, kv_heads, 40, head_size)
    )


def test_positions_must_cover_the_longest_history():
    with pytest.raises(ValueError, match=f"has {POSITIONS} positions, fewer than the {POSITIONS + 1} tokens"):
        ValueEngine(make_value_model("gpt2", "v"), 2, POSITIONS + 1)


def test_a_cache_is_shared_by_equal_geometries_only_and_must_be_large_enough():
    gpt2, llama = make_value_model("gpt2", "v"), make_value_model("llama-gqa", "v")
    caches: dict[CacheGeometry, KVCache] = {}
    cache = ValueEngine(gpt2, 2, 32, caches).cache
    for slots, length in [(3, 32), (2, 33)]:
        with pytest.raises(ValueError, match="the shared cache is 2 slots × 32 tokens"):
            ValueEngine(gpt2, slots, length, caches)
    assert ValueEngine(gpt2, 2, 32, caches).cache is cache
    assert ValueEngine(llama, 2, 32, caches).cache is not cache
    assert len(caches) == 2


@pytest.mark.parametrize("size", [{"slots": 0, "max_length": 4}, {"slots": 4, "max_length": 0}])
def test_an_empty_cache_is_refused(size: dict[str, int]):
    geometry = measure_geometry(make_backbone(CONFIGS["llama"]), 4)
    with pytest.raises(ValueError, match="both must be positive"):
        KVCache(geometry, **size)


def test_a_cache_beyond_all_memory_says_what_to_change():
    geometry = measure_geometry(make_backbone(CONFIGS["llama"]), 4)
    with pytest.raises(ValueError, match=r"1048576 sequences × 1048576 tokens needs 786,432.8 GiB.*--max-num-seqs"):
        KVCache(geometry, 2**20, 2**20)


@pytest.mark.parametrize(("fraction", "held"), [(1.0, 2), (0.5, 3)])
def test_held_pages_are_those_of_slots_in_use(fraction: float, held: int):
    """In one piece a page is a slot; else one has two pages, of 32 positions each, and the other one."""
    cache = KVCache(CacheGeometry(1, 1, 2, torch.float32, torch.device("cpu")), 4, 64, fraction)
    assert cache.held_pages == 0
    slots = [0, 1]
    for slot, length in zip(slots, [33, 5], strict=True):
        cache.acquire(slot)
        cache.hold(np.array([slot]), np.array([length]))
    assert cache.held_pages == held
    for slot in slots:
        cache.release(slot)
    assert cache.held_pages == 0


class Operations(TorchDispatchMode):
    """Counts what torch is asked to do."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def paged_cache(slots: int, dtype: torch.dtype = torch.float32) -> KVCache:
    return KVCache(CacheGeometry(2, 3, 5, dtype, torch.device("cpu")), slots, 20 * PAGE_TOKENS, 0.9)


def hold(cache: KVCache, slot: int, length: int) -> None:
    """Random keys and values, none of them 0."""
    cache.acquire(slot)
    cache.hold(np.array([slot]), np.array([length]))
    for layer in range(cache.geometry.layers):
        keys_CGD, values_CGD = torch.rand(2, length, 3, 5).add(1).to(cache.geometry.dtype)
        cache.memory.write_span(layer, slot, 0, keys_CGD, values_CGD)


def operations_on_history(what: str, pages: int) -> int:
    cache = paged_cache(slots=3)
    first, second = 0, 1
    hold(cache, first, pages * PAGE_TOKENS + 7)
    with Operations() as operations:
        if what == "copy":
            cache.copy(first, second, pages * PAGE_TOKENS + 5)
        elif what == "rewind":
            cache.rewind(first, 40)
        else:
            cache.drop(first)
    return operations.count


@pytest.mark.parametrize("what", ["copy", "rewind", "drop"])
def test_a_long_history_in_pages_is_copied_and_forgotten_in_as_few_operations_as_a_short_one(what: str):
    counts = [operations_on_history(what, pages) for pages in (3, 19)]
    assert counts[1] <= counts[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [PAGE_TOKENS - 1, 3 * PAGE_TOKENS, 3 * PAGE_TOKENS + 5])
def test_a_copy_in_pages_has_the_tokens_asked_for_and_nothing_beyond(length: int, dtype: torch.dtype):
    cache = paged_cache(3, dtype)
    source, target = 0, 1
    hold(cache, source, 4 * PAGE_TOKENS)
    cache.copy(source, target, length)
    for layer in range(2):
        expected = cache.memory.read(layer, torch.tensor([source]), length)
        held = cache.memory.read(layer, torch.tensor([target]), 5 * PAGE_TOKENS)
        for got_1GPD, expected_1GPD in zip(held, expected, strict=True):
            assert torch.equal(got_1GPD[:, :, :length], expected_1GPD)
            assert not got_1GPD[:, :, length:].any()


@pytest.mark.parametrize("kept", [0, 1, PAGE_TOKENS, 2 * PAGE_TOKENS + 1])
@pytest.mark.parametrize("length", [5, 3 * PAGE_TOKENS, 3 * PAGE_TOKENS + 5])
def test_pages_given_back_are_zero_and_the_others_as_they_were(length: int, kept: int):
    cache = paged_cache(3)
    cut, other = 0, 1
    for slot in (cut, other):
        hold(cache, slot, length)
    pages, others = cache.pages.of(cut).copy(), cache.pages.of(other)
    before = cache.memory.keys_LNGPD.clone(), cache.memory.values_LNGPD.clone()
    kept = min(kept, length)
    cache.rewind(cut, kept)
    given_back = pages[math.ceil(kept / PAGE_TOKENS) :]
    for content_LNGPD, before_LNGPD in zip((cache.memory.keys_LNGPD, cache.memory.values_LNGPD), before, strict=True):
        assert not content_LNGPD[:, given_back].any()
        for held in (others, pages[: len(pages) - len(given_back)]):
            assert torch.equal(content_LNGPD[:, held], before_LNGPD[:, held])
    for slot in (cut, other):
        cache.release(slot)
    assert not cache.memory.keys_LNGPD.any()
    assert not cache.memory.values_LNGPD.any()


def test_dropout_is_off_in_the_engine():
    backbone = make_backbone(LlamaConfig(attention_dropout=0.9, attn_implementation="eager", **HEADS, **SIZES)).train()
    engine = ValueEngine(ValueModel.from_backbone(backbone, "v", Bernoulli(), head_std=0.5), 1, 8)
    slot, candidates_BK = acquire(engine), torch.tensor([[4, 4]])
    first = value_logits(engine, [slot], [[1, 2, 3]], candidates_BK)
    torch.testing.assert_close(value_logits(engine, [slot], [[1, 2, 3]], candidates_BK), first)
