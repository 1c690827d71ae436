"""Drive vLLM's engine step by step: requests that arrive when a test says so, and what came back."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.llm_engine import LLMEngine

from qtilt.params import GuidanceParams
from vllm import SamplingParams

_request_numbers = count()


@dataclass
class Ask:
    """One request. arrives, aborted_at: the engine step before which it is. sampling: further sampling parameters."""

    prompt: list[int]
    guidance: GuidanceParams | None = None
    temperature: float = 1.0
    max_tokens: int = 12
    n: int = 1
    arrives: int = 0
    aborted_at: int | None = None
    sampling: dict[str, Any] = field(default_factory=dict)


@dataclass
class Choice:
    """token_ids: what was generated. logprobs: per token, the log-probability of every token of the vocabulary."""

    token_ids: list[int]
    logprobs: list[dict[int, float]]


@dataclass
class Answer:
    ask: Ask
    choices: list[Choice]
    cached_tokens: int
    finish_reason: str
    steps_to_first_token: int


def sampling_params(ask: Ask) -> SamplingParams:
    defaults = {
        "detokenize": False,
        "ignore_eos": True,
        "seed": 1234 + next(_request_numbers),
        "extra_args": {"qtilt": ask.guidance.to_extra_args()} if ask.guidance else None,
    }
    return SamplingParams(
        temperature=ask.temperature,
        max_tokens=ask.max_tokens,
        n=ask.n,
        logprobs=-1,
        # Choices of n > 1 come together only at the end.
        output_kind=RequestOutputKind.CUMULATIVE if ask.n == 1 else RequestOutputKind.FINAL_ONLY,
        **(defaults | ask.sampling),
    )


def drive(
    engine: LLMEngine, asks: Sequence[Ask], before_step: Callable[[int], Sequence[Ask] | None] = lambda step: None
) -> list[Answer]:
    """Answers in the order of the asks, none for those that were aborted.

    ``before_step`` may act between steps and return further asks.
    """
    everything, waiting = list(asks), list(asks)
    running: dict[str, tuple[Ask, int]] = {}
    answers: dict[int, Answer] = {}
    first_token: dict[str, int] = {}
    for step in range(2000):
        later = list(before_step(step) or [])
        everything += later
        waiting += later
        for ask in [ask for ask in waiting if ask.arrives <= step]:
            name = f"request-{next(_request_numbers)}"
            engine.add_request(name, {"prompt_token_ids": ask.prompt}, sampling_params(ask))
            running[name] = (ask, step)
        waiting = [ask for ask in waiting if ask.arrives > step]
        for name in [name for name, (ask, _) in running.items() if ask.aborted_at == step]:
            engine.abort_request([name])
            running.pop(name)
        if not waiting and not running:
            break
        for output in engine.step():
            first_token.setdefault(output.request_id, step)
            if output.finished:
                ask, added_at = running.pop(output.request_id)
                answers[id(ask)] = _answer(ask, output, first_token[output.request_id] - added_at + 1)
    assert not running, "requests are unfinished after 2000 steps"
    engine.step()  # lets the worker know what has finished
    return [answers[id(ask)] for ask in everything if ask.aborted_at is None]


def _answer(ask: Ask, output: Any, steps_to_first_token: int) -> Answer:
    choices = [
        Choice(
            list(completion.token_ids),
            [{token: entry.logprob for token, entry in position.items()} for position in completion.logprobs],
        )
        for completion in sorted(output.outputs, key=lambda completion: completion.index)
    ]
    (reason,) = {completion.finish_reason for completion in output.outputs}
    return Answer(ask, choices, output.num_cached_tokens or 0, reason, steps_to_first_token)
