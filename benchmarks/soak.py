"""A load that tries to make the server leak, answer inexactly or break; bounded, and its exit code says the outcome.

    python benchmarks/soak.py                                    # 10 minutes, 64 clients
    python benchmarks/soak.py --minutes 1 --clients 16 --out runs/soak

Starts the real qtilt-server on the CPU over tiny random models (tests/real_server/models.py), with too little memory
for its load: fewer sequences in a batch than clients, so that requests queue; too few KV blocks, so that they preempt
each other; prompts longer than a step's tokens, so that prefills come in chunks; a small --guidance-kv-fraction, so
that value caches drop histories. The prefix cache is on.

Clients ask one request after the other, at random: completions and chats, whole and streamed, unguided and guided by a
V-type and a Q-type value model, lengths, η, top_k, methods, candidate masses, temperatures, seeds, stop strings,
several choices and prompts. A fifth of them go away: before the answer, in the middle of a stream, by closing the
connection or resetting it. Some requests are malformed. A publisher swaps the versions of both value models every
few seconds; 409, when two versions are still in use, is an answer like any other and counted.

Checked: every response (status, choices, what it says of its guidance, a version that was active at some time of the
request); a sampled share against plain Hugging Face forwards (soaking/exactness.py: log-probabilities to 1e-4, KL);
that what the load is for really happened; and after it that no row, slot, page, trace or lease is held, that resident
memory hasn't grown by more than --most-growth MiB since the warm-up, and that answers are still exact.
"""

import argparse
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
LEAST_MINUTES = 0.5
"""Within less there are too few samples of memory for a window after the warm-up."""


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--minutes", type=float, default=10.0, help="of load; start and final checks come on top")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--kv-fraction", type=float, default=0.3, help="the server's --guidance-kv-fraction")
    parser.add_argument("--checked", type=float, default=0.02, help="share of answers compared with the oracle")
    parser.add_argument("--most-growth", type=float, default=64.0, help="of the server's resident memory, in MiB")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="folder for soak.json and the server's log")
    parsed = parser.parse_args(arguments)
    if not parsed.minutes >= LEAST_MINUTES or parsed.clients < 8:
        parser.error(f"expected at least {LEAST_MINUTES} --minutes and 8 --clients")
    return parsed


def main() -> int:
    arguments = parse_arguments()
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    sys.path.append(str(ROOT / "tests"))  # the models, the server's process and the oracle of the tests
    from soaking.findings import Findings, reported
    from soaking.run import soak

    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
    findings = Findings()
    with (
        reported(findings, vars(arguments), arguments.out),
        tempfile.TemporaryDirectory(prefix="qtilt-soak-") as folder,
    ):
        soak(arguments, Path(folder).resolve(), findings)
    return 1 if findings.problems else 0


if __name__ == "__main__":
    sys.exit(main())
