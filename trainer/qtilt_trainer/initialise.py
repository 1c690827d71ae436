"""A new value model from a backbone: a Hugging Face directory or a hub id."""

import logging
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModel, AutoTokenizer

from qtilt.checkpoint import save_value_model
from qtilt.distributions import distribution_from_config
from qtilt.value_model import ValueModel, ValueType

logger = logging.getLogger(__name__)

# What transformers raises for configs and weights that make no sense; many of its checks are lookups that fail.
UNUSABLE = (OSError, ValueError, TypeError, KeyError, AttributeError, ImportError, RuntimeError, SafetensorError)


def initialise_value_model(
    backbone: str,
    type: ValueType,
    distribution: dict[str, Any],
    out: Path,
    head_std: float = 0.0,
    seed: int = 0,
) -> None:
    """Writes a value model made of `backbone` and a new head as the directory `out`, atomically.

    distribution: what `distribution_from_config` reads. head_std 0 gives a head of zeros: every value is the same at
    first, so an unfitted model ranks no token above another.
    Raises ValueError for a backbone that can't be loaded, CheckpointError when `out` exists.
    """
    returns = distribution_from_config(distribution)
    try:
        tokenizer = AutoTokenizer.from_pretrained(backbone, trust_remote_code=False)
        model = AutoModel.from_pretrained(backbone, dtype=torch.float32, trust_remote_code=False)
    except UNUSABLE as error:
        raise ValueError(f"backbone {backbone!r} is no model directory or hub id that can be read: {error}") from error
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        value_model = ValueModel.from_backbone(model, type, returns, head_std)
    save_value_model(value_model, out, tokenizer, {"backbone": backbone})
    logger.info("new %s-type %s value model from %s in %s", type, returns.name, backbone, out)
