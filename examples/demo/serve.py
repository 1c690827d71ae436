"""Serves SmolLM2 with the value models of both demo tasks: `make serve`. Further arguments go to `qtilt-server`."""

import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from smollm2 import DIRECTORY, server_flags

from served_runs.server_process import server_environment

TASKS = ("keywords", "sentiment")


def main() -> None:
    """Becomes the server."""
    command = [str(Path(sys.executable).parent / "qtilt-server"), str(DIRECTORY), *server_flags()]
    command += ["--served-model-name=smollm2", "--host=127.0.0.1"]
    command += [f"--value-model={task}={HERE / 'value_models' / task}" for task in TASKS]
    os.execve(command[0], [*command, *sys.argv[1:]], server_environment())


if __name__ == "__main__":
    main()
