"""Where the C++ parts run: only in the tests that ask for them."""

from pathlib import Path

import pytest

from qtilt.forwards.compiled import library


@pytest.fixture(autouse=True)
def _plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's own operators, whatever other tests of this process have loaded."""
    monkeypatch.setattr(library, "_loaded", [])


@pytest.fixture
def compiled(_plain: None) -> Path:
    """The C++ parts are loaded; gives the file they are in."""
    library.load()
    return library._loaded[0]


@pytest.fixture(params=["torch", "compiled"])
def implementation(request: pytest.FixtureRequest) -> str:
    """Each of the two."""
    if request.param == "compiled":
        request.getfixturevalue("compiled")
    return str(request.param)
