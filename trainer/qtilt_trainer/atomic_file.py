"""Files that exist completely or not at all, whatever kills the process that writes them."""

import json
from pathlib import Path
from typing import Any

from qtilt.model.durable import flush

UNFINISHED = ".unfinished"
"""Suffix of a file that is being written; one that stays was left by a process that died."""


def publish_file(unfinished: Path, file: Path) -> None:
    """Gives a fully written file its real name, durably: data first, then the name."""
    flush(unfinished)
    unfinished.replace(file)
    flush(file.parent)


def write_text(file: Path, text: str) -> None:
    """Writes `file` so that a reader sees the old content or the new one. One writer at a time."""
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_name(file.name + UNFINISHED)
    unfinished.write_text(text, encoding="utf-8")
    publish_file(unfinished, file)


def write_json(file: Path, value: Any) -> None:
    """The same for a JSON value, indented."""
    write_text(file, json.dumps(value, indent=2, allow_nan=False) + "\n")
