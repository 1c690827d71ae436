"""Takes the pictures of docs/playground.md from a demo server that runs: `make serve`, then

.venv/bin/python tests/playground_pictures.py [--url http://127.0.0.1:8000]
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from playwright.sync_api import expect

from browser import find_chromium, headless

DOCS = Path(__file__).resolve().parents[1] / "docs"
SEED, TOKEN = 10, 8
WEAK, STRONG = "1", "0.05"
"""η: the answer at the first stays behind the curves of the one at the second."""


def main() -> None:
    """Writes docs/playground*.png."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=SEED, help="of both answers; default: %(default)s")
    options = parser.parse_args()
    chromium = find_chromium()
    if chromium is None:
        sys.exit("there is no Chromium: make install-browser, or name one with QTILT_CHROMIUM")
    with headless(chromium) as browser:
        for name, width, height, scheme in (
            ("playground", 1280, 960, "light"),
            ("playground-dark", 1280, 960, "dark"),
            ("playground-phone", 390, 844, "light"),
        ):
            page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
            page.goto(f"{options.url}/playground")
            show_answers(page, options.seed)
            if width < height:
                page.locator("#guided").evaluate("pane => pane.scrollIntoView()")
            page.screenshot(path=DOCS / f"{name}.png")
            page.close()


def show_answers(page: Any, seed: int) -> None:
    """Both answers, the guided one twice, and one of its tokens looked at."""
    expect(page.locator("#status")).to_have_attribute("data-state", "ready", timeout=60_000)
    page.locator("#more").evaluate("element => { element.open = true }")
    page.fill("#seed", str(seed))
    page.locator("#more").evaluate("element => { element.open = false }")
    page.fill("#eta", WEAK)
    page.click("#send")
    wait(page)
    page.fill("#eta", STRONG)
    page.click("#again")
    wait(page)
    page.locator("#guided .token").nth(TOKEN).click()


def wait(page: Any) -> None:
    """Until both answers are there."""
    for pane, told in (("reference", "tokens"), ("guided", "KL")):
        expect(page.locator(f"#{pane} .sum")).to_contain_text(told, timeout=60_000)
    expect(page.locator("[aria-busy=true]")).to_have_count(0, timeout=60_000)


if __name__ == "__main__":
    main()
