"""From a guidance block to what the worker is told."""

import pytest

from qtilt_server.admission import Admission
from qtilt_server.errors import GuidanceRequestError
from qtilt_server.flags import GuidanceFlags
from qtilt_server.registry import ResidentVersion, ValueModelRegistry
from qtilt_server.schema import GuidanceRequest


@pytest.fixture
def registry() -> ValueModelRegistry:
    registry = ValueModelRegistry()
    registry.activate(ResidentVersion("value", 1, "value", "v", {}, 10))
    return registry


@pytest.mark.parametrize(("field", "asked"), [("details", True), ("kl_budget", 0.5)])
def test_what_isnt_there_while_tokens_are_drafted_is_refused(
    registry: ValueModelRegistry, field: str, asked: object
) -> None:
    flags, request = GuidanceFlags(), GuidanceRequest.model_validate({field: asked})
    params, lease = Admission(flags, registry, speculates=False).admit(request)
    assert getattr(params, field) == asked
    lease.release()
    drafting = Admission(flags, registry, speculates=True)
    with pytest.raises(GuidanceRequestError, match=rf"guidance\.{field} is {asked}.*--speculative-config") as refusal:
        drafting.admit(request)
    assert refusal.value.parameter == f"guidance.{field}"
    assert registry.lease(None).version.leases == 1, "the refused one holds none"
    assert not drafting.admit(GuidanceRequest(details=False))[0].details
