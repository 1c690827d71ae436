"""Tiny language models as bases, and low-rank value models of them with an update that matters."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from guided_vllm.tiny_models import MAX_MODEL_LEN, backbone_config, make_tokenizer
from qtilt.checkpoint import save_value_model
from qtilt.distributions import Bernoulli
from qtilt.model.backbone import first_layers, read_backbone, read_config
from qtilt.model.low_rank import Base, LowRank, factor_shapes, projections, weights_digest
from qtilt.value_model import ValueModel, ValueType

RANK = 4


def write_language_model(directory: Path, family: str, layers: int = 3, seed: int = 0) -> Path:
    """A causal language model with its tokenizer."""
    torch.manual_seed(seed)
    config = backbone_config(family, MAX_MODEL_LEN)
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = ["full_attention"] * layers
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    make_tokenizer().save_pretrained(directory)
    return directory


def write_low_rank(
    directory: Path, base: Path, layers: int = 2, seed: int = 0, type: ValueType = "v", name: str | None = None
) -> Path:
    """name: what the manifest calls the base, if not where it is."""
    backbone = read_backbone(base, first_layers(read_config(base), layers), is_part=True)
    torch.manual_seed(seed)
    model = ValueModel.from_backbone(backbone, type, Bernoulli(), head_std=0.4)
    factors = {
        module: (0.3 * torch.randn(a_shape), 0.3 * torch.randn(b_shape))
        for module, layer in projections(backbone).items()
        for a_shape, b_shape in [factor_shapes(layer, RANK)]
    }
    update = LowRank(Base(name or str(base), layers, weights_digest(backbone)), RANK, factors)
    save_value_model(model, directory, AutoTokenizer.from_pretrained(base), low_rank=update)
    return directory


def write_merged(directory: Path, low_rank: Path, base: Path) -> Path:
    """The same value model as a full one: Hugging Face's layers cut and merged by hand, for Llamas."""
    update, head_weights = (load_file(low_rank / f"{name}.safetensors") for name in ("update", "head"))
    backbone = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).model
    layers = 1 + max(int(name.split(".")[1]) for name in update)
    backbone.layers = backbone.layers[:layers]
    backbone.config.num_hidden_layers = layers
    for name in {name[:-2] for name in update}:
        backbone.get_submodule(name).weight.data += update[f"{name}.B"] @ update[f"{name}.A"]
    head = torch.nn.Linear(*reversed(head_weights["weight"].shape))
    head.load_state_dict(head_weights)
    save_value_model(ValueModel(backbone, "v", Bernoulli(), head), directory, AutoTokenizer.from_pretrained(base))
    return directory
