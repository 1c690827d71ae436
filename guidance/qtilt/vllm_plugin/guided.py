"""The guided requests of the running batch, and one guided step of them. Imports no vLLM.

Shapes: ``S`` slots of the model runner, ``N`` requests of a step, ``R`` rows of logits, ``G`` requests or rows that one
value-model version guides, ``V`` vocabulary of the reference.

A request that guidance fails for is ended as failure.py says; nothing that happens in value code reaches the others.

Without drafts in a step, row i is that of request i. With drafts, the host doesn't know which rows are whose: all are
computed, each version's are picked on the device, and what the others write goes to the scratch slot.
"""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from time import perf_counter

import numpy as np
import torch
from torch import Tensor

from qtilt.forwards.arrays import BoolArray, IntArray, copy_to_device
from qtilt.forwards.packing import LastTokens, Span
from qtilt.method.params import GuidanceParams
from qtilt.method.tilt import scale_of
from qtilt.vllm_plugin.captured import CapturedSteps, Graphs
from qtilt.vllm_plugin.details import Details
from qtilt.vllm_plugin.failure import GuidanceFailure, of_exception
from qtilt.vllm_plugin.ranks import Ranks
from qtilt.vllm_plugin.records import Stay, StepTable
from qtilt.vllm_plugin.runner import Requests, StepRows
from qtilt.vllm_plugin.step import CERTAIN, FORCED, Asked, Guided, RowSettings, StepSettings, end_unless, guide_step
from qtilt.vllm_plugin.versions import ResidentVersion

logger = logging.getLogger("vllm.qtilt.guided")  # vLLM configures the loggers below its own name only

ALWAYS = np.iinfo(np.int64).max


@dataclass(eq=False)
class GuidedRequest:
    """A request that is guided, for as long as it holds its slot.

    prefill_len: tokens fed before the first is drawn, the earlier output of a resumed request included.
    """

    slot: int
    params: GuidanceParams
    version: ResidentVersion
    stay: Stay
    prompt_len: int
    prefill_len: int

    @property
    def guided_steps(self) -> int:
        """How many steps of this stay are guided, from its first on."""
        guided = self.params.guided_tokens
        return ALWAYS if guided is None else guided - (self.prefill_len - self.prompt_len)

    def hold(self) -> None:
        """Hold a slot of the value cache again, if tokens were taken back after the last guided one."""
        if not self.version.engine.holds(self.slot):
            self.version.engine.acquire(self.slot)

    def release(self) -> None:
        """Give the slot of the value cache back."""
        if self.version.engine.holds(self.slot):
            self.version.engine.release(self.slot)


class Group:
    """Requests of one version, in the order of their slots.

    where_G: which requests of the step they are. On the device: ``where``, their rows of logits (a slice if they lie
    side by side), ``device_slots_G`` and their settings. settings_SC: of the requests in all slots.
    """

    def __init__(self, requests: Sequence[GuidedRequest], where_G: IntArray, settings_SC: Tensor) -> None:
        self.requests = requests
        self.where_G = where_G
        self.version = requests[0].version
        self.slots_G = np.array([request.slot for request in requests])
        self.prefill_G = np.array([request.prefill_len for request in requests])
        self.detailed = [row for row, request in enumerate(requests) if request.stay.details is not None]
        self._settings_SC = settings_SC
        rows = np.stack([self.where_G, self.slots_G])
        ((device_where_G, self.device_slots_G),) = copy_to_device(settings_SC.device, rows)
        self.where: slice | Tensor = device_where_G
        if (np.diff(where_G) == 1).all():
            self.where = slice(int(where_G[0]), int(where_G[-1]) + 1)
        self.settings = StepSettings.of(
            settings_SC[self.device_slots_G], Asked.by(request.params for request in requests)
        )

    def part(self, rows: IntArray) -> "Group":
        """Some of them; itself if that is all."""
        if len(rows) == len(self.requests):
            return self
        return Group([self.requests[row] for row in rows.tolist()], self.where_G[rows], self._settings_SC)


