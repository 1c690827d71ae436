"""``/playground`` in a real browser, asking the real server: what is typed goes out, and what comes back is shown."""

import json
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from browser import find_chromium, headless
from real_server.process import RunningServer
from real_server.state import running

playwright = pytest.importorskip("playwright.sync_api", reason="playwright isn't installed: make install-clients")
expect = playwright.expect

CHROMIUM = find_chromium()
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="there is no Chromium: make install-browser, or name one with QTILT_CHROMIUM"
)
LIMIT_MS = 15_000
VIEWPORT = {"width": 1280, "height": 900}
WITHOUT_END = {"ignore_eos": True}
MARKUP = "<img src=x onerror=document.title=1>"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    assert CHROMIUM is not None
    with headless(CHROMIUM) as browser:
        yield browser


@pytest.fixture
def open_page(browser: Any, idle: RunningServer) -> Iterator[Callable[..., Any]]:
    """Opens pages; fails when one wrote an error to the console or asked another host for anything."""
    wrong: list[str] = []
    contexts = []

    def open_page(path: str = "/playground", ready: bool = True, prepare: Any = None, **options: Any) -> Any:
        context = browser.new_context(**{"viewport": VIEWPORT, **options})
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(LIMIT_MS)
        # An answer of 4xx is the browser's own error; the tests that mean to get one look at it themselves.
        page.on(
            "console", lambda said: said.type == "error" and "status of 4" not in said.text and wrong.append(said.text)
        )
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda request: request.url.startswith(f"{idle.origin}/") or wrong.append(request.url))
        if prepare:
            prepare(page)
        page.goto(f"{idle.origin}{path}")
        if ready:
            expect(page.locator("#status")).to_have_attribute("data-state", "ready", timeout=LIMIT_MS)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not wrong


@pytest.fixture
def page(open_page: Callable[..., Any]) -> Any:
    return open_page()


def requests_of(page: Any) -> list[dict[str, Any]]:
    """The bodies of the requests for completions, from now on."""
    bodies: list[dict[str, Any]] = []
    page.on("request", lambda asked: asked.url.endswith("completions") and bodies.append(json.loads(asked.post_data)))
    return bodies


def without_end(page: Any) -> None:
    """The tiny reference soon says that it has ended; its requests say from now on that it shall go on."""

    def change(route: Any) -> None:
        route.continue_(post_data=json.dumps({**json.loads(route.request.post_data), **WITHOUT_END}))

    page.route("**/v1/*completions", change)
    page.route("**/v1/chat/completions", change)


def settings(page: Any, **fields: object) -> None:
    page.locator("#more").evaluate("element => { element.open = true }")
    for name, value in fields.items():
        page.locator(f"#{name.replace('_', '-')}").fill(str(value))


def wait_for_both(page: Any) -> None:
    expect(page.locator("#reference .sum")).to_contain_text("tokens", timeout=LIMIT_MS)
    expect(page.locator("#guided .sum")).to_contain_text("KL", timeout=LIMIT_MS)
    expect(page.locator("[aria-busy=true]")).to_have_count(0)


def only(bodies: list[dict[str, Any]], *, guided: bool) -> dict[str, Any]:
    (body,) = [body for body in bodies if ("guidance" in body) == guided]
    return body


def ask_again(server: RunningServer, body: dict[str, Any]) -> dict[str, Any]:
    """The same request without an end, whole."""
    whole = {key: value for key, value in {**body, **WITHOUT_END}.items() if key not in ("stream", "stream_options")}
    answer = server.post("/v1/chat/completions" if "messages" in body else "/v1/completions", whole)
    assert answer.status_code == 200, answer.text
    return dict(answer.json()["choices"][0])


def percent(logprob: float) -> float:
    return 100 * math.exp(logprob)


def shown(text: str) -> float:
    return float(text.replace("<", "").replace("−", "-"))


def stream_of(*chunks: dict[str, Any]) -> dict[str, Any]:
    """What a route fulfils a request with."""
    events = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks)
    return {"status": 200, "content_type": "text/event-stream", "body": f": hello\n\n{events}data: [DONE]\n\n"}


def detail(token: str, value: float | None = 0.5) -> dict[str, Any]:
    candidates = {"token_ids": [7], "tokens": [token], "reference_logprobs": [-1.0], "guided_logprobs": [-0.5]}
    return {
        "token_id": 7,
        "token": token,
        "reference_logprob": -1.0,
        "guided_logprob": -0.5,
        "value": value,
        "offset": 0.0,
        "kl": 0.1,
        "entropy": 0.2,
        "candidates": {**candidates, "values": [value]},
    }


