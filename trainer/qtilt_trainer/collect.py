"""Collecting roll-outs: Algorithm 1 of the paper, in the form in which one request rolls in and out.

Iteration 1 asks the reference alone (g = 0), all samples of a prompt in one request. Later iterations draw for every
sample a switch point g uniformly below the length of an earlier response to the same prompt; the server guides the
first g tokens and leaves the rest to the reference.

Departures. The official code first generates a guided response to find out how long it is, and rolls in at least one
token; we take the length from an earlier iteration, which saves that response, and g may be 0. A prompt without an
earlier response (a later iteration with more prompts) has g = 0.
"""

import logging
import random
from collections import defaultdict
from collections.abc import Mapping, Sequence

import pyarrow.compute as pc

from qtilt_trainer.client import Guidance, Sampling
from qtilt_trainer.config import CollectConfig, SamplingConfig
from qtilt_trainer.plan import PlannedRequest, consecutive, seed_of
from qtilt_trainer.prompts import Framing
from qtilt_trainer.refused import RefusedPrompts
from qtilt_trainer.rollouts import RolloutStore, rollout_id
from qtilt_trainer.tasks.problem import Problem, Task

logger = logging.getLogger(__name__)

Missing = list[tuple[Problem, tuple[int, ...]]]
"""Prompts with the numbers of the samples that are not stored."""


def missing_samples(task: Task, iteration: int, store: RolloutStore, config: CollectConfig) -> Missing:
    """What the store lacks of `iteration`; prompts that the server refused are not missed."""
    stored, refused = store.ids(), RefusedPrompts(store.directory).ids()
    candidates = [
        (problem, _missing(iteration, problem.id, config.samples_per_prompt, stored))
        for problem in task.problems("train", config.prompts)
        if problem.id not in refused
    ]
    return [(problem, samples) for problem, samples in candidates if samples]


def plan_requests(
    missing: Missing,
    iteration: int,
    store: RolloutStore,
    config: CollectConfig,
    sampling: SamplingConfig,
    value_model: str | None,
) -> list[PlannedRequest]:
    """The requests that make the missing roll-outs of `iteration`.

    value_model: NAME@VERSION that rolls in from iteration 2 on; None in iteration 1.
    A roll-out has the same seed and switch point whenever and in whatever portions it is made. (Its tokens are the same
    as far as the server's arithmetic doesn't depend on what else is in the batch.)
    """
    if (iteration == 1) != (value_model is None):
        raise ValueError(f"only the first iteration has no value model, got {value_model} for iteration {iteration}")
    if value_model is None:
        return [
            _unguided(iteration, problem, neighbours, config, sampling)
            for problem, samples in missing
            for neighbours in consecutive(samples)
        ]
    lengths = earlier_lengths(store, iteration)
    _log_unknown([problem for problem, _ in missing], lengths)
    return [
        _rolled_in(iteration, problem, sample, config, sampling, lengths, value_model)
        for problem, samples in missing
        for sample in samples
    ]


def earlier_lengths(store: RolloutStore, iteration: int) -> dict[str, list[int]]:
    """Prompt id -> lengths of its responses before `iteration` in tokens, end token included, in a fixed order."""
    lengths = defaultdict(list)
    for number in range(1, iteration):
        table = store.table(number, ["rollout_id", "prompt_id", "token_ids"]).sort_by("rollout_id")
        counts = pc.list_value_length(table.column("token_ids")).to_pylist()
        for prompt_id, count in zip(table.column("prompt_id").to_pylist(), counts, strict=True):
            lengths[prompt_id].append(count)
    return dict(lengths)


def switch_point(seed: int, what: str, lengths: Sequence[int]) -> int:
    """g uniform on 0 … L - 1, L being the length of one of the earlier responses drawn uniformly; 0 without any."""
    if not lengths:
        return 0
    rng = random.Random(f"{seed}/switch/{what}")
    return rng.randrange(rng.choice(lengths))


def _missing(iteration: int, prompt_id: str, samples: int, stored: set[str]) -> tuple[int, ...]:
    return tuple(sample for sample in range(samples) if rollout_id(iteration, prompt_id, sample) not in stored)


def _unguided(
    iteration: int, problem: Problem, samples: tuple[int, ...], config: CollectConfig, sampling: SamplingConfig
) -> PlannedRequest:
    seed = seed_of(config.seed, rollout_id(iteration, problem.id, 0)) + samples[0]
    return PlannedRequest(iteration, "train", problem, samples, seed, sampling_of(sampling), None)


def _rolled_in(
    iteration: int,
    problem: Problem,
    sample: int,
    config: CollectConfig,
    sampling: SamplingConfig,
    lengths: Mapping[str, Sequence[int]],
    value_model: str,
) -> PlannedRequest:
    what = rollout_id(iteration, problem.id, sample)
    g = switch_point(config.seed, what, lengths.get(problem.id, ()))
    guidance = (
        Guidance(value_model, config.eta, config.guidance_top_k, config.method, g, config.tail) if g > 0 else None
    )
    seed = seed_of(config.seed, what)
    return PlannedRequest(iteration, "train", problem, (sample,), seed, sampling_of(sampling), guidance)


def sampling_of(config: SamplingConfig) -> Sampling:
    """The configured sampling, for one request."""
    return Sampling(
        config.temperature,
        config.top_p,
        config.top_k,
        config.max_tokens,
        config.min_tokens,
        config.stop,
        config.stop_token_ids,
        Framing(config.system, _messages(config.few_shot), config.prefill, config.chat_template_kwargs),
    )


def _messages(examples: Sequence[dict[str, str]]) -> tuple[dict[str, str], ...]:
    messages: list[dict[str, str]] = []
    for example in examples:
        pair = [{"role": role, "content": example[role]} for role in ("user", "assistant") if role in example]
        messages += pair or [example]
    return tuple(messages)


def _log_unknown(problems: Sequence[Problem], lengths: Mapping[str, Sequence[int]]) -> None:
    unknown = sum(problem.id not in lengths for problem in problems)
    if unknown:
        logger.warning("%d of %d prompts have no earlier response: they are not rolled in", unknown, len(problems))
