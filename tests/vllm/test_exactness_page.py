"""docs/exactness.md says what the tests cover, no more and no less."""

import importlib.util
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"


def test_the_page_is_what_the_tests_say() -> None:
    spec = importlib.util.spec_from_file_location("docs_generate", DOCS / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    generator = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generator)
    page = generator.exactness_page()
    assert (DOCS / "exactness.md").read_text() == page, "docs/exactness.md has drifted: run make docs"