def test_the_pickers_hold_what_the_server_has(page: Any, idle: RunningServer) -> None:
    status = idle.get("/v1/guidance").json()
    names = page.locator("#value-model option").all_text_contents()
    assert names == [each["name"] for each in status["value_models"]]
    assert page.locator("#model option").all_text_contents() == [idle.model], "not the names that guide by themselves"
    assert page.locator("#eta").input_value() == "0.2"
    assert page.locator("#top-k").input_value() == "8"
    assert page.locator("#kind").input_value() == "chat"
    page.select_option("#value-model", "graded")
    versions = page.locator("#version option").all_text_contents()
    assert versions == ["the active one, 1", "1, q-type, graded"]
    assert (page.inner_text("#least"), page.inner_text("#most")) == ("−1.00", "1.00"), "its lowest and highest return"


def test_type_and_send_and_both_answers_stream(page: Any, idle: RunningServer) -> None:
    without_end(page)
    bodies = requests_of(page)
    page.evaluate(
        """() => {
          window.lengths = {reference: new Set(), guided: new Set()};
          for (const [name, seen] of Object.entries(window.lengths)) {
            const text = document.querySelector(`#${name} .text`);
            new MutationObserver(() => seen.add(text.textContent.length)).observe(
              text, {childList: true, subtree: true, characterData: true});
          }
        }"""
    )
    page.fill("#prompt", "tell me about abc")
    settings(page, max_tokens=300, seed=5)
    page.click("#send")
    wait_for_both(page)
    reference, guided = only(bodies, guided=False), only(bodies, guided=True)
    assert {**guided, "guidance": None} == {**reference, "guidance": None}, "the same seed, the same prompt"
    assert reference["messages"] == [{"role": "user", "content": "tell me about abc"}]
    assert (reference["seed"], reference["max_tokens"], reference["stream"]) == (5, 300, True)
    assert guided["guidance"]["details"] is True
    for name in ("reference", "guided"):
        assert page.evaluate(f"window.lengths.{name}.size") > 2, "it grew"
    assert page.inner_text("#reference .text") == ask_again(idle, reference)["message"]["content"]
    choice = ask_again(idle, guided)
    assert page.locator("#guided .token:not(.unsaid)").count() == len(choice["message"]["content"])
    said = "".join(page.locator("#guided .token:not(.unsaid)").all_text_contents())
    assert said == choice["message"]["content"]


def test_each_token_is_coloured_by_its_value_and_shows_its_candidates(page: Any, idle: RunningServer) -> None:
    without_end(page)
    bodies = requests_of(page)
    settings(page, max_tokens=12, seed=3, top_k=4)
    page.select_option("#kind", "completion")
    page.click("#send")
    wait_for_both(page)
    details = ask_again(idle, only(bodies, guided=True))["guidance"]["details"]
    tokens = page.locator("#guided .token")
    expect(tokens).to_have_count(len(details))
    scored = [each["value"] is not None for each in details]
    assert tokens.evaluate_all("all => all.map(each => each.classList.contains('scored'))") == scored
    distances = tokens.evaluate_all("all => all.map(each => parseFloat(each.style.getPropertyValue('--distance')))")
    for distance, each in zip(distances, details, strict=True):
        if each["value"] is not None:
            assert distance == pytest.approx(200 * abs(each["value"] - 0.5), abs=0.1), "Bernoulli: from 0 to 1"
    backgrounds = tokens.evaluate_all("all => all.map(each => getComputedStyle(each).backgroundColor)")
    by_value = {each["value"]: colour for each, colour in zip(details, backgrounds, strict=True)}
    assert len(set(by_value.values())) == len(by_value)
    for index, each in enumerate(details):
        tokens.nth(index).hover()
        expect(page.locator("#inspector-title")).to_contain_text(f"{index + 1} of {len(details)}")
        rows = page.locator("#inspector tbody tr").evaluate_all(
            "rows => rows.map(row => [...row.querySelectorAll('td:not(.bars)')].map(cell => cell.textContent))"
        )
        candidates = each["candidates"]
        for k, (before, after, value) in enumerate(rows[: len(candidates["token_ids"])]):
            assert shown(before) == pytest.approx(percent(candidates["reference_logprobs"][k]), abs=0.06)
            assert shown(after) == pytest.approx(percent(candidates["guided_logprobs"][k]), abs=0.06)
            assert shown(value) == pytest.approx(candidates["values"][k], abs=0.006)
        drawn = page.locator("#inspector tbody tr[aria-current=true]")
        expect(drawn).to_have_count(1)
        assert ("outside" in (drawn.get_attribute("class") or "")) is (each["token_id"] not in candidates["token_ids"])
        facts = page.inner_text("#inspector dl")
        assert f"{each['kl']:.4f}" in facts
        assert f"{each['offset']:.3f}".replace("-", "−") in facts or abs(each["offset"]) < 0.0006
    assert float(re.findall(r"KL ([\d.]+)", page.inner_text("#guided .sum"))[0]) == pytest.approx(
        sum(each["kl"] for each in details), abs=0.006
    )


