"""How an error in a worker reaches who called: as an answer. Imports neither torch nor vLLM.

With several workers vLLM 0.32 (``MultiprocExecutor.collective_rpc``) reads their answers one after the other and stops
at the first that has raised. What the others have answered stays in their queues, and is taken for their answers to the
calls that follow. No upstream issue was found for it. So no call may raise in one of several workers.
"""

import logging
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

logger = logging.getLogger("vllm.qtilt.answers")  # vLLM configures the loggers below its own name only

ERROR = "qtilt_error"
P = ParamSpec("P")
Worker = TypeVar("Worker")


def answers_errors(method: Callable[Concatenate[Worker, P], Any]) -> Callable[Concatenate[Worker, P], Any]:
    """Make a worker's method answer ``{ERROR: message}`` where it would raise; see :func:`raise_errors`."""

    @wraps(method)
    def answer(self: Worker, /, *args: P.args, **kwargs: P.kwargs) -> Any:
        try:
            return method(self, *args, **kwargs)
        except ValueError as error:
            return {ERROR: str(error)}
        except Exception as error:
            logger.exception("%s failed", method.__name__)
            return {ERROR: f"{type(error).__name__}: {error}"}

    return answer


def raise_errors(answers: Sequence[Any]) -> list[Any]:
    """The workers' answers. Raises ValueError with the message of the first that is an error."""
    for answer in answers:
        if isinstance(answer, dict) and ERROR in answer:
            raise ValueError(answer[ERROR])
    return list(answers)
