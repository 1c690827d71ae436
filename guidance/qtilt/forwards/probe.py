"""Which backbones the value engine computes exactly: measured on the backbone, at construction, not looked up by name.

Shapes: ``C`` tokens of one sequence, ``T`` packed tokens, ``H`` query heads, ``G`` key/value heads, ``D`` head size.

The engine runs a backbone's own modules, or their fused equals (fused_forward.py), and replaces its attention by causal
softmax attention over each row's history. That is the same function only if the backbone asks for nothing else: no
sliding window shorter than a history, soft cap, sinks, position bias, cross-attention, recurrent or convolutional
layers, and no frequencies that depend on the longest sequence around.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from qtilt.engine.cache import CacheGeometry, KVCache
from qtilt.engine.packing import LastTokens, PackedStep, Span, pack
from qtilt.forwards.attention import ATTENTION_NAME, AttentionStep, attend_span, register_attention

# The probe's two packed sequences: of different lengths, so that any mixing between or inside them shows.
PROBE_LENGTHS = (5, 3)
# Relative L2 distance to the backbone's own eager attention; a missing term in attention costs far more.
TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.1}
# Keywords that transformers models give their attention function and that change its result.
CHANGES_ATTENTION = ("softcap", "s_aux", "position_bias", "alibi", "block_bias")


class AttentionProbe:
    """An attention step that computes the probe's sequences plainly and notes what each layer asks for."""

    def __init__(self, max_length: int) -> None:
        self.max_length = max_length
        self.shapes: dict[int, tuple[int, int]] = {}

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scaling: float, extras: dict[str, Any]
    ) -> Tensor:
        """Causal attention inside each probe sequence: ``[1, T, H, D]``."""
        self._refuse(module, key, value, extras)
        self.shapes[int(module.layer_idx)] = (key.shape[1], key.shape[3])  # type: ignore[arg-type]
        outs, first = [], 0
        for count in PROBE_LENGTHS:
            part = slice(first, first + count)
            outs.append(attend_span(query[:, :, part], key[:, :, part], value[:, :, part], None, scaling))
            first += count
        return torch.cat(outs, dim=2).transpose(1, 2)

    def _refuse(self, module: nn.Module, key: Tensor, value: Tensor, extras: Mapping[str, Any]) -> None:
        name = type(module).__name__
        if not getattr(module, "is_causal", True):
            raise ValueError(f"{name} is not causal; the value engine needs a decoder")
        for keyword in CHANGES_ATTENTION:
            if extras.get(keyword) is not None:
                raise ValueError(f"{name} uses {keyword}, which the value engine cannot compute exactly")
        window = extras.get("sliding_window")
        if window is not None and window < self.max_length:
            raise ValueError(
                f"{name} has a sliding window of {window} tokens, shorter than the {self.max_length} tokens a history "
                "may have; the value engine needs full attention, or a max_length within the window"
            )
        if key.shape[3] != value.shape[3]:
            raise ValueError(f"{name} has keys of size {key.shape[3]} and values of size {value.shape[3]}, not equal")


@contextmanager
def engine_attention(backbone: PreTrainedModel) -> Iterator[None]:
    """Have the backbone call our attention function inside the block, and its own again after it.

    The same module trains or is evaluated elsewhere in the process, with the attention it was loaded with.
    """
    with _attention(backbone, ATTENTION_NAME):
        yield


@torch.inference_mode()
def measure_geometry(backbone: PreTrainedModel, max_length: int) -> CacheGeometry:
    """Run the backbone on a few tokens: the shape of the cache it needs, if the engine is exact on it.

    Raises ValueError that says what the backbone does differently.
    """
    if not backbone._supports_attention_backend:
        raise ValueError(f"{type(backbone).__name__} does not let its attention be replaced; use another backbone")
    register_attention()
    config = backbone.config.get_text_config()
    _refuse_config(config, max_length)
    ids_T, positions_T = _probe_tokens(backbone)
    probe = AttentionProbe(max_length)
    packed_TH = _packed_hidden(backbone, ids_T, positions_T, probe)
    _check_layers(backbone, probe, config.num_hidden_layers)
    plain_TH = _plain_hidden(backbone, ids_T)
    _check_same(packed_TH, plain_TH, f"{type(backbone).__name__} computes something else than causal attention")
    kv_heads, head_size = probe.shapes[0]
    return CacheGeometry(config.num_hidden_layers, kv_heads, head_size, packed_TH.dtype, packed_TH.device)


@torch.inference_mode()
def check_forward(backbone: PreTrainedModel, forward: Callable[[Tensor, Tensor, AttentionStep], Tensor]) -> None:
    """Raise ValueError unless ``forward(input_ids_T, position_ids_T, step)`` gives the backbone's hidden states."""
    ids_T, positions_T = _probe_tokens(backbone)
    hidden_TH = forward(ids_T, positions_T, AttentionProbe(max(PROBE_LENGTHS)))
    _check_same(hidden_TH, _plain_hidden(backbone, ids_T), f"{type(backbone).__name__} computes something else")


