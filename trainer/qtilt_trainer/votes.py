"""What completions vote for in maj@k: answers that the task calls the same are one vote, however they are written."""

from collections.abc import Hashable, Sequence

from qtilt_trainer.tasks.problem import Problem, Task


def votes(task: Task, problem: Problem, completions: Sequence[str]) -> list[Hashable | None]:
    """For each completion the answer it votes for, None if it doesn't vote.

    Of answers that `task.same_answer` calls the same (a task may lack it: then only equal ones are) the first one
    stands for all. Each different answer is compared with the different ones before it only.
    """
    answers = [task.answer(problem, completion) for completion in completions]
    same = getattr(task, "same_answer", None)
    if same is None:
        return answers
    stands_for: dict[Hashable, Hashable] = {}
    for answer in answers:
        if answer is not None and answer not in stands_for:
            earlier = dict.fromkeys(stands_for.values())
            stands_for[answer] = next((one for one in earlier if same(problem, one, answer)), answer)
    return [None if answer is None else stands_for[answer] for answer in answers]
