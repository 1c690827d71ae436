"""Trains the tiny reference model of a toy, tokenizer included.

    python examples/toys/train_reference.py examples/toys/arithmetic.toml --out DIR --steps 1500 --threads 1

Only the file's [task] table is read. Sizes that aren't given are ReferenceConfig's defaults.
"""

import argparse
import dataclasses
import logging
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from qtilt_trainer.tasks import make_task
from tiny_reference import ReferenceConfig, train_reference


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0, or 2 for bad input, with one line that says what is wrong."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("tiny_reference").setLevel(logging.INFO)
    options = parse_options(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    sizes = {field.name: getattr(options, field.name) for field in dataclasses.fields(ReferenceConfig)}
    try:
        train_reference(read_task(options.config), ReferenceConfig(**sizes), options.out)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"train_reference: {error}\n")
        return 2
    return 0


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line: one option for each field of ReferenceConfig."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, metavar="CONFIG.toml")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="Hugging Face directory to write")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's own choice)")
    for field in dataclasses.fields(ReferenceConfig):
        option = f"--{field.name.replace('_', '-')}"
        parser.add_argument(option, type=type(field.default), default=field.default, help="default: %(default)s")
    return parser.parse_args(arguments)


def read_task(config: Path) -> Any:
    """The task with reference texts that a configuration names. Raises ValueError if it has none."""
    with config.open("rb") as stream:
        table = tomllib.load(stream).get("task")
    if not isinstance(table, dict):
        raise ValueError(f"{config}: the table [task] is required")
    task = make_task(table)
    if not hasattr(task, "reference_texts"):
        raise ValueError(f"{config}: task {task.name} has no reference_texts to train a reference on")
    return task


if __name__ == "__main__":
    sys.exit(main())
