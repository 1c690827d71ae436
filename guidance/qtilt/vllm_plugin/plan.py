"""How a device's memory is shared out between the reference and its guidance: arithmetic, before anything is loaded.

vLLM gives its own key-value cache what is left of the memory that it may use, once the reference and what lies beside
it are there. So what guidance needs is allocated, or held, before that. Imports no vLLM.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModel, PreTrainedConfig

from qtilt.forwards.memory import PAGE_TOKENS, CacheGeometry
from qtilt.forwards.packed_attention import COPIED_ELEMENTS
from qtilt.method.distributions import Bernoulli, ReturnDistribution
from qtilt.model.backbone import first_layers, read_config
from qtilt.model.checkpoint import BACKBONE_DIRECTORY, MANIFEST_FILE, read_manifest
from qtilt.model.value_model import ValueType, head_rows

GIB = 2**30
VERSIONS = 3
"""How many versions of a value model are held at once: the one in use, an older one that requests may still name, and
the one that is being loaded, for which the older one goes once it is known to be good."""
RECORD_BYTES = 28
"""What was measured, of each position of each slot: see records.py."""
VOCABULARY_COPIES, VOCABULARY_COPIES_ON_GPU = 6, 1
"""How many copies of a step's logits the tilt holds at once, in float32; by Triton, of rows that don't lie together."""
CAPTURED_TOKENS, CAPTURED_ROWS = 4096, 256
"""Of a captured step on a GPU, at most: what it computes in between stays allocated, and a copy of its logits. With
more of the value model's tokens the device takes longer than the host, whoever starts what."""
COPIED_BYTES = 2 * 4 * COPIED_ELEMENTS
"""What the attention of rows copies at once where they have pages, on CPUs: see forwards/packed_attention.py."""


class PlanError(ValueError):
    """What is to be served doesn't fit: one line that says what to change."""


@dataclass(frozen=True, slots=True)
class ModelSize:
    """One model on one device. weights, token: bytes, of all weights, and of the keys and values of one token.

    activations: bytes of a token's numbers in one layer. vocabulary: how many logits a row has. All but this are 0 of a
    model whose config doesn't tell.
    """

    weights: int
    token: int
    activations: int
    vocabulary: int


