"""What the page on exactness is made of: no test counts that may be skipped or fail."""

import pytest

from guided_vllm.matrix import covers, report


def test_a_test_that_covers_something_is_reported(request: pytest.FixtureRequest) -> None:
    request.node.add_marker(covers("Q-type", "V-type", engines=["sync"]))
    (first, second) = report([request.node])["cells"]
    assert (first["feature"], second["feature"]) == ("Q-type", "V-type")
    assert first["engine"] == "sync"
    assert first["file"] == "tests/unit/test_matrix.py"


def test_a_skipped_test_covers_nothing(request: pytest.FixtureRequest) -> None:
    request.node.add_marker(covers("Q-type"))
    request.node.add_marker(pytest.mark.skip(reason="only looked at"))
    assert report([request.node])["cells"] == []


@pytest.mark.parametrize("mark", [pytest.mark.xfail, pytest.mark.skipif], ids=["xfail", "skipif"])
def test_a_test_that_may_fail_or_be_skipped_must_not_cover_anything(
    request: pytest.FixtureRequest, mark: pytest.MarkDecorator
) -> None:
    request.node.add_marker(mark(False, reason="the condition doesn't hold, so that this test runs"))
    assert report([request.node])["cells"] == []
    request.node.add_marker(covers("Q-type"))
    with pytest.raises(ValueError, match=f"covers something, and is marked {mark.name}"):
        report([request.node])
