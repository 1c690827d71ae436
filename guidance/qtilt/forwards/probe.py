"""Which backbones the value engine computes exactly: measured on the backbone, at construction, not looked up by name.

Shapes: ``C`` tokens of one sequence, ``T`` packed tokens, ``H`` query heads, ``G`` key/value heads, ``D`` head size.

A forward runs a backbone's own modules, or their equals, and replaces its attention by causal softmax attention over
each row's history. That is the same function only if the backbone asks for nothing else: no sliding window shorter than
a history, soft cap, sinks, position bias, cross-attention, recurrent or convolutional layers, and no frequencies that
depend on the longest sequence around.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from qtilt.forwards.attention import ATTENTION_NAME, attend_span, register_attention
from qtilt.forwards.interface import Forward
from qtilt.forwards.memory import PAGE_TOKENS, CacheGeometry, PageMemory, has_one_piece
from qtilt.forwards.modules import attention_of
from qtilt.forwards.packing import LastTokens, Span, pack

# The probe's two packed sequences: of different lengths, so that any mixing between or inside them shows.
PROBE_LENGTHS = (5, 3)
# The histories that each forward is tried on, in two steps: pages are filled, begun and crossed, and rows padded. The
# first and longest gets its last but SECOND_SPAN tokens in the second step, beside the rows with their candidates.
FORWARD_LENGTHS = (PAGE_TOKENS + 5, PAGE_TOKENS, 3)
SECOND_SPAN = 7
DISTINCT_TOKENS = 8
CANDIDATES = 3
# Of each history: rows with all, with some and with none of their candidates.
COUNTS = (2, CANDIDATES, 0)
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
    sequences = _spread_ids(backbone, sum(PROBE_LENGTHS)).split(PROBE_LENGTHS)
    probe = AttentionProbe(max_length)
    packed_TH = _packed_hidden(backbone, sequences, probe)
    _check_layers(backbone, probe, config.num_hidden_layers)
    plain_TH = torch.cat([_plain_hidden(backbone, ids_C) for ids_C in sequences])
    _check_same(packed_TH, plain_TH, f"{type(backbone).__name__} computes something else than causal attention")
    kv_heads, head_size = probe.shapes[0]
    return CacheGeometry(config.num_hidden_layers, kv_heads, head_size, packed_TH.dtype, packed_TH.device)


@torch.inference_mode()
def check_forward(backbone: PreTrainedModel, forward: Forward, geometry: CacheGeometry, max_length: int) -> None:
    """Raise ValueError unless the forward gives the backbone's own hidden states, however the cache is laid out.

    max_length: the longest history, which a sliding window may be as short as.
    """
    lengths = [max(min(length, max_length - 1), 1) for length in FORWARD_LENGTHS]
    *histories, candidates_N = _spread_ids(backbone, sum(lengths) + CANDIDATES * len(lengths)).split(
        [*lengths, CANDIDATES * len(lengths)]
    )
    candidates_BK = candidates_N.view(len(lengths), CANDIDATES)
    plain_TH = _plain_steps(backbone, histories, candidates_BK)
    plain_BH = plain_TH.unflatten(0, (len(lengths), -1))[:, 0]
    complaint = f"{type(backbone).__name__}, run by {forward.name}, computes something else"
    for memory in _memories(geometry, lengths):
        hidden_XH, last, places_X = _packed_steps(forward, memory, histories, candidates_BK)
        _check_same(hidden_XH, plain_TH[places_X], complaint)
        _check_same(forward(pack(memory, [], last)), plain_BH, f"{complaint} without candidates")


def _memories(geometry: CacheGeometry, lengths: Sequence[int]) -> Iterator[PageMemory]:
    """Room for histories of these lengths: in one piece, if that may be, and in pages that aren't in order."""
    slots, longest = len(lengths), max(lengths)
    if has_one_piece(geometry.device):
        table_S1 = torch.arange(slots + 1, device=geometry.device).unsqueeze(1)
        yield PageMemory(geometry, slots + 1, longest, table_S1, in_one_piece=True)
    pages = math.ceil(longest / PAGE_TOKENS) + 1
    table_SM = torch.arange((slots + 1) * pages, device=geometry.device).flip(0).view(slots + 1, pages)
    yield PageMemory(geometry, table_SM.numel(), PAGE_TOKENS, table_SM, in_one_piece=False)


