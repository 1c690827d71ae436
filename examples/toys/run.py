"""The toys: two tiny flawed references, served and steered like a real one, in some ten minutes on two CPU cores.

    python examples/toys/run.py [--tasks arithmetic star_graph] [--out runs/toys]

Settings: TASK.toml beside this file. What is written where: examples/served_runs/runs.py.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from served_runs.runs import ServedRun, run_all, say

TASKS = ("arithmetic", "star_graph")
SAMPLED_GOAL, GREEDY_GOAL = 0.93, 0.97
"""What three seeds of roll-outs and fit had and more (README.md)."""
SERVER_FLAGS = (
    "--dtype=float32",  # vLLM would turn a float32 checkpoint into bfloat16
    "--enforce-eager",  # compiling takes longer than the run
    "--gpu-memory-utilization=0.1",  # on CPUs too: of their memory, all of it by default
    "--kv-cache-memory-bytes=268435456",
    "--max-num-seqs=128",
)


def main() -> None:
    """Runs the tasks and says whether they came out as well as README.md says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS, help="default: both")
    parser.add_argument("--out", type=Path, default=Path("runs/toys"), help="default: %(default)s")
    options = parser.parse_args()
    runs = [ServedRun(HERE / f"{task}.toml", HERE / "references" / task, SERVER_FLAGS) for task in options.tasks]
    say(verdict(run_all(runs, options.out.resolve())))


def verdict(records: list[dict[str, Any]]) -> str:
    """Did Q# at eta = 0.1 reach its goal?"""
    lines = []
    for record in records:
        if record["method"] == "qsharp" and record["inv_eta"] == 10:
            goal = GREEDY_GOAL if record["temperature"] == 0 else SAMPLED_GOAL
            met = "reached" if record["accuracy"] >= goal else "MISSED"
            lines.append(
                f"{record['task']}, Q♯ at η = 0.1, {record['regime']}: {100 * record['accuracy']:.1f} % "
                f"(goal {100 * goal:.0f} %: {met})"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
