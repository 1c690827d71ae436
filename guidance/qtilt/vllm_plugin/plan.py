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

from qtilt.forwards.attention import MOST_SCORES
from qtilt.forwards.memory import PAGE_TOKENS, CacheGeometry
from qtilt.method.distributions import Bernoulli, ReturnDistribution
from qtilt.model.backbone import first_layers, read_config
from qtilt.model.checkpoint import BACKBONE_DIRECTORY, MANIFEST_FILE, read_manifest
from qtilt.model.value_model import ValueType, head_rows

GIB = 2**30
VERSIONS = 2
"""How many versions of a value model are held at once: the one in use, and the one that is to replace it."""
RECORD_BYTES = 28
"""What was measured, of each position of each slot: see records.py."""
VOCABULARY_COPIES = 6
"""How many copies of a step's logits the tilt holds at once, in float32."""
ATTENTION_BYTES = 5 * 4 * MOST_SCORES
"""What the attention of rows takes at once: scores and copies of keys and values, see forwards/attention.py."""


class PlanError(ValueError):
    """What is to be served doesn't fit: one line that says what to change."""


@dataclass(frozen=True, slots=True)
class ModelSize:
    """One model on one device. weights, token: bytes, of all weights, and of the keys and values of one token.

    activations: bytes of a token's numbers in one layer. vocabulary: how many logits a row has.
    """

    weights: int
    token: int
    activations: int
    vocabulary: int


@dataclass(frozen=True, slots=True)
class Serving:
    """What is served at most: ``slots`` requests of up to ``max_length`` tokens, ``batched_tokens`` of them in a step,
    guided with up to ``max_top_k`` candidates.
    """

    slots: int
    max_length: int
    batched_tokens: int
    max_top_k: int

    def pages(self, tokens: int) -> int:
        """Value pages for so many tokens, or for one history of full length at least, and for all at most."""
        of_one = math.ceil(self.max_length / PAGE_TOKENS)
        return max(min(math.ceil(tokens / PAGE_TOKENS), self.slots * of_one), of_one)

    def cache_positions(self, pages: int) -> int:
        """How many positions are allocated for so many: with all of them a slot is one piece, and one is a scratch."""
        if pages == self.pages(self.slots * self.max_length):
            return (self.slots + 1) * self.max_length
        return (pages + 2) * PAGE_TOKENS


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes of one device; ``budget`` is all that vLLM may use. value_tokens: how many the value pages hold.

    cache_tokens: how many vLLM's own key-value cache holds with what is left to it.
    """

    budget: int
    reference_weights: int
    reference_activations: int
    value_weights: int
    value_cache: int
    records: int
    step_activations: int
    value_tokens: int
    cache_tokens: int

    @property
    def cache(self) -> int:
        """What is left to vLLM's key-value cache."""
        return self.budget - self.reference_weights - self.reference_activations - self.guidance

    def kv_fraction(self, serving: Serving) -> float:
        """The value pages as a fraction of what all requests need at full length."""
        all_pages = serving.pages(serving.slots * serving.max_length)
        pages = self.value_tokens // PAGE_TOKENS
        return 1.0 if pages == all_pages else (pages - 0.5) / all_pages

    @property
    def guidance(self) -> int:
        """What guidance takes."""
        return self.value_weights + self.value_cache + self.records + self.step_activations

    def table(self) -> str:
        """One line for each part, in GiB."""
        lines = {
            "what vLLM may use": self.budget,
            "reference: weights": self.reference_weights,
            "reference: activations, estimated": self.reference_activations,
            f"guidance: weights of {VERSIONS} versions": self.value_weights,
            f"guidance: value pages, {self.value_tokens:,} tokens": self.value_cache,
            "guidance: records": self.records,
            "guidance: activations of a step, at most": self.step_activations,
            f"left to vLLM's key-value cache, {self.cache_tokens:,} tokens": self.cache,
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

    Raises PlanError when nothing is left for one request of full length.
    """
    fixed = {
        "reference_weights": reference.weights,
        "reference_activations": serving.batched_tokens * reference.activations
        + serving.slots * reference.vocabulary * 4 * 3,
        "value_weights": VERSIONS * value.weights,
        "records": (serving.slots + 1) * serving.max_length * RECORD_BYTES,
        "step_activations": (serving.batched_tokens + serving.slots * (1 + serving.max_top_k)) * value.activations
        + VOCABULARY_COPIES * serving.slots * reference.vocabulary * 4
        + ATTENTION_BYTES,
    }
    left = budget - sum(fixed.values())
    if value_tokens is None:
        value_tokens = (left // (reference.token + value.token)) if cache is None else cache // reference.token
    pages = serving.pages(max(value_tokens, 0))
    value_cache = serving.cache_positions(pages) * value.token
    left -= value_cache
    plan = MemoryPlan(
        budget=budget,
        **fixed,
        value_cache=value_cache,
        value_tokens=pages * PAGE_TOKENS,
        cache_tokens=max(left, 0) // reference.token,
    )
    if left < serving.max_length * reference.token:
        raise PlanError(
            f"guidance and the reference need {(budget - left) / GIB:.1f} of the {budget / GIB:.1f} GiB that vLLM may "
            f"use, which leaves too little for the keys and values of a request of {serving.max_length} tokens: serve "
            "fewer (--max-num-seqs) or shorter (--max-model-len) requests, have fewer --guidance-kv-tokens, or take a "
            "smaller value model"
        )
    return plan


def model_size(config: PreTrainedConfig, dtype: torch.dtype, *, further_weights: int = 0, ranks: int = 1) -> ModelSize:
    """Of a decoder and ``further_weights`` numbers, a head say, shared out among tensor-parallel ``ranks``."""
    text = config.get_text_config()
    with torch.device("meta"):
        decoder = AutoModel.from_config(config)
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


def all_of(sizes: Sequence[ModelSize]) -> ModelSize:
    """Of several value models held side by side, as if they were one. Equal caches are shared."""
    return ModelSize(
        weights=sum(size.weights for size in sizes),
        token=sum({size.token for size in sizes}),
        activations=max(size.activations for size in sizes),
        vocabulary=max(size.vocabulary for size in sizes),
    )


def _kv_heads(text: PreTrainedConfig) -> tuple[int, int]:
    """How many key/value heads there are, and their size."""
    heads = text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    return kv_heads, getattr(text, "head_dim", None) or text.hidden_size // heads
