"""Publishing value models into the running server: versions, swaps under load, drain, refusals."""

import asyncio
import itertools
import json
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from low_rank_models import write_low_rank, write_merged
from qtilt.model.digest import content_digest
from qtilt.params import DEFAULT_TAIL
from real_server.checking import Oracle, Returned, encode
from real_server.models import ALPHABET, make_reference, make_tokenizer, make_value_model
from real_server.process import RunningServer
from real_server.state import versions
from real_server.streams import Streamed, StreamedChoice

SWAPS = 4
LONG = {"prompt": "long", "max_tokens": 4000, "stream": True}


@pytest.fixture
def publish(idle: RunningServer, oracle: Oracle) -> Callable[[str, str], httpx.Response]:
    """POST, and on success let the oracle know what the version is made of."""

    def send(name: str, path: str) -> httpx.Response:
        response = idle.post("/v1/guidance/value_models", {"name": name, "path": path})
        if response.status_code == 200:
            label = f"{name}@{response.json()['version']}"
            oracle.directories[label] = idle.value_model_root / path
        return response

    return send


@pytest.fixture(scope="module")
def root(models: Path) -> Path:
    """The value-model root with six more directories to publish."""
    root = models / "published"
    for seed in range(10, 16):
        make_value_model(root / f"model-{seed}", seed=seed)
    return root


def test_a_new_name_starts_at_version_1_and_can_be_used_at_once(
    client: OpenAI, idle: RunningServer, oracle: Oracle, publish: Any, root: Path
) -> None:
    response = publish("fresh", "model-10")
    assert response.json() == {
        "name": "fresh",
        "version": 1,
        "path": "model-10",
        "digest": content_digest(root / "model-10"),
        "type": "v",
        "distribution": {"name": "bernoulli"},
    }
    answer = guided(client, idle, "fresh")
    assert answer.guidance["value_model"] == "fresh@1"
    check(oracle, answer)


def test_the_next_version_is_active_and_the_one_before_can_be_named(
    client: OpenAI, idle: RunningServer, oracle: Oracle, publish: Any, root: Path
) -> None:
    assert [publish("steps", f"model-{seed}").json()["version"] for seed in (10, 11, 12)] == [1, 2, 3]
    assert {number: version["state"] for number, version in versions(idle, "steps").items()} == {
        2: "resident",
        3: "active",
    }
    for wanted, used in (("steps", "steps@3"), ("steps@3", "steps@3"), ("steps@2", "steps@2")):
        answer = guided(client, idle, wanted)
        assert answer.guidance["value_model"] == used
        check(oracle, answer)
    refused = idle.post("/v1/completions", {"model": idle.model, "prompt": "a", "guidance": {"value_model": "steps@1"}})
    assert refused.status_code == 400
    assert "has no version '1' loaded" in refused.json()["error"]["message"]


def test_low_rank_versions_of_the_served_model_are_merged_with_it(
    client: OpenAI, idle: RunningServer, oracle: Oracle, publish: Any, models: Path, tmp_path: Path
) -> None:
    for seed in (1, 2):
        directory = models / "published" / f"low-rank-{seed}"
        write_low_rank(directory, models / "reference", layers=1, seed=seed, name="/nowhere/else")
        label = f"lean@{publish('lean', directory.name).json()['version']}"
        oracle.directories[label] = write_merged(tmp_path / directory.name, directory, models / "reference")
    for version in ("lean@1", "lean@2"):
        answer = guided(client, idle, version)
        assert answer.guidance["value_model"] == version
        check(oracle, answer)


def test_a_low_rank_version_of_another_model_is_refused(
    idle: RunningServer, publish: Any, models: Path, tmp_path: Path
) -> None:
    other = make_reference(tmp_path / "other", seed=1)
    write_low_rank(models / "published" / "of-another", other, layers=1)
    shutil.rmtree(other)
    before = versions(idle, "value")
    response = publish("value", "of-another")
    assert response.status_code == 400
    message = response.json()["error"]["message"]
    assert re.search(r"of-another/value_model.json: its base .*reference: .* digest .*…, not .*…", message), message
    assert versions(idle, "value") == before


