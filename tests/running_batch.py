"""Guided requests in a batch without vLLM: what a model runner does to its slots is played here.

tests/vllm and tests/vllm_v2 drive the real ones.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from guided_vllm.poisoned import POISON
from guided_vllm.tiny_models import REFERENCE_VOCAB, make_tokenizer
from qtilt.checkpoint import fingerprint_tokenizer
from qtilt.params import GuidanceParams
from qtilt.vllm_plugin.captured import Graphs
from qtilt.vllm_plugin.compatibility import Reference
from qtilt.vllm_plugin.details import Details
from qtilt.vllm_plugin.failure import GuidanceFailure
from qtilt.vllm_plugin.guided import GuidedBatch, GuidedRequest
from qtilt.vllm_plugin.ranks import Ranks
from qtilt.vllm_plugin.records import GuidanceSummary, Records, Stay
from qtilt.vllm_plugin.runner import StepRows
from qtilt.vllm_plugin.step import RowSettings
from qtilt.vllm_plugin.versions import EngineSettings, Residents, ResidentVersion

LENGTH = 64
END = 17
CPU = torch.device("cpu")


def make_residents(
    slots: int, dtype: torch.dtype = torch.float32, kv_fraction: float = 1.0, device: torch.device = CPU
) -> Residents:
    """None resident yet, for the tests' reference model."""
    reference = Reference(fingerprint_tokenizer(make_tokenizer()), REFERENCE_VOCAB, LENGTH)
    return Residents(reference, EngineSettings(slots, LENGTH, dtype, device, kv_fraction))


class PlayedRequests:
    """See :class:`qtilt.vllm_plugin.runner.Requests`."""

    def __init__(self, slots: int, *, speculates: bool, device: torch.device = CPU) -> None:
        self.device = device
        self.slots = slots
        self.speculates = speculates
        self.tokens_SP = torch.zeros(slots, LENGTH, dtype=torch.int32, device=device)
        self.total_len_S = torch.zeros(slots, dtype=torch.int32, device=device) if speculates else None
        self.prompt_lens, self.prefill_lens, self.total_lens = ([0] * slots for _ in range(3))

    def prompt_len(self, slot: int) -> int:
        return self.prompt_lens[slot]

    def prefill_len(self, slot: int) -> int:
        return self.prefill_lens[slot]

    def prefill(self, slot: int) -> np.ndarray:
        return self.tokens_SP[slot, : self.prefill_lens[slot]].cpu().numpy().copy()

    def enter(self, slot: int, prompt_ids: Sequence[int], output: Sequence[int]) -> None:
        self.prompt_lens[slot], self.total_lens[slot] = len(prompt_ids), 0
        self.commit(slot, [*prompt_ids, *output])
        self.prefill_lens[slot] = self.total_lens[slot]

    def commit(self, slot: int, tokens: Sequence[int]) -> None:
        length = self.total_lens[slot]
        self.tokens_SP[slot, length : length + len(tokens)] = torch.tensor(
            tokens, dtype=torch.int32, device=self.device
        )
        self.total_lens[slot] += len(tokens)
        if self.total_len_S is not None:
            self.total_len_S[slot] = self.total_lens[slot]

    def tokens(self, slot: int) -> list[int]:
        return self.tokens_SP[slot, : self.total_lens[slot]].tolist()