def test_colours_over_the_range_of_the_answer(page: Any, idle: RunningServer) -> None:
    without_end(page)
    settings(page, max_tokens=12, seed=3)
    page.click("#send")
    wait_for_both(page)
    distances = "all => all.map(each => parseFloat(each.style.getPropertyValue('--distance')))"
    before = page.locator("#guided .token.scored").evaluate_all(distances)
    page.check("#stretch")
    least, most = (shown(page.inner_text(f"#{end}")) for end in ("least", "most"))
    assert 0 < least < most < 1
    after = page.locator("#guided .token.scored").evaluate_all(distances)
    assert max(after) == 100 > max(before)
    assert after.count(100) == 2, "the least and the most valuable"


def test_the_curves_have_a_point_for_each_token_and_lead_to_it(page: Any, idle: RunningServer) -> None:
    without_end(page)
    settings(page, max_tokens=20, seed=1)
    page.click("#send")
    wait_for_both(page)
    count = page.locator("#guided .token").count()
    points = page.locator("#kl-curve path.now").get_attribute("d").count("L") + 1
    assert points == count
    heights = [float(y) for y in re.findall(r" ([\d.]+)", page.locator("#kl-curve path.now").get_attribute("d"))]
    assert heights == sorted(heights, reverse=True), "a sum of what is never negative rises"
    box = page.locator("#kl-curve svg").bounding_box()
    page.mouse.move(box["x"] + box["width"] - 12, box["y"] + box["height"] / 2)
    expect(page.locator("#inspector-title")).to_contain_text(f"{count} of {count}")
    expect(page.locator("#guided .token[aria-selected=true]")).to_have_count(1)
    expect(page.locator("#value-curve line.mark")).to_have_count(1)


def test_another_eta_asks_again_for_the_guided_answer_only(page: Any, idle: RunningServer) -> None:
    bodies = requests_of(page)
    settings(page, max_tokens=8)
    page.click("#send")
    wait_for_both(page)
    expect(page.locator("#again")).to_be_hidden()
    before = page.inner_text("#reference .text")
    page.locator("#eta-slider").focus()
    page.keyboard.press("End")
    assert page.locator("#eta").input_value() == "10"
    page.click("#again")
    wait_for_both(page)
    first, second = [body for body in bodies if "guidance" in body]
    assert (first["guidance"]["eta"], second["guidance"]["eta"]) == (0.2, 10)
    assert {**first["guidance"], "eta": 10} == second["guidance"]
    assert first["seed"] == second["seed"]
    assert len(bodies) == 3
    assert page.inner_text("#reference .text") == before
    expect(page.locator("#guided .applied")).to_contain_text("η 10,")
    page.check("#live")
    page.fill("#eta", "0.05")
    page.keyboard.press("Tab")
    expect(page.locator("#guided .applied")).to_contain_text("η 0.05,")
    assert bodies[-1]["guidance"]["eta"] == 0.05
    assert float(page.locator("#eta-slider").input_value()) == pytest.approx(math.log10(0.05), abs=0.01)
    expect(page.locator("#kl-curve path.before")).to_have_attribute("d", re.compile("L"))


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("top-k", "0", "guidance.top_k"),
        ("eta", "strong", "guidance.eta"),
        ("temperature", "-1", "temperature"),
        ("top-k", "9999", "guidance.top_k"),
    ],
)
def test_what_the_server_refuses_is_shown_and_its_field_marked(
    page: Any, idle: RunningServer, field: str, value: str, named: str
) -> None:
    settings(page, **{field: value})
    page.click("#send")
    error = page.locator("#guided .error")
    expect(error).to_be_visible()
    expect(error.locator("b")).to_have_text("400")
    expect(error.locator("strong")).to_have_text(named)
    expect(page.locator(f"#{field}")).to_have_attribute("aria-invalid", "true")
    expect(page.locator("[aria-invalid=true]")).to_have_count(1)
    if named.startswith("guidance."):
        expect(page.locator("#reference .error")).to_be_hidden()
    settings(page, **{field: "1"}, max_tokens=4)
    page.click("#send")
    wait_for_both(page)
    expect(error).to_be_hidden()
    expect(page.locator("[aria-invalid=true]")).to_have_count(0)


