"""The site of the documentation, built as `make docs-site` does, with the generator's warnings as errors."""

from __future__ import annotations

import html
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("docs")
    command = ["make", "docs-site", f"DOCS_VENV={folder / 'venv'}", f"DOCS_SITE={folder / 'out'}"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if "No matching distribution" in result.stderr or "ConnectionError" in result.stderr:
        pytest.skip(f"the generator can't be had here: {result.stderr.strip().splitlines()[-1]}")
    assert result.returncode == 0, result.stdout + result.stderr
    complete = subprocess.run(
        [folder / "venv" / "bin" / "python", "-m", "pip", "check"], capture_output=True, text=True
    )
    assert complete.returncode == 0, f"requirements/docs.txt lacks something: {complete.stdout}"
    return folder / "out" / "site"


def articles(site: Path) -> dict[str, str]:
    """The pages' own text, in HTML."""
    found = {}
    for page in site.rglob("index.html"):
        article = re.search(r"<article.*?</article>", page.read_text(), re.DOTALL)
        assert article is not None, page
        found[str(page.parent.relative_to(site))] = article[0]
    return found


@pytest.mark.slow
def test_the_site_has_every_page_and_the_files_that_these_name(site: Path) -> None:
    assert {".", "docs/concepts", "docs/tutorial", "docs/troubleshooting", "SECURITY"} <= articles(site).keys()
    assert (site / "guidance" / "qtilt" / "method" / "tilt.py").exists()
    assert (site / "docs" / "frontier.png").exists()


@pytest.mark.slow
def test_links_to_files_of_the_site_lead_somewhere(site: Path) -> None:
    """The generator looks at links to pages only."""
    missing = []
    for name, article in articles(site).items():
        for link in re.findall(r'(?:href|src)="([^"#:?]+)"', article):
            target = (site / name / link).resolve()
            if not (target.is_file() or (target / "index.html").is_file()):
                missing.append(f"{name}: {link}")
    assert not missing


@pytest.mark.slow
def test_nothing_is_left_of_the_markup(site: Path) -> None:
    """What code hosts read as a list or as code, and the generator doesn't, is a matter of indentation."""
    left = []
    for name, article in articles(site).items():
        text = re.sub(r"<(pre|code|h\d)\b.*?</\1>", "", article, flags=re.DOTALL)
        lines = html.unescape(re.sub(r"<[^>]+>", "", text)).splitlines()
        left += [f"{name}: {line}" for line in lines if re.match(r"\s*(- |\d+\. |#+ |\|.*\|)|.*(\*\*|`|\]\()", line)]
    assert not left
