"""Low-rank value models: a base model's first layers, and a small update of their projections.

Shapes: ``R`` rank, ``I`` inputs and ``O`` outputs of one projection. Its weight is W + B·A with ``A [R, I]`` and
``B [O, R]``; nothing else of the base changes. There is no further factor before B·A: it would only rescale the
learning rate.

Versions of one base share what they don't change, and the base's projections until they are merged.
"""

import copy
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from qtilt.model.backbone import BackboneError, first_layers, read_backbone, read_config

SHOWN_DIGITS = 12
"""Of a digest, in messages."""
ORIGIN = {"_name_or_path", "transformers_version"}
"""Fields of a config that say where it is from."""


@dataclass(frozen=True)
class Base:
    """A base model's first layers: final norm and embeddings with them.

    name: directory or hub id, as given when the value model was made. sha256: see :func:`weights_digest`.
    """

    name: str
    layers: int
    sha256: str

    def __post_init__(self) -> None:
        if type(self.layers) is not int or not all(isinstance(text, str) for text in (self.name, self.sha256)):
            raise ValueError("a base is a name, a number of layers, and a hexadecimal digest")


@dataclass(frozen=True)
class LowRank:
    """An update of a base. factors: the name of each projection, and its A ``[R, I]`` and B ``[O, R]`` in float32."""

    base: Base
    rank: int
    factors: Mapping[str, tuple[Tensor, Tensor]]


class BaseModelError(ValueError):
    """A base that isn't found, or isn't the one that is meant; one line."""


@dataclass(eq=False)
class BaseModel:
    """A base in memory: its projections in float32 on the host, all else in the dtype and on the device of its use."""

    backbone: PreTrainedModel
    dtype: torch.dtype
    device: torch.device

    @property
    def shared(self) -> frozenset[str]:
        """Names of the parameters that all value models made of it have in common: all but the projections' weights."""
        merged = {f"{name}.weight" for name in projections(self.backbone)}
        return frozenset(name for name, _ in self.backbone.named_parameters() if name not in merged)

    def merged(self, low_rank: LowRank) -> PreTrainedModel:
        """A backbone of its own with the update in its projections; it shares all other weights with the base."""
        shared = {id(parameter): parameter for parameter in self.backbone.parameters()}
        backbone = copy.deepcopy(self.backbone, shared)
        for name, projection in projections(backbone).items():
            weight = merged_weight(projection, *low_rank.factors[name]).to(self.device, self.dtype)
            projection.weight = nn.Parameter(weight, requires_grad=False)
        return backbone


_BaseKey = tuple[str, str, torch.dtype, torch.device]


class BaseModels:
    """The bases that a process uses: each is read once, and held as long as a value model made of it is."""

    def __init__(self, served: Sequence[str] = ()) -> None:
        """served: directories or hub ids where a base is looked for before the place that its value model names."""
        self._served = tuple(served)
        self._held: WeakValueDictionary[_BaseKey, BaseModel] = WeakValueDictionary()

    def get(
        self, base: Base, config: PreTrainedConfig, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> BaseModel:
        """``base`` ready to be merged with. config: of its first layers. Raises BaseModelError."""
        key = (base.sha256, _told_apart(config), dtype, torch.device(device))
        held = self._held.get(key)
        if held is None:
            held = BaseModel(self.read(base, config), *key[2:])
            _move_shared(held, base.name)
            self._held[key] = held
        return held

    def read(self, base: Base, config: PreTrainedConfig) -> PreTrainedModel:
        """``base`` from its files, in float32. Raises BaseModelError with what was wrong at each place."""
        reasons = []
        for source in dict.fromkeys((*self._served, base.name)):
            try:
                return _read_same(source, base, config)
            except ValueError as error:
                reasons.append(f"{source}: {error}")
        raise BaseModelError(
            f"its base {base.name} isn't found ({'; '.join(reasons)}): restore it, or make the value model anew"
        )


def weights_digest(backbone: PreTrainedModel) -> str:
    """SHA-256 over each weight's name, shape and float32 bytes, whatever dtype or files the weights were stored in."""
    digest = hashlib.sha256()
    for name, parameter in sorted(backbone.named_parameters()):
        weight = parameter.detach().to("cpu", torch.float32).contiguous()
        digest.update(f"{name} {list(weight.shape)}\n".encode())
        digest.update(weight.numpy().data)
    return digest.hexdigest()


def projections(backbone: nn.Module) -> dict[str, nn.Linear | Conv1D]:
    """The linear layers of a backbone by name: what an update changes."""
    return {name: layer for name, layer in backbone.named_modules() if isinstance(layer, nn.Linear | Conv1D)}


def factor_shapes(layer: nn.Linear | Conv1D, rank: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Of A and of B."""
    outputs, inputs = layer.weight.shape[:: -1 if isinstance(layer, Conv1D) else 1]
    return (rank, inputs), (outputs, rank)


def merged_weight(layer: nn.Linear | Conv1D, a_RI: Tensor, b_OR: Tensor) -> Tensor:
    """W + B·A in float32, laid out as the layer has it: GPT-2's Conv1D holds Wᵀ."""
    update_OI = b_OR @ a_RI
    return layer.weight.detach().float() + (update_OI.T if isinstance(layer, Conv1D) else update_OI)


def _read_same(source: str, base: Base, config: PreTrainedConfig) -> PreTrainedModel:
    _check_sizes(read_config(source), config)
    backbone = read_backbone(source, copy.deepcopy(config), is_part=True).requires_grad_(False)
    digest = weights_digest(backbone)
    if digest != base.sha256:
        raise BackboneError(
            f"the weights of its first {base.layers} layers have digest {digest[:SHOWN_DIGITS]}…, not "
            f"{base.sha256[:SHOWN_DIGITS]}…"
        )
    return backbone


def _told_apart(config: PreTrainedConfig) -> str:
    """A config as text: the same weights with other rotary frequencies, say, are another function."""
    fields = config.to_dict()
    return json.dumps({name: fields[name] for name in sorted(fields.keys() - ORIGIN)}, default=str)


def _check_sizes(found: PreTrainedConfig, wanted: PreTrainedConfig) -> None:
    """Tell another model by its config: reading the weights of a large one takes long."""
    wanted = wanted.get_text_config()
    first = first_layers(found, wanted.num_hidden_layers).get_text_config()
    for name in ("model_type", "hidden_size", "vocab_size"):
        if getattr(first, name, None) != getattr(wanted, name):
            raise BackboneError(f"{name} is {getattr(first, name, None)!r}, not {getattr(wanted, name)!r}")


def _move_shared(base: BaseModel, name: str) -> None:
    shared = base.shared
    for parameter_name, parameter in base.backbone.named_parameters():
        if parameter_name in shared:
            parameter.data = parameter.data.to(base.device, base.dtype)
        if not bool(parameter.isfinite().all()):
            raise BaseModelError(f"parameter {parameter_name} of its base {name} holds values that are not finite")