def test_both_answers_may_be_refused_for_reasons_of_their_own(page: Any, idle: RunningServer) -> None:
    settings(page, temperature="-1", top_k="0")
    page.click("#send")
    expect(page.locator("#reference .error strong")).to_have_text("temperature")
    expect(page.locator("#guided .error strong")).to_have_text("guidance.top_k")
    for field in ("temperature", "top-k"):
        expect(page.locator(f"#{field}")).to_have_attribute("aria-invalid", "true")


def test_nothing_is_left_of_an_answer_that_another_takes_the_place_of(page: Any, idle: RunningServer) -> None:
    without_end(page)
    settings(page, max_tokens=4000)
    page.click("#send")
    expect(page.locator("#guided .token").nth(5)).to_be_attached()
    settings(page, max_tokens=3)
    page.click("#send")
    wait_for_both(page)
    expect(page.locator("#guided .token")).to_have_count(3)
    settings(page, top_k="0")
    page.click("#send")
    expect(page.locator("#guided .error")).to_be_visible()
    expect(page.locator("#guided .token")).to_have_count(0)
    expect(page.locator("#guided .applied")).to_have_text("steered, token by token")


def test_a_value_model_that_has_gone_is_an_error_too(page: Any, idle: RunningServer) -> None:
    page.locator("#value-model").evaluate(
        "select => { select.append(new Option('gone', 'gone')); select.value = 'gone' }"
    )
    page.click("#send")
    expect(page.locator("#guided .error strong")).to_have_text("guidance.value_model")
    expect(page.locator("#guided .error")).to_contain_text("gone")


def test_guidance_that_fails_on_the_way_is_shown_under_what_came(open_page: Callable[..., Any]) -> None:
    chunk = {
        "choices": [
            {"index": 0, "delta": {"content": "so "}, "finish_reason": None, "guidance": {"details": [detail("so ")]}}
        ]
    }
    failed = {"error": {"message": "guidance failed in value model value@1", "type": "x", "param": None, "code": 500}}
    page = open_page()
    page.route("**/v1/chat/completions", lambda route: route.fulfill(**stream_of(chunk, failed)))
    page.click("#send")
    expect(page.locator("#guided .error")).to_contain_text("500")
    expect(page.locator("#guided .error")).to_contain_text("guidance failed in value model value@1")
    expect(page.locator("#guided .token")).to_have_count(1)


def test_stop_ends_both_in_the_server(page: Any, idle: RunningServer) -> None:
    settings(page, max_tokens=4000, seed=8)
    without_end(page)
    page.click("#send")
    expect(page.locator("#guided .token").nth(3)).to_be_visible()
    assert running(idle) == 1
    page.keyboard.press("Escape")
    idle.wait_until(lambda: running(idle) == 0)
    expect(page.locator("[aria-busy=true]")).to_have_count(0)
    expect(page.locator("#stop")).to_be_disabled()
    expect(page.locator("#guided .error")).to_be_hidden()
    assert page.locator("#guided .token").count() < 4000


