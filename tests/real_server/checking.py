"""Compares what the server reports for a choice with the independent oracle."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from guided_vllm.oracle import Guided, Measured, expected_steps
from real_server.models import TOKENS, VOCAB, make_tokenizer

LOGPROB_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Returned:
    """One choice as a client sees it; logprobs: of the returned tokens, as sampled from."""

    prompt: list[int]
    token_ids: list[int]
    logprobs: list[float]
    guidance: Mapping[str, Any] | None


@dataclass(frozen=True)
class Oracle:
    """directories: of every version ever served, by its NAME@VERSION."""

    reference: Path
    directories: dict[str, Path]

    def check(
        self,
        choice: Returned,
        applied: Mapping[str, Any] | None,
        *,
        guided_tokens: int | None = None,
        temperature: float = 1.0,
    ) -> None:
        """Every token's probability, and what is said of guidance, are those of what the answer says was applied."""
        differences, expected = self.compare(choice, applied, guided_tokens=guided_tokens, temperature=temperature)
        assert max(differences, default=0.0) < LOGPROB_TOLERANCE
        if applied is None:
            assert choice.guidance is None
            return
        assert choice.guidance is not None
        returned = len(choice.token_ids)
        assert choice.guidance["guided_tokens"] == (returned if guided_tokens is None else min(guided_tokens, returned))
        assert choice.guidance["kl"] == pytest.approx(expected.kl, abs=1e-4, rel=1e-5)
        assert choice.guidance["kl_candidates"] == pytest.approx(expected.kl_candidates, abs=1e-4, rel=1e-5)
        assert (choice.guidance["mass"] or 0.0) == pytest.approx(expected.mass, abs=1e-5)
        assert (choice.guidance["mass"] is None) == (choice.guidance["guided_tokens"] == 0)
        assert choice.guidance["candidates"] == pytest.approx(expected.candidates)

    def compare(
        self,
        choice: Returned,
        applied: Mapping[str, Any] | None,
        *,
        guided_tokens: int | None = None,
        temperature: float = 1.0,
    ) -> tuple[list[float], Measured]:
        """By how much each token's log-probability differs from the expected one, and what is to be on record."""
        guided = None if applied is None else self._guided(applied, guided_tokens)
        steps = expected_steps(
            self.reference,
            choice.prompt,
            choice.token_ids,
            guided,
            temperature,
            TOKENS,
            reported=[_known(*each) for each in zip(choice.token_ids, choice.logprobs, strict=True)],
        )
        differences = [
            abs(reported - float(step.log_probs_V[token]))
            for token, reported, step in zip(choice.token_ids, choice.logprobs, steps, strict=True)
        ]
        return differences, Measured.of(steps)

    def _guided(self, applied: Mapping[str, Any], guided_tokens: int | None) -> Guided:
        directory = self.directories[applied["value_model"]]
        return Guided(
            directory,
            applied["eta"],
            applied["top_k"],
            applied["method"],
            guided_tokens,
            applied["candidate_mass"],
            applied["tail"],
            applied["kl_budget"],
        )


def _known(token: int, logprob: float) -> torch.Tensor:
    """Log-probabilities ``[V]`` of which one is known."""
    known_V = torch.full((VOCAB,), torch.nan, dtype=torch.float64)
    known_V[token] = logprob
    return known_V


def encode(text: str) -> list[int]:
    return list(make_tokenizer()(text)["input_ids"])


def completion_choices(response: Any, prompts: Sequence[str], n: int = 1) -> list[Returned]:
    """The choices of a completion that was asked for token ids and logprobs."""
    return [
        Returned(
            encode(prompts[choice.index // n]),
            choice.token_ids,
            choice.logprobs.token_logprobs,
            getattr(choice, "guidance", None),
        )
        for choice in response.choices
    ]
