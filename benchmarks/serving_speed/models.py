"""Write the models of a pair: random weights, a tokenizer of their own, Q- and V-type value models."""

from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from qtilt.checkpoint import save_value_model
from qtilt.distributions import Bernoulli
from qtilt.value_model import ValueModel, ValueType
from serving_speed.shapes import DecoderShape, Pair


@dataclass(frozen=True)
class ModelFiles:
    """reference: a Hugging Face directory, without weights if they are dummies. values: by type."""

    reference: Path
    values: dict[ValueType, Path]


def llama_config(shape: DecoderShape, positions: int) -> LlamaConfig:
    """For at least ``positions`` tokens, without special tokens: nothing ends a response early."""
    return LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_size,
        max_position_embeddings=max(positions, shape.positions),
        rope_parameters=dict(shape.rope),
        eos_token_id=None,
        bos_token_id=None,
        tie_word_embeddings=False,
    )


def make_tokenizer(vocab: int) -> PreTrainedTokenizerFast:
    """One word a token, the last two the end and the padding."""
    words = {f"w{index}": index for index in range(vocab - 2)}
    model = Tokenizer(WordLevel(words, unk_token="w0"))
    model.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=model, eos_token="<end>", pad_token="<pad>")


def write_models(
    directory: Path, pair: Pair, types: set[ValueType], positions: int, dtype: str, device: str, dummy: bool
) -> ModelFiles:
    """Random weights drawn on ``device``; a ``dummy`` reference gets its configuration only, for loaders that draw."""
    torch_dtype = getattr(torch, dtype)
    tokenizer = make_tokenizer(pair.reference.vocab)
    reference = directory / "reference"
    config = llama_config(pair.reference, positions)
    config.architectures, config.dtype = ["LlamaForCausalLM"], torch_dtype
    if dummy:
        config.save_pretrained(reference)
    else:
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).to(torch_dtype)
        model.generation_config.eos_token_id = None
        model.save_pretrained(reference)
    tokenizer.save_pretrained(reference)
    values = {}
    for type in sorted(types):
        values[type] = directory / f"value-{type}"
        torch.manual_seed(1)
        with torch.device(device):
            backbone = AutoModel.from_config(llama_config(pair.value, positions), dtype=torch_dtype)
            value_model = ValueModel.from_backbone(backbone, type, Bernoulli(), head_std=0.1)
        save_value_model(value_model, values[type], tokenizer)
    if device != "cpu":
        del backbone, value_model
        torch.cuda.empty_cache()  # this process keeps nothing that the systems could use
    return ModelFiles(reference, values)
