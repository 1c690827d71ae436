"""The engine under test together with what the oracle needs to know of it."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import torch
from vllm.v1.engine.llm_engine import LLMEngine

from guided_vllm.driving import Answer, Choice
from guided_vllm.oracle import Adjust, Guided, Measured, Step, expected_steps, log_softmax
from guided_vllm.tiny_models import TOKENS
from guided_vllm.truncation import truncate_as_reported
from qtilt.params import GuidanceParams
from qtilt.vllm_plugin.answers import raise_errors


@dataclass
class Served:
    """The running engine and what the oracle needs to know of it. directories: of every version ever loaded.

    plain: what the same engine without the plugin answered to plain_vllm.requests, by name.
    penalties_first: whether penalties act on the reference's logits, as on V2, or on guided ones, as on V1.
    """

    engine: LLMEngine
    reference: Path
    directories: dict[tuple[str, int], Path]
    plain: dict[str, list[Answer]]
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
        """The answer of the worker that guides. Raises ValueError with its error."""
        answer, *others = raise_errors(self.engine.collective_rpc(method, args=args))
        assert method == "qtilt_describe" or others == [None] * len(others)
        return answer

    @contextmanager
    def also(self, value_model: str, version: int, directory: Path) -> Iterator[None]:
        """Another version is resident inside the block."""
        self.rpc("qtilt_prepare_value_model", value_model, version, str(directory))
        assert await_preparation(self, value_model, version)["state"] == "ready"
        self.rpc("qtilt_commit_value_model", value_model, version)
        self.directories[value_model, version] = directory
        try:
            yield
        finally:
            self.rpc("qtilt_discard_value_model", value_model, version)

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
        penalise: Adjust | None = None,
    ) -> None:
        """Every reported probability, and what is on record of guidance, equal the oracle's.

        adjust: what happens to raw logits before guidance on either model runner. penalise: what penalties do.
        """
        ask, guidance = answer.ask, answer.ask.guidance
        measured: list[Measured] = []
        for choice in answer.choices:
            reported = [_vector(logprobs) for logprobs in choice.logprobs]
            steps = self.expected(answer, choice, self._adjustment(adjust, penalise))
            for count, (token, step, reported_V) in enumerate(zip(choice.token_ids, steps, reported, strict=True)):
                expected_V = step.log_probs_V
                if penalise is not None and not self.penalties_first:
                    penalised_V = penalise(step.guided_logits_V.clone(), choice.token_ids[:count])
                    expected_V = log_softmax(penalised_V / (ask.temperature or 1.0))
                if ask.temperature > 0:
                    expected_V = truncate_as_reported(expected_V, reported_V, ask.sampling)
                self._check_step(token, reported_V, expected_V, greedy=ask.temperature == 0)
            measured.append(Measured.of(steps))
        if guidance is not None:
            if guidance.details:
                self._check_details(answer, guidance)
            self._check_records(answer, guidance, measured)

    def expected(self, answer: Answer, choice: Choice, adjust: Adjust | None = None) -> list[Step]:
        """What the steps that drew these tokens should have been. adjust: what happens to logits before guidance."""
        ask = answer.ask
        return expected_steps(
            self.reference,
            ask.prompt,
            choice.token_ids,
            self.for_oracle(ask.guidance),
            ask.temperature,
            self.scorable,
            adjust,
            [_vector(logprobs) for logprobs in choice.logprobs],
        )

    def _adjustment(self, adjust: Adjust | None, penalise: Adjust | None) -> Adjust | None:
        """What happens to the reference's logits before guidance."""
        assert adjust is None or penalise is None, "their order differs between the model runners"
        return penalise if penalise is not None and self.penalties_first else adjust

    def for_oracle(self, guidance: GuidanceParams | None) -> Guided | None:
        if guidance is None:
            return None
        directory = self.directories[guidance.value_model, guidance.version]
        return Guided(
            directory,
            guidance.eta,
            guidance.top_k,
            guidance.method,
            guidance.guided_tokens,
            guidance.candidate_mass,
            guidance.tail,
            guidance.kl_budget,
        )

    def _check_step(self, token: int, reported_V: torch.Tensor, expected_V: torch.Tensor, greedy: bool) -> None:
        assert torch.equal(reported_V.isfinite(), expected_V.isfinite()), "something else is masked"
        # float32 logits are rounded, which 1/η multiplies: up to 2e-5 has been seen.
        torch.testing.assert_close(reported_V.exp(), expected_V.exp(), rtol=0, atol=5e-5)
        # Of all but hopeless tokens also the logarithm, to 1e-4 and what float32 rounds off large logits.
        compared = expected_V > -20
        assert compared[token]
        torch.testing.assert_close(reported_V[compared], expected_V[compared], rtol=2e-5, atol=1e-4)
        if greedy:
            assert float(expected_V[token]) > float(expected_V.max()) - 1e-4

    def _check_details(self, answer: Answer, guidance: GuidanceParams) -> None:
        """Each token's probabilities and its step's KL."""
        for choice in answer.choices:
            unguided = replace(answer.ask, guidance=None)
            plain = self.expected(replace(answer, ask=unguided), choice)
            details = self.rpc("qtilt_details", guidance.trace_id, 0, choice.token_ids)
            for count, each in enumerate(
                zip(choice.token_ids, details, plain, self.expected(answer, choice), strict=True)
            ):
                token, told, before, after = each
                assert (told is not None) == guidance.guides(count)
                if told is not None:
                    assert told["token_id"] == token
                    assert told["reference_logprob"] == pytest.approx(float(before.log_probs_V[token]), abs=1e-4)
                    assert told["guided_logprob"] == pytest.approx(float(after.log_probs_V[token]), abs=1e-4)
                    assert told["kl"] == pytest.approx(after.kl, abs=1e-4, rel=1e-5)
                    assert len(told["candidates"]["token_ids"]) == min(guidance.top_k, self.scorable)

    def _check_records(self, answer: Answer, guidance: GuidanceParams, measured: list[Measured]) -> None:
        """measured: of each choice."""
        returned = [choice.token_ids for choice in answer.choices]
        summaries = self.rpc("qtilt_take_records", guidance.trace_id, returned)
        limit = guidance.guided_tokens
        for tokens, expected, summary in zip(returned, measured, summaries, strict=True):
            assert summary["guided_tokens"] == (len(tokens) if limit is None else min(limit, len(tokens)))
            assert summary["kl"] == pytest.approx(expected.kl, abs=1e-4, rel=1e-5)
            assert guidance.kl_budget is None or summary["kl"] <= guidance.kl_budget
            assert summary["kl_candidates"] == pytest.approx(expected.kl_candidates, abs=1e-4, rel=1e-5)
            assert (summary["mass"] or 0.0) == pytest.approx(expected.mass, abs=1e-5)
            assert (summary["mass"] is None) == (summary["guided_tokens"] == 0)
            assert summary["candidates"] == pytest.approx(expected.candidates)


def _vector(logprobs: dict[int, float]) -> torch.Tensor:
    return torch.tensor([logprobs[token] for token in range(len(logprobs))], dtype=torch.float64)


def await_preparation(served: Served, name: str, version: int) -> dict[str, str | None]:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        status: dict[str, str | None] = served.rpc("qtilt_prepare_status", name, version)
        if status["state"] != "loading":
            return status
        time.sleep(0.02)
    raise TimeoutError(f"{name}@{version} is still loading")
