"""The forward by transformers' own modules, with our attention in place of theirs: runs every backbone."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qtilt.forwards.attention import ATTENTION_NAME, register_attention
from qtilt.forwards.cpu_linear import onednn_linears, slow_linears
from qtilt.forwards.interface import AttentionOf
from qtilt.forwards.packed_attention import PackedAttention
from qtilt.forwards.packing import PackedStep


class ModulesForward:
    """See :class:`qtilt.forwards.interface.Forward`."""

    name: ClassVar[str] = "transformers"
    is_capturable: ClassVar[bool] = False  # who knows what a module does

    def __init__(self, backbone: PreTrainedModel, attention: AttentionOf = PackedAttention) -> None:
        register_attention()
        self._backbone, self._attention = backbone, attention
        self._slow_linears = slow_linears(backbone)
        # A mask of four dimensions is passed through untouched: no mask is built and, in GPT-2, no ids are compared
        # with the padding token on the device.
        self._any_mask = torch.zeros(1, 1, 1, 1, device=backbone.device)

    def __call__(self, step: PackedStep) -> Tensor:
        with attention_of(self._backbone, ATTENTION_NAME), onednn_linears(self._slow_linears):
            outputs = self._backbone(
                input_ids=step.input_ids_T.unsqueeze(0),
                position_ids=step.position_ids_T.unsqueeze(0),
                attention_mask=self._any_mask,
                use_cache=False,
                attention_step=self._attention(step),
            )
        return outputs.last_hidden_state[0, step.span_tokens :]  # type: ignore[no-any-return]


@contextmanager
def attention_of(backbone: PreTrainedModel, name: str) -> Iterator[None]:
    """Have the backbone call the attention function of this name inside the block, and its own again after it.

    The same module trains or is evaluated elsewhere in the process, with the attention it was loaded with.
    """
    # Set on the configuration itself: set_attn_implementation also validates and logs, which a step can't afford.
    config = backbone.config.get_text_config()
    before = config._attn_implementation
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = before