def test_a_version_is_rolled_back_and_another_unloaded(
    client: OpenAI, idle: RunningServer, oracle: Oracle, publish: Any, root: Path
) -> None:
    for path in ("model-10", "model-11"):
        assert publish("rolled", path).status_code == 200
    route = f"{idle.origin}/v1/guidance/value_models/rolled"
    assert httpx.delete(f"{route}/2", timeout=30).status_code == 409
    assert idle.post("/v1/guidance/value_models/rolled/activate", {"version": 7}).status_code == 404
    assert idle.post("/v1/guidance/value_models/rolled/activate", {"version": "1"}).status_code == 400
    status = idle.post("/v1/guidance/value_models/rolled/activate", {"version": 1}).json()
    (rolled,) = [entry for entry in status["value_models"] if entry["name"] == "rolled"]
    assert (rolled["active"], [version["state"] for version in rolled["versions"]]) == (1, ["active", "resident"])
    assert 'qtilt_active_version{value_model="rolled"} 1.0' in idle.get("/metrics").text
    assert guided(client, idle, f"rolled@{content_digest(root / 'model-11')}").guidance["value_model"] == "rolled@2"
    with pytest.raises(openai.BadRequestError, match="no version 'sha256:0"):
        guided(client, idle, f"rolled@sha256:{'0' * 64}")
    ready = idle.get("/v1/guidance/ready")
    assert (ready.status_code, ready.json()["ready"]) == (200, True)
    assert {"rolled@1", "rolled@2"} & {*ready.json()["active"]} == {"rolled@1"}
    answer = guided(client, idle, "rolled")
    assert answer.guidance["value_model"] == "rolled@1"
    check(oracle, answer)
    for number in (2, 1):
        assert httpx.delete(f"{route}/{number}", timeout=30).status_code == 200
    assert httpx.delete(f"{route}/1", timeout=30).status_code == 404
    assert "rolled" not in idle.get("/v1/guidance").text + idle.get("/v1/models").text
    assert 'qtilt_active_version{value_model="rolled"}' not in idle.get("/metrics").text
    assert publish("rolled", "model-12").json()["version"] == 3
    assert httpx.delete(f"{route}/3", timeout=30).status_code == 200


def test_concurrent_publications_take_their_turn(idle: RunningServer, publish: Any, root: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda seed: publish("turns", f"model-{seed}").json(), (10, 11, 12, 13)))
    assert sorted(answer["version"] for answer in answers) == [1, 2, 3, 4]
    paths = {answer["version"]: answer["path"] for answer in answers}
    assert {number: version["path"] for number, version in versions(idle, "turns").items()} == {
        3: paths[3],
        4: paths[4],
    }


def test_swaps_under_32_streams_leave_every_token_to_the_version_its_answer_names(
    idle: RunningServer, oracle: Oracle, publish: Any, root: Path
) -> None:
    publish("swapped", "model-10")
    choices = asyncio.run(swap_under_load(idle, publish))
    assert len(choices) >= 64
    labels = set()
    for choice in choices:
        assert choice.applied is not None
        labels.add(choice.applied["value_model"])
        returned = Returned(encode("swap"), choice.token_ids, choice.logprobs, choice.guidance)
        oracle.check(returned, choice.applied)
    assert len(labels) >= 3, "the streams were to run under several versions"
    assert_another_version_would_show(oracle, choices[-1])