def _packed_steps(
    forward: Forward, memory: PageMemory, histories: Sequence[Tensor], candidates_BK: Tensor
) -> tuple[Tensor, LastTokens, Tensor]:
    """Hidden states ``[X, H]`` of the histories' last tokens and, behind each, some of its candidates; which of all.

    From two steps: the first caches the histories but for their ends, the longest's being of some tokens.
    """
    ends = [len(history) - 1 for history in histories]
    cut = max(ends[0] - SECOND_SPAN, 0)
    parts = zip(histories, [cut, *ends[1:]], strict=True)
    begun = [Span(slot, 0, history[:end]) for slot, (history, end) in enumerate(parts) if end]
    if begun:
        forward(pack(memory, begun))
    rest = [Span(0, cut, histories[0][cut:-1])] if cut < ends[0] else []
    slots_B, positions_B = torch.tensor([range(len(ends)), ends], device=candidates_BK.device)
    last = LastTokens(slots_B, positions_B, torch.stack([history[-1] for history in histories]), max(ends) + 1)
    step = pack(memory, rest, last, candidates_BK, np.array(COUNTS))
    assert step.places_X is not None
    return forward(step), last, step.places_X


def _plain_steps(backbone: PreTrainedModel, histories: Sequence[Tensor], candidates_BK: Tensor) -> Tensor:
    """Of all candidates what :func:`_packed_steps` gives, from plain forwards of the backbone: ``[B·(1 + K), H]``."""
    tails = []
    for history, candidates_K in zip(histories, candidates_BK, strict=True):
        tails.append(_plain_hidden(backbone, history)[-1:])
        tails += [
            _plain_hidden(backbone, torch.cat([history, candidate_1]))[-1:] for candidate_1 in candidates_K.split(1)
        ]
    return torch.cat(tails)


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


def _spread_ids(backbone: PreTrainedModel, count: int) -> Tensor:
    """Token ids ``[count]``, of a few tokens spread over the vocabulary, in changing order.

    Its first and last ids are special and often untrained, and a model may blow up what it rounds on them: in bfloat16,
    12 layers of SmolLM2 are off by 31 % on its ids 1 to 8, by 1 % on ids that are spread. Few, because a model that
    overflows on some token is still exact on all others, and fails where it is asked about that one.
    """
    vocab_size = backbone.config.get_text_config().vocab_size
    steps_N = torch.arange(count, device=backbone.device)
    turns_N = (steps_N + steps_N.div(DISTINCT_TOKENS, rounding_mode="floor")) % DISTINCT_TOKENS
    return (2 * turns_N + 1).mul_(vocab_size).div_(2 * DISTINCT_TOKENS, rounding_mode="floor")


def _packed_hidden(backbone: PreTrainedModel, sequences: Sequence[Tensor], probe: AttentionProbe) -> Tensor:
    """Hidden states ``[T, hidden]`` of the sequences in one packed forward through our attention function."""
    ids_T = torch.cat(list(sequences))
    positions_T = torch.cat([torch.arange(len(ids_C), device=ids_T.device) for ids_C in sequences])
    with attention_of(backbone, ATTENTION_NAME):
        outputs = backbone(input_ids=ids_T[None], position_ids=positions_T[None], use_cache=False, attention_step=probe)
    return outputs.last_hidden_state[0]  # type: ignore[no-any-return]


def _plain_hidden(backbone: PreTrainedModel, ids_C: Tensor) -> Tensor:
    """Hidden states ``[C, hidden]`` of one sequence, with the backbone's own attention."""
    with attention_of(backbone, "eager"):
        return backbone(input_ids=ids_C[None], use_cache=False).last_hidden_state[0]  # type: ignore[no-any-return]


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
