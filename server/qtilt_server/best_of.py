"""``best_of``: of so many samples of a prompt the ones that the value model holds best, the best first."""

from typing import Any

from qtilt_server.scoring import Scorer
from qtilt_server.session import GuidedSession


async def keep_best(response: dict[str, Any], session: GuidedSession, scorer: Scorer, kept: int) -> dict[str, Any]:
    """A whole response with ``kept`` choices of each prompt, by their final value: E[Z] after the last token that is
    scored. Equal ones stay in their order. ``usage`` counts what was sampled.

    Raises UnavailableError when the worker can't score them.
    """
    choices, best = response["choices"], list[dict[str, Any]]()
    for prompt_ids, answers in session.sampled():
        scored = await scorer.score(session.version, prompt_ids, answers)
        finals = [next((each for each in reversed(one["values"]) if each is not None), None) for one in scored]
        first = len(best) // kept * len(answers)
        ranked = sorted(range(len(answers)), key=lambda child: -_or_worst(finals[child]))
        for child in ranked[:kept]:
            choice = choices[first + child]
            choice["guidance"]["value"] = finals[child]
            best.append({**choice, "index": len(best)})
    return {**response, "choices": best}


def _or_worst(value: float | None) -> float:
    return float("-inf") if value is None else value
