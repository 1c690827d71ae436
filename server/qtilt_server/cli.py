"""``qtilt-server MODEL --value-model NAME=DIR … [every flag of vllm serve]``."""

import os
import sys

from qtilt_server.errors import StartupError
from qtilt_server.flags import parse_own_flags


def main(argv: list[str] | None = None) -> None:
    """Serve until interrupted. Exits with code 2 and one line on stderr when the server must not start."""
    arguments = sys.argv[1:] if argv is None else argv
    try:
        parse_own_flags(arguments)  # refuses in a second what can be refused without vLLM
        from qtilt_server.launch import check_vllm, launch, prepare_environment

        check_vllm()
        prepare_environment(os.environ)
        launch(arguments)
    except StartupError as refusal:
        print(f"qtilt-server: {' '.join(str(refusal).split())}", file=sys.stderr)  # noqa: T201 - a refusal is for a person
        sys.exit(2)


if __name__ == "__main__":
    main()
