"""What a soak found: counts of what happened, and problems, of which there should be none."""

import json
import statistics
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from soaking.exactness import Difference

TOO_MANY = 50
"""So many problems end the load early: the server is probably dead."""


@dataclass
class Findings:
    """answer_s: from a request to its complete answer. swap_s: of publications that were made."""

    counts: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    answer_s: list[float] = field(default_factory=list)
    swap_s: list[float] = field(default_factory=list)
    differences: list[Difference] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    def problem(self, text: str) -> None:
        """Say it at once: a run may be broken off."""
        self.problems.append(text)
        print(f"PROBLEM {text[:1000]}", file=sys.stderr, flush=True)

    def expect(self, holds: bool, otherwise: str) -> None:
        if not holds:
            self.problem(otherwise)

    @property
    def are_too_many(self) -> bool:
        return len(self.problems) >= TOO_MANY

    def checked(self, difference: Difference, what: str) -> None:
        """A choice was compared with the oracle."""
        self.differences.append(difference)
        if difference.complaints:
            self.problem(f"not exact: {'; '.join(difference.complaints[:5])}: {what}")

    def exactness(self) -> dict[str, float]:
        return {
            "choices": len(self.differences),
            "tokens": sum(difference.tokens for difference in self.differences),
            "largest_logprob_difference": max((difference.logprob for difference in self.differences), default=0.0),
            "largest_kl_difference": max((difference.kl for difference in self.differences), default=0.0),
        }

    def to_json(self) -> dict[str, Any]:
        return {
            "passed": not self.problems,
            "counts": dict(sorted(self.counts.items())),
            "answer_seconds": spread(self.answer_s),
            "swap_seconds": spread(self.swap_s),
            "exactness": self.exactness(),
            **self.facts,
            "problems": self.problems,
        }


@contextmanager
def reported(findings: Findings, arguments: dict[str, Any], out: Path | None) -> Iterator[None]:
    """However the block ends, write soak.json into ``out``, if given, and print the table."""
    try:
        yield
    except BaseException as error:
        findings.problem(f"broken off: {error!r}")
        raise
    finally:
        report = {"arguments": {name: str(value) for name, value in arguments.items()}, **findings.to_json()}
        if out is not None:
            (out / "soak.json").write_text(json.dumps(report, indent=1))
        print(table(report))


def spread(seconds: Sequence[float]) -> dict[str, float]:
    if not seconds:
        return {}
    return {"median": round(statistics.median(seconds), 3), "most": round(max(seconds), 3)}


def table(report: dict[str, Any]) -> str:
    """One line per figure, nested figures on the same line."""
    rows = [(name, text) for name, figure in report["counts"].items() for text in [str(figure)]]
    for name, figure in report.items():
        if name not in ("counts", "problems", "passed", "arguments", "memory_series"):
            rows.append((name.replace("_", " "), _one_line(figure)))
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}}  {text}" for name, text in rows]
    problems = [f"PROBLEM {problem[:1000]}" for problem in report["problems"][:10]]
    verdict = "passed" if report["passed"] else f"FAILED: {len(report['problems'])} problem(s)"
    return "\n".join([*lines, *problems, verdict])


def _one_line(figure: Any) -> str:
    if isinstance(figure, dict):
        return ", ".join(f"{name.replace('_', ' ')} {_one_line(part)}" for name, part in figure.items())
    return format(figure, ".3g") if isinstance(figure, float) else str(figure)
