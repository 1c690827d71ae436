"""Tiny backbones of several families, and what plain Hugging Face forwards say a value model's logits are.

One forward of the whole sequence per row (Q-type) or per row and candidate (V-type), with eager attention, no cache, no
packing, no padding; the head is applied row by row.
"""

import torch
from torch import Tensor
from transformers import (
    AutoModel,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from qtilt.distributions import Bernoulli, Categorical, ReturnDistribution
from qtilt.value_model import ValueModel, ValueType

VOCABULARY, POSITIONS = 61, 96
# Weights ten times the usual: attention has to matter for a wrong key to show.
WIDE = {"initializer_range": 0.2, "vocab_size": VOCABULARY, "attn_implementation": "eager"}
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "max_position_embeddings": POSITIONS}
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(num_attention_heads=4, num_key_value_heads=4, **SIZES, **WIDE),
    "llama-gqa": LlamaConfig(num_attention_heads=8, num_key_value_heads=2, **SIZES, **WIDE),
    "mistral": MistralConfig(num_attention_heads=4, num_key_value_heads=2, sliding_window=None, **SIZES, **WIDE),
    "qwen2": Qwen2Config(num_attention_heads=4, num_key_value_heads=2, **SIZES, **WIDE),
    "qwen3": Qwen3Config(num_attention_heads=4, num_key_value_heads=2, head_dim=16, **SIZES, **WIDE),
    "gpt2": GPT2Config(n_embd=32, n_layer=3, n_head=4, n_positions=POSITIONS, bos_token_id=0, eos_token_id=0, **WIDE),
}
DISTRIBUTIONS: dict[str, ReturnDistribution] = {"bernoulli": Bernoulli(), "categorical": Categorical(-1.0, 2.0, 5)}


def make_backbone(config: PretrainedConfig, seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    return AutoModel.from_config(config).eval()


def make_value_model(
    family: str, type: ValueType, distribution: str = "bernoulli", seed: int = 0, scored_by: float = 0.5
) -> ValueModel:
    model = ValueModel.from_backbone(make_backbone(CONFIGS[family], seed), type, DISTRIBUTIONS[distribution], scored_by)
    torch.nn.init.normal_(model.head.bias)
    return model.eval()


@torch.no_grad()
def plain_value_logits(model: ValueModel, histories: list[list[int]], candidates_BK: Tensor) -> Tensor:
    """Logits of Z(history, candidate): float32 ``[B, K, A]``."""
    rows = [
        torch.stack([_one_logits(model, history, token) for token in candidates])
        for history, candidates in zip(histories, candidates_BK.tolist(), strict=True)
    ]
    return torch.stack(rows)


def _one_logits(model: ValueModel, history: list[int], token: int) -> Tensor:
    atoms = model.distribution.num_logits
    if model.type == "v":
        hidden_H, rows = _last_hidden(model, [*history, token]), slice(0, atoms)
    else:
        hidden_H, rows = _last_hidden(model, history), slice(token * atoms, (token + 1) * atoms)
    return model.head.weight[rows].float() @ hidden_H.float() + model.head.bias[rows].float()


def _last_hidden(model: ValueModel, tokens: list[int]) -> Tensor:
    assert model.backbone.config._attn_implementation == "eager", "the oracle must not run the attention under test"
    input_ids_1T = torch.tensor([tokens], device=model.backbone.device)
    return model.backbone(input_ids=input_ids_1T, use_cache=False).last_hidden_state[0, -1]
