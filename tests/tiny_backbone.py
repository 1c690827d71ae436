"""A reference model small enough for tests that care about files and figures, not about what it says."""

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase


def write_tiny_backbone(directory: Path, tokenizer: PreTrainedTokenizerBase, positions: int = 16) -> None:
    """A one-layer Llama with seeded random weights, and its tokenizer, as a Hugging Face directory."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=positions,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