@torch.inference_mode()
def check_packed(backbone: PreTrainedModel, forward: Callable[[PackedStep], Tensor], geometry: CacheGeometry) -> None:
    """:func:`check_forward` of one that attends, and caches, by itself.

    The last two tokens of each sequence are a tail, those before it a span.
    """
    cache = KVCache(geometry, len(PROBE_LENGTHS), max(PROBE_LENGTHS))
    ids_T, positions_T = _probe_tokens(backbone)
    is_span_T = torch.cat([torch.arange(count) < count - 2 for count in PROBE_LENGTHS])
    spans = [Span(slot, 0, ids_C[:-2]) for slot, ids_C in enumerate(ids_T.split(PROBE_LENGTHS))]
    (last_B, candidates_B), (positions_B, _) = (each_T[~is_span_T].view(-1, 2).T for each_T in (ids_T, positions_T))
    last = LastTokens(torch.arange(len(spans)), positions_B, last_B, max(PROBE_LENGTHS) - 1)
    hidden_TH, plain_TH = forward(pack(cache, spans, last, candidates_B.unsqueeze(1))), _plain_hidden(backbone, ids_T)
    plain_TH = torch.cat([plain_TH[is_span_T], plain_TH[~is_span_T]])
    _check_same(hidden_TH, plain_TH, f"{type(backbone).__name__} computes something else")


def _refuse_config(config: PretrainedConfig, max_length: int) -> None:
    """Refuse what the configuration says and a few short sequences can't show."""
    window = getattr(config, "sliding_window", None)
    for kind in set(getattr(config, "layer_types", None) or ()) - {"full_attention"}:
        if kind != "sliding_attention" or window is None or window < max_length:
            raise ValueError(
                f"the backbone has {kind} layers (sliding_window {window}); the value engine needs full attention over "
                f"{max_length} tokens"
            )
    rope = getattr(config, "rope_parameters", None) or {}
    for parameters in [rope, *(part for part in rope.values() if isinstance(part, Mapping))]:
        if parameters.get("rope_type") in ("dynamic", "longrope"):
            raise ValueError(
                f"the backbone's rope_type is {parameters['rope_type']!r}: its frequencies depend on the longest "
                "sequence of a batch, so cached keys would be wrong; use a backbone with fixed frequencies"
            )


def _probe_tokens(backbone: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """Token ids and positions ``[T]`` of the probe's sequences, one after the other.

    They are spread over the vocabulary. Its first and last ids are special and often untrained, and a model may blow up
    what it rounds on them: in bfloat16, 12 layers of SmolLM2 are off by 31 % on its ids 1 to 8, by 1 % on these.
    """
    vocab_size, count = backbone.config.get_text_config().vocab_size, sum(PROBE_LENGTHS)
    ids_T = (2 * torch.arange(count, device=backbone.device) + 1) * vocab_size // (2 * count)
    return ids_T, torch.cat([torch.arange(count, device=backbone.device) for count in PROBE_LENGTHS])


def _packed_hidden(backbone: PreTrainedModel, ids_T: Tensor, positions_T: Tensor, probe: AttentionProbe) -> Tensor:
    """Hidden states ``[T, hidden]`` of the probe's sequences in one packed forward through our attention function."""
    with engine_attention(backbone):
        outputs = backbone(input_ids=ids_T[None], position_ids=positions_T[None], use_cache=False, attention_step=probe)
    return outputs.last_hidden_state[0]  # type: ignore[no-any-return]


def _plain_hidden(backbone: PreTrainedModel, ids_T: Tensor) -> Tensor:
    """Hidden states ``[T, hidden]`` of the probe's sequences one by one, with the backbone's own attention."""
    with _attention(backbone, "eager"):
        hidden = [
            backbone(input_ids=ids_C[None], use_cache=False).last_hidden_state for ids_C in ids_T.split(PROBE_LENGTHS)
        ]
    return torch.cat(hidden, dim=1)[0]


def _check_same(hidden_TH: Tensor, plain_TH: Tensor, complaint: str) -> None:
    distance = float((hidden_TH.double() - plain_TH.double()).norm() / plain_TH.double().norm().clamp_min(1e-12))
    allowed = TOLERANCES[plain_TH.dtype]
    if not distance <= allowed:
        raise ValueError(
            f"{complaint} over each sequence: packed and plain hidden states differ by {distance:.1e} (relative), "
            f"allowed {allowed:.0e}"
        )


def _check_layers(backbone: PreTrainedModel, probe: AttentionProbe, layers: int) -> None:
    name = type(backbone).__name__
    if sorted(probe.shapes) != list(range(layers)):
        raise ValueError(f"{name} has {layers} layers, but only layers {sorted(probe.shapes)} called our attention")
    if len(set(probe.shapes.values())) != 1:
        raise ValueError(f"the layers of {name} differ in key heads or head size: {sorted(set(probe.shapes.values()))}")


@contextmanager
def _attention(backbone: PreTrainedModel, name: str) -> Iterator[None]:
    # Set on the configuration itself: set_attn_implementation also validates and logs, which a step can't afford.
    config = backbone.config.get_text_config()
    before = config._attn_implementation
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = before
