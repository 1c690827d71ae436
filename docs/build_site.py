"""Builds the documentation site: `make docs-site`. Warnings are errors.

The generator gets a copy of every page and of what it links to, at its own path: so relative links need no rewriting,
and a source file that a page names is in the site.
"""

import argparse
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "docs" / "zensical.toml"
PAGE = re.compile(r'"([^"]+\.md)"')
LINK = re.compile(r"""(?:\]\(|src=")([^)"#\s]+)[^)"]*[)"]""")
CODE = re.compile(r"^ *```.*?^ *```|`[^`\n]*`", re.MULTILINE | re.DOTALL)


def main() -> None:
    """Writes the site below the given directory. Exits with the generator's code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="directory to write; the site is its site/")
    out: Path = parser.parse_args().out
    shutil.rmtree(out, ignore_errors=True)
    for file in sorted(linked(pages())):
        copy = out / "pages" / file.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy)
    staged = out / CONFIG.name
    shutil.copyfile(CONFIG, staged)
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--config-file", str(staged)]
    sys.exit(subprocess.run(command).returncode)


def pages() -> set[Path]:
    """Those of the navigation."""
    return {ROOT / name for name in PAGE.findall(CONFIG.read_text())}


def linked(start: set[Path]) -> set[Path]:
    """The files, and those that they link to, and so on from page to page."""
    found: set[Path] = set()
    waiting = set(start)
    while waiting:
        file = waiting.pop()
        found.add(file)
        if file.suffix == ".md":
            waiting |= {target for target in links(file) if target.is_file()} - found
    return found


def links(page: Path) -> Iterator[Path]:
    """Where a page's relative links lead."""
    for target in LINK.findall(CODE.sub("", page.read_text())):
        if "://" not in target:
            yield (page.parent / target).resolve()


if __name__ == "__main__":
    main()
