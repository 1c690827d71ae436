"""The forward of Llama-like decoders with a serving engine's kernels: less than half of the operations.

Shapes: ``T`` packed tokens (see packing.py), ``H`` query heads and ``G`` key/value heads of size ``D``, ``n`` numbers
that are normalised together, ``P`` positions.
"""

from collections.abc import Sequence
from typing import Any, ClassVar, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.functional import silu
from transformers import PreTrainedModel

from qtilt.forwards.cpu_linear import linear
from qtilt.forwards.interface import AttentionOf, StepAttention
from qtilt.forwards.memory import CacheGeometry
from qtilt.forwards.packed_attention import PackedAttention
from qtilt.forwards.packing import PackedStep
from qtilt.forwards.paged.kernels import FlashAttention

FUSED = frozenset({"LlamaModel", "MistralModel", "Qwen2Model", "Qwen3Model"})
"""The classes of transformers that compute what :class:`FusedForward` does.

Every backbone is measured nevertheless (probe.py), in half precision only for what is far beyond rounding.
"""

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NORM_MULTIPLE = 16
"""On CPUs the kernels normalise multiples of so many numbers only."""


class Kernels(Protocol):
    """What vLLM brings along for CPUs and GPUs. All but the last write in place."""

    def rms_norm(self, out_Tn: Tensor, hidden_Tn: Tensor, weight: Tensor, epsilon: float, /) -> None:
        """Write what is normalised to ``out_Tn``."""

    def fused_add_rms_norm(self, hidden_Tn: Tensor, residual_Tn: Tensor, weight: Tensor, epsilon: float, /) -> None:
        """Add ``hidden_Tn`` to ``residual_Tn``, and normalise the sum into ``hidden_Tn``."""

    def rotary_embedding(
        self, positions_T: Tensor, query: Tensor, key: Tensor, head_size: int, rotation_PD: Tensor, is_neox: bool, /
    ) -> None:
        """Turn ``query [T, H·D]`` and ``key [T, G·D]``; the table has cosines, then sines, of half a head each."""

    def silu_and_mul(self, out_TI: Tensor, gate_up: Tensor, /) -> None:
        """Of ``gate_up [T, 2·I]`` write silu of the first half, times the second."""

    def flash_attention(self, geometry: CacheGeometry) -> FlashAttention | None:
        """Over pages of such a cache, on a GPU; None if there is none for it."""


class FusedForward:
    """See :class:`qtilt.forwards.interface.Forward`. Runs on the backbone's own weights.

    positions: how many the rotation is tabulated for. together: lay weights that multiply the same numbers side by side
    in memory, for one product each; on CPUs that is slower. Raises ValueError for a backbone that isn't of this kind.
    """

    name: ClassVar[str] = "fused"
    is_capturable: ClassVar[bool] = True

    def __init__(
        self,
        backbone: PreTrainedModel,
        kernels: Kernels,
        positions: int,
        attention: AttentionOf = PackedAttention,
        *,
        together: bool = False,
    ) -> None:
        if not can_fuse(backbone):
            raise ValueError(f"{type(backbone).__name__} can't be fused: see can_fuse")
        self._backbone = cast(Any, backbone)  # no class has what the four have in common
        self._kernels, self._attention = kernels, attention
        self._rotation_PD = rotation_table(backbone, positions)
        products = Together if together else Apart
        self._layers = [
            (
                layer,
                products(layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj),
                products(layer.mlp.gate_proj, layer.mlp.up_proj),
            )
            for layer in self._backbone.layers
        ]

    def __call__(self, step: PackedStep) -> Tensor:
        attention, position_ids_T = self._attention(step), step.position_ids_T
        hidden: Tensor = self._backbone.embed_tokens(step.input_ids_T)
        residual = torch.zeros_like(hidden)
        for layer, query_key_value, gate_up in self._layers:
            self._add_and_norm(hidden, residual, layer.input_layernorm)
            is_last = layer is self._backbone.layers[-1]
            hidden = self._attend(
                layer.self_attn, query_key_value(hidden), position_ids_T, attention, tails_only=is_last
            )
            if is_last:
                residual = residual[step.span_tokens :]
                if step.last is None:
                    return residual
            self._add_and_norm(hidden, residual, layer.post_attention_layernorm)
            hidden = linear(layer.mlp.down_proj, gate_up.gated(hidden, self._kernels))
        self._add_and_norm(hidden, residual, self._backbone.norm)
        return hidden

    def _attend(
        self,
        layer: Any,
        query_key_value: Sequence[Tensor],
        position_ids_T: Tensor,
        attention: StepAttention,
        *,
        tails_only: bool,
    ) -> Tensor:
        query, key, value = query_key_value
        if hasattr(layer, "q_norm"):
            query, key = self._norm_heads(query, layer.q_norm), self._norm_heads(key, layer.k_norm)
        self._kernels.rotary_embedding(position_ids_T, query, key, layer.head_dim, self._rotation_PD, True)
        query_1HTD, key_1GTD, value_1GTD = (
            packed.unflatten(-1, (-1, layer.head_dim)).transpose(0, 1).unsqueeze(0) for packed in (query, key, value)
        )
        out_1THD = attention.attend(layer, query_1HTD, key_1GTD, value_1GTD, layer.scaling, {}, tails_only=tails_only)
        return linear(layer.o_proj, out_1THD[0].flatten(1))

    def _add_and_norm(self, hidden: Tensor, residual: Tensor, norm: Any) -> None:
        self._kernels.fused_add_rms_norm(hidden, residual, norm.weight, norm.variance_epsilon)

    def _norm_heads(self, packed: Tensor, norm: Any) -> Tensor:
        """Each head by itself."""
        heads = packed.reshape(-1, len(norm.weight))
        out = torch.empty_like(heads)
        self._kernels.rms_norm(out, heads, norm.weight, norm.variance_epsilon)
        return out.view_as(packed)


