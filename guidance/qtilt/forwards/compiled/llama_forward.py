"""The forward of Llama-like decoders as one compiled function, for float32 on CPUs.

Shapes: ``N`` outputs and ``K`` inputs of a layer, ``I`` intermediate size, ``D`` head size, ``P`` positions.

A step of few tokens there waits for memory and for calls: llama_forward.h reads weights, keys and values in order and
ahead of time, in place and no further than a history goes, and is one call. Its products are those of ``nn.Linear`` up
to rounding. It has the weights of all projections in the order in which they are read.
"""

from collections.abc import Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qtilt.forwards.fused import can_fuse, rotation_table
from qtilt.forwards.memory import CacheGeometry
from qtilt.forwards.packing import PackedStep

MULTIPLE = 16
"""Heads and hidden states must be multiples of so many numbers: whole vectors."""


class CompiledForward:
    """See :class:`qtilt.forwards.interface.Forward`. The library must have been loaded (library.py).

    positions: how many the rotation is tabulated for. Raises ValueError for a backbone that isn't of this kind.
    """

    name: ClassVar[str] = "compiled"
    is_capturable: ClassVar[bool] = False

    def __init__(self, backbone: PreTrainedModel, geometry: CacheGeometry, positions: int) -> None:
        if not can_compile(backbone, geometry):
            raise ValueError(f"{type(backbone).__name__} can't be compiled: see can_compile")
        body = cast(Any, backbone)  # no class has what the four have in common
        attention, mlp = body.layers[0].self_attn, body.layers[0].mlp
        self._scaling = attention.scaling
        self._nobody = torch.empty(0, dtype=torch.int64)
        self._forward = torch.classes.qtilt.LlamaForward(
            body.embed_tokens.weight.detach(),
            body.norm.weight.detach(),
            rotation_table(backbone, positions),
            attention.q_proj.out_features // geometry.head_size,
            geometry.kv_heads,
            geometry.head_size,
            mlp.gate_proj.out_features,
            body.norm.variance_epsilon,
        )
        self._layers = body.layers
        for layer in body.layers:
            self._add(layer)

    @torch.no_grad()
    def _add(self, layer: Any) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self._forward.add_layer(
            layer.input_layernorm.weight.detach(),
            *_panels([attention.q_proj, attention.k_proj, attention.v_proj]),
            attention.q_norm.weight.detach() if hasattr(attention, "q_norm") else None,
            attention.k_norm.weight.detach() if hasattr(attention, "k_norm") else None,
            *_panels([attention.o_proj]),
            layer.post_attention_layernorm.weight.detach(),
            *_panels([mlp.gate_proj, mlp.up_proj], alternating=True),
            *_panels([mlp.down_proj]),
        )

    @torch.no_grad()
    def free_backbones_own(self) -> None:
        """Drop the backbone's projections, of which this forward has its own: nothing else can run it after that."""
        for module in self._layers.modules():
            if isinstance(module, nn.Linear):
                module.weight = nn.Parameter(module.weight.new_empty(0), requires_grad=False)

    def __call__(self, step: PackedStep) -> Tensor:
        memory, last = step.memory, step.last
        spans = [(span.slot, span.start, len(span.token_ids_C)) for span in step.spans]
        hidden_TE: Tensor = self._forward.forward(
            step.input_ids_T,
            step.position_ids_T,
            torch.tensor(spans).view(-1, 3) if spans else self._nobody.view(0, 3),
            self._nobody if last is None else last.slots_B,
            self._nobody if last is None else last.positions_B,
            torch.from_numpy(step.tails_B),
            *memory.content,
            memory.table_SM,
            self._scaling,
        )
        return hidden_TE


def candidate_logits(head: nn.Linear, atoms: int, hidden_BH: Tensor, candidates_BK: Tensor) -> Tensor:
    """What :meth:`ValueModel.head_logits` gives for a Q-type head in float32 on a CPU."""
    logits_BKA: Tensor = torch.ops.qtilt.candidate_logits(hidden_BH, head.weight, head.bias, candidates_BK, atoms)
    return logits_BKA


def can_compile(backbone: PreTrainedModel, geometry: CacheGeometry) -> bool:
    """Whether :class:`CompiledForward` is the backbone's forward."""
    is_float32 = geometry.device.type == "cpu" and geometry.dtype == torch.float32
    sizes = (geometry.head_size, backbone.config.get_text_config().hidden_size)
    return is_float32 and can_fuse(backbone) and all(size % MULTIPLE == 0 for size in sizes)


def _panels(layers: Sequence[nn.Linear], *, alternating: bool = False) -> tuple[Tensor, Tensor | None]:
    """Layers of the same input as one: weight ``[panels, K, panel]`` and bias ``[panels, panel]``, padded with zeros.

    A panel has two vectors of outputs, of one layer and then the other if ``alternating``. All layers have a bias, or
    none has.
    """
    lanes = torch.ops.qtilt.lanes()
    weights: list[Tensor] = [layer.weight for layer in layers]
    biases: list[Tensor] = [layer.bias for layer in layers if layer.bias is not None]
    if alternating:
        weights, biases = ([_padded(each, lanes).unflatten(0, (-1, lanes)) for each in of] for of in (weights, biases))
        weight_NK = torch.stack(weights, dim=1).flatten(0, 2)
        bias_N = torch.stack(biases, dim=1).flatten() if biases else None
    else:
        weight_NK, bias_N = torch.cat(weights), torch.cat(biases) if biases else None
    weight = _padded(weight_NK, 2 * lanes).unflatten(0, (-1, 2 * lanes)).transpose(1, 2).contiguous()
    return weight, None if bias_N is None else _padded(bias_N, 2 * lanes)


def _padded(outputs: Tensor, multiple: int) -> Tensor:
    """With zeros for the outputs that the first dimension lacks."""
    lacking = -len(outputs) % multiple
    return torch.cat([outputs, outputs.new_zeros(lacking, *outputs.shape[1:])])
