"""The engine under test together with what the oracle needs to know of it."""

import time
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

Adjust = Callable[[torch.Tensor], torch.Tensor]
Penalise = Callable[[torch.Tensor, list[int]], torch.Tensor]


@dataclass
class Served:
    """The running engine and what the oracle needs to know of it. directories: of every version ever loaded.

    penalties_first: whether penalties act on the reference's logits, as on V2, or on guided ones, as on V1.
    """

    engine: LLMEngine
    reference: Path
    directories: dict[tuple[str, int], Path]
    max_seqs: int = 8
    penalties_first: bool = False
    kv_fraction: float = 1.0
    scorable: int = TOKENS

    @property
    def speculates(self) -> bool:
        """Whether vLLM drafts tokens. It then refuses ``min_p`` and ``logit_bias``."""
        return self.engine.vllm_config.speculative_config is not None

    def dropped(self) -> int:
        """How many histories value caches have dropped to make room."""
        return sum(version["dropped"] for version in self.rpc("qtilt_describe")["value_models"])

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
        adjust: Adjust | None = None,
        penalise: Penalise | None = None,
    ) -> None:
        """Every reported probability, and the KL and the scored candidates on record, equal the oracle's.

        adjust: what happens to raw logits before guidance. penalise: what penalties do to logits, given the tokens
        generated before.
        """
        ask, guidance = answer.ask, answer.ask.guidance
        measured = []
        for choice in answer.choices:
            steps = expected_steps(
                self.reference,
                ask.prompt,
                choice.token_ids,
                self.for_oracle(guidance),
                ask.temperature,
                self.scorable,
                self._adjustment(adjust, penalise),
            )
            for count, (token, (expected_V, _, _)) in enumerate(zip(choice.token_ids, steps, strict=True)):
                if penalise is not None and not self.penalties_first:
                    scale = ask.temperature or 1.0
                    expected_V = log_softmax(penalise(expected_V * scale, choice.token_ids[:count]) / scale)
                self._check_step(token, choice.logprobs[count], expected_V, greedy=ask.temperature == 0)
            guided = [step.candidates for step in steps if step.candidates]
            measured.append((sum(step.kl for step in steps), sum(guided) / len(guided) if guided else 0.0))
        if guidance is not None:
            self._check_records(answer, guidance, measured)

    def _adjustment(self, adjust: Adjust | None, penalise: Penalise | None) -> Penalise | None:
        """What happens to the reference's logits before guidance."""
        if adjust is not None:
            return lambda logits_V, generated: adjust(logits_V)
        return penalise if self.penalties_first else None

    def for_oracle(self, guidance: GuidanceParams | None) -> Guided | None:
        if guidance is None:
            return None
        directory = self.directories[guidance.value_model, guidance.version]
        tolerance = 0.0 if self.speculates else guidance.tolerance
        return Guided(directory, guidance.eta, guidance.top_k, guidance.method, guidance.guided_tokens, tolerance)

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

    def _check_records(self, answer: Answer, guidance: GuidanceParams, measured: list[tuple[float, float]]) -> None:
        """measured: summed KL and mean candidates of each choice."""
        returned = [choice.token_ids for choice in answer.choices]
        summaries = self.rpc("qtilt_take_records", guidance.trace_id, returned)
        limit = guidance.guided_tokens
        for tokens, (kl, candidates), summary in zip(returned, measured, summaries, strict=True):
            assert summary["guided_tokens"] == (len(tokens) if limit is None else min(limit, len(tokens)))
            assert summary["kl"] == pytest.approx(kl, abs=1e-4, rel=1e-5)
            assert summary["candidates"] == pytest.approx(candidates)


def await_preparation(served: Served, name: str, version: int) -> dict[str, str | None]:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        status: dict[str, str | None] = served.rpc("qtilt_prepare_status", name, version)
        if status["state"] != "loading":
            return status
        time.sleep(0.02)
    raise TimeoutError(f"{name}@{version} is still loading")