@dataclass(frozen=True, slots=True)
class Serving:
    """What is served at most: ``slots`` requests of up to ``max_length`` tokens, ``batched_tokens`` of them in a step,
    guided with up to ``max_top_k`` candidates. drafts: of each request in a step, if there is speculative decoding.
    on_gpu: value caches then always have pages, which are read in place.
    """

    slots: int
    max_length: int
    batched_tokens: int
    max_top_k: int
    drafts: int = 0
    on_gpu: bool = False

    @property
    def rows(self) -> int:
        """Rows of logits in a step, at most."""
        return self.slots * (1 + self.drafts)

    @property
    def pages_of_one(self) -> int:
        """Value pages of one history of full length."""
        return math.ceil(self.max_length / PAGE_TOKENS)

    @property
    def all_pages(self) -> int:
        """Value pages of all histories at full length."""
        return self.slots * self.pages_of_one

    def pages(self, tokens: int) -> int:
        """Value pages for so many tokens, or for one history of full length at least, and for all at most."""
        return max(min(math.ceil(tokens / PAGE_TOKENS), self.all_pages), self.pages_of_one)

    def cache_positions(self, pages: int) -> int:
        """How many positions are allocated for so many: with all of them a slot is one piece, and one is a scratch."""
        return (self.slots + 1) * self.max_length if self._in_one_piece(pages) else (pages + 2) * PAGE_TOKENS

    def tokens(self, pages: int) -> int:
        """How many tokens so many pages hold."""
        return self.slots * self.max_length if self._in_one_piece(pages) else pages * PAGE_TOKENS

    def _in_one_piece(self, pages: int) -> bool:
        return pages == self.all_pages and not self.on_gpu


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes of one device; ``budget`` is all that vLLM may use. value_tokens: how many the ``value_pages`` hold.

    cache: of vLLM's own key-value cache, what is left if the user hasn't said; it holds ``cache_tokens``.
    """

    budget: int
    reference_weights: int
    reference_activations: int
    value_weights: int
    value_cache: int
    records: int
    step_activations: int
    cache: int
    value_pages: int
    value_tokens: int
    cache_tokens: int

    def kv_fraction(self, serving: Serving) -> float:
        """The value pages as a fraction of what all requests need at full length, which a cache rounds up to pages."""
        return 1.0 if self.value_pages == serving.all_pages else (self.value_pages - 0.5) / serving.all_pages

    @property
    def guidance(self) -> int:
        """What guidance takes."""
        return self.value_weights + self.value_cache + self.records + self.step_activations

    def table(self) -> str:
        """One line for each part, in GiB."""
        is_known = self.reference_weights > 0
        lines = {"what vLLM may use": self.budget}
        if is_known:
            lines["reference: weights"] = self.reference_weights
            lines["reference: activations, estimated"] = self.reference_activations
        lines |= {
            f"guidance: weights of {VERSIONS} versions": self.value_weights,
            f"guidance: value pages, {self.value_tokens:,} tokens": self.value_cache,
            "guidance: records": self.records,
            "guidance: activations of a step, estimated": self.step_activations,
            f"vLLM's key-value cache, {self.cache_tokens:,} tokens"
            if is_known
            else "the reference, and vLLM's key-value cache": self.cache,
        }
        width = max(map(len, lines))
        return "\n".join(f"{name:<{width}}  {size / GIB:9.3f} GiB" for name, size in lines.items())


def plan_memory(
    budget: int,
    reference: ModelSize,
    value: ModelSize,
    serving: Serving,
    value_tokens: int | None = None,
    cache: int | None = None,
) -> MemoryPlan:
    """value_tokens: of the value pages; None: as many as vLLM's own cache will hold. cache: bytes that this is given by
    the user, who then decides how large both are; None: what is left.

    Raises PlanError when it can't fit, nothing is left for one request of full length, or nobody says how large the
    value caches are: not the user, nor the reference.
    """
    is_known = reference.token > 0
    if not is_known and value_tokens is None:
        raise PlanError(
            "the size of the reference isn't told by its config, so value caches can't be as large as vLLM's own: say "
            "how many --guidance-kv-tokens they hold"
        )
    fixed = {
        "reference_weights": reference.weights,
        "reference_activations": is_known
        * (serving.batched_tokens * reference.activations + serving.rows * reference.vocabulary * 4 * 3),
        "value_weights": VERSIONS * value.weights,
        "records": (serving.slots + 1) * serving.max_length * RECORD_BYTES,
        "step_activations": (serving.batched_tokens + serving.rows * (1 + serving.max_top_k)) * value.activations
        + serving.rows * reference.vocabulary * 4 * (VOCABULARY_COPIES_ON_GPU if serving.on_gpu else VOCABULARY_COPIES)
        + (_captured(value, reference, serving) if serving.on_gpu else COPIED_BYTES),
    }
    left = budget - sum(fixed.values())
    if value_tokens is None:
        value_tokens = (left // (reference.token + value.token)) if cache is None else cache // reference.token
    pages = serving.pages(max(value_tokens, 0))
    value_cache = serving.cache_positions(pages) * value.token
    left -= value_cache
    needed = serving.max_length * reference.token if cache is None else cache
    if left < needed:
        of_cache = (
            f"a request of {serving.max_length} tokens" if cache is None else "the size that vLLM's cache is given"
        )
        raise PlanError(
            f"guidance and the reference need {(budget - left) / GIB:.1f} of the {budget / GIB:.1f} GiB that vLLM may "
            f"use, which leaves too little for the keys and values of {of_cache}: serve fewer (--max-num-seqs) or "
            "shorter (--max-model-len) requests, have fewer --guidance-kv-tokens, take smaller models, or let vLLM use "
            "more (--gpu-memory-utilization)"
        )
    cache = left if cache is None else cache
    return MemoryPlan(
        budget=budget,
        **fixed,
        value_cache=value_cache,
        cache=cache,
        value_pages=pages,
        value_tokens=serving.tokens(pages),
        cache_tokens=cache // reference.token if is_known else 0,
    )


def _captured(value: ModelSize, reference: ModelSize, serving: Serving) -> int:
    """Bytes that stay with captured steps of all kinds: their logits, and twice what they compute.

    Once as it was captured, and once as it ran before that.
    """
    rows = min(serving.slots, CAPTURED_ROWS)
    tokens = min(rows * (1 + serving.max_top_k), CAPTURED_TOKENS)
    return 2 * tokens * value.activations + rows * reference.vocabulary * 4


def model_size(config: PreTrainedConfig, dtype: torch.dtype, *, further_weights: int = 0, ranks: int = 1) -> ModelSize:
    """Of a decoder and ``further_weights`` numbers, a head say, shared out among tensor-parallel ``ranks``."""
    text = config.get_text_config()
    with torch.device("meta"):
        decoder = AutoModel.from_config(config, trust_remote_code=False)
    numbers = sum(parameter.numel() for parameter in decoder.parameters()) + further_weights
    heads, hidden = text.num_attention_heads, text.hidden_size
    all_kv_heads, head_size = _kv_heads(text)
    kv_heads = math.ceil(all_kv_heads / ranks)
    intermediate = getattr(text, "intermediate_size", None) or 4 * hidden
    activations = 4 * hidden + (2 * heads * head_size + 3 * intermediate) // ranks + 4 * kv_heads * head_size
    return ModelSize(
        weights=numbers * dtype.itemsize // ranks,
        token=2 * text.num_hidden_layers * kv_heads * head_size * dtype.itemsize,
        activations=activations * dtype.itemsize,
        vocabulary=text.vocab_size,
    )


def reference_size(config: PreTrainedConfig, dtype: torch.dtype, ranks: int = 1) -> ModelSize:
    """Of a language model: its head has weights of its own unless they are the embedding's."""
    text = config.get_text_config()
    tied = getattr(config, "tie_word_embeddings", False) or getattr(text, "tie_word_embeddings", False)
    return model_size(config, dtype, further_weights=0 if tied else text.vocab_size * text.hidden_size, ranks=ranks)


