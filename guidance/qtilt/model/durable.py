"""What has been written survives a crash of the machine once it is flushed: files, and the directories naming them."""

import os
from pathlib import Path


def flush(path: Path) -> None:
    """Wait until a file's content, or a directory's list of names, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
