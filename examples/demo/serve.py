"""Serves SmolLM2 with the value models of both demo tasks: `make serve`. Further arguments go to `qtilt-server`."""

import os
import sys
from pathlib import Path

from smollm2 import DIRECTORY, server_flags

HERE = Path(__file__).resolve().parent
TASKS = ("keywords", "sentiment")


def main() -> None:
    """Becomes the server."""
    command = [str(Path(sys.executable).parent / "qtilt-server"), str(DIRECTORY), *server_flags()]
    command += ["--served-model-name=smollm2", "--host=127.0.0.1"]
    command += [f"--value-model={task}={HERE / 'value_models' / task}" for task in TASKS]
    # The first request would otherwise wait for torch.compile.
    os.execve(command[0], [*command, *sys.argv[1:]], {**os.environ, "TORCHDYNAMO_DISABLE": "1"})


if __name__ == "__main__":
    main()
