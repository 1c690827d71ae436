"""One writer a run directory."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def run_lock(run_dir: Path) -> Iterator[None]:
    """Holds the directory for this process; the lock ends with the process, however it ends.

    Raises ValueError when another process holds it.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    with (run_dir / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"another qtilt-trainer is working in {run_dir}: wait for it or end it") from error
        yield
