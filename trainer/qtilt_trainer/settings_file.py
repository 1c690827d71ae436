"""What a stage was started with, kept beside its output: a resumed stage goes on with the same, or refuses."""

import json
from pathlib import Path
from typing import Any

from qtilt_trainer.atomic_file import write_json


def claim(file: Path, settings: dict[str, Any], begun: bool) -> None:
    """Writes `settings` before a stage makes anything; when it has, checks that it was with the same.

    settings: what the stage's output depends on, JSON-able. begun: whether there is output.
    Raises ValueError that names the fields that differ.
    """
    wanted = json.loads(json.dumps(settings))
    if not begun or not file.exists():
        write_json(file, wanted)
        return
    found = json.loads(file.read_text(encoding="utf-8"))
    if found != wanted:
        raise ValueError(
            f"{file} has other settings ({'; '.join(_differences(found, wanted))}): "
            "use another run_dir, or delete it with what was made from it"
        )


def _differences(found: Any, wanted: Any, where: str = "") -> list[str]:
    if isinstance(found, dict) and isinstance(wanted, dict):
        keys = sorted(found.keys() | wanted.keys())
        return [
            line
            for key in keys
            if found.get(key) != wanted.get(key)
            for line in _differences(found.get(key), wanted.get(key), f"{where}.{key}".lstrip("."))
        ]
    return [f"{where}: {found!r} then, {wanted!r} now"]
