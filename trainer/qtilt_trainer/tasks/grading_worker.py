"""The process that grading.py starts and may kill: JSON questions on stdin, JSON answers on stdout, one a line.

{"expected": latex, "given": latex} -> whether they are equal; {"given": latex} -> its canonical text, or null.
"""

import json
import logging
import os
import resource
import signal
import sys
from typing import Any

MEMORY_LIMIT_BYTES = 4 << 30
"""An answer such as 9^{9^{9}} otherwise takes the machine's memory before its time is up."""
GIVE_UP_S = 60
"""Who asked kills a worker long before. This ends it when that process was itself killed: an orphan in the middle of a
computation wouldn't notice that stdin is closed."""


def main() -> None:
    """Answers until stdin closes."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # Whatever a library prints must not look like an answer.
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT_BYTES, MEMORY_LIMIT_BYTES))
    # Both packages warn for every answer they can't read and that nobody limits their time: that is our caller's job.
    logging.disable(logging.ERROR)
    import math_verify  # noqa: F401  # Imported here so that "ready" means ready.

    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        signal.alarm(GIVE_UP_S)  # Without a handler SIGALRM ends the process, in the middle of C code too.
        print(json.dumps(_reply(json.loads(line))), file=answers, flush=True)
        signal.alarm(0)


def _reply(question: dict[str, str]) -> Any:
    try:
        if "expected" in question:
            return _equal(question["expected"], question["given"])
        return _canonical(question["given"])
    except Exception:  # noqa: BLE001  # Process edge: whatever a parser does to a hostile answer, it is a wrong answer.
        return None


def _equal(expected: str, given: str) -> bool:
    from math_verify import verify

    return bool(verify(_parse(expected), _parse(given), timeout_seconds=None))


def _canonical(given: str) -> str | None:
    parsed = _parse(given)
    return str(parsed[0]) if parsed else None


def _parse(latex: str) -> list[Any]:
    from math_verify import LatexExtractionConfig, parse

    boxed = rf"$\boxed{{{latex}}}$"
    return list(parse(boxed, extraction_config=[LatexExtractionConfig()], parsing_timeout=None))


if __name__ == "__main__":
    main()