class GuidedBatch:
    """Guided requests by slot. Requests without guidance aren't here, and their logits aren't touched.

    graphs: for steps that can be captured, if any are to be. ranks: that are to sample from the same logits, if any.
    """

    def __init__(self, requests: Requests, graphs: Graphs | None = None, ranks: Ranks | None = None) -> None:
        self._requests = requests
        self._ranks = ranks
        self._captured = None if graphs is None else CapturedSteps(graphs, requests.slots)
        self.table = StepTable(requests)
        self._guided: dict[int, GuidedRequest] = {}
        self._failed: dict[int, Stay] = {}
        self._detailed: dict[int, tuple[int, Details]] = {}
        """Of guided requests that ask for details, with the lengths of their prompts."""
        self._left: dict[int, Stay] = {}
        """Of requests that have left slots which nobody has taken yet: what was measured is still there."""
        slots = requests.slots
        self._prefill_S = np.zeros(slots, dtype=np.int64)
        self._guided_steps_S = np.zeros(slots, dtype=np.int64)
        self._steps_S = np.zeros(slots, dtype=np.int64)
        """How many steps have drawn a token in this stay; with drafts each has drawn one at least."""
        self._staged_SC = np.zeros((slots + 1, len(RowSettings._fields)))
        self._settings_SC, self._is_staged = torch.empty(0), True
        self._failures_S = torch.zeros(slots + 1, dtype=torch.int32, device=requests.device)
        self._spent_S = torch.zeros(slots + 1, dtype=torch.float64, device=requests.device)
        """Nats of the KL in this stay, of requests that have a budget."""
        self._rows: StepRows | None = None
        """Of the step that was guided last."""
        self._grouped: tuple[IntArray, BoolArray, list[Group]] | None = None

    def __len__(self) -> int:
        return len(self._guided) + len(self._failed)

    def put(self, request: GuidedRequest, settings: RowSettings) -> None:
        """The request takes its slot, which is free. Raises ValueError when its value cache's isn't."""
        slot, guided = request.slot, request.params.guided_tokens
        if guided is not None:
            settings = settings._replace(guided_below=request.prompt_len - 1 + guided)
        self._take(slot, settings)
        # One that comes with output has been here before, and has lost what it had cached.
        held_before = request.prefill_len if request.prefill_len > request.prompt_len else 0
        request.version.engine.acquire(slot, self._requests.prefill(slot), held_before=held_before)
        self._guided[slot] = request
        if request.stay.details is not None:
            self._detailed[slot] = request.prompt_len, request.stay.details
        self._prefill_S[slot] = request.prefill_len
        self._guided_steps_S[slot] = request.guided_steps
        request.version.rows += 1

    def put_failed(self, slot: int, stay: Stay, settings: RowSettings) -> None:
        """A request whose guidance has failed already takes the slot, which is free."""
        self._take(slot, settings)
        self._failed[slot] = stay

    def remove(self, slot: int) -> None:
        """What is in the slot, if anything, has left, and somebody takes it."""
        self._note_leaving(slot)
        stay = self._left.pop(slot, None)
        if stay is not None:
            stay.end()

    def flush(self) -> None:
        """Bring the settings of requests that have arrived to the device; a step does if nobody has before."""
        if self._is_staged:
            (self._settings_SC,), self._is_staged = copy_to_device(self._requests.device, self._staged_SC), False

    def keep_only(self, running: Iterable[int]) -> None:
        """Of all slots only these still hold a running request."""
        for slot in {*self._guided, *self._failed} - set(running):
            self._note_leaving(slot)

    def look_for_failures(self) -> None:
        """Find out, waiting for the device, in which slots values weren't finite numbers."""
        for slot in self._failures_S.nonzero().flatten().tolist():
            request = self._guided.get(slot)
            if request is not None:
                request.stay.read()
                if request.stay.failure is not None:
                    logger.error("the values of %s for a request are not finite: it ends", request.version.label)
                    self._set_failed(request)

    @torch.inference_mode()
    def guide(self, logits_RV: Tensor, rows: StepRows) -> Tensor:
        """Tilt, in place, the rows that are guided in this step; all others stay bit-identical.

        Where guidance fails, or has failed before, the row gets logits that end its request.
        """
        self.flush()
        self._rows = rows
        if self._ranks is not None:
            self._ranks.begin(self._ending_tokens(rows))
        self.table.note_lengths(rows.slots_N, rows.lengths_N)
        self._draw_detailed(rows)
        if not self._requests.speculates:
            self._steps_S[rows.slots_N] = np.maximum(rows.lengths_N - self._prefill_S[rows.slots_N], 0)
        for group in self._groups(rows):
            self._guide_group(group, logits_RV, rows)
        self._end_failed(logits_RV, rows)
        if self._ranks is not None:
            self._ranks.send(logits_RV)
        return logits_RV

    @torch.inference_mode()
    def leave_out_forced(self, logits_RV: Tensor) -> None:
        """Leave out of the records where vLLM has forced a token since: of the step that was guided last."""
        assert self._rows is not None, "no step has been guided"
        largest_R = logits_RV.amax(-1)
        is_forced_R = (largest_R >= FORCED) & (largest_R < CERTAIN)
        left_out_R = self.table.leave_out(self._rows.slots_R, self._rows.positions_R, is_forced_R)
        self._spent_S.index_add_(0, self._rows.slots_R, -left_out_R)

    def _take(self, slot: int, settings: RowSettings) -> None:
        assert not any(slot in taken for taken in (self._guided, self._failed, self._left)), f"slot {slot} is taken"
        self._staged_SC[slot], self._is_staged = settings, True
        self._failures_S[slot].zero_()  # to assign a number to one element waits for a GPU
        self._spent_S[slot].zero_()
        self._steps_S[slot] = self._guided_steps_S[slot] = 0
        self._grouped = None
        self.table.clear(slot, self._requests.prefill_len(slot))

    def _note_leaving(self, slot: int) -> None:
        request, stay = self._guided.pop(slot, None), self._failed.pop(slot, None)
        if request is not None:
            self._leave(request)
            stay = request.stay
        if stay is not None:
            self._left[slot] = stay

    def _leave(self, request: GuidedRequest) -> None:
        """The request isn't guided any more."""
        self._grouped = None
        self._detailed.pop(request.slot, None)
        request.version.rows -= 1
        request.release()

    def _set_failed(self, request: GuidedRequest) -> None:
        self._failed[request.slot] = self._guided.pop(request.slot).stay
        self._leave(request)

    def _fail(self, request: GuidedRequest, failure: GuidanceFailure) -> None:
        """Guidance of the next token has failed: none of this request from here on."""
        request.stay.fail(failure, request.prefill_len - request.prompt_len + int(self._steps_S[request.slot]))
        self._set_failed(request)

    def _groups(self, rows: StepRows) -> list[Group]:
        """The requests that are guided in this step: from step to step mostly the same."""
        is_guided_N = self._steps_S[rows.slots_N] < self._guided_steps_S[rows.slots_N]
        if self._grouped is not None:
            slots_N, were_guided_N, groups = self._grouped
            if np.array_equal(slots_N, rows.slots_N) and np.array_equal(were_guided_N, is_guided_N):
                return groups
        by_version: dict[ResidentVersion, list[tuple[int, GuidedRequest]]] = {}
        for where in np.argsort(rows.slots_N, kind="stable").tolist():
            request = self._guided.get(int(rows.slots_N[where]))
            if request is None:
                continue
            if is_guided_N[where]:
                request.hold()
                by_version.setdefault(request.version, []).append((where, request))
            else:
                request.release()
        groups = [
            Group([request for _, request in of_one], np.array([where for where, _ in of_one]), self._settings_SC)
            for of_one in by_version.values()
        ]
        self._grouped = rows.slots_N.copy(), is_guided_N, groups
        return groups

    def _guide_group(self, group: Group, logits_RV: Tensor, rows: StepRows) -> None:
        """As many requests at a time as the value cache can hold.

        This is the edge that no error of value code crosses. What a forward that broke off has left in the cache goes
        with the slots.
        """
        began, counts = perf_counter(), group.version.counts
        cache, lengths_G = group.version.engine.cache, rows.lengths_N[group.where_G]
        # What is cached goes first, before room is made for the others: so it isn't dropped unused.
        order = np.argsort(cache.covered_S[group.slots_G] == 0, kind="stable")
        for cut in cache.parts(lengths_G[order]):
            try:
                part = group.part(order[cut])
                self._guide_held_together(part, rows.lengths_N[part.where_G], logits_RV, rows)
            except Exception as error:
                failing = [group.requests[row] for row in order[cut].tolist()]
                label, count = group.version.label, len(failing)
                logger.exception("guidance failed in value model %s: %d request(s) end", label, count)
                for request in failing:
                    self._fail(request, of_exception(error))
        counts.steps += 1
        counts.seconds += perf_counter() - began

    def _guide_held_together(self, group: Group, lengths_G: IntArray, logits_RV: Tensor, rows: StepRows) -> None:
        """Requests whose histories the value cache can hold together."""
        # The logits of an unfinished prefill's chunk are discarded: its tokens are cached, nothing is scored.
        draws_G = lengths_G >= group.prefill_G
        are_bounds_G = self._steps_S[group.slots_G] > 0 if self._requests.speculates else None
        spans = group.version.engine.feed(group.slots_G, lengths_G, self._requests.tokens_SP, draws_G, are_bounds_G)
        drawing = np.flatnonzero(draws_G)
        if len(drawing):
            self._guide_rows(group.part(drawing), int(lengths_G[drawing].max()), spans, logits_RV, rows)

    def _guide_rows(self, group: Group, longest: int, spans: Sequence[Span], logits_RV: Tensor, rows: StepRows) -> None:
        """History → value → offset → tilted logits for the rows that draw tokens, in place, and what was measured."""
        engine, slots_G, where = group.version.engine, group.device_slots_G, group.where
        settings, is_mine_G = group.settings, None
        if rows.has_drafts:
            is_mine_G = self._is_of(slots_G, rows)
            slots_G = rows.slots_R.where(is_mine_G, engine.cache.scratch_slot)
            where = slice(0, len(logits_RV))
            settings = StepSettings.of(self._settings_SC[slots_G], settings.asked)
        if settings.asked.have_budgets:
            settings = settings.after(self._spent_S[slots_G])
        positions_G, logits_GV = rows.positions_R[where], logits_RV[where]
        if self._ranks is not None and isinstance(where, slice):
            logits_GV = logits_GV.clone()  # what breaks off half done is told to nobody, and must leave nothing
        # Of another's history nothing is read, however long it is.
        fed_at_G = positions_G if is_mine_G is None else positions_G.where(is_mine_G, 0)
        tokens_G = rows.token_ids_R[where].clamp(0, engine.model.vocab_size - 1)
        last = LastTokens(slots_G, fed_at_G, tokens_G, longest, has_drafts=rows.has_drafts)

        def score(candidates_GK: Tensor, is_scored_GK: Tensor) -> Tensor:
            counts_G = None
            if engine.model.type == "v":
                counts_G = run_counts(group.requests, settings, is_scored_GK, has_drafts=rows.has_drafts)
            return engine.score(last, candidates_GK, spans, counts_G)

        if self._requests.speculates:
            # Of the tokens that are guided the host knows only how many have been drawn at least.
            is_guided_G = positions_G < settings.guided_below_G
            is_mine_G = is_guided_G if is_mine_G is None else is_mine_G & is_guided_G
            slots_G = slots_G.where(is_mine_G, engine.cache.scratch_slot)
        detailed = {row: logits_GV[row].clone() for row in group.detailed}
        guided = None
        if self._captured is not None and not self._requests.speculates:
            guided = self._captured.guide(group.version, logits_GV, settings, last, spans)
        if guided is None:
            guided = guide_step(group.version, logits_GV, settings, score, is_mine_G)
        if self._ranks is not None:
            self._ranks.note(where, guided, settings.temperature_G, is_mine_G)
        if isinstance(where, Tensor) or self._ranks is not None:  # a slice of them is the rows themselves
            logits_RV[where] = logits_GV
        self._failures_S.index_add_(0, slots_G, guided.failed.int())
        if settings.asked.have_budgets:
            self._spent_S.index_add_(0, slots_G, guided.divergence_G3[:, 0].nan_to_num(nan=0.0))
        self.table.write(slots_G, positions_G, guided.divergence_G3, guided.candidates_G)
        if detailed:
            self._keep_details(group, rows, detailed, guided, scale_of(settings.temperature_G))
        self._steps_S[group.slots_G] += 1
        group.version.counts.requests += len(group.requests)

    def _keep_details(
        self, group: Group, rows: StepRows, before: dict[int, Tensor], guided: Guided, scale_G: Tensor
    ) -> None:
        """Of the requests that ask for them. before: by row, its logits before they were tilted."""
        for row, logits_V in before.items():
            prompt_len, details = self._detailed[group.requests[row].slot]
            step = int(rows.lengths_N[group.where_G[row]]) - prompt_len
            details.add(step, logits_V, guided, row, group.version, scale_G)

    def _draw_detailed(self, rows: StepRows) -> None:
        """What the last step of a request that asks for details has drawn is fed in this one."""
        if not self._detailed:
            return
        for where, slot in enumerate(rows.slots_N.tolist()):
            if slot in self._detailed:
                prompt_len, details = self._detailed[slot]
                details.draw(int(rows.lengths_N[where]) - prompt_len - 1, rows.token_ids_R[where].clone())

    def _end_failed(self, logits_RV: Tensor, rows: StepRows) -> None:
        slots_F_host = np.intersect1d(rows.slots_N, list(self._failed)) if self._failed else np.empty(0)
        if len(slots_F_host):
            (slots_F,) = copy_to_device(logits_RV.device, slots_F_host.astype(np.int64))
            end_unless(~self._is_of(slots_F, rows), logits_RV, self._ending_tokens(rows))

    def _ending_tokens(self, rows: StepRows) -> Tensor:
        """Of each row's request, ``[R]``; of an unguided one, any that there was."""
        return self._settings_SC[rows.slots_R, RowSettings._fields.index("ending_token")].long()

    def _is_of(self, slots_F: Tensor, rows: StepRows) -> Tensor:
        """Which rows ``[R]`` are of these slots. (``torch.isin`` waits for the device when there are many.)"""
        is_in_S = torch.zeros_like(self._failures_S, dtype=torch.bool).index_fill_(0, slots_F, True)
        return is_in_S[rows.slots_R]


def run_counts(
    requests: Sequence[GuidedRequest], settings: StepSettings, is_scored_GK: Tensor, *, has_drafts: bool
) -> IntArray | None:
    """How many candidates of each row a V-type runs, the first ones; None: all of them. requests: without drafts, of
    these rows.

    On a GPU, and where the step isn't captured, the host waits for that if some request has asked for fewer by their
    mass: otherwise a request costs its ``top_k``, and with drafts the largest of them.
    """
    if is_scored_GK.device.type == "cpu" or settings.candidate_mass_G is not None:
        counts_G: IntArray = is_scored_GK.sum(-1).cpu().numpy()
        return counts_G
    if settings.top_k_G is None or has_drafts:
        return None
    return np.array([min(request.params.top_k, is_scored_GK.shape[1]) for request in requests])
