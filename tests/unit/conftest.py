"""Where the C++ parts run: only in the tests that ask for them."""

from pathlib import Path

import pytest

from qtilt.forwards.compiled import library
from qtilt.forwards.compiled import tilt as by_cpp
from qtilt.method import tilt as by_torch


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
    """Each of the two. What a test module imports of the tilt is then what is compiled."""
    if request.param == "compiled":
        request.getfixturevalue("compiled")
        for name, value in list(vars(request.module).items()):
            if getattr(value, "__module__", None) == by_torch.__name__ and hasattr(by_cpp, value.__name__):
                request.getfixturevalue("monkeypatch").setattr(request.module, name, getattr(by_cpp, value.__name__))
    return str(request.param)
