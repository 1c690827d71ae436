"""What README and docs show is true as far as a machine can tell: links, configurations, make targets."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from qtilt_trainer.config import LoopConfig, read_config

ROOT = Path(__file__).parents[2]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
EXAMPLES = sorted((ROOT / "examples").rglob("*.toml"))


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def complete_configurations() -> list[str]:
    texts = [text for page in PAGES for text in blocks(page, "toml")]
    return [text for text in texts if "value_model" in tomllib.loads(text)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text())
    missing = [target for target in targets if "://" not in target and not (page.parent / target).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_make_targets_that_are_shown_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    shown = {line for block in blocks(page, "bash") for line in re.findall(r"^make ([a-z-]+)", block, re.MULTILINE)}
    assert shown <= targets


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_example_configuration_is_valid(example: Path) -> None:
    read_config(example)


def test_configurations_in_the_documentation_are_valid() -> None:
    configurations = complete_configurations()
    assert configurations
    for text in configurations:
        LoopConfig(**tomllib.loads(text))