class RunningBatch:
    """Slots of a model runner, and the guided requests in them."""

    def __init__(
        self,
        slots: int,
        *,
        speculates: bool = False,
        device: torch.device = CPU,
        graphs: Graphs | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self.requests = PlayedRequests(slots, speculates=speculates, device=device)
        self.batch = GuidedBatch(self.requests, graphs, ranks)
        self.records = Records()

    def add(
        self,
        slot: int,
        version: ResidentVersion,
        prompt_ids: list[int],
        output: Sequence[int] = (),
        temperature: float = 1.0,
        ending_token: int | None = END,
        **params: object,
    ) -> GuidedRequest:
        """A request, one that comes back with this output, enters a slot; who was there has left."""
        self.batch.remove(slot)
        self.requests.enter(slot, prompt_ids, output)
        guidance = GuidanceParams(version.name, version.version, **({"eta": 0.1, "top_k": 5, "trace_id": "t"} | params))
        stay = Stay(self.requests, self.batch.table, slot, guidance.guided_tokens)
        stay.details = Details(guidance.top_k) if guidance.details else None
        lengths = self.requests.prompt_len(slot), self.requests.prefill_len(slot)
        request = GuidedRequest(slot, guidance, version, stay, *lengths)
        self.records.open(guidance.trace_id, stay)
        settings = RowSettings.of(guidance, temperature, ending_token)
        if guidance.kl_budget is not None:
            settings = settings._replace(kl_left=guidance.kl_budget)
        self.batch.put(request, settings)
        return request

    def add_unguided(self, slot: int, prompt_ids: list[int]) -> None:
        self.batch.remove(slot)
        self.requests.enter(slot, prompt_ids, [])

    def guide(self, slots: Sequence[int], logits_RV: Tensor, drafts: dict[int, list[int]] | None = None) -> Tensor:
        """The logits of one step of these slots: a row each and, behind it, one for each draft."""
        return self.batch.guide(logits_RV, self.layout(slots, drafts))

    def layout(self, slots: Sequence[int], drafts: dict[int, list[int]] | None = None) -> StepRows:
        """Of the next step."""
        lengths = {slot: self.requests.total_lens[slot] for slot in slots}
        fed = {slot: [self.requests.tokens(slot)[-1], *(drafts or {}).get(slot, [])] for slot in slots}
        rows = [(slot, lengths[slot] - 1 + row, token) for slot in slots for row, token in enumerate(fed[slot])]
        return StepRows(
            np.array(slots),
            np.array([lengths[slot] + len(fed[slot]) - 1 for slot in slots]),
            *torch.tensor(rows).T.contiguous().to(self.requests.device),
        )

    def step(self, drawn: dict[int, list[int]], drafts: dict[int, list[int]] | None = None) -> Tensor:
        """One step of these slots, of which each draws tokens: the first of its drafts that came true, and one more.

        The reference's logits depend on the position only, so that what is beside a row can't make a difference.
        """
        positions = [
            self.requests.total_lens[slot] - 1 + row
            for slot in drawn
            for row in range(1 + len((drafts or {}).get(slot, [])))
        ]
        guided_RV = self.guide(list(drawn), torch.stack([logits_at(position) for position in positions]), drafts)
        for slot, tokens in drawn.items():
            self.requests.commit(slot, tokens)
        return guided_RV

    def draw(self, logits_BV: Tensor, slots: Sequence[int] | None = None) -> Tensor:
        """A step of all slots, in order, that draws each one's likeliest token, but never the poison."""
        slots = range(len(logits_BV)) if slots is None else slots
        guided_BV = self.guide(slots, logits_BV.clone())
        for slot, guided_V in zip(slots, guided_BV, strict=True):
            self.requests.commit(slot, [int(guided_V[:POISON].argmax())])
        return guided_BV

    def drawn(self, slot: int) -> list[int]:
        """The tokens that were generated in the slot."""
        return self.requests.tokens(slot)[self.requests.prompt_lens[slot] :]

    def outcome(self, tokens: list[int], trace: str = "t") -> GuidanceSummary | GuidanceFailure:
        (outcome,) = self.records.take(trace, [tokens], more_to_come=True)
        return outcome

    def summary(self, tokens: list[int], trace: str = "t") -> GuidanceSummary:
        outcome = self.outcome(tokens, trace)
        assert "kl" in outcome
        return outcome


def logits_at(position: int) -> Tensor:
    return torch.randn(REFERENCE_VOCAB, generator=torch.Generator().manual_seed(position)) * 3


def count_tokens(version: ResidentVersion) -> list[int]:
    """Appended to: how many tokens each forward of the value model runs."""
    run: list[int] = []
    embedding = version.engine.model.backbone.get_input_embeddings()
    embedding.register_forward_pre_hook(lambda _, inputs: run.append(inputs[0].numel()))
    return run
