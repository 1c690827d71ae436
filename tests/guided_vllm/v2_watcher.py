"""A logits processor for Model Runner V2 that writes down what vLLM tells it, and adds a bias where a request asks."""

from dataclasses import dataclass, field
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext, LogitsProcessor, LogitsProcRequestState

from vllm import SamplingParams


def watched(name: str, bias: dict[int, float] | None = None) -> dict[str, Any]:
    """Sampling parameters of a request to watch. bias: per token, what is added to its logit."""
    return {"extra_args": {"watch": {"name": name, "bias": bias or {}}}}


@dataclass
class Row:
    """One row of logits: ``[V]`` as they came. draft: how many drafts it follows; 0: committed tokens only."""

    position: int
    token: int
    draft: int
    logits: torch.Tensor


@dataclass
class Visit:
    """One request in one call of apply.

    call: which call. known: all_token_ids up to total_len, as they are then. bound: its seq_lens_upper_bound_np.
    """

    call: int
    rows: list[Row]
    known: list[int]
    bound: int


@dataclass
class Stay:
    """From one add_request to the slot's next. Of all_token_ids ``[prefill_len]``, as apply_staged_writes sees them."""

    name: str | None
    slot: int
    prompt_len: int
    prefill_len: int
    prefilled: list[int] | None = None
    visits: list[Visit] = field(default_factory=list)


class Watcher(LogitsProcessor):
    def __init__(self, vllm_config: VllmConfig, req_states: LogitsProcRequestState) -> None:
        self.requests = req_states
        self.bias_SV = torch.zeros(req_states.max_num_reqs, req_states.vocab_size, device=req_states.device)
        self.forget()

    def forget(self) -> None:
        self.calls = 0
        self.stays: list[Stay] = []
        self.in_slot: dict[int, Stay] = {}

    def of(self, name: str) -> list[Stay]:
        return [stay for stay in self.stays if stay.name == name]

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        watch = (sampling_params.extra_args or {}).get("watch")
        lengths = (int(self.requests.prompt_len.np[req_idx]), int(self.requests.prefill_len.np[req_idx]))
        self.in_slot[req_idx] = Stay(watch and watch["name"], req_idx, *lengths)
        self.stays.append(self.in_slot[req_idx])
        self.bias_SV[req_idx] = 0
        if watch is None:
            return False
        for token, amount in watch["bias"].items():
            self.bias_SV[req_idx, token] = amount
        return True

    def apply_staged_writes(self) -> None:
        for stay in self.stays:
            if stay.prefilled is None:
                stay.prefilled = self.requests.all_token_ids.gpu[stay.slot, : stay.prefill_len].tolist()

    def apply(self, logits: torch.Tensor, ctx: LogitsContext) -> torch.Tensor:
        self._check_layout(logits, ctx)
        slots = ctx.expanded_idx_mapping.tolist()
        # Bounds are padded where a captured graph is for more requests.
        for slot, bound in zip(ctx.idx_mapping.tolist(), ctx.seq_lens_upper_bound_np.tolist(), strict=False):
            if slot in self.in_slot:
                rows = [
                    Row(
                        int(ctx.pos[row]),
                        int(ctx.input_ids[row]),
                        int(ctx.expanded_local_pos[row]),
                        logits[row].clone(),
                    )
                    for row, of in enumerate(slots)
                    if of == slot
                ]
                known = self.requests.all_token_ids.gpu[slot, : self.requests.total_len.gpu[slot]].tolist()
                self.in_slot[slot].visits.append(Visit(self.calls, rows, known, bound))
        self.calls += 1
        return logits.add_(self.bias_SV[ctx.expanded_idx_mapping])

    def _check_layout(self, logits: torch.Tensor, ctx: LogitsContext) -> None:
        """Rows lie request by request, each request's in the order of its drafts; no row is padding."""
        slots, drafts = ctx.expanded_idx_mapping.tolist(), ctx.expanded_local_pos.tolist()
        assert logits.dtype == torch.float32
        assert len(logits) == len(slots) == len(drafts) == len(ctx.pos) == len(ctx.input_ids)
        assert list(dict.fromkeys(slots)) == ctx.idx_mapping.tolist() == ctx.idx_mapping_np.tolist()
        for row, draft in enumerate(drafts):
            assert draft == 0 or (slots[row - 1] == slots[row] and drafts[row - 1] == draft - 1)
