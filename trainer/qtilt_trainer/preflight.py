"""What can't work is found before hours of collecting: rewards, prompts that fit, a request as they all will be."""

import logging
from collections.abc import Sequence

from qtilt_trainer.client import Guidance, GuidedClient, Sampling
from qtilt_trainer.grade import RewardFailure, grade
from qtilt_trainer.rewards import Rules, is_above
from qtilt_trainer.server_errors import PromptRefusedError
from qtilt_trainer.tasks.problem import Problem, Task, prompt_text

logger = logging.getLogger(__name__)

TRIED = (0.5, 0.25, 0.75)
"""Which prompts are tried, by their place among all prompts sorted by length."""
MADE_UP = "This answer was made up to see whether it can be graded."


def check_rewards(task: Task, problem: Problem, rules: Rules) -> None:
    """Grades a made-up completion and, where it is a text, the gold answer itself.

    Raises ValueError when either has no reward, or one that `rules` excludes.
    """
    completions = [MADE_UP, *([problem.answer] if isinstance(problem.answer, str) else [])]
    rewards = grade(task, [(problem, text) for text in completions], rules.timeout)
    for completion, reward in zip(completions, rewards, strict=True):
        if isinstance(reward, RewardFailure):
            raise ValueError(
                f"task {task.name} can't grade the completion {completion!r} of problem {problem.id}: "
                f"{reward.message}. A reward must be a number for any text"
            )
    rules.check_representable(rewards)


def check_framing(problems: Sequence[Problem], sampling: Sampling) -> None:
    """Raises ValueError for a prompt that `[sampling]` doesn't go with."""
    for problem in problems:
        try:
            sampling.framing.framed(problem.prompt)
        except ValueError as error:
            raise ValueError(f"problem {problem.id}: {error}") from error


async def check_lengths(
    client: GuidedClient, problems: Sequence[Problem], sampling: Sampling, max_refused_share: float
) -> None:
    """Compares the longest prompts with the server's context: longest first, until one fits.

    Raises ValueError when more than the allowed share doesn't fit with max_tokens after it.
    """
    context = await client.context_length()
    longest_first = sorted(problems, key=lambda problem: len(prompt_text(problem.prompt)), reverse=True)
    too_long: list[str] = []
    for problem in longest_first:
        if await _fits(client, problem, sampling, context):
            break
        too_long.append(problem.id)
        if is_above(len(too_long), len(problems), max_refused_share) or len(too_long) == len(problems):
            raise ValueError(
                f"{len(too_long)} or more of {len(problems)} prompts leave no room for sampling.max_tokens = "
                f"{sampling.max_tokens} in the server's context of {context} tokens, the longest is {too_long[0]}: "
                "lower max_tokens, drop the prompts, or start the server with a larger --max-model-len"
            )
    if too_long:
        logger.warning(
            "%d prompts leave no room for %d tokens in the context of %d, and will be left out: %s",
            len(too_long),
            sampling.max_tokens,
            context,
            ", ".join(too_long[:10]),
        )


async def check_request(
    client: GuidedClient, problems: Sequence[Problem], sampling: Sampling, guidance: Guidance | None
) -> None:
    """Asks for one completion of a prompt of middling length, then of others if it is refused.

    Raises ServerError, and ValueError when all of them are refused: then it isn't the prompts.
    """
    by_length = sorted(problems, key=lambda problem: len(prompt_text(problem.prompt)))
    tried = [by_length[int(share * (len(by_length) - 1))] for share in TRIED]
    for problem in tried:
        try:
            await client.complete(problem.prompt, 1, 0, sampling, guidance)
            return
        except PromptRefusedError as refusal:
            refused = refusal
            logger.warning("trial request: prompt %s is refused: %s", problem.id, refusal)
    raise ValueError(f"the server refuses every prompt that was tried ({len(tried)}): {refused}") from refused


async def _fits(client: GuidedClient, problem: Problem, sampling: Sampling, context: int) -> bool:
    try:
        return await client.prompt_length(problem.prompt, sampling.framing) + sampling.max_tokens <= context
    except PromptRefusedError:
        return False
