"""Requests that an engine without the plugin answers first: where guidance tilts nothing, answers are the same bits."""

from collections.abc import Callable, Sequence

from vllm.v1.engine.llm_engine import LLMEngine

from guided_vllm.driving import Answer, Ask, drive
from guided_vllm.tiny_models import TOKENS, prompt
from qtilt.params import GuidanceParams

Guide = Callable[[int], GuidanceParams | None]
ALLOWED = {
    # Columns of logits that no token of the tokenizer has aren't scored, so a value above the lowest tilts them.
    "the tokenizer's tokens": {"allowed_token_ids": list(range(TOKENS))},
    "any token": {},
}


def requests(allowed: str, guide: Guide = lambda index: None) -> list[Ask]:
    """Six that come one after the other. guide: the guidance of each.

    The one whose prompt comes in chunks is greedy: without the plugin, a seed would end vLLM's engine there on a CPU
    (see qtilt.vllm_plugin.v1.seeded_prefill).
    """
    sampling = [{}, {}, {"presence_penalty": 0.5}, {"top_k": 30}, {"top_p": 0.9}, {}]
    temperatures, lengths, choices = (1.0, 0.0, 0.0, 1.3, 0.7, 1.0), (7, 50, 9, 11, 13, 12), (1, 1, 1, 1, 1, 2)
    return [
        Ask(
            prompt(lengths[index], seed=600 + index),
            guide(index),
            temperatures[index],
            max_tokens=8,
            n=choices[index],
            arrives=index,
            sampling={"seed": 600 + 10 * index} | ALLOWED[allowed] | sampling[index],
        )
        for index in range(6)
    ]


def drive_uncached(engine: LLMEngine, asks: Sequence[Ask]) -> list[Answer]:
    """With no prompt in vLLM's prefix cache: batched alike each time. On GPUs, what a row's bits are depends on it."""
    assert engine.reset_prefix_cache()
    return drive(engine, asks)


def answers(engine: LLMEngine) -> dict[str, list[Answer]]:
    return {allowed: drive_uncached(engine, requests(allowed)) for allowed in ALLOWED}


def assert_same_bits(answer: Answer, plain: Answer) -> None:
    assert answer.choices == plain.choices  # token ids, and logprobs as floats
