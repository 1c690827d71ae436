"""A value model as a fit trains it: all its weights, or its low-rank update and its head."""

from collections.abc import Mapping
from pathlib import Path

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from qtilt.checkpoint import load_unmerged, load_value_model, read_manifest
from qtilt.model.low_rank import Base, LowRank, projections
from qtilt.value_model import ValueModel

ADAPTER = "default"
"""peft's name for it."""


def load_for_fit(directory: Path, device: torch.device) -> tuple[ValueModel, LowRank | None]:
    """The model with what a fit trains requiring gradients, and the update as it was if the model is a low-rank one.

    Raises CheckpointError.
    """
    if read_manifest(directory).base is None:
        return load_value_model(directory, device=device).requires_grad_(True), None
    model, low_rank = load_unmerged(directory)
    attach(model, low_rank.rank)
    for name, layer in _adapted(model).items():
        a_RI, b_OR = low_rank.factors[name]
        layer.lora_A[ADAPTER].weight.data.copy_(a_RI)  # type: ignore[index,union-attr]
        layer.lora_B[ADAPTER].weight.data.copy_(b_OR)  # type: ignore[index,union-attr]
    return model.to(device), low_rank


def attach(model: ValueModel, rank: int) -> None:
    """Gives each projection a new update that changes nothing yet; it and the head require gradients, all else not."""
    layers = projections(model.backbone)
    # alpha is the rank: peft scales B·A by alpha/rank, and value models have no such factor (qtilt.model.low_rank).
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=list(layers),
        fan_in_fan_out=any(isinstance(layer, Conv1D) for layer in layers.values()),
    )
    inject_adapter_in_model(config, model.backbone, adapter_name=ADAPTER)
    model.head.requires_grad_(True)


def update_of(model: ValueModel, base: Base, rank: int) -> LowRank:
    """What was attached, as it is now."""
    return LowRank(base, rank, {name: _factors(layer) for name, layer in _adapted(model).items()})


def _adapted(model: ValueModel) -> Mapping[str, nn.Module]:
    return {name: layer for name, layer in model.backbone.named_modules() if hasattr(layer, "lora_A")}


def _factors(layer: nn.Module) -> tuple[Tensor, Tensor]:
    a_RI, b_OR = (getattr(layer, factor)[ADAPTER].weight.detach().clone() for factor in ("lora_A", "lora_B"))
    return a_RI, b_OR