async def swap_under_load(server: RunningServer, publish: Any) -> list[StreamedChoice]:
    """32 clients stream one answer after the other, at least two each, until there were enough swaps."""
    enough = asyncio.Event()
    async with AsyncOpenAI(base_url=server.base_url, api_key="none", max_retries=0, timeout=120) as client:
        clients = [asyncio.create_task(streams(client, server.model, seed, enough)) for seed in range(32)]
        swaps = 0
        while swaps < SWAPS:
            # A 409 is right when the older version is still in use; then the client tries again.
            path = f"model-{11 + swaps % 5}"
            swaps += (await asyncio.to_thread(publish, "swapped", path)).status_code == 200
        enough.set()
        return [choice for client_choices in await asyncio.gather(*clients) for choice in client_choices]


async def streams(client: AsyncOpenAI, model: str, seed: int, enough: asyncio.Event) -> list[StreamedChoice]:
    # With these seeds no step's last candidate is so near to the next token that rounding decides between them.
    guidance = {"value_model": "swapped", "tail": "floor"}
    choices: list[StreamedChoice] = []
    for turn in itertools.count():
        if turn >= 2 and enough.is_set():
            break
        streamed = Streamed()
        stream = await client.completions.create(
            model=model,
            prompt="swap",
            max_tokens=16 + seed // 2,
            logprobs=0,
            seed=100 * seed + turn,
            stream=True,
            extra_body={"guidance": guidance, "return_token_ids": True, "ignore_eos": True},
        )
        async for chunk in stream:
            streamed.add(chunk)
        choices += streamed.choices.values()
    return choices


def assert_another_version_would_show(oracle: Oracle, choice: StreamedChoice) -> None:
    """The check has teeth: under a version of other weights the same tokens have other probabilities."""
    assert choice.applied is not None
    returned = Returned(encode("swap"), choice.token_ids, choice.logprobs, choice.guidance)
    differences, _ = oracle.compare(returned, {**choice.applied, "value_model": "value@1"})
    assert max(differences) > 1e-2


@pytest.fixture
def endless(idle: RunningServer) -> Iterator[Callable[[str], None]]:
    """Start a stream on a value model that goes on until the test ends."""
    stop, threads = threading.Event(), []

    def start(value_model: str) -> None:
        started = threading.Event()
        threads.append(threading.Thread(target=_stream, args=(idle, value_model, started, stop)))
        threads[-1].start()
        assert started.wait(20)

    yield start
    stop.set()
    for thread in threads:
        thread.join(20)


def _stream(server: RunningServer, value_model: str, started: threading.Event, stop: threading.Event) -> None:
    body = {**LONG, "model": server.model, "ignore_eos": True, "guidance": {"value_model": value_model}}
    with httpx.stream("POST", f"{server.base_url}/completions", json=body, timeout=60) as response:
        for _ in response.iter_lines():
            started.set()
            if stop.is_set():
                return


def test_a_version_in_use_is_waited_for_then_409_and_all_is_as_before(
    client: OpenAI, idle: RunningServer, oracle: Oracle, publish: Any, root: Path, endless: Callable[[str], None]
) -> None:
    publish("drained", "model-10")
    endless("drained")
    assert publish("drained", "model-11").json()["version"] == 2
    before = versions(idle, "drained")
    assert before[1]["running"] == 1
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(publish, "drained", "model-12")
        idle.wait_until(lambda: versions(idle, "drained")[1]["state"] == "draining")
        refused = idle.post(
            "/v1/completions", {"model": idle.model, "prompt": "a", "guidance": {"value_model": "drained@1"}}
        )
        assert refused.status_code == 400
        assert "being unloaded" in refused.json()["error"]["message"]
        response = waiting.result(60)
    assert response.status_code == 409
    assert "drained@1 still guides 1 running request(s)" in response.json()["error"]["message"]
    assert versions(idle, "drained") == before
    for wanted in ("drained", "drained@1"):
        check(oracle, guided(client, idle, wanted))


