"""Attention over pages in place, as GPUs run it: Triton's interpreter runs our kernels here."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from engine_histories import EXACT, Histories, acquire, assert_only_tails_come_out, value_logits
from guided_vllm.as_on_gpus import run_as_on_gpus
from hf_oracle import CONFIGS, DISTRIBUTIONS, POSITIONS, make_backbone, make_value_model, plain_value_logits
from paged_oracle import check_attention
from qtilt.engine import ValueEngine, cache
from qtilt.forwards.fused import FusedForward
from qtilt.forwards.interface import AttentionOf
from qtilt.forwards.memory import CacheGeometry
from qtilt.forwards.packed_attention import PackedAttention
from qtilt.forwards.packing import LastTokens, Span
from qtilt.forwards.paged import programs
from qtilt.forwards.paged.attention import PagedAttention
from qtilt.forwards.paged.flash_kernels import FlashKernels
from qtilt.forwards.paged.kernels import PagedKernels
from qtilt.forwards.paged.triton_kernels import TritonKernels
from qtilt.forwards.probe import CANDIDATES
from qtilt.value_model import ValueModel
from qtilt.vllm_plugin.kernels import VllmKernels


def flash_attention(
    *,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    max_seqlen_q: int,
    cu_seqlens_q: Tensor,
    max_seqlen_k: int,
    seqused_k: Tensor,
    block_table: Tensor,
    softmax_scale: float,
    causal: bool,
    num_splits: int,
    return_softmax_lse: bool,
) -> tuple[Tensor, Tensor]:
    """Stands in for FlashAttention's kernel, as its documentation has it; it also reads what is idle in a last page."""
    assert return_softmax_lse
    assert num_splits in (0, 1)  # version 2 has no others
    assert {cu_seqlens_q.dtype, seqused_k.dtype, block_table.dtype} == {torch.int32}
    assert k.shape[1] % 16 == 0
    assert {tensor.stride(-1) for tensor in (q, k, v, out)} == {1}
    counts = cu_seqlens_q.diff()
    assert int(counts.max()) <= max_seqlen_q
    assert int(seqused_k.max()) <= max_seqlen_k <= block_table.shape[1] * k.shape[1]
    lse = q.new_full(q.shape[1::-1], torch.nan, dtype=torch.float32)
    rows = zip(cu_seqlens_q[:-1].tolist(), counts.tolist(), seqused_k.tolist(), strict=True)
    for row, (first, count, length) in enumerate(rows):
        pages = block_table[row, : -(-length // k.shape[1])]
        keys, values = (cache[pages].flatten(0, 1).repeat_interleave(q.shape[1] // k.shape[2], 1) for cache in (k, v))
        hidden = torch.arange(len(keys)) >= length
        if causal:
            hidden = torch.arange(len(keys)) > torch.arange(length - count, length)[:, None]
        scores = torch.einsum("qhd,khd->hqk", q[first : first + count].float(), keys.float()) * softmax_scale
        scores = scores.masked_fill(hidden, -torch.inf)
        lse[:, first : first + count] = scores.logsumexp(-1)
        out[first : first + count] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), values.float()).to(out.dtype)
    return out, lse


KERNELS: dict[str, PagedKernels] = {"triton": TritonKernels(), "flash": FlashKernels(flash_attention)}


@pytest.fixture(params=KERNELS)
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> PagedKernels:
    """What every engine of the test attends with."""
    run_as_on_gpus(KERNELS[request.param], monkeypatch)
    return KERNELS[request.param]


@pytest.mark.parametrize("tails_only", [False, True])
@pytest.mark.parametrize(
    ("dtype", "rounding"), [(torch.float32, 5e-5), (torch.bfloat16, 2**-6), (torch.float16, 2**-9)]
)
@pytest.mark.parametrize(("head_size", "kv_heads", "group"), [(16, 2, 4), (24, 1, 3), (80, 3, 1)])
def test_attention_is_the_softmax_over_what_each_token_sees(
    kernels: PagedKernels,
    head_size: int,
    kv_heads: int,
    group: int,
    dtype: torch.dtype,
    rounding: float,
    tails_only: bool,
) -> None:
    geometry = CacheGeometry(2, kv_heads, head_size, dtype, torch.device("cpu"))
    check_attention(kernels, geometry, group, rounding, tails_only=tails_only)


@pytest.mark.parametrize("value_type", ["q", "v"])
@pytest.mark.parametrize("family", ["llama-gqa", "qwen2", "qwen3", "gpt2"])
def test_whatever_happens_between_steps(kernels: PagedKernels, family: str, value_type: str) -> None:
    model = make_value_model(family, value_type)
    run = Histories(model, kv_fraction=0.3, max_new_tokens=24, kernels=VllmKernels())
    assert run.engine.forward.name == ("transformers" if family == "gpt2" else "fused")
    run.wander(steps=10)


def test_only_tails_come_out_and_of_spans_nothing(kernels: PagedKernels) -> None:
    assert_only_tails_come_out(ValueEngine(make_value_model("llama-gqa", "v"), 2, 64))


class TooMuch(TritonKernels):
    """A token more than the history, in tails of so many tokens."""

    def __init__(self, tokens: int) -> None:
        self._tokens = tokens

    def attend_tails(self, *args: Any) -> None:
        *before, rows, scaling = args
        if rows.most_tokens == self._tokens:
            rows = replace(rows, lengths_W=rows.lengths_W + 1)
        super().attend_tails(*before, rows, scaling)


@pytest.mark.parametrize(("tokens", "where"), [(1 + CANDIDATES, "over each sequence"), (1, "without candidates")])
def test_an_engine_refuses_kernels_that_compute_something_else(
    tokens: int, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_as_on_gpus(TooMuch(tokens), monkeypatch)
    with pytest.raises(ValueError, match=f"LlamaModel, run by transformers, computes something else {where}"):
        ValueEngine(make_value_model("llama", "v"), 1, 8)


@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
@pytest.mark.parametrize("value_type", ["q", "v"])
def test_a_draft_that_overflows_fails_itself_and_not_the_tokens_before_it(
    kernels: PagedKernels, value_type: str, broken: float
) -> None:
    model = make_value_model("llama-gqa", value_type)
    good, bad = 3, 7
    engine = ValueEngine(model, 1, 64)
    slot = acquire(engine)
    candidates_BK = torch.tensor([[1, 2]])
    expected = value_logits(engine, [slot], [[good, good]], candidates_BK)
    model.backbone.embed_tokens.weight.data[bad] = broken
    slots_B, positions_B = torch.tensor([slot] * 2), torch.tensor([1, 2])
    last = LastTokens(slots_B, positions_B, torch.tensor([good, bad]), longest=3, has_drafts=True)
    got = engine.score(last, candidates_BK.expand(2, -1))
    torch.testing.assert_close(got[:1], expected)
    assert got[1].isnan().all()
    # It hasn't come true: another token takes its place.
    got = value_logits(engine, [slot], [[good] * 3], candidates_BK)
    torch.testing.assert_close(got, plain_value_logits(model, [[good] * 3], candidates_BK), **EXACT)


@pytest.mark.parametrize("value_type", ["q", "v"])
@pytest.mark.parametrize("family", ["llama-gqa", "mistral", "qwen2", "qwen3"])
def test_weights_side_by_side_give_the_same(family: str, value_type: str) -> None:
    model = make_value_model(family, value_type)
    run = Histories(model)
    run.engine.forward = together(model, PackedAttention)
    run.wander(steps=10)
    layer = model.backbone.layers[0]
    of_one_product = layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj
    assert len({each.weight.untyped_storage().data_ptr() for each in of_one_product}) == 1


def together(model: ValueModel, attention: AttentionOf) -> FusedForward:
    """As on a GPU."""
    return FusedForward(model.backbone, VllmKernels(), POSITIONS, attention, together=True)


class Launches(TorchDispatchMode):
    """How many kernels a GPU would be given: torch's operations, and starts of ours and FlashAttention's."""

    ON_THE_HOST = ("aten::empty", "aten::new_empty", "aten::empty_like", "aten::_unsafe_view", "aten::detach")

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.names: list[str] = []
        self._inside = False
        for name in ("store", "merge_own", "attend"):
            patch.setattr(programs, name, Started(name, getattr(programs, name), self))

    def __torch_dispatch__(self, func: Any, types: object, args: Any = (), kwargs: Any = None) -> Any:
        name, result = func.name().split(".")[0], func(*args, **(kwargs or {}))
        is_view = func.is_view and result is args[0] if name == "aten::to" else func.is_view
        if not (self._inside or is_view or name in self.ON_THE_HOST):
            self.names.append(name)
        return result

    def start(self, name: str, kernel: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What the stand-in, or the interpreter, does for one kernel isn't counted."""
        self.names.append(name)
        self._inside = True
        try:
            return kernel(*args, **kwargs)
        finally:
            self._inside = False


@dataclass
class Started:
    """A program of Triton's, which tells when it is started."""

    name: str
    program: Any
    launches: Launches

    def __getitem__(self, grid: object) -> Callable[..., Any]:
        return partial(self.launches.start, self.name, self.program[grid])


@pytest.mark.parametrize("has_span", [False, True])
@pytest.mark.parametrize(("value_type", "of_a_layer"), [("q", 10), ("v", 11)])
@pytest.mark.parametrize("layers", [2, 5])
def test_how_many_kernels_a_step_starts(
    layers: int, value_type: str, of_a_layer: int, has_span: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = type(CONFIGS["llama-gqa"]).from_dict(CONFIGS["llama-gqa"].to_dict() | {"num_hidden_layers": layers})
    model = ValueModel.from_backbone(make_backbone(config), value_type, DISTRIBUTIONS["bernoulli"], 0.5).eval()
    engine = ValueEngine(model, 4, 64)
    launches = Launches(monkeypatch)
    flash = partial(launches.start, "flash", flash_attention)
    engine.forward = together(model, partial(PagedAttention, kernels=FlashKernels(flash)))
    monkeypatch.setattr(cache, "has_one_piece", lambda _: False)
    ids = torch.arange(3)
    last = LastTokens(ids, ids, ids, longest=3)
    spans = [Span(3, 0, torch.arange(5))] if has_span else []
    engine.cache = cache.KVCache(engine.cache.geometry, 4, 64)
    with launches:
        engine.score(last, ids.expand(3, 3), spans)
    more_with_a_span = layers + layers - 1 + 5  # stores, attention but for the last layer, and their layout
    assert len(launches.names) <= of_a_layer * layers + 25 + has_span * more_with_a_span, launches.names
    assert launches.names.count("flash") == layers + has_span * (layers - 1)
