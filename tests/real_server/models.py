"""A tiny random reference model that speaks single characters, and value models for it."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import GPT2Config, GPT2Model, LlamaConfig, LlamaForCausalLM, LlamaModel, PreTrainedTokenizerFast

from guided_vllm.poisoned import poison
from qtilt.checkpoint import save_value_model
from qtilt.distributions import Bernoulli, Categorical, ReturnDistribution
from qtilt.value_model import ValueModel, ValueType

ALPHABET = 'abcdefghijklmnopqrstuvwxyz0123456789 .,+=?{}[]<>/_:"\n'
SPECIAL = ("<end>", "<pad>", "<user>", "<assistant>")
TOKENS = len(ALPHABET) + len(SPECIAL)
VOCAB = TOKENS + 3
"""Three padding rows beyond the tokens."""
POSITIONS = 4096
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<user>' if message.role == 'user' else '<assistant>' }}"
    "{{ message.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    "{% if marked %}={% endif %}"
)


def make_tokenizer(alphabet: str = ALPHABET, special: tuple[str, ...] = SPECIAL) -> PreTrainedTokenizerFast:
    model = Tokenizer(WordLevel({character: index for index, character in enumerate(alphabet)}, unk_token=alphabet[0]))
    model.pre_tokenizer = Split(Regex(r"[\s\S]"), "isolated")
    model.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, eos_token=special[0], pad_token=special[1])
    tokenizer.add_special_tokens({"additional_special_tokens": list(special[2:])})
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_reference(directory: Path, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    model = LlamaForCausalLM(_config(hidden_size=64, layers=2, initializer_range=0.25))
    model.save_pretrained(directory)
    make_tokenizer().save_pretrained(directory)
    return directory


def make_value_model(
    directory: Path,
    seed: int,
    type: ValueType = "v",
    distribution: ReturnDistribution | None = None,
    *,
    tokenizer: PreTrainedTokenizerFast | None = None,
    positions: int = POSITIONS,
    provenance: dict[str, Any] | None = None,
) -> Path:
    """Random values, different enough between seeds that a version can be told by its probabilities."""
    torch.manual_seed(seed)
    backbone = LlamaModel(_config(hidden_size=16, layers=1, initializer_range=0.3, positions=positions))
    model = ValueModel.from_backbone(backbone, type, distribution or Bernoulli(), head_std=1.0)
    torch.nn.init.normal_(model.head.bias, std=0.5)
    save_value_model(model, directory, tokenizer or make_tokenizer(), provenance or {})
    return directory


def make_overflowing_value_model(directory: Path, token: int, seed: int) -> Path:
    """A Q-type GPT-2 whose values are NaN on every history with ``token``, and numbers on all others."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=VOCAB, n_positions=POSITIONS, n_embd=16, n_layer=1, n_head=2, bos_token_id=None, eos_token_id=None
    )
    model = ValueModel.from_backbone(GPT2Model(config), "q", Bernoulli(), head_std=1.0)
    save_value_model(model, directory, make_tokenizer(), {})
    return poison(directory, token)


def graded() -> Categorical:
    return Categorical(-1.0, 1.0, 5)


def _config(hidden_size: int, layers: int, initializer_range: float, positions: int = POSITIONS) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=positions,
        initializer_range=initializer_range,
        eos_token_id=len(ALPHABET),
        bos_token_id=None,
        pad_token_id=None,
        tie_word_embeddings=False,
    )
