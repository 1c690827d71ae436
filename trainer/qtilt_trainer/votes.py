"""What completions vote for in maj@k: answers that the task calls the same are one vote, however they are written."""

import logging
from collections.abc import Callable, Hashable, Sequence

from qtilt_trainer.tasks.problem import Problem, Task

logger = logging.getLogger(__name__)


def votes(task: Task, problem: Problem, completions: Sequence[str]) -> list[Hashable | None]:
    """For each completion the answer it votes for, None if it doesn't vote.

    Of answers that `task.same_answer` calls the same (a task may lack it: then only equal ones are) the first one
    stands for all. Each different answer is compared with the different ones before it only.
    """
    answers = [answer_of(task, problem, completion) for completion in completions]
    same = getattr(task, "same_answer", None)
    if same is None:
        return answers
    stands_for: dict[Hashable, Hashable] = {}
    for answer in answers:
        if answer is not None and answer not in stands_for:
            earlier = dict.fromkeys(stands_for.values())
            stands_for[answer] = next((one for one in earlier if _are_same(same, problem, one, answer)), answer)
    return [None if answer is None else stands_for[answer] for answer in answers]


def answer_of(task: Task, problem: Problem, completion: str) -> Hashable | None:
    """`task.answer`; None, with a warning, where it raises or what it gives can't be compared."""
    try:
        answer = task.answer(problem, completion)
        hash(answer)
    except Exception as error:  # noqa: BLE001  # The edge of a user's code.
        logger.warning("task.answer fails on a completion of problem %s, which then has no vote: %r", problem.id, error)
        return None
    return answer


def _are_same(same: Callable[[Problem, Hashable, Hashable], bool], problem: Problem, *answers: Hashable) -> bool:
    try:
        return bool(same(problem, *answers))
    except Exception as error:  # noqa: BLE001  # The edge of a user's code.
        logger.warning("task.same_answer fails on %r, which then are two answers: %r", answers, error)
        return False
