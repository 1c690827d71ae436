"""The running batch of vLLM's Model Runner V2: which slots are guided, and one guided step. Imports no vLLM.

Shapes: ``S`` slots of the model runner, ``R`` rows of logits in a step, ``G`` of them that one value-model version
guides, ``V`` vocabulary of the reference.

What this file rests on (vLLM 0.32, ``vllm/v1/worker/gpu``; tests/vllm_v2 holds each):

- A request keeps its slot from ``add_request`` on. Nobody says when it leaves; the slot is added to again.
- A row is a token that was fed, at a position of a slot: the last committed token of a request and, behind it, its
  drafts. Every token after the prefill is fed once it is committed, or was as a draft that came true. So a value cache
  that is written at every row's (slot, position) holds the history whenever a row is scored; what a rejected draft left
  is overwritten before. The host needs to know no length, and no step waits for the device.
- Of the prefill, the rows show the last token of each chunk. Its tokens are on the device from the start, and its
  lengths on the host: the value cache advances chunk by chunk as vLLM's does.
- Without drafts in a step, row i is that of request i. With drafts, the host doesn't know which rows are whose: all are
  computed, each version's are picked on the device, and what the others write goes to a slot that is nobody's. With
  speculative decoding lengths on the host are upper bounds, and how many tokens came true is known on the device only.
  Candidates are then all scored, whatever the tolerance: most rows are other versions' or follow drafts that won't come
  true, and a request's tokens mustn't depend on what is drafted for the others.
"""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from qtilt.engine.device_copy import copy_to_device
from qtilt.engine.packing import LastTokens, Span
from qtilt.engine.prefixes import SHORTEST
from qtilt.method.params import GuidanceParams
from qtilt.vllm_plugin.failure import GuidanceFailure, of_exception
from qtilt.vllm_plugin.step import RowSettings, StepSettings, end_unless, guide_step, scores_in_stages
from qtilt.vllm_plugin.v2.stays import Stay, StepTable
from qtilt.vllm_plugin.versions import ResidentVersion

if TYPE_CHECKING:
    from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext, LogitsProcRequestState

logger = logging.getLogger("vllm.qtilt.slots")  # vLLM configures the loggers below its own name only


@dataclass(eq=False)
class SlotRequest:
    """The guided request in a slot.

    prefill_len: tokens fed before the first is drawn, the earlier output of a resumed request included. steps: how many
    have drawn a token for it in this stay; each has drawn one at least. failure: why it isn't guided any more.
    """

    slot: int
    params: GuidanceParams
    version: ResidentVersion
    stay: Stay
    prompt_len: int
    prefill_len: int
    steps: int = 0
    failure: GuidanceFailure | None = None

    @property
    def generated(self) -> int:
        """How many tokens it has generated at least; exactly so many without speculative decoding."""
        return self.prefill_len - self.prompt_len + self.steps

    def leave(self) -> None:
        """Another request takes the slot, or the request is known to be gone."""
        self.stay.end()
        self.version.rows -= 1
        self.release()

    def release(self) -> None:
        """Give the slot of the value cache back."""
        if self.version.engine.holds(self.slot):
            self.version.engine.release(self.slot)

    def fail(self, failure: GuidanceFailure) -> None:
        """Guidance of the next token has failed: none of this request from here on."""
        self.failure = failure
        self.stay.fail(failure, self.generated)
        self.release()


@dataclass(frozen=True, slots=True)
class Seat:
    """A guided request in one step. length: tokens visible to the token being drawn, or an upper bound (see above)."""

    request: SlotRequest
    row: int
    length: int

    @property
    def is_prefilling(self) -> bool:
        """Whether this is a chunk of an unfinished prefill, whose logits vLLM discards."""
        return self.length < self.request.prefill_len


