"""The pages that people read, and the commands and flags that these show."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "examples").rglob("*.md"))]
FENCED = re.compile(r"^ *```(\w*)\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"(?:\$ )?(?:\S*/)?(qtilt-(?:server|trainer)) +([^\n]+)")


def blocks(page: Path, language: str) -> list[str]:
    """What is fenced as of this language."""
    return [text for found, text in FENCED.findall(page.read_text()) if found == language]


def prose(page: Path) -> str:
    """The page without what is fenced."""
    return FENCED.sub("", page.read_text())


def commands(page: Path) -> Iterator[tuple[str, list[str]]]:
    """Program and arguments of each command of ours that is shown in full."""
    for text in [text for language, text in FENCED.findall(page.read_text()) if language in ("bash", "")]:
        for line in re.sub(r"\\\n\s*", "", text).splitlines():
            found = COMMAND.match(line.strip())
            if found is not None:
                yield found[1], shlex.split(found[2], comments=True)


def flags(page: Path) -> set[str]:
    """Each ``--flag`` that the prose names as code."""
    codes = re.findall(r"`([^`\n]+)`", prose(page))
    return {flag for code in codes for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*\w(?![\w-]*\*)", code)}
