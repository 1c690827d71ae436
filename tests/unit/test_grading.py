"""Boxed answers are judged by math-verify in processes that may hang, die or take all memory."""

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from qtilt_trainer.tasks.grading import GradingPool, canonical_expression, last_boxed, matches_expression

HANGS = r"10^{10^{10^{10}}}!"
"""SymPy tries to compute it."""


@pytest.fixture(scope="module")
def pool() -> Iterator[GradingPool]:
    pool = GradingPool(workers=2, timeout=5.0)
    yield pool
    pool.close()


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"so \boxed{74}", "74"),
        (r"\boxed{1} no, \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{7} then \boxed{8", "7"),
        (r"\boxed{", None),
        ("74", None),
        (r"\boxed{}", ""),
    ],
)
def test_the_last_complete_box_counts(text: str, content: str | None) -> None:
    assert last_boxed(text) == content


@pytest.mark.parametrize(
    ("expected", "given", "equal"),
    [
        ("74", "74", True),
        ("74", "74.0", True),
        ("74", "75", False),
        (r"\frac{1}{2}", "0.5", True),
        (r"\frac{1}{2}", r"\dfrac12", True),
        ("x+1", "1+x", True),
        ("x+1", "x+2", False),
        (r"\{1,2\}", r"\{2,1\}", True),
        ("74", "", False),
        ("74", r"\frac{", False),
        ("74", "hello", False),
    ],
)
def test_expressions_are_compared_mathematically(expected: str, given: str, equal: bool) -> None:
    assert matches_expression(expected, rf"the answer is \boxed{{{given}}}") is equal


def test_equal_expressions_vote_together() -> None:
    assert canonical_expression(r"\boxed{\frac{1}{2}}") == canonical_expression(r"\boxed{\dfrac{1}{2}}")
    assert canonical_expression("none") is None


def test_a_hanging_comparison_is_killed_and_the_next_one_is_right() -> None:
    pool = GradingPool(workers=1, timeout=1.0)
    try:
        assert pool.ask({"expected": "74", "given": "74.0"}) is True
        assert pool.ask({"expected": "74", "given": HANGS}) is None
        assert pool.killed == 1
        assert pool.ask({"expected": "75", "given": "75.0"}) is True
    finally:
        pool.close()


def test_a_worker_killed_by_somebody_else_is_replaced() -> None:
    pool = GradingPool(workers=1, timeout=5.0)
    try:
        assert pool.ask({"expected": "1", "given": "1.0"}) is True
        process = pool._idle.get()
        assert process is not None
        process._process.kill()
        process._process.wait()
        pool._idle.put(process)
        assert pool.ask({"expected": "1", "given": "1.0"}) is None
        assert pool.killed == 1
        assert pool.ask({"expected": "1", "given": "1.0"}) is True
    finally:
        pool.close()


def test_threads_that_grade_at_once_get_their_own_answers(pool: GradingPool) -> None:
    answers: dict[int, object] = {}

    def grade(n: int) -> None:
        answers[n] = pool.ask({"expected": str(n % 7), "given": f"{n}.0 - {n - n % 7}"})

    threads = [threading.Thread(target=grade, args=(n,)) for n in range(1, 30)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == dict.fromkeys(range(1, 30), True)


def test_a_worker_whose_parent_was_killed_does_not_compute_for_ever() -> None:
    program = "import qtilt_trainer.tasks.grading_worker as worker; worker.GIVE_UP_S = 1; worker.main()"
    worker = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert worker.stdin is not None
    worker.stdin.write(json.dumps({"expected": "74", "given": HANGS}).encode() + b"\n")
    worker.stdin.close()
    assert worker.wait(60) == -signal.SIGALRM
    assert worker.stdout is not None
    worker.stdout.close()


def test_a_pool_checks_its_settings() -> None:
    with pytest.raises(ValueError, match="workers must be >= 1"):
        GradingPool(workers=0)
