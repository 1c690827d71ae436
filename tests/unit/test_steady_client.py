"""A server that goes away, comes back empty, or comes back with something else under the same name."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import qtilt_trainer.steady_client
from qtilt_trainer.client import Completion, Guidance, Sampling
from qtilt_trainer.config import ServerConfig
from qtilt_trainer.publish import publish
from qtilt_trainer.server_errors import PromptRefusedError, ServerAwayError, ServerError
from qtilt_trainer.steady_client import SteadyClient
from stand_in_server import StandInServer
from star_graph import StarGraph

PROBLEMS = StarGraph().problems("train", 12)
COMPLETIONS = "/v1/completions"
Before = Callable[[str, Any], tuple[int, Any] | None]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qtilt_trainer.steady_client, "POLL_SECONDS", 0.02)


@pytest.fixture
def fitted(tmp_path: Path) -> Path:
    directory = tmp_path / "iteration-001"
    directory.mkdir()
    (directory / "value_model.json").write_text("{}")
    return directory


def ask(server: StandInServer, fitted: Path, guided: bool = True, before: Before | None = None, **settings: Any) -> Any:
    """One completion of each problem, four at a time; `before` acts once the value model is published."""

    async def run() -> list[Completion]:
        async with SteadyClient(ServerConfig(url=server.url, retries=0, **{"wait": 20.0, **settings})) as client:
            record = fitted.parent / "published.json"
            label = await client.keep_published(lambda: publish(client, fitted, "value", fitted.parent, record))
            server.before = before or server.before
            guidance = Guidance(label, 0.1, 20, "qsharp", 2) if guided else None
            limit = asyncio.Semaphore(4)

            async def one(prompt: Any) -> Completion:
                async with limit:
                    return (await client.complete(prompt, 1, 7, Sampling(1.0, 1.0, 0, 9), guidance))[0]

            return list(await asyncio.gather(*(one(problem.prompt) for problem in PROBLEMS)))

    return asyncio.run(run())


def ask_one(server: StandInServer, before: Before) -> None:
    """A single request."""

    async def run() -> None:
        async with SteadyClient(ServerConfig(url=server.url, retries=0, wait=20.0)) as client:
            server.before = before
            await client.complete(PROBLEMS[0].prompt, 1, 7, Sampling(1.0, 1.0, 0, 9), None)

    asyncio.run(run())


def away_for(server: StandInServer, calls: int, first: int, then: Callable[[], None]) -> Before:
    """From completion `first` on, `calls` requests of any kind lose their connection; then the server is back."""
    lost = 0

    def before(path: str, body: Any) -> None:
        nonlocal lost
        if len(server.bodies(COMPLETIONS)) >= first and lost < calls:
            lost += 1
            if lost == calls:
                then()
            raise ConnectionAbortedError

    return before


@pytest.mark.parametrize("guided", [True, False])
def test_a_server_that_comes_back_empty_gets_the_value_model_again(fitted: Path, guided: bool) -> None:
    with StandInServer() as server:
        undisturbed = ask(server, fitted, guided)
        server.restart()

        def comes_back() -> None:
            server.versions[:] = [{"version": 1, "path": "started-with"}]

        completions = ask(server, fitted, guided, away_for(server, 9, len(server.bodies(COMPLETIONS)) + 6, comes_back))
    assert [completion.token_ids for completion in completions] == [completion.token_ids for completion in undisturbed]
    labels = {completion.value_model for completion in completions}
    assert labels == ({"value@1", "value@2"} if guided else {None})
    assert [version["path"] for version in server.versions] == ["started-with", "iteration-001"]


def test_a_server_that_goes_away_while_it_loads_a_value_model_is_waited_for(fitted: Path) -> None:
    with StandInServer() as server:

        def before(path: str, body: Any) -> None:
            if path == "/v1/guidance/value_models" and len(server.bodies(path)) == 1:
                raise ConnectionAbortedError

        server.before = before
        assert {completion.value_model for completion in ask(server, fitted, before=before)} == {"value@1"}
        assert len(server.bodies("/v1/guidance/value_models")) == 2


def test_answers_of_another_value_model_under_the_same_name_do_not_count(fitted: Path) -> None:
    """Restarted so quickly that no request notices."""
    with StandInServer() as server:

        def swap(path: str, body: Any) -> None:
            if path == COMPLETIONS and len(server.bodies(COMPLETIONS)) == 6:
                server.versions[:] = [{"version": 1, "path": "another"}]

        completions = ask(server, fitted, before=swap)
        asked = [body["guidance"]["value_model"] for body in server.bodies(COMPLETIONS)]
    by_label = [completion.value_model for completion in completions]
    # Those before the swap were confirmed; every answer after it came from what was published anew.
    assert by_label.count("value@1") <= 6
    assert by_label.count("value@2") >= 6
    assert asked.count("value@1") > by_label.count("value@1")


def test_a_version_that_is_gone_is_published_again(fitted: Path) -> None:
    error = {"error": {"message": "there is no value@1", "param": "guidance.value_model"}}
    with StandInServer() as server:

        def forgets(path: str, body: Any) -> tuple[int, Any] | None:
            if path == COMPLETIONS and len(server.bodies(COMPLETIONS)) == 3:
                server.restart()
            known = {f"value@{version['version']}" for version in server.versions}
            unknown = path == COMPLETIONS and body["guidance"]["value_model"] not in known
            return (400, error) if unknown else None

        assert len(ask(server, fitted, before=forgets)) == 12
        assert len(server.bodies("/v1/guidance/value_models")) == 2


def test_a_server_that_stays_away_for_too_long_is_an_error(fitted: Path) -> None:
    with StandInServer() as server:
        before = away_for(server, 10**6, 1, lambda: None)
        with pytest.raises(ServerError, match=r"away for 0.2 s \(server.wait\): start it; what is stored is kept"):
            ask(server, fitted, before=before, wait=0.2)


def test_a_request_that_always_fails_is_the_prompts_fault_when_the_server_is_well(fitted: Path) -> None:
    with StandInServer() as server:
        broken = {"error": {"message": "guidance failed"}}
        with pytest.raises(PromptRefusedError, match=r"answered 500: guidance failed \(3 times, while the"):
            ask(server, fitted, before=lambda path, body: (500, broken) if path == COMPLETIONS else None)


def test_a_request_that_always_breaks_the_server_ends_it() -> None:
    """After each failure the server is away for a while, as it is when its engine died."""
    away = False

    def dies(path: str, body: Any) -> tuple[int, Any] | None:
        nonlocal away
        if path == COMPLETIONS:
            away = True
            return 500, {"error": {"message": "the engine died"}}
        if path == "/health" and away:
            away = False
            return 503, {}
        return None

    with StandInServer() as server, pytest.raises(ServerAwayError, match="answered 500: the engine died"):
        ask_one(server, dies)


def test_another_model_after_the_restart_is_refused(fitted: Path) -> None:
    with StandInServer() as server:
        other = {"data": [{"id": "other", "max_model_len": 9}]}
        away = away_for(server, 3, 2, lambda: None)

        def before(path: str, body: Any) -> tuple[int, Any] | None:
            restarted = path == "/v1/models" and len(server.bodies(COMPLETIONS)) >= 2
            return (200, other) if restarted else away(path, body)

        with pytest.raises(ServerError, match=r"came back with \['other'\] instead of stand-in"):
            ask(server, fitted, before=before)


def test_a_refused_prompt_is_no_reason_to_wait(fitted: Path) -> None:
    with StandInServer() as server:
        refusal = {"error": {"message": "too long"}}
        with pytest.raises(PromptRefusedError, match="too long"):
            ask(server, fitted, before=lambda path, body: (400, refusal) if path == COMPLETIONS else None)
        assert server.bodies("/health") == []