def test_with_the_keyboard_alone(page: Any, idle: RunningServer) -> None:
    without_end(page)
    focused = "document.activeElement.id || document.activeElement.className"
    while page.evaluate(focused) != "prompt":
        page.keyboard.press("Tab")
    page.keyboard.press("Control+a")
    page.keyboard.type("abc")
    bodies = requests_of(page)
    page.keyboard.press("Control+Enter")
    wait_for_both(page)
    assert only(bodies, guided=True)["messages"][0]["content"] == "abc"
    for _ in range(40):
        page.keyboard.press("Tab")
        if "token" in page.evaluate(focused):
            break
    count = page.locator("#guided .token").count()
    title = page.locator("#inspector-title")
    expect(title).to_contain_text(f"1 of {count}")
    for key, reached in (("ArrowRight", 2), ("ArrowRight", 3), ("ArrowLeft", 2), ("End", count), ("Home", 1)):
        page.keyboard.press(key)
        expect(title).to_contain_text(f"{reached} of {count}")
        assert page.evaluate("Number(document.activeElement.dataset.index)") == reached - 1
    bottom = "document.activeElement.getClientRects()[0].bottom"
    above = page.evaluate(bottom)
    page.keyboard.press("ArrowDown")
    assert above + 15 < page.evaluate(bottom) < above + 60, "in the line below"
    page.keyboard.press("ArrowUp")
    assert page.evaluate(bottom) == pytest.approx(above, abs=10)
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid", "one sees where one is"
    expect(page.locator("#guided .token[tabindex='0']")).to_have_count(1)


def test_every_field_has_a_name(page: Any) -> None:
    unnamed = page.evaluate(
        """() => [...document.querySelectorAll("input, select, textarea, button")].filter((each) =>
          !each.labels?.length && !each.ariaLabel && !each.textContent.trim()).map((each) => each.id)"""
    )
    assert unnamed == []
    expect(page.locator("[aria-live=polite]")).to_have_count(2)


def test_what_is_read_out_is_the_answer(page: Any, idle: RunningServer) -> None:
    without_end(page)
    settings(page, max_tokens=30)
    page.click("#send")
    wait_for_both(page)
    assert page.locator("#reference .spoken").text_content() == page.locator("#reference .text").text_content()
    said = "".join(page.locator("#guided .token:not(.unsaid)").all_text_contents())
    assert page.locator("#guided .spoken").text_content() == said


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_all_without_scrolling_sideways(open_page: Callable[..., Any], scheme: str) -> None:
    page = open_page(viewport={"width": 360, "height": 700}, has_touch=True, color_scheme=scheme)
    without_end(page)
    width = "document.documentElement.scrollWidth"
    assert page.evaluate(width) == 360
    settings(page, max_tokens=120)
    page.tap("#send")
    wait_for_both(page)
    assert page.evaluate(width) == 360
    page.locator("#guided .token").nth(2).tap()
    expect(page.locator("#inspector")).to_have_css("position", "fixed")
    expect(page.locator("#inspector tbody tr").first).to_be_visible()
    assert page.evaluate(width) == 360
    page.tap("#close")
    expect(page.locator("#inspector")).not_to_have_css("position", "fixed")


def test_markup_is_text_wherever_it_comes_from(open_page: Callable[..., Any]) -> None:
    said = {"index": 0, "delta": {"content": MARKUP}, "finish_reason": "stop"}
    guided = {**said, "guidance": {"guided_tokens": 1, "kl": 0.1, "mass": 1.0, "details": [detail(MARKUP)]}}
    applied = {"value_model": MARKUP, "eta": 0.1, "top_k": 1, "method": "qsharp", "tail": "mean"}

    def answer(route: Any) -> None:
        chunk = {"choices": [guided if "guidance" in route.request.post_data else said], "guidance": applied}
        route.fulfill(**stream_of(chunk))

    page = open_page()
    page.route("**/v1/chat/completions", answer)
    page.fill("#prompt", MARKUP)
    page.click("#send")
    expect(page.locator("#reference .text")).to_have_text(MARKUP)
    expect(page.locator("#guided .token")).to_have_text(MARKUP)
    page.locator("#guided .token").hover()
    expect(page.locator("#inspector tbody th")).to_have_text(MARKUP.replace(" ", "␣"))
    page.unroute("**/v1/chat/completions")
    refused = {"error": {"message": MARKUP, "param": MARKUP, "code": 400, "type": "x"}}
    page.route("**/v1/chat/completions", lambda route: route.fulfill(status=400, json=refused))
    page.click("#send")
    expect(page.locator("#guided .error")).to_contain_text(MARKUP)
    assert page.locator("main img").count() == 0
    assert page.title() == "qtilt playground"


