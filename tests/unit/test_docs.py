"""What README and docs show is true as far as a machine can tell: links, configurations, commands, messages."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from documented import PAGES, ROOT, blocks, commands, prose
from qtilt_trainer.cli import build_parser
from qtilt_trainer.config import LoopConfig, read_config

EXAMPLES = sorted((ROOT / "examples").rglob("*.toml"))
CONFIG = tomllib.loads((ROOT / "docs" / "zensical.toml").read_text())["project"]
PACKAGES = [ROOT / "guidance" / "qtilt", ROOT / "server" / "qtilt_server", ROOT / "trainer" / "qtilt_trainer"]
of_each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def complete_configurations() -> list[str]:
    texts = [text for page in PAGES for text in blocks(page, "toml")]
    return [text for text in texts if "value_model" in tomllib.loads(text)]


def anchors(page: Path) -> set[str]:
    """Of the headings, as code hosts and the site make them; a repeated one isn't told apart."""
    headings = re.findall(r"^#+ +(.+)$", prose(page), flags=re.MULTILINE)
    texts = [re.sub(r"[`*]|\]\([^)]*\)", "", heading).lower() for heading in headings]
    return {re.sub(r"[^\w\- ]", "", text).replace(" ", "-") for text in texts}


@of_each_page
def test_relative_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)(?: \"[^\"]*\")?\)", re.sub(r"`[^`\n]*`", "", prose(page)))
    missing = []
    for link in links:
        target, _, anchor = link.partition("#")
        file = (page.parent / target).resolve() if target else page
        if "://" not in link and not (file.exists() and (not anchor or anchor in anchors(file))):
            missing.append(link)
    assert not missing


@of_each_page
def test_make_targets_that_are_shown_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    shown = {line for block in blocks(page, "bash") for line in re.findall(r"^make ([a-z-]+)", block, re.MULTILINE)}
    shown |= set(re.findall(r"`make ([a-z-]+)", prose(page)))
    assert shown <= targets


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_example_configuration_is_valid(example: Path) -> None:
    read_config(example)


def test_configurations_in_the_documentation_are_valid() -> None:
    configurations = complete_configurations()
    assert configurations
    for text in configurations:
        LoopConfig(**tomllib.loads(text))


def test_the_configuration_that_the_tutorial_writes_is_valid() -> None:
    (text,) = re.findall(r"run\.toml <<'END'\n(.*?)^END", (ROOT / "docs" / "tutorial.md").read_text(), re.M | re.S)
    LoopConfig(**tomllib.loads(text))


@of_each_page
def test_commands_of_the_trainer_that_are_shown_parse(page: Path) -> None:
    for program, arguments in commands(page):
        if program == "qtilt-trainer":
            build_parser().parse_args(arguments)


@of_each_page
def test_commands_of_the_trainer_that_are_named_exist(page: Path) -> None:
    known = {name for action in build_parser()._actions if isinstance(action.choices, dict) for name in action.choices}
    assert "loop" in known
    assert set(re.findall(r"`(?:\S*/)?qtilt-trainer (\w+)", prose(page))) <= known


def test_there_are_commands_in_the_documentation() -> None:
    """So the tests that parse them (also tests/vllm/test_documented_flags.py) have something to parse."""
    programs = [program for page in PAGES for program, _ in commands(page)]
    assert programs.count("qtilt-trainer") >= 8
    assert programs.count("qtilt-server") >= 4
    assert set(programs) == {"qtilt-trainer", "qtilt-server"}


@cache
def messages() -> list[str]:
    """The texts in the code, each with … for what is filled in."""
    found = []
    for node in (
        node for each in PACKAGES for file in each.rglob("*.py") for node in ast.walk(ast.parse(file.read_text()))
    ):
        if isinstance(node, ast.JoinedStr):
            found.append("".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values))  # type: ignore[misc]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(node.value.replace("%s", "…"))
    return found


def documented_messages() -> Iterator[str]:
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    yield from re.findall(r"^\| `([^`]+)`", page, flags=re.MULTILINE)
    yield "value model … was fitted on roll-outs sampled with …, but requests ask for …"
    yield "guidance runs slower than it could"


def test_the_messages_of_troubleshooting_are_the_codes_own() -> None:
    documented = list(documented_messages())
    assert len(documented) > 25
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    assert all(message in page for message in documented)
    unknown = [
        message
        for message in documented
        if not any(re.search(".*".join(map(re.escape, message.split("…"))), text, re.S) for text in messages())
    ]
    assert not unknown


def pages_of(entries: object) -> Iterator[str]:
    for entry in entries if isinstance(entries, list) else [entries]:
        if isinstance(entry, str):
            yield entry
        else:
            yield from (page for below in entry.values() for page in pages_of(below))


def test_every_page_is_in_the_navigation_of_the_site_once() -> None:
    listed = list(pages_of(CONFIG["nav"]))
    assert len(listed) == len(set(listed))
    there = {str(page.relative_to(ROOT)) for page in PAGES}
    assert set(listed) == there
