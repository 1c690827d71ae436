"""Tiny random models, scaled so that distributions are far from uniform and values differ between tokens.

The vocabularies differ on purpose: 90 tokens, 100 columns of reference logits, 96 rows of value-model embedding.
"""

from functools import partial
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    AutoModel,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

from qtilt.checkpoint import save_value_model
from qtilt.distributions import Bernoulli, Categorical, ReturnDistribution
from qtilt.value_model import ValueModel, ValueType

TOKENS = 90
REFERENCE_VOCAB = 100
VALUE_VOCAB = 96
MAX_MODEL_LEN = 128


JSON_WORDS = ["{", "}", ":", ",", '"', '{"', '":', ',"', '"}', "a", "b", "c", "ab", "true", "false", "null"]
JSON_WORDS += ["1", "2", "31"]


def words(ordinary: int = TOKENS - 2) -> list[str]:
    """The tokenizer's, by id: w0, w1, … and at the end what JSON consists of."""
    return [f"w{index}" for index in range(ordinary - len(JSON_WORDS))] + JSON_WORDS


def make_tokenizer(ordinary: int = TOKENS - 2) -> PreTrainedTokenizerFast:
    vocabulary = {word: index for index, word in enumerate(words(ordinary))}
    model = Tokenizer(WordLevel(vocabulary, unk_token="w0"))
    model.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, eos_token="<end>", pad_token="<pad>")
    assert len(tokenizer) == ordinary + 2
    return tokenizer


def make_reference(directory: Path) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=REFERENCE_VOCAB,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=MAX_MODEL_LEN,
        initializer_range=0.25,
        eos_token_id=None,
        bos_token_id=None,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    model.generation_config.eos_token_id = None
    model.save_pretrained(directory)
    make_tokenizer().save_pretrained(directory)
    return directory


def backbone_config(family: str, positions: int) -> PreTrainedConfig:
    sizes = {
        "vocab_size": VALUE_VOCAB,
        "hidden_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": positions,
        "initializer_range": 0.25,
        "eos_token_id": None,
        "bos_token_id": None,
    }
    grouped = {"num_key_value_heads": 2, "intermediate_size": 96}
    configs = {
        "gpt2": partial(GPT2Config),
        "llama": partial(LlamaConfig, head_dim=48, **grouped),
        "qwen3": partial(Qwen3Config, head_dim=16, **grouped),
    }
    return configs[family](**sizes)


def make_value_model(
    directory: Path,
    type: ValueType,
    distribution: ReturnDistribution,
    family: str,
    seed: int,
    positions: int = MAX_MODEL_LEN,
    tokenizer: PreTrainedTokenizerFast | None = None,
) -> Path:
    torch.manual_seed(seed)
    backbone = AutoModel.from_config(backbone_config(family, positions))
    model = ValueModel.from_backbone(backbone, type, distribution, head_std=0.4)
    torch.nn.init.normal_(model.head.bias, std=0.5)
    save_value_model(model, directory, tokenizer or make_tokenizer())
    return directory


def make_constant(
    directory: Path, type: ValueType, distribution: ReturnDistribution, family: str, lowest: bool
) -> Path:
    """A value model that predicts the same whatever it sees: surely the lowest return, or all with equal chances."""
    model = ValueModel.from_backbone(AutoModel.from_config(backbone_config(family, MAX_MODEL_LEN)), type, distribution)
    torch.nn.init.zeros_(model.head.weight)
    logits_A = torch.zeros(distribution.num_logits)
    if lowest:
        # The exponential of −1e4 is 0 exactly. A Bernoulli's logit is that of the return 1.
        logits_A[1 if distribution.num_logits > 1 else 0 :] = -1e4
    with torch.no_grad():
        model.head.bias.copy_(logits_A.repeat(len(model.head.bias) // distribution.num_logits))
    save_value_model(model, directory, make_tokenizer())
    return directory


VALUE_MODELS: dict[str, tuple[ValueType, ReturnDistribution, str]] = {
    "q-bernoulli": ("q", Bernoulli(), "gpt2"),
    "v-bernoulli": ("v", Bernoulli(), "llama"),
    "q-categorical": ("q", Categorical(-1.0, 0.5, 4), "llama"),
    "v-categorical": ("v", Categorical(0.2, 1.2, 11), "qwen3"),
}


def prompt(length: int, seed: int) -> list[int]:
    """Random ordinary tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(TOKENS - 2, (length,), generator=generator).tolist()
