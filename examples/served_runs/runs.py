"""For each configuration: serve its reference with the real server, train a value model, measure, report.

Everything goes through the two commands a user would type, `qtilt-server` and `qtilt-trainer`, over HTTP. Started again
it goes on where it was: finished runs are reused, an unfinished one resumes.

    OUT/results.json            the records of all runs
    OUT/report.html, plots/     the page and its figures
    OUT/NAME/                   run directory of the loop (roll-outs, value models, evaluation) and server.log
"""

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from served_runs.server_process import ServerFailedError, running_server

REPOSITORY = Path(__file__).resolve().parents[2]
"""The configurations' paths are relative to it."""


@dataclass(frozen=True, slots=True)
class ServedRun:
    """One configuration and the reference it is run against."""

    settings: Path
    """The loop's TOML file; its stem names the run."""
    reference: Path
    """Model directory."""
    server_flags: Sequence[str]
    """Flags of `qtilt-server` beside model, name, address and value-model root."""

    @property
    def name(self) -> str:
        """What the run's directory is called."""
        return self.settings.stem


def run_all(runs: Sequence[ServedRun], out: Path) -> list[dict[str, Any]]:
    """Finishes all runs, writes the common page and returns the records.

    Ends the process with a failed command's exit code (it has said why), or with a line about a server that failed.
    """
    started = time.monotonic()
    try:
        for run in runs:
            finish(run, out / run.name)
        records = merge_results(runs, out)
        trainer("report", *(str(out / run.name) for run in runs), "--out", str(out))
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)
    except ServerFailedError as error:
        sys.exit(str(error))
    say(tables(records))
    say(f"\n{time.monotonic() - started:.0f} s. Page: {out / 'report.html'}")
    return records


def finish(run: ServedRun, run_dir: Path) -> None:
    """Serves the reference and runs the whole loop against it, unless that is done."""
    if is_finished(run.settings, run_dir):
        say(f"{run.name}: finished before, reusing {run_dir}")
        return
    say(f"{run.name}: starting the server (log: {run_dir / 'server.log'})")
    with running_server(run.reference, f"{run.name}-reference", run_dir, run.server_flags) as url:
        trainer("loop", str(run.settings), "--run-dir", str(run_dir), "--server", url)


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


def merge_results(runs: Sequence[ServedRun], out: Path) -> list[dict[str, Any]]:
    """Writes the records of all runs to `out/results.json`."""
    from qtilt_trainer.atomic_file import write_json

    records = [record for run in runs for record in json.loads((out / run.name / "results.json").read_text())]
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


def say(text: str) -> None:
    """Prints at once, also between the output of the commands."""
    print(text, flush=True)