def test_a_key_goes_with_every_request_and_into_no_address(open_page: Callable[..., Any], idle: RunningServer) -> None:
    asked = []

    def guard(route: Any) -> None:
        asked.append(route.request.url)
        if route.request.headers.get("authorization") == "Bearer sesame":
            route.continue_()
        else:
            route.fulfill(status=401, json={"error": "Unauthorized"})

    page = open_page(ready=False, prepare=lambda page: page.route("**/v1/**", guard))
    expect(page.locator("#status")).to_have_text("this server wants its API key")
    expect(page.locator("#api-key")).to_be_focused()
    page.keyboard.type("sesame")
    page.keyboard.press("Enter")
    expect(page.locator("#status")).to_have_attribute("data-state", "ready")
    expect(page.locator("#api-key")).to_be_hidden()
    settings(page, max_tokens=4)
    page.click("#send")
    wait_for_both(page)
    page.reload()
    expect(page.locator("#status")).to_have_attribute("data-state", "ready")
    assert not any("sesame" in url for url in [*asked, page.url])
    assert page.evaluate("Object.values(localStorage).length + document.cookie.length") == 0
    other = open_page(ready=False, prepare=lambda page: page.route("**/v1/**", guard))
    expect(other.locator("#status")).to_have_text("this server wants its API key")


def test_below_a_prefix(open_page: Callable[..., Any], idle: RunningServer) -> None:
    """Of a proxy that takes it away."""
    inside = f"{idle.origin}/some/where"
    urls: list[str] = []

    def forward(route: Any) -> None:
        urls.append(route.request.url)
        route.fulfill(response=route.fetch(url=route.request.url.replace(inside, idle.origin)))

    page = open_page("/some/where/playground", prepare=lambda page: page.route("**/*", forward))
    settings(page, max_tokens=4)
    page.click("#send")
    wait_for_both(page)
    assert all(url.startswith(f"{inside}/") for url in urls)


def test_a_model_without_a_chat_template_is_asked_to_complete(open_page: Callable[..., Any]) -> None:
    refusal = {"error": {"message": "no chat template", "type": "BadRequestError", "param": None, "code": 400}}
    page = open_page(
        prepare=lambda page: page.route("**/tokenize", lambda route: route.fulfill(status=400, json=refusal))
    )
    expect(page.locator("#kind")).to_have_value("completion")
    bodies = requests_of(page)
    settings(page, max_tokens=4)
    page.click("#send")
    wait_for_both(page)
    assert {"prompt" in body for body in bodies} == {True}


@pytest.mark.parametrize(
    ("text", "tokens", "pieces"),
    [
        ("it is", ["it", " is"], ["it", " is"]),
        ("it is", ["it", "is"], ["it", " is"]),  # SentencePiece: alone a token has lost its space
        ("a 猫 b", ["a", " \ufffd", "\ufffd", " b"], ["a", None, " 猫", " b"]),  # some bytes of a character
        ("猫", ["\ufffd", "\ufffd"], [None, "猫"]),
        ("end", ["end", "<|im_end|>"], ["end", None]),
        ("a a", ["a", " a", " a"], ["a", " a", None]),
        ("", ["<|im_end|>"], [None]),
        ("a\n b", ["a", "\n", " ", "b"], ["a", "\n", " ", "b"]),
        ("a b", ["a", "", "b"], ["a", None, " b"]),
    ],
)
def test_each_token_is_shown_as_its_part_of_the_text(
    page: Any, text: str, tokens: list[str], pieces: list[str | None]
) -> None:
    found = page.evaluate(
        """async ([text, tokens]) => {
          const { Answer } = await import("/playground/answer.js");
          const choice = { text, finish_reason: "stop", guidance: { details: tokens.map((token) => ({ token })) } };
          const answer = new Answer();
          answer.add({ choices: [choice] });
          return answer.pieces;
        }""",
        [text, tokens],
    )
    assert found == {"pieces": pieces, "left": ""}


def test_events_are_read_however_their_bytes_are_cut(page: Any) -> None:
    stream = ': ping\r\n\r\ndata: {"a": "猫"}\r\n\r\ndata: {"b":\ndata: 2}\n\n: ping\n\ndata: [DONE]\n\n'
    for size in (1, 2, 7, 1000):
        found = page.evaluate(
            """async ([text, size]) => {
              const { events } = await import("/playground/sse.js");
              const bytes = new TextEncoder().encode(text);
              const body = new ReadableStream({ start(controller) {
                for (let at = 0; at < bytes.length; at += size) controller.enqueue(bytes.slice(at, at + size));
                controller.close();
              } });
              const found = [];
              for await (const event of events(body)) found.push(event);
              return found;
            }""",
            [stream, size],
        )
        assert found == [{"a": "猫"}, {"b": 2}]
