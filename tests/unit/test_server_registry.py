import asyncio

import pytest

from qtilt_server.errors import GuidanceRequestError, NotFoundError
from qtilt_server.registry import Lease, ResidentVersion, ValueModelRegistry


def version(name: str, number: int) -> ResidentVersion:
    return ResidentVersion(name, number, f"{name}-{number}", "v", {"name": "bernoulli"}, scorable_tokens=10)


def registry(*labels: str) -> ValueModelRegistry:
    made = ValueModelRegistry()
    for label in labels:
        name, _, number = label.partition("@")
        made.activate(version(name, int(number)))
    return made


def test_a_name_means_its_active_version_and_the_default_is_the_first_name() -> None:
    versions = registry("first@1", "second@1", "second@2")
    assert versions.lease(None).version.label == "first@1"
    assert versions.lease("second").version.label == "second@2"
    assert versions.lease("second@1").version.label == "second@1"


@pytest.mark.parametrize(
    "wanted", ["third", "first@2", "first@0", "first@", "first@01", "first@x", "@1", "", "first@1@1"]
)
def test_what_is_not_loaded_is_refused_with_what_is(wanted: str) -> None:
    with pytest.raises(GuidanceRequestError, match=r"loaded: first@1"):
        registry("first@1").lease(wanted)


def test_without_any_value_model_the_default_is_refused() -> None:
    with pytest.raises(GuidanceRequestError, match="no value model is loaded; loaded: none"):
        ValueModelRegistry().lease(None)


def test_versions_count_from_one_and_are_never_used_twice() -> None:
    versions = registry("name@1", "name@2")
    oldest = versions.in_the_way("name")
    assert oldest is not None
    versions.remove(oldest)
    assert versions.next_version("name") == 3
    assert versions.next_version("other") == 1


def test_two_versions_fit_and_the_older_is_in_the_way_of_a_third() -> None:
    assert registry("name@1").in_the_way("name") is None
    oldest = registry("name@1", "name@2").in_the_way("name")
    assert oldest is not None
    assert oldest.label == "name@1"


def test_an_older_version_becomes_active_again_and_then_the_newer_one_is_in_the_way() -> None:
    versions = registry("name@1", "name@2")
    versions.activate(versions.resident("name", 1))
    assert versions.lease("name").version.label == "name@1"
    assert versions.lease("name@2").version.label == "name@2"
    assert versions.describe()[0].active == 1
    newer = versions.in_the_way("name")
    assert newer is not None
    assert newer.label == "name@2"


def test_with_its_last_version_a_name_goes_but_not_its_numbers() -> None:
    versions = registry("name@1", "other@1")
    lease = versions.lease("name@1")
    lease.release()
    versions.remove(lease.version)
    assert versions.default_name == "other"
    with pytest.raises(GuidanceRequestError, match="unknown value model 'name'; loaded: other@1"):
        versions.lease("name")
    assert versions.next_version("name") == 2
    versions.activate(version("name", 2))
    assert versions.lease("name").version.label == "name@2"


@pytest.mark.parametrize(("name", "number"), [("name", 3), ("nobody", 1)])
def test_a_version_that_is_not_resident_is_not_found(name: str, number: int) -> None:
    with pytest.raises(NotFoundError, match=f"{name}@{number} isn't loaded; loaded: name@1, name@2"):
        registry("name@1", "name@2").resident(name, number)


def test_a_version_is_found_by_its_digest() -> None:
    versions = registry("name@1", "name@2")
    versions.resident("name", 1).digest = f"sha256:{'0' * 64}"
    assert versions.lease(f"name@sha256:{'0' * 64}").version.label == "name@1"
    for wanted in ("name@sha256:", "name@", "name@sha256:1", f"other@sha256:{'0' * 64}"):
        with pytest.raises(GuidanceRequestError, match="loaded: name@1, name@2"):
            versions.lease(wanted)


def test_a_drain_ends_when_the_last_lease_is_released() -> None:
    async def drain() -> bool:
        versions = registry("name@1", "name@2")
        leases = [versions.lease("name@1"), versions.lease("name@1")]
        draining = asyncio.create_task(versions.drain(leases[0].version, limit_s=5))
        await asyncio.sleep(0)
        leases[0].release()
        leases[0].release()
        await asyncio.sleep(0.01)
        assert not draining.done(), "the other lease is still held"
        leases[1].release()
        return await draining

    assert asyncio.run(drain())


def test_a_version_that_drains_takes_no_new_requests_until_it_is_kept() -> None:
    async def drain() -> None:
        versions = registry("name@1", "name@2")
        lease = versions.lease("name@1")
        assert not await versions.drain(lease.version, limit_s=0.01)
        assert versions.describe()[0].versions[0].state == "draining"
        with pytest.raises(GuidanceRequestError, match=r"being unloaded.*loaded: name@2"):
            versions.lease("name@1")
        versions.keep(lease.version)
        assert versions.lease("name@1").version is lease.version

    asyncio.run(drain())


def test_an_unused_version_drains_at_once() -> None:
    versions = registry("name@1", "name@2")
    oldest = versions.in_the_way("name")
    assert oldest is not None
    assert asyncio.run(versions.drain(oldest, limit_s=0))


def test_status_counts_the_leases() -> None:
    versions = registry("name@1", "name@2")
    lease = Lease(versions.lease("name@1").version)
    status = versions.describe()[0]
    assert status.active == 2
    assert [(entry.version, entry.state, entry.running) for entry in status.versions] == [
        (1, "resident", 2),
        (2, "active", 0),
    ]
    lease.release()
    assert versions.describe()[0].versions[0].running == 1