class Apart:
    """Linear layers of the same input, a product each."""

    def __init__(self, *layers: nn.Linear) -> None:
        self._layers = layers

    def __call__(self, hidden: Tensor) -> Sequence[Tensor]:
        return [linear(layer, hidden) for layer in self._layers]

    def gated(self, hidden: Tensor, kernels: Kernels) -> Tensor:
        """Of two layers: silu of the first's output, times the second's."""
        gate, up = self(hidden)
        return silu(gate).mul_(up)


class Together:
    """Linear layers of the same input, one product: the layers' weights become views of ours."""

    def __init__(self, *layers: nn.Linear) -> None:
        self._sizes = [layer.out_features for layer in layers]
        self._weight = torch.cat([layer.weight.detach() for layer in layers])
        self._bias: Tensor | None = None
        for layer, weight in zip(layers, self._weight.split(self._sizes), strict=True):
            layer.weight.data = weight
        biases = [layer.bias for layer in layers if layer.bias is not None]
        if biases:
            assert len(biases) == len(layers), "can_fuse knows no backbone that has some of them only"
            self._bias = torch.cat([bias.detach() for bias in biases])

    def __call__(self, hidden: Tensor) -> Sequence[Tensor]:
        parts: Sequence[Tensor] = self._product(hidden).split(self._sizes, dim=-1)
        return parts

    def gated(self, hidden: Tensor, kernels: Kernels) -> Tensor:
        """See :class:`Apart`."""
        both = self._product(hidden)
        out = both.new_empty(len(both), self._sizes[0])
        kernels.silu_and_mul(out, both)
        return out

    def _product(self, hidden: Tensor) -> Tensor:
        return functional.linear(hidden, self._weight, self._bias)


def rotation_table(backbone: PreTrainedModel, positions: int) -> Tensor:
    """Cosines, then sines, of half a head: ``[P, D]``. The second half turns by the same angles."""
    body = cast(Any, backbone)
    positions_1P = torch.arange(positions, device=backbone.device).unsqueeze(0)
    turns = body.rotary_emb(body.embed_tokens.weight, positions_1P)
    return torch.cat([turn_1PD[0].chunk(2, dim=-1)[0] for turn_1PD in turns], dim=-1).detach()


def can_fuse(backbone: PreTrainedModel) -> bool:
    """Whether :class:`FusedForward` is the backbone's forward, and the kernels take its sizes and dtype."""
    if type(backbone).__name__ not in FUSED or backbone.config.hidden_act != "silu" or backbone.dtype not in DTYPES:
        return False
    modules = list(backbone.named_modules())
    is_plain = all(type(module) is nn.Linear for name, module in modules if name.endswith("_proj"))
    return is_plain and all(
        module.weight.numel() % NORM_MULTIPLE == 0 for name, module in modules if name.endswith("norm")
    )
