"""The demo: for each task, serve a flawed reference with the real server, train a value model, measure, report.

    python examples/demo/run.py [--tasks arithmetic star_graph] [--out runs/demo]

Everything goes through the two commands a user would type, `qtilt-server` and `qtilt-trainer`, over HTTP. Started again
it goes on where it was: finished tasks are reused, an unfinished one resumes. Settings: TASK.toml beside this file.

    OUT/results.json            the records of all tasks
    OUT/report.html, plots/     the page and its figures
    OUT/TASK/                   run directory of the loop (roll-outs, value models, evaluation) and server.log
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from server_process import ServerFailedError, running_server

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
"""The configurations' paths are relative to it."""
TASKS = ("arithmetic", "star_graph")
SAMPLED_GOAL, GREEDY_GOAL = 0.93, 0.97
"""What the README says of Q# at eta = 0.1."""


def main() -> int:
    """Exit code: that of a command that failed, else 0."""
    options = parse_options()
    started = time.monotonic()
    try:
        for task in options.tasks:
            run_task(task, options.out / task)
    except subprocess.CalledProcessError as error:
        return error.returncode
    except ServerFailedError as error:
        sys.stderr.write(f"demo: {error}\n")
        return 1
    records = merge_results(options.tasks, options.out)
    run_dirs = [str(options.out / task) for task in options.tasks]
    trainer("report", *run_dirs, "--out", str(options.out))
    say(tables(records))
    say(verdict(records))
    say(f"{time.monotonic() - started:.0f} s. Page: {options.out / 'report.html'}")
    return 0


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS, help="default: both")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="default: %(default)s")
    options = parser.parse_args()
    options.out = options.out.resolve()
    return options


def run_task(task: str, run_dir: Path) -> None:
    """Serves the task's reference and runs the whole loop against it, unless that is done."""
    settings = HERE / f"{task}.toml"
    if is_finished(settings, run_dir):
        say(f"{task}: finished before, reusing {run_dir}")
        return
    say(f"{task}: starting the server (log: {run_dir / 'server.log'})")
    with running_server(HERE / "references" / task, served_as=f"{task}-reference", run_dir=run_dir) as url:
        trainer("loop", str(settings), "--run-dir", str(run_dir), "--server", url)


def is_finished(settings: Path, run_dir: Path) -> bool:
    """Are there results, and were they made with these settings? With others the trainer will say what differs."""
    from qtilt_trainer.config import read_config

    if not (run_dir / "results.json").exists():
        return False
    recorded = json.loads((run_dir / "config.json").read_text())
    wanted = read_config(settings).model_dump(mode="json")
    return all(recorded[name] == wanted[name] for name in wanted if name not in ("run_dir", "server"))


def trainer(*arguments: str) -> None:
    """Runs `qtilt-trainer` with its progress bars on this terminal. Raises CalledProcessError when it fails."""
    command = [str(Path(sys.executable).parent / "qtilt-trainer"), *arguments]
    subprocess.run(command, check=True, cwd=REPOSITORY)


def merge_results(tasks: list[str], out: Path) -> list[dict[str, Any]]:
    """Writes the records of all tasks to `out/results.json`."""
    from qtilt_trainer.atomic_file import write_json

    records = [record for task in tasks for record in json.loads((out / task / "results.json").read_text())]
    write_json(out / "results.json", records)
    return records


def tables(records: list[dict[str, Any]]) -> str:
    """One result table a task."""
    from qtilt_trainer.evaluate import Record
    from qtilt_trainer.result_table import result_table

    tasks = dict.fromkeys(record["task"] for record in records)
    blocks = [
        f"\n{task}\n{result_table([Record(**record) for record in records if record['task'] == task])}"
        for task in tasks
    ]
    return "\n".join(blocks)


def verdict(records: list[dict[str, Any]]) -> str:
    """Did Q# at eta = 0.1 reach what the README says?"""
    lines = []
    for record in records:
        if record["method"] == "qsharp" and record["inv_eta"] == 10:
            goal = SAMPLED_GOAL if record["decoding"] == "sample" else GREEDY_GOAL
            met = "reached" if record["accuracy"] >= goal else "MISSED"
            lines.append(
                f"{record['task']}, Q♯ at η = 0.1, {record['decoding']}: {100 * record['accuracy']:.1f} % "
                f"(goal {100 * goal:.0f} %: {met})"
            )
    return "\n" + "\n".join(lines)


def say(text: str) -> None:
    """Prints at once, also between the output of the commands."""
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