@dataclass(frozen=True, slots=True)
class Published:
    """Value models that will be held. source: one of them, or the language model that they start from, of which
    ``layers`` are taken, all if None; a V-type head is assumed for that.
    """

    source: str
    layers: int | None = None

    def size(self, dtype: torch.dtype) -> ModelSize:
        """Raises ValueError for what can't be read."""
        config, head = self._read()
        return model_size(config, dtype, further_weights=head)

    def geometry(self, dtype: torch.dtype, device: torch.device) -> CacheGeometry:
        """Of their cache."""
        text = self._read()[0].get_text_config()
        return CacheGeometry(text.num_hidden_layers, *_kv_heads(text), dtype, device)

    @property
    def max_positions(self) -> int:
        """Of the longest history they can read."""
        return int(self._read()[0].get_text_config().max_position_embeddings)

    def _read(self) -> tuple[PreTrainedConfig, int]:
        """The decoder's config, and how many numbers the head has."""
        type_: ValueType = "v"
        distribution: ReturnDistribution = Bernoulli()
        source = self.source
        if (Path(source) / MANIFEST_FILE).exists():
            manifest = read_manifest(source)
            type_, distribution = manifest.type, manifest.distribution
            source = str(Path(source) / BACKBONE_DIRECTORY)
        config = first_layers(read_config(source), self.layers)
        text = config.get_text_config()
        return config, head_rows(type_, distribution, text.vocab_size) * (text.hidden_size + 1)


def all_of(models: Sequence[Published], dtype: torch.dtype) -> ModelSize:
    """Of several value models held side by side, as if they were one: those of equal geometry share a cache."""
    sizes = [model.size(dtype) for model in models]
    geometries = {model.geometry(dtype, torch.device("meta")) for model in models}
    return ModelSize(
        weights=sum(size.weights for size in sizes),
        token=sum(geometry.token_bytes for geometry in geometries),
        activations=max(size.activations for size in sizes),
        vocabulary=max(size.vocabulary for size in sizes),
    )


def _kv_heads(text: PreTrainedConfig) -> tuple[int, int]:
    """How many key/value heads there are, and their size."""
    heads = text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    return kv_heads, getattr(text, "head_dim", None) or text.hidden_size // heads
