"""The requests of Model Runner V2, as it shows them to logits processors. Imports no vLLM.

What this file rests on (vLLM 0.32, ``vllm/v1/worker/gpu``; tests/vllm_v2 holds each):

- A request keeps its slot from ``add_request`` on. Nobody says when it leaves; the slot is added to again.
- Of the prefill, the rows show the last token of each chunk. Its tokens are on the device from the start, and its
  lengths on the host: the value cache advances chunk by chunk as vLLM's does.
- In ``add_request`` the tokens of the prefill wait on the host to be written to the device: the last that were staged.
- With speculative decoding lengths on the host are upper bounds, and how many tokens came true is known on the device
  only.
"""

from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from qtilt.forwards.arrays import Int32Array
from qtilt.vllm_plugin.runner import StepRows

if TYPE_CHECKING:
    from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext, LogitsProcRequestState


class V2Requests:
    """See :class:`qtilt.vllm_plugin.runner.Requests`."""

    def __init__(self, state: "LogitsProcRequestState", *, speculates: bool) -> None:
        self._state = state
        self.device = state.device
        self.slots = state.max_num_reqs
        self.speculates = speculates
        self.total_len_S: Tensor | None = state.total_len.gpu if speculates else None
        self.tokens_SP: Tensor = state.all_token_ids.gpu

    def prompt_len(self, slot: int) -> int:
        return int(self._state.prompt_len.np[slot])

    def prefill_len(self, slot: int) -> int:
        return int(self._state.prefill_len.np[slot])

    def prefill(self, slot: int) -> Int32Array:
        staged = self._state.all_token_ids
        if not staged._staged_write_indices or staged._staged_write_indices[-1] != slot:
            raise RuntimeError(f"vLLM has staged no tokens for slot {slot}, which a request has just got")
        return np.array(staged._staged_write_contents[-self.prefill_len(slot) :], dtype=np.int32)


def step_rows(context: "LogitsContext") -> StepRows:
    """The layout of a step that vLLM passes on."""
    slots_N = context.idx_mapping_np
    return StepRows(
        slots_N=slots_N,
        # Padded where a captured graph is for more requests.
        lengths_N=context.seq_lens_upper_bound_np[: len(slots_N)].astype(np.int64),
        slots_R=context.expanded_idx_mapping.long(),
        positions_R=context.pos.long(),
        token_ids_R=context.input_ids.long(),
    )
