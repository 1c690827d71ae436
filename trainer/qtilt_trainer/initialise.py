"""A new value model from a pre-trained language model, whole or its first layers: a directory or a hub id."""

import logging
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qtilt.checkpoint import save_value_model
from qtilt.distributions import distribution_from_config
from qtilt.model.backbone import BackboneError, first_layers, read_backbone, read_config, read_tokenizer
from qtilt.model.low_rank import Base, weights_digest
from qtilt.value_model import ValueModel, ValueType

logger = logging.getLogger(__name__)


def initialise_value_model(
    backbone: str,
    type: ValueType,
    distribution: dict[str, Any],
    out: Path,
    head_std: float = 0.0,
    seed: int = 0,
    *,
    layers: int | None = None,
    low_rank: int | None = None,
    adapter: str | None = None,
) -> None:
    """Writes a value model made of `backbone` and a new head as the directory `out`, atomically.

    distribution: what `distribution_from_config` reads. head_std 0 gives a head of zeros: every value is the same at
    first, so an unfitted model ranks no token above another.
    layers: how many of its first decoder layers are taken, None: all. low_rank: rank of the update that fits will
    train in place of all weights; `out` then names `backbone` instead of holding its weights. adapter: the LoRA adapter
    of the reference that it is for.
    Raises ValueError for a backbone that can't be loaded, CheckpointError when `out` exists.
    """
    returns = distribution_from_config(distribution)
    decoder, tokenizer = _read(backbone, layers)
    digest = None if low_rank is None else weights_digest(decoder)
    provenance = {"backbone": backbone, "layers": decoder.config.get_text_config().num_hidden_layers}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        value_model = ValueModel.from_backbone(decoder, type, returns, head_std)
        if low_rank is None or digest is None:
            save_value_model(value_model, out, tokenizer, provenance, adapter=adapter)
        else:
            from qtilt_trainer.low_rank_fit import attach, update_of

            attach(value_model, low_rank)
            update = update_of(value_model, Base(backbone, provenance["layers"], digest), low_rank)
            save_value_model(value_model, out, tokenizer, provenance, update, adapter)
    logger.info("new %s-type %s value model from %s in %s", type, returns.name, backbone, out)


def _read(backbone: str, layers: int | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    try:
        config = read_config(backbone)
    except BackboneError as error:
        raise _unreadable(backbone, error) from error
    try:
        config = first_layers(config, layers)
    except BackboneError as error:
        raise ValueError(f"value_model.{error} (backbone {backbone!r})") from error
    try:
        return read_backbone(backbone, config, is_part=True), read_tokenizer(backbone)
    except BackboneError as error:
        raise _unreadable(backbone, error) from error


def _unreadable(backbone: str, error: Exception) -> ValueError:
    return ValueError(f"backbone {backbone!r} is no model directory or hub id that can be read: {error}")