def test_a_client_that_goes_away_lets_go_of_its_version(
    idle: RunningServer, publish: Any, root: Path, endless: Callable[[str], None]
) -> None:
    publish("left", "model-10")
    body = {**LONG, "model": idle.model, "ignore_eos": True, "guidance": {"value_model": "left"}, "n": 2}
    with httpx.stream("POST", f"{idle.base_url}/completions", json=body, timeout=60) as response:
        lines = response.iter_lines()  # httpx closes the connection when this goes away
        next(lines)
        assert versions(idle, "left")[1]["running"] == 1
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{idle.base_url}/completions", json={**body, "stream": False}, timeout=0.5)
    chat = {"model": idle.model, "messages": [{"role": "user", "content": "a"}], "max_tokens": 4000}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{idle.base_url}/chat/completions", json={**body, **chat, "stream": False}, timeout=0.5)
    idle.wait_until(lambda: versions(idle, "left")[1]["running"] == 0)
    assert [publish("left", f"model-{seed}").json()["version"] for seed in (11, 12)] == [2, 3]


def test_an_error_in_the_engine_ends_the_request_and_lets_go_of_its_version(idle: RunningServer) -> None:
    """vLLM ends a request in error when its grammar and its vocabulary have no token in common."""
    body = {"model": idle.model, "prompt": "a", "structured_outputs": {"choice": ["aé"]}, "guidance": {}}
    assert idle.post("/v1/completions", body).status_code == 500
    stream = idle.post("/v1/completions", {**body, "stream": True})
    events = [line.removeprefix("data: ") for line in stream.text.splitlines() if line.startswith("data: ")]
    assert json.loads(events[-2])["error"]["code"] == 500
    assert events[-1] == "[DONE]"


BROKEN = (
    "no-manifest",
    "manifest-not-json",
    "wrong-format-version",
    "truncated-head",
    "truncated-backbone",
    "no-backbone-config",
    "head-of-another-shape",
    "not-finite",
    "other-vocabulary",
    "too-few-positions",
    "leads-outside",
)


@pytest.fixture(scope="module")
def broken(root: Path, models: Path) -> dict[str, str]:
    """Directories below broken/, each wrong in one way, and what a refusal must mention."""
    good = root / "start"
    manifest = json.loads((good / "value_model.json").read_text())
    for name in BROKEN[:8]:
        shutil.copytree(good, root / "broken" / name)
    directory = root / "broken"
    (directory / "no-manifest" / "value_model.json").unlink()
    (directory / "manifest-not-json" / "value_model.json").write_text('{"format_version": 1')
    (directory / "wrong-format-version" / "value_model.json").write_text(json.dumps({**manifest, "format_version": 99}))
    _truncate(directory / "truncated-head" / "head.safetensors")
    _truncate(directory / "truncated-backbone" / "backbone" / "model.safetensors")
    (directory / "no-backbone-config" / "backbone" / "config.json").unlink()
    shutil.copy(root / "graded" / "head.safetensors", directory / "head-of-another-shape" / "head.safetensors")
    _make_not_finite(directory / "not-finite" / "head.safetensors")
    make_value_model(directory / "other-vocabulary", seed=1, tokenizer=make_tokenizer(ALPHABET[::-1]))
    make_value_model(directory / "too-few-positions", seed=1, positions=64)
    make_value_model(models / "outside", seed=1)
    (directory / "leads-outside").symlink_to(models / "outside")
    return {
        "no-manifest": "value_model.json",
        "manifest-not-json": "value_model.json: not valid JSON",
        "wrong-format-version": "value_model.json: format_version is 99",
        "truncated-head": "head.safetensors",
        "truncated-backbone": "backbone",
        "no-backbone-config": "config.json",
        "head-of-another-shape": "head.safetensors",
        "not-finite": "not finite",
        "other-vocabulary": "ordinary tokens",
        "too-few-positions": "covers 64 positions",
        "leads-outside": "stay below it",
    }


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_directory_is_refused_and_nothing_changes(
    idle: RunningServer, publish: Any, broken: dict[str, str], name: str
) -> None:
    before = idle.get("/v1/guidance").json()
    response = publish("value", f"broken/{name}")
    assert response.status_code == 400
    error = response.json()["error"]
    assert broken[name] in error["message"]
    assert str(idle.value_model_root) not in error["message"]
    assert idle.get("/v1/guidance").json() == before


