"""Commands of the server that the documentation shows, and flags that it names, exist: vLLM's own among them."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import pytest
from vllm.entrypoints.cli.serve import ServeSubcommand
from vllm.utils.argparse_utils import FlexibleArgumentParser

from documented import PAGES, ROOT, commands, flags
from qtilt_server import launch
from qtilt_server.flags import add_guidance_arguments
from qtilt_trainer.cli import build_parser

OF_OTHERS = {
    "--no-deps",  # pip's
    "--strict",  # mypy's
    "--remote_rm_url",  # OpenRLHF's
}
SHOWN = [(page, arguments) for page in PAGES for program, arguments in commands(page) if program == "qtilt-server"]


def server_flags() -> set[str]:
    parser = ServeSubcommand().subparser_init(FlexibleArgumentParser().add_subparsers())
    add_guidance_arguments(parser)
    return set(parser._option_string_actions)


def trainer_flags() -> set[str]:
    found: set[str] = set()
    waiting: list[argparse.ArgumentParser] = [build_parser()]
    while waiting:
        parser = waiting.pop()
        found |= set(parser._option_string_actions)
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                waiting += action.choices.values()
    return found


def script_flags() -> set[str]:
    """Of the scripts beside the packages, as they define them."""
    texts = [
        file.read_text() for folder in ("benchmarks", "examples", "docs") for file in (ROOT / folder).rglob("*.py")
    ]
    return {flag for text in texts for flag in re.findall(r'"(--[a-z0-9-]+)"', text)}


@pytest.mark.parametrize(("page", "arguments"), SHOWN, ids=lambda value: getattr(value, "name", " "))
def test_a_command_of_the_server_parses(page: Path, arguments: list[str]) -> None:
    launch._parse(ServeSubcommand(), arguments)


def test_every_flag_that_is_named_exists() -> None:
    known = server_flags() | trainer_flags() | script_flags() | OF_OTHERS
    named = {flag: page.name for page in PAGES for flag in flags(page)}
    assert len(named) > 40
    assert {flag: page for flag, page in named.items() if flag not in known} == {}
