"""The engine under test together with what the oracle needs to know of it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import torch
from vllm.v1.engine.llm_engine import LLMEngine

from guided_vllm.driving import Answer
from guided_vllm.oracle import Guided, expected_steps, log_softmax
from guided_vllm.tiny_models import TOKENS
from qtilt.params import GuidanceParams


@dataclass
class Served:
    """The running engine and what the oracle needs to know of it. directories: of every version ever loaded."""

    engine: LLMEngine
    reference: Path
    directories: dict[tuple[str, int], Path]
    max_seqs: int = 8
    scorable: int = TOKENS

    def rpc(self, method: str, *args: Any) -> Any:
        """One worker's answer, as the server asks it."""
        (result,) = self.engine.collective_rpc(method, args=args)
        return result

    def guide(
        self, value_model: str, version: int = 1, eta: float = 0.2, top_k: int = 8, **more: Any
    ) -> GuidanceParams:
        return GuidanceParams(value_model, version, eta, top_k, trace_id=uuid4().hex, **more)

    def preemptions(self) -> int:
        (counter,) = [metric for metric in self.engine.get_metrics() if metric.name == "vllm:num_preemptions"]
        return int(counter.value)

    def check(
        self,
        answer: Answer,
        adjust: Callable[[torch.Tensor], torch.Tensor] | None = None,
        penalise: Callable[[torch.Tensor, list[int]], torch.Tensor] | None = None,
    ) -> None:
        """Every reported probability, and the KL on record, equal the oracle's.

        adjust: what happens to raw logits before guidance. penalise: what happens to guided logits after it, given the
        tokens generated before.
        """
        ask, guidance = answer.ask, answer.ask.guidance
        kls = []
        for choice in answer.choices:
            steps = expected_steps(
                self.reference,
                ask.prompt,
                choice.token_ids,
                self._for_oracle(guidance),
                ask.temperature,
                self.scorable,
                adjust,
            )
            for count, (token, (expected_V, _)) in enumerate(zip(choice.token_ids, steps, strict=True)):
                if penalise is not None:
                    scale = ask.temperature or 1.0
                    expected_V = log_softmax(penalise(expected_V * scale, choice.token_ids[:count]) / scale)
                self._check_step(token, choice.logprobs[count], expected_V, greedy=ask.temperature == 0)
            kls.append(sum(kl for _, kl in steps))
        if guidance is not None:
            self._check_records(answer, guidance, kls)

    def _for_oracle(self, guidance: GuidanceParams | None) -> Guided | None:
        if guidance is None:
            return None
        directory = self.directories[guidance.value_model, guidance.version]
        return Guided(directory, guidance.eta, guidance.top_k, guidance.method, guidance.guided_tokens)

    def _check_step(self, token: int, reported: dict[int, float], expected_V: torch.Tensor, greedy: bool) -> None:
        reported_V = torch.tensor([reported[index] for index in range(len(expected_V))], dtype=torch.float64)
        # float32 logits are rounded, which 1/η multiplies: up to 2e-5 has been seen.
        torch.testing.assert_close(reported_V.exp(), expected_V.exp(), rtol=0, atol=5e-5)
        # Of all but hopeless tokens also the logarithm, to 1e-4 and what float32 rounds off large logits.
        compared = expected_V > -20
        assert compared[token]
        torch.testing.assert_close(reported_V[compared], expected_V[compared], rtol=2e-5, atol=1e-4)
        if greedy:
            assert float(expected_V[token]) > float(expected_V.max()) - 1e-4

    def _check_records(self, answer: Answer, guidance: GuidanceParams, kls: list[float]) -> None:
        returned = [choice.token_ids for choice in answer.choices]
        summaries = self.rpc("qtilt_take_records", guidance.trace_id, returned)
        limit = guidance.guided_tokens
        for tokens, kl, summary in zip(returned, kls, summaries, strict=True):
            assert summary["guided_tokens"] == (len(tokens) if limit is None else min(limit, len(tokens)))
            assert summary["kl"] == pytest.approx(kl, abs=1e-4, rel=1e-5)
