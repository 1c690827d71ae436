"""Sizes of the decoders that are compared. Imports neither torch nor transformers."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class DecoderShape:
    """A Llama-like decoder: grouped-query attention, gated MLP, no biases.

    positions: that its rotation is made for; a run that needs more gets more.
    """

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_size: int
    vocab: int
    rope: tuple[tuple[str, Any], ...] = (("rope_type", "default"), ("rope_theta", 10_000.0))
    positions: int = 0

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """Inputs and outputs of one layer's matrix products, those with a common input fused."""
        query, key = self.heads * self.head_size, self.kv_heads * self.head_size
        return {
            "qkv": (self.hidden, query + 2 * key),
            "attention output": (query, self.hidden),
            "gate and up": (self.hidden, 2 * self.intermediate),
            "down": (self.intermediate, self.hidden),
        }

    @property
    def parameters(self) -> int:
        """In the matrices of all layers: neither embeddings, norms nor the language-model head."""
        return self.layers * sum(inputs * outputs for inputs, outputs in self.matrices.values())

    @property
    def kv_per_token(self) -> int:
        """Numbers in the key/value cache per token."""
        return 2 * self.layers * self.kv_heads * self.head_size


@dataclass(frozen=True)
class Pair:
    """A reference model and the value model that guides it; they share the vocabulary."""

    reference: DecoderShape
    value: DecoderShape


def _llama3_rope(factor: float) -> tuple[tuple[str, Any], ...]:
    return (
        ("rope_type", "llama3"),
        ("rope_theta", 500_000.0),
        ("factor", factor),
        ("low_freq_factor", 1.0),
        ("high_freq_factor", 4.0),
        ("original_max_position_embeddings", 8192),
    )


SMOLLM2_ROPE = (("rope_type", "default"), ("rope_theta", 100_000.0))

PAIRS = {
    # For tests: what is measured on it means nothing.
    "tiny": Pair(
        DecoderShape(layers=2, hidden=64, intermediate=128, heads=2, kv_heads=1, head_size=32, vocab=256),
        DecoderShape(layers=1, hidden=32, intermediate=64, heads=1, kv_heads=1, head_size=32, vocab=256),
    ),
    # Parameters 1:8.
    "mid": Pair(
        DecoderShape(layers=8, hidden=512, intermediate=1376, heads=8, kv_heads=4, head_size=64, vocab=4096),
        DecoderShape(layers=4, hidden=256, intermediate=688, heads=4, kv_heads=2, head_size=64, vocab=4096),
    ),
    # HuggingFaceTB/SmolLM2-135M-Instruct, and its first six layers. Parameters 1:5.
    "smollm2+6": Pair(
        DecoderShape(30, 576, 1536, 9, 3, 64, 49_152, SMOLLM2_ROPE, 8192),
        DecoderShape(6, 576, 1536, 9, 3, 64, 49_152, SMOLLM2_ROPE, 8192),
    ),
    # meta-llama/Llama-3.1-8B and meta-llama/Llama-3.2-1B: the paper's largest pair. Parameters 1:7.2.
    "llama-3.1-8b+1b": Pair(
        DecoderShape(32, 4096, 14336, 32, 8, 128, 128_256, _llama3_rope(8.0), 131_072),
        DecoderShape(16, 2048, 8192, 32, 8, 64, 128_256, _llama3_rope(32.0), 131_072),
    ),
}
