"""The same model in another size: what it computes is unchanged, what it costs is that of a larger one.

Every matrix is padded with zeros, so added channels, heads and layers add nothing. RMSNorm takes the mean over all
channels, of which a share is zero now: its weights are scaled back.
"""

import math
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedModel

from qtilt.checkpoint import load_value_model, save_value_model
from qtilt.value_model import ValueModel
from serving_speed.shapes import DecoderShape


def widen_reference(source: Path, target: Path, shape: DecoderShape) -> None:
    """Write the reference in ``source`` in the layers and hidden size of ``shape``, with its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    wide = AutoModelForCausalLM.from_config(_config(model.config, shape))
    _pad(model, wide, shape.hidden // model.config.hidden_size)
    wide.generation_config = model.generation_config
    wide.save_pretrained(target)
    AutoTokenizer.from_pretrained(source).save_pretrained(target)


def widen_value_model(source: Path, target: Path, tokenizer: Path, shape: DecoderShape) -> None:
    """Write the V-type value model in ``source`` in the layers and hidden size of ``shape``."""
    model = load_value_model(source)
    wide = AutoModel.from_config(_config(model.backbone.config, shape))
    _pad(model.backbone, wide, shape.hidden // model.hidden_size)
    head = nn.Linear(shape.hidden, model.head.out_features)
    with torch.no_grad():
        head.weight.zero_()[:, : model.hidden_size] = model.head.weight
        head.bias.copy_(model.head.bias)
    save_value_model(
        ValueModel(wide, model.type, model.distribution, head), target, AutoTokenizer.from_pretrained(tokenizer)
    )


def _config(config: LlamaConfig, shape: DecoderShape) -> LlamaConfig:
    """Raises ValueError for another family, or a hidden size that isn't a multiple."""
    if not isinstance(config, LlamaConfig) or shape.hidden % config.hidden_size:
        raise ValueError(f"{config.model_type} of hidden size {config.hidden_size} can't be widened to {shape.hidden}")
    factor = shape.hidden // config.hidden_size
    return LlamaConfig(
        **{
            **config.to_dict(),
            "hidden_size": shape.hidden,
            "num_hidden_layers": max(shape.layers, config.num_hidden_layers),
            "intermediate_size": max(shape.intermediate, config.intermediate_size),
            "num_attention_heads": factor * config.num_attention_heads,
            "num_key_value_heads": factor * config.num_key_value_heads,
            "rms_norm_eps": config.rms_norm_eps / factor,
        }
    )


def _pad(model: PreTrainedModel, wide: PreTrainedModel, factor: int) -> None:
    padded = {name: torch.zeros_like(tensor) for name, tensor in wide.state_dict().items()}
    for name, tensor in model.state_dict().items():
        corner = tuple(slice(0, size) for size in tensor.shape)
        padded[name][corner] = tensor / math.sqrt(factor) if "norm" in name else tensor
    wide.load_state_dict(padded)
