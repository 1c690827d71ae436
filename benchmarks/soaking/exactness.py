"""Compares an answer with plain Hugging Face forwards, in a process of its own that does nothing else.

Its tolerances are those of tests/guided_vllm/served.py; the forwards are those of tests/guided_vllm/oracle.py.
"""

import math
import multiprocessing
import signal
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.utils.logging import disable_progress_bar

from guided_vllm.oracle import Guided, expected_steps
from real_server.models import TOKENS, VOCAB

PROBABILITY_TOLERANCE = 5e-5
LOGPROB_TOLERANCE, LOGPROB_RELATIVE = 1e-4, 2e-5
KL_TOLERANCE, KL_RELATIVE = 1e-4, 1e-5
CANDIDATES_RELATIVE = 1e-6
HOPELESS = -20.0
"""Below this log-probability only the probability is compared."""


@dataclass(frozen=True)
class Sample:
    """One choice. directory: of the value model's version that the answer names, None without guidance.

    logprobs: of the generated tokens; all_logprobs: per generated token those of all tokens; either may be empty.
    applied: ``guidance`` of the answer. kl, candidates: as reported.
    """

    reference: Path
    directory: Path | None
    applied: dict[str, Any] | None
    guided_tokens: int | None
    temperature: float
    prompt: list[int]
    token_ids: list[int]
    logprobs: list[float]
    all_logprobs: list[dict[int, float]]
    kl: float | None
    candidates: float | None


@dataclass(frozen=True)
class Difference:
    """The largest differences, and what is beyond the tolerance. tokens: whose log-probabilities were compared."""

    logprob: float
    kl: float
    tokens: int
    complaints: tuple[str, ...]


def make_checker() -> ProcessPoolExecutor:
    """One process; submit :func:`compare` to it."""
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=_start_checker)


def _start_checker() -> None:
    """Interrupts are for the parent, which ends this process; the parent's handlers aren't inherited."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    disable_progress_bar()


def compare(sample: Sample) -> Difference:
    """Raises nothing: what is wrong is in the difference's complaints."""
    guided = None
    if sample.directory is not None and sample.applied is not None:
        applied = sample.applied
        guided = Guided(
            sample.directory,
            applied["eta"],
            applied["top_k"],
            applied["method"],
            sample.guided_tokens,
            applied["candidate_mass"],
            applied["tail"],
        )
    steps = expected_steps(
        sample.reference,
        sample.prompt,
        sample.token_ids,
        guided,
        sample.temperature,
        TOKENS,
        reported=_reported(sample),
    )
    complaints: list[str] = []
    largest = 0.0
    for count, step in enumerate(steps):
        expected = dict(enumerate(step.log_probs_V.tolist()))
        token = sample.token_ids[count]
        reported = {token: sample.logprobs[count]} if sample.logprobs else {}
        if sample.all_logprobs:
            reported = sample.all_logprobs[count]
            if reported.keys() != expected.keys():
                complaints.append(f"token {count}: log-probabilities of {len(reported)} tokens, not {len(expected)}")
                continue
        difference, complaint = _compare_step(reported, expected)
        largest = max(largest, difference)
        if complaint:
            complaints.append(f"token {count} (id {token}): {complaint}")
        if sample.temperature == 0 and expected[token] < max(expected.values()) - LOGPROB_TOLERANCE:
            complaints.append(f"token {count} (id {token}) isn't the likeliest")
    expected_kl = sum(step.kl for step in steps)
    kl_difference = 0.0 if sample.kl is None else abs(sample.kl - expected_kl)
    if not kl_difference <= KL_TOLERANCE + KL_RELATIVE * expected_kl:
        complaints.append(f"the KL is {sample.kl}, expected {expected_kl}")
    scored = [step.candidates for step in steps if step.candidates]
    expected_mean = sum(scored) / len(scored) if scored else 0.0
    if sample.candidates is not None and not math.isclose(
        sample.candidates, expected_mean, rel_tol=CANDIDATES_RELATIVE
    ):
        complaints.append(f"{sample.candidates} candidates in the mean, expected {expected_mean}")
    return Difference(largest, kl_difference, len(steps) if sample.logprobs else 0, tuple(complaints))


def _reported(sample: Sample) -> list[Tensor] | None:
    """Per generated token the log-probabilities ``[V]`` that came, NaN for those that didn't; None without any."""
    if sample.all_logprobs:
        known = sample.all_logprobs
    elif sample.logprobs:
        known = [{token: logprob} for token, logprob in zip(sample.token_ids, sample.logprobs, strict=True)]
    else:
        return None
    return [torch.tensor([each.get(token, math.nan) for token in range(VOCAB)], dtype=torch.float64) for each in known]


def _compare_step(reported: dict[int, float], expected: dict[int, float]) -> tuple[float, str | None]:
    """The largest difference of log-probabilities that aren't hopeless, and what is beyond the tolerance."""
    largest, complaint = 0.0, None
    for token, logprob in reported.items():
        wanted = expected[token]
        if not abs(math.exp(logprob) - math.exp(wanted)) <= PROBABILITY_TOLERANCE:
            complaint = f"token {token} has probability {math.exp(logprob)}, expected {math.exp(wanted)}"
        if wanted > HOPELESS:
            difference = abs(logprob - wanted)
            largest = max(largest, difference)
            if not difference <= LOGPROB_TOLERANCE + LOGPROB_RELATIVE * abs(wanted):
                complaint = f"token {token} has log-probability {logprob}, expected {wanted}"
    return largest, complaint
