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


def test_details_are_refused_where_tokens_are_drafted(registry: ValueModelRegistry) -> None:
    flags = GuidanceFlags()
    asked = GuidanceRequest(details=True)
    params, lease = Admission(flags, registry, speculates=False).admit(asked)
    assert params.details
    lease.release()
    drafting = Admission(flags, registry, speculates=True)
    with pytest.raises(GuidanceRequestError, match=r"guidance\.details is true.*--speculative-config") as refusal:
        drafting.admit(asked)
    assert refusal.value.parameter == "guidance.details"
    assert registry.lease(None).version.leases == 1, "the refused one holds none"
    assert not drafting.admit(GuidanceRequest(details=False))[0].details