class GuidedSlots:
    """Guided requests by slot. Requests without guidance have none, and their logits aren't touched.

    speculates: whether vLLM drafts tokens.
    """

    def __init__(self, requests: "LogitsProcRequestState", *, speculates: bool) -> None:
        self._requests = requests
        self._speculates = speculates
        self._in_slot: dict[int, SlotRequest] = {}
        self.table = StepTable(requests)
        self._staged_SC = np.zeros((requests.max_num_reqs + 1, len(RowSettings._fields)))
        self._settings_SC, self._is_staged = torch.empty(0), True
        self._failures_S = torch.zeros(requests.max_num_reqs + 1, dtype=torch.int32, device=requests.device)

    def __len__(self) -> int:
        return len(self._in_slot)

    def put(self, slot: int, request: SlotRequest | None, settings: RowSettings | None) -> None:
        """The request in ``slot`` is now this one (None: one without guidance); what was there has left."""
        if (previous := self._in_slot.pop(slot, None)) is not None:
            previous.leave()
        if request is None or settings is None:
            return
        request.version.rows += 1
        request.version.engine.acquire(slot)
        self._in_slot[slot] = request
        guided = request.params.guided_tokens
        if guided is not None:
            settings = settings._replace(guided_below=request.prompt_len - 1 + guided)
        self._staged_SC[slot], self._is_staged = settings, True
        self._failures_S[slot] = 0
        self.table.clear(slot)

    def flush(self) -> None:
        """Bring the settings of added requests to the device."""
        if self._is_staged:
            (self._settings_SC,), self._is_staged = copy_to_device(self._requests.device, self._staged_SC), False

    def drop_absent(self, running: Iterable[int]) -> None:
        """Of all slots only these still hold a running request."""
        for slot in self._in_slot.keys() - set(running):
            self._in_slot.pop(slot).leave()

    def look_for_failures(self) -> None:
        """Find out, waiting for the device, in which slots values weren't finite numbers."""
        for slot in self._failures_S.nonzero().flatten().tolist():
            request = self._in_slot.get(slot)
            if request is not None and request.failure is None:
                request.stay.read()
                if request.stay.failure is not None:
                    logger.error("the values of %s for a request are not finite: it ends", request.version.label)
                    request.failure = request.stay.failure

    def guide(self, logits_RV: Tensor, context: "LogitsContext") -> Tensor:
        """Tilt, in place, the rows that are guided in this step; all others stay bit-identical.

        Where guidance fails, or has failed before, the row gets logits that end its request.
        """
        together: dict[tuple[ResidentVersion, bool], list[Seat]] = {}
        lengths = context.seq_lens_upper_bound_np.tolist()
        for row, slot in enumerate(context.idx_mapping_np.tolist()):
            request = self._in_slot.get(slot)
            if request is None:
                continue
            request.stay.longest = max(request.stay.longest, lengths[row])
            if request.failure is None and request.params.guides(request.generated):
                together.setdefault((request.version, self._scores_in_stages(request)), []).append(
                    Seat(request, row, lengths[row])
                )
        for (version, _), seats in together.items():
            self._guide_version(version, seats, logits_RV, context)
        self._end_failed(logits_RV, context)
        return logits_RV

    def _guide_version(
        self, version: ResidentVersion, seats: Sequence[Seat], logits_RV: Tensor, context: "LogitsContext"
    ) -> None:
        """Rows of one version that are scored in one way, as many at a time as the value cache can hold.

        This is the edge that no error of value code crosses; the logits of what it concerns are left untouched.
        """
        for cut in version.engine.parts([seat.length for seat in seats]):
            part = seats[cut]
            try:
                self._guide_held_together(version, part, logits_RV, context)
            except Exception as error:
                logger.exception("guidance failed in value model %s: %d request(s) end", version.label, len(part))
                for seat in part:
                    seat.request.fail(of_exception(error))

    def _guide_held_together(
        self, version: ResidentVersion, seats: Sequence[Seat], logits_RV: Tensor, context: "LogitsContext"
    ) -> None:
        """Rows whose histories the value cache can hold together."""
        cache = version.engine.cache
        for seat in seats:
            # Drafts that didn't come true, or tokens that vLLM took back.
            cache.rewind(seat.request.slot, min(cache.covered(seat.request.slot), seat.length))
        cache.make_room({seat.request.slot: seat.length for seat in seats})
        spans: list[Span] = []
        for seat in seats:
            spans += self._catch_up(seat, spans)
        drawing = [seat for seat in seats if not seat.is_prefilling]
        if sum(len(span.token_ids_C) for span in spans) > version.engine.max_new_tokens or not drawing:
            version.engine.extend(spans)
            spans = []
        if drawing:
            self._guide_rows(version, drawing, spans, logits_RV, context)

    def _catch_up(self, seat: Seat, spans: list[Span]) -> list[Span]:
        """What the value cache lacks of the history, without the last token of one that draws: that is a row.

        During the prefill that is vLLM's chunk, and all of it when vLLM took the beginning from its own cache. Later it
        is nothing, or everything if the cache had to drop it. Where ``seat.length`` is too high, what is cached beyond
        the history is out of sight until it is overwritten. ``spans``: what is to be cached before.
        """
        request, cache = seat.request, seat.request.version.engine.cache
        covered = cache.covered(request.slot)
        # Once it draws, a slot that holds anything holds all: with speculation, up to a length known to the device.
        holds_all = request.steps > 0 and covered > 0
        covered = covered or self._share_prompt(request, seat.length, spans)
        end = seat.length if seat.is_prefilling else seat.length - 1
        cache.reserve(request.slot, seat.length)
        cache.advance(request.slot, seat.length)
        if holds_all or covered >= end:
            return []
        last_row = request.version.manifest.vocab_size - 1
        tokens_C = self._requests.all_token_ids.gpu[request.slot, covered:end].long().clamp(0, last_row)
        return [Span(request.slot, covered, tokens_C)]

    def _share_prompt(self, request: SlotRequest, length: int, spans: list[Span]) -> int:
        """Copy what another sample of the prompt has cached, or has among ``spans``, which then are cached first.

        Returns how many tokens that are. Requests of one trace are samples of one prompt (records.py); which others
        begin alike, only the device knows.
        """
        if not request.params.trace_id:
            return 0
        cache = request.version.engine.cache
        # Nothing is cached yet of the token before the one that is drawn in this step.
        available = {
            other.slot: min(cache.covered(other.slot) - 1, length - 1, request.prompt_len)
            for other in self._in_slot.values()
            if other.params.trace_id == request.params.trace_id and other.version is request.version
        }
        source, common = max(available.items(), key=lambda item: item[1])
        if common < SHORTEST:
            return 0
        if any(span.slot == source for span in spans):
            request.version.engine.extend(spans)
            spans.clear()
        cache.copy(source, request.slot, common)
        return common

    def _guide_rows(
        self,
        version: ResidentVersion,
        seats: Sequence[Seat],
        spans: Sequence[Span],
        logits_RV: Tensor,
        context: "LogitsContext",
    ) -> None:
        """History → value → offset → tilted logits for the rows that draw tokens, in place, and what was measured."""
        device = logits_RV.device
        rows = np.array([[seat.row for seat in seats], [seat.request.slot for seat in seats]])
        ((rows_G, slots_G),) = copy_to_device(device, rows)
        has_drafts = len(logits_RV) != len(context.idx_mapping_np)
        if not has_drafts:
            positions_G, tokens_G, logits_GV = context.pos[rows_G], context.input_ids[rows_G], logits_RV[rows_G]
            is_mine_G = torch.ones_like(slots_G, dtype=torch.bool)
        else:
            positions_G, tokens_G, logits_GV = context.pos, context.input_ids, logits_RV
            rows_G = torch.arange(len(logits_RV), device=device)
            is_mine_G = self._is_of(slots_G, context)
            slots_G = context.expanded_idx_mapping.long().where(is_mine_G, version.engine.cache.nobodys)
        settings_GC = self._settings_SC[slots_G]
        settings = StepSettings.of(settings_GC, [seat.request.params for seat in seats])
        # With speculative decoding the host knows only how many tokens there are at least.
        is_mine_G = is_mine_G & (positions_G < settings.guided_below_G)
        last = LastTokens(
            slots_G,
            positions_G.long(),
            tokens_G.long().clamp(0, version.manifest.vocab_size - 1),
            max(seat.length for seat in seats),
            has_drafts=has_drafts,
        )

        def score(candidates_RK: Tensor, rows_R: Tensor | None = None) -> Tensor:
            if rows_R is None:
                return version.engine.score(last, candidates_RK, spans)
            some = LastTokens(last.slots_B[rows_R], last.positions_B[rows_R], last.token_ids_B[rows_R], last.longest)
            return version.engine.score(some, candidates_RK)

        in_stages = self._scores_in_stages(seats[0].request)
        guided = guide_step(version, logits_GV, settings, score, in_stages=in_stages)
        logits_RV[rows_G] = guided.logits_GV.where(is_mine_G.unsqueeze(-1), logits_GV)
        slots_G = slots_G.where(is_mine_G, version.engine.cache.nobodys)
        self._failures_S.index_add_(0, slots_G, guided.failed.int())
        self.table.write(slots_G, last.positions_B, guided.divergence_G3, guided.candidates_G)
        for seat in seats:
            seat.request.steps += 1

    def _scores_in_stages(self, request: SlotRequest) -> bool:
        return not self._speculates and scores_in_stages(request.version, request.params)

    def _end_failed(self, logits_RV: Tensor, context: "LogitsContext") -> None:
        failed = [slot for slot, request in self._in_slot.items() if request.failure is not None]
        if failed:
            (slots_F,) = copy_to_device(logits_RV.device, np.array(failed))
            slots_R = context.expanded_idx_mapping.long()
            ending_R = self._settings_SC[slots_R, RowSettings._fields.index("ending_token")].long()
            end_unless(~self._is_of(slots_F, context), logits_RV, ending_R)

    def _is_of(self, slots_F: Tensor, context: "LogitsContext") -> Tensor:
        """Which rows ``[R]`` are of these slots. (``torch.isin`` waits for the device when there are many.)"""
        is_in_S = torch.zeros_like(self._failures_S, dtype=torch.bool).index_fill_(0, slots_F, True)
        return is_in_S[context.expanded_idx_mapping.long()]
