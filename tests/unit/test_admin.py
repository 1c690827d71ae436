"""Who may change what is served, and where the admin key is kept."""

from argparse import Namespace

import pytest
from starlette.requests import Request

from qtilt_server.admin import AdminAccess, hide_admin_key
from qtilt_server.errors import ForbiddenError
from qtilt_server.flags import GuidanceFlags, parse_own_flags

KEY = "s3cret"


def request(host: str | None = "127.0.0.1", authorization: str | None = None) -> Request:
    headers = [] if authorization is None else [(b"authorization", authorization.encode())]
    scope = {"type": "http", "path": "/v1/guidance/value_models", "headers": headers, "query_string": b""}
    return Request({**scope, "client": None if host is None else (host, 4711), "server": ("h", 80), "scheme": "http"})


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "::ffff:127.0.0.1", None])
def test_without_a_key_this_machine_may(host: str | None) -> None:
    AdminAccess(None).check(request(host))


@pytest.mark.parametrize(
    "host", ["10.0.0.3", "172.17.0.2", "2001:db8::1", "::ffff:10.0.0.3", "0.0.0.0", "localhost.example", ""]
)
def test_without_a_key_no_other_may(host: str) -> None:
    with pytest.raises(ForbiddenError, match="--admin-key"):
        AdminAccess(None).check(request(host, f"Bearer {KEY}"))


@pytest.mark.parametrize("scheme", ["Bearer", "bearer"])
def test_with_a_key_whoever_has_it_may(scheme: str) -> None:
    AdminAccess(KEY).check(request("10.0.0.3", f"{scheme} {KEY}"))


@pytest.mark.parametrize(
    "authorization", [None, "", KEY, "Bearer ", f"Bearer  {KEY}", f"Bearer {KEY}x", f"Basic {KEY}"]
)
def test_with_a_key_no_other_may(authorization: str | None) -> None:
    with pytest.raises(ForbiddenError, match="needs the admin key"):
        AdminAccess(KEY).check(request("127.0.0.1", authorization))


def test_the_key_comes_from_the_flag_or_the_environment_and_is_in_no_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QTILT_ADMIN_KEY", raising=False)
    assert parse_own_flags([]).admin_key is None
    monkeypatch.setenv("QTILT_ADMIN_KEY", "other")
    assert parse_own_flags([]).admin_key == "other"
    assert parse_own_flags(["--admin-key", KEY]).admin_key == KEY
    assert KEY not in f"{GuidanceFlags(admin_key=KEY)!r} {AdminAccess(KEY)!r}"


@pytest.mark.parametrize(
    ("flag", "variable", "expected"),
    [(None, None, None), (["user"], None, ["user", KEY]), (None, "user", ["user", KEY]), (["a"], "b", ["a", KEY])],
)
def test_the_admin_key_is_an_api_key_where_there_are_any(
    flag: list[str] | None, variable: str | None, expected: list[str] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without, completions stay open to all."""
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    if variable is not None:
        monkeypatch.setenv("VLLM_API_KEY", variable)
    args, environment = Namespace(admin_key=KEY, api_key=flag), {}
    hide_admin_key(args, KEY, environment)
    assert (args.admin_key, args.api_key, environment) == (None, expected, {"QTILT_ADMIN_KEY": KEY})


def test_without_an_admin_key_nothing_changes() -> None:
    args, environment = Namespace(admin_key=None, api_key=["user"]), {}
    hide_admin_key(args, None, environment)
    assert (args.api_key, environment) == (["user"], {})
