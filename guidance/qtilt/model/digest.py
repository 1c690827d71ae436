"""What a value-model directory holds, as one digest: the same for the same files, wherever they are. Without torch."""

import hashlib
from pathlib import Path


def content_digest(directory: Path) -> str:
    """``sha256:`` and 64 hexadecimal digits, over each file's place and content; files whose name begins with a dot, or
    that lie in such a folder, don't count.

    Of a low-rank value model the base isn't here, but its weights' digest is, in the manifest. Raises OSError.
    """
    total = hashlib.sha256()
    for file in sorted(directory.rglob("*")):
        place = file.relative_to(directory)
        if file.is_file() and not any(part.startswith(".") for part in place.parts):
            with file.open("rb") as content:
                total.update(hashlib.file_digest(content, "sha256").digest())
            total.update(place.as_posix().encode() + b"\0")
    return f"sha256:{total.hexdigest()}"