@pytest.mark.parametrize(
    "body",
    [
        {"name": "value", "path": "../published/start"},
        {"name": "value", "path": "/etc"},
        {"name": "value", "path": "nothing"},
        {"name": "value", "path": "start/value_model.json"},
        {"name": "value", "path": ""},
        {"name": "value"},
        {"name": "a@1", "path": "start"},
        {"name": "value", "path": "start", "version": 7},
        {"name": True, "path": "start"},
        [],
    ],
    ids=repr,
)
def test_a_bad_publish_request_is_refused(idle: RunningServer, body: Any) -> None:
    before = idle.get("/v1/guidance").json()
    response = idle.post("/v1/guidance/value_models", body)
    assert response.status_code == 400
    assert {"message", "type", "param", "code"} <= set(response.json()["error"])
    assert idle.get("/v1/guidance").json() == before


def test_status_tells_what_is_loaded_and_the_defaults(idle: RunningServer) -> None:
    status = idle.get("/v1/guidance").json()
    assert status["defaults"] == {
        "value_model": "value",
        "eta": 0.2,
        "top_k": 8,
        "method": "qsharp",
        "tail": DEFAULT_TAIL,
    }
    assert status["max_top_k"] == 64
    assert status["value_model_root"] == str(idle.value_model_root)
    assert [entry["name"] for entry in status["value_models"]][:2] == ["value", "graded"]
    assert versions(idle, "graded")[1]["distribution"] == {
        "name": "categorical",
        "low": -1.0,
        "high": 1.0,
        "atoms": 5,
    }
    assert versions(idle, "value")[1]["rollouts"] == {"temperature": 1.0, "top_p": 1.0, "top_k": 0}


def test_sampling_that_differs_from_the_rollouts_is_warned_about_once(client: OpenAI, idle: RunningServer) -> None:
    told = []
    for temperature in (0.625, 0.5, 0.375):
        client.completions.create(
            model=idle.model, prompt="a", max_tokens=1, temperature=temperature, extra_body={"guidance": {}}
        )
        told.append(len(re.findall(r"value@1 was fitted on roll-outs .* requests ask for", idle.log.read_text())))
    # Others may have been told of before: this server has had many requests.
    assert told[0] >= 1
    assert told == [told[0]] * 3


def test_metrics_are_on_vllms_own_route(client: OpenAI, idle: RunningServer) -> None:
    client.completions.create(model=idle.model, prompt="a", max_tokens=2, extra_body={"guidance": {}})
    metrics = idle.get("/metrics").text
    for line in (
        'qtilt_guided_requests_total{method="qsharp",value_model="value",version="1"}',
        'qtilt_guided_tokens_total{value_model="value",version="1"}',
        'qtilt_guided_kl_nats_total{value_model="value",version="1"}',
        'qtilt_choice_kl_nats_count{value_model="value",version="1"}',
        'qtilt_scored_candidates_total{value_model="value",version="1"}',
        'qtilt_active_version{value_model="graded"} 1.0',
        "vllm:num_requests_running",
    ):
        assert line in metrics


def guided(client: OpenAI, server: RunningServer, value_model: str) -> Any:
    return client.completions.create(
        model=server.model,
        prompt="abc",
        max_tokens=8,
        logprobs=0,
        extra_body={"guidance": {"value_model": value_model}, "return_token_ids": True},
    )


def check(oracle: Oracle, answer: Any) -> None:
    (choice,) = answer.choices
    returned = Returned(encode("abc"), choice.token_ids, choice.logprobs.token_logprobs, choice.guidance)
    oracle.check(returned, answer.guidance)


def _truncate(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def _make_not_finite(path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    tensors["weight"][0, 0] = float("nan")
    save_file(tensors, path)
