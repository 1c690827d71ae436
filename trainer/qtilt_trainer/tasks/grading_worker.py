"""The process that grading.py starts and may kill: JSON questions on stdin, JSON answers on stdout, one a line.

{"expected": text, "given": text} -> whether the answers are equal.
{"unreadable": [texts]} -> for each null, or why it can't be read as an answer.
Either may say "cpu_s", after how many seconds of computing the process ends itself, in the middle of C code too. Not of
the clock: a reward must not depend on what else the machine does. An orphan ends by it as well.
"""

import importlib
import json
import logging
import os
import resource
import signal
import sys
from collections.abc import Callable
from typing import Any

MEMORY_LIMIT_BYTES = 4 << 30
"""An answer such as 9^{9^{9}} otherwise takes the machine's memory before its time is up."""
DEFAULT_CPU_S = 60.0
"""Limit of a question that brings none."""


def main() -> None:
    """Answers questions about mathematical expressions."""
    serve("qtilt_trainer.tasks.math_equality", _reply)


def serve(module: str, reply: Callable[[Any], Any]) -> None:
    """Answers until stdin closes; `module` is imported before it says that it is ready."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # Whatever a library prints must not look like an answer.
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT_BYTES, MEMORY_LIMIT_BYTES))
    logging.disable(logging.ERROR)  # The parser warns for every answer it can't read: that is our caller's job.
    importlib.import_module(module)
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        question = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, question.pop("cpu_s", DEFAULT_CPU_S))  # SIGPROF without a handler kills.
        print(json.dumps(reply(question)), file=answers, flush=True)
        signal.setitimer(signal.ITIMER_PROF, 0)


def _reply(question: dict[str, Any]) -> Any:
    if "unreadable" in question:
        return [_unreadable(text) for text in question["unreadable"]]
    try:
        return _equal(question["expected"], question["given"])
    except Exception:  # noqa: BLE001  # Process edge: whatever SymPy does to a hostile answer, it is a wrong answer.
        return None


def _equal(expected: str, given: str) -> bool:
    from qtilt_trainer.tasks.answer_kinds import UnreadableError
    from qtilt_trainer.tasks.math_answers import parse_answer
    from qtilt_trainer.tasks.math_equality import same_answer

    try:
        return same_answer(parse_answer(expected), parse_answer(given))
    except UnreadableError:
        return False


def _unreadable(text: str) -> str | None:
    from qtilt_trainer.tasks.answer_kinds import UnreadableError
    from qtilt_trainer.tasks.math_answers import parse_answer

    try:
        parse_answer(text)
    except UnreadableError as error:
        return str(error)
    except Exception as error:  # noqa: BLE001  # Process edge, as above.
        return f"reading it fails ({type(error).__name__})"
    return None


if __name__ == "__main__":
    main()
