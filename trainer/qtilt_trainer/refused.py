"""Prompts that the server refused, and why: `refused.jsonl` in a store. Those in it aren't asked again."""

import json
from pathlib import Path

from qtilt_trainer.atomic_file import write_text


class RefusedPrompts:
    """One JSON object a line: prompt_id, what, message."""

    def __init__(self, directory: Path) -> None:
        self.file = directory / "refused.jsonl"

    def ids(self) -> set[str]:
        """Raises ValueError for a line that is none of ours."""
        return {self._read_line(number, line) for number, line in enumerate(self._lines(), 1)}

    def add(self, prompt_id: str, message: str) -> None:
        """Notes one more, durably."""
        line = json.dumps({"prompt_id": prompt_id, "what": "request", "message": message}, ensure_ascii=False)
        write_text(self.file, "".join(f"{each}\n" for each in [*self._lines(), line]))

    def forget(self) -> None:
        """They are asked again."""
        self.file.unlink(missing_ok=True)

    def _lines(self) -> list[str]:
        if not self.file.exists():
            return []
        return [line for line in self.file.read_text(encoding="utf-8").split("\n") if line]

    def _read_line(self, number: int, line: str) -> str:
        try:
            return str(json.loads(line)["prompt_id"])
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{self.file}, line {number}: no refused prompt ({line!r}): delete the line") from error
