"""The demo: SmolLM2-135M-Instruct steered on two tasks, from collecting to the report: `make demo`.

    python examples/demo/run.py [--tasks keywords sentiment] [--out runs/demo]

Settings: TASK.toml beside this file. What is written where: examples/served_runs/runs.py.
"""

import argparse
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from smollm2 import DIRECTORY, server_flags

from served_runs.runs import ServedRun, run_all

TASKS = ("keywords", "sentiment")


def main() -> None:
    """Runs the tasks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS, help="default: both")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="default: %(default)s")
    options = parser.parse_args()
    runs = [ServedRun(HERE / f"{task}.toml", DIRECTORY, server_flags()) for task in options.tasks]
    run_all(runs, options.out.resolve())


if __name__ == "__main__":
    main()
