"""How much memory the roll-outs of a large run take when a value model is fitted to them.

    python benchmarks/rollout_memory.py [--rollouts 120000] [--tokens 512]

Writes a store as the trainer does (in another process), then reads and labels it, splits it by prompt and makes an
epoch's batches, as a fit does before its first step. Prints one line: the peak resident memory of the process with
everything imported, and before it read anything.
"""

import argparse
import math
import multiprocessing
import resource
import tempfile
import time
from pathlib import Path

import numpy as np

PART, SAMPLES, PROMPT_TOKENS = 256, 8, 64


def main() -> None:
    options = parse_options()
    with tempfile.TemporaryDirectory() as folder:
        writer = multiprocessing.get_context("spawn").Process(
            target=write_store, args=(Path(folder), options.rollouts, options.tokens)
        )
        writer.start()
        writer.join()
        if writer.exitcode != 0:
            raise SystemExit("the store could not be written")
        began = time.monotonic()
        before, peak, sequences = peak_of_a_fit(Path(folder))
    print(
        f"{options.rollouts} roll-outs of {options.tokens} tokens: {peak / 2**20:.0f} MiB at the peak, "
        f"{before / 2**20:.0f} MiB of it before reading; {sequences} sequences, {time.monotonic() - began:.0f} s"
    )


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rollouts", type=int, default=120_000, help="default: %(default)s")
    parser.add_argument("--tokens", type=int, default=512, help="of a completion; default: %(default)s")
    return parser.parse_args()


def write_store(directory: Path, rollouts: int, tokens: int) -> None:
    """Parts of random tokens, with rewards 0 and 1."""
    from qtilt_trainer.rollouts import Rollout, RolloutStore, rollout_id

    store, rng = RolloutStore(directory), np.random.default_rng(0)
    for first in range(0, rollouts, PART):
        numbers = range(first, min(first + PART, rollouts))
        part = [
            Rollout(
                rollout_id=rollout_id(1, f"prompt-{number // SAMPLES:08d}", number % SAMPLES),
                iteration=1,
                prompt_id=f"prompt-{number // SAMPLES:08d}",
                prompt_digest="",
                split="train",
                prompt_token_ids=rng.integers(0, 50_000, PROMPT_TOKENS).tolist(),
                token_ids=rng.integers(0, 50_000, tokens).tolist(),
                text="a word " * (tokens // 2),
                finish_reason="stop",
                ended=True,
                switch_point=0,
                guided_tokens=0,
                value_model=None,
                eta=None,
                method=None,
                guidance_top_k=None,
                tail=None,
                temperature=1.0,
                top_p=1.0,
                sampling_top_k=0,
                max_tokens=tokens,
                seed=number,
                model="m",
                kl=0.0,
                kl_candidates=0.0,
                mass=None,
            )
            for number in numbers
        ]
        store.set_rewards(store.append(part), rng.integers(0, 2, len(part)).astype(float).tolist(), [None] * len(part))


def peak_of_a_fit(directory: Path) -> tuple[int, int, int]:
    """Peak resident bytes before reading, and after an epoch; sequences in it."""
    from qtilt_trainer.dataset import batches, collate, label_rollouts, split_prompts
    from qtilt_trainer.fit import COLUMNS
    from qtilt_trainer.rollouts import RolloutStore, read_compactly

    read_compactly()
    before = peak_bytes()
    examples, _ = label_rollouts(RolloutStore(directory).table(1, COLUMNS), drop_unanimous=True)
    training, _ = split_prompts(examples, 0.1, seed=0)
    sequences = sum(len(collate(batch).reward_N) for batch in batches(training, 64, seed=0))
    assert sequences == len(training)
    assert math.isfinite(float(training[0].reward))
    return before, peak_bytes(), sequences


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
