"""The page in a real browser."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from threading import Thread

import openai
import pytest
import uvicorn
from fastapi import FastAPI
from fastapi.responses import JSONResponse, StreamingResponse
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webdriver import WebDriver

from rlkv_vllm.allocation.heads import allocate
from rlkv_vllm.bench.server import free_port
from rlkv_vllm.profile.lookup import find_profile
from rlkv_vllm.serving.endpoint import RlkvEndpoint
from rlkv_vllm.serving.page import page as show_page
from rlkv_vllm.serving.status import CacheFigures, split_status
from tests.support.asking import ask, is_right, problems
from tests.support.page import Page
from tests.support.plans import BLOCKS, make_plan
from tests.support.server import KEY, Server, wait_for

#: Runs script if a page takes it for HTML.
HTML = '<img src=x onerror="window.hacked=1"><script>window.hacked=1</script>'


@pytest.fixture
def page(browser: WebDriver, server: Server) -> Page:
    return Page(browser, server.url)


def test_ask_and_see_reasoning_answer_and_the_meter_move(page: Page, client: openai.OpenAI) -> None:
    page.unlock()
    page.wait_for("state", lambda: page.get("state").text == "split active")
    assert page.get("model").text == "embedded"
    page.watch_meter()
    problem = max(problems(per_family=2), key=lambda problem: len(problem.thought))
    page.get("question").clear()
    page.get("question").send_keys(problem.prompt)
    page.get("temperature").send_keys("0")
    # Somebody else's long answer: the page's own may be over before it looks at the meter again.
    # Not before the typing, which takes seconds on a busy machine.
    others = ThreadPoolExecutor(1).submit(
        ask, client, problem, max_tokens=1500, extra_body={"ignore_eos": True}
    )
    page.get("question").send_keys(Keys.CONTROL, Keys.ENTER)
    page.wait_for("answer", lambda: "tokens in" in page.get("answer-note").text)
    assert is_right(page.get("answer").text, problem)
    assert len(page.get("thought").text.split()) > 20
    page.wait_for("meter", lambda: page.browser.execute_script("return window.most") > 0)
    others.result(120)
    page.wait_for("idle again", lambda: page.get("held").text == "0 B")
    assert page.errors() == []


def test_head_map_tells_kind_and_gate_to_mouse_and_keyboard(page: Page) -> None:
    page.unlock()
    page.wait_for("map", lambda: page.browser.find_elements(By.CSS_SELECTOR, "#map .cell"))
    cells = page.browser.find_elements(By.CSS_SELECTOR, "#map .cell")
    assert len(cells) == 20
    profile, _ = find_profile("embedded")
    assert profile.recommended_sparsity is not None
    streaming = allocate(profile.gates, profile.recommended_sparsity).num_streaming
    assert len(page.browser.find_elements(By.CSS_SELECTOR, "#map .cell.streaming")) == streaming
    page.browser.execute_script("arguments[0].focus()", cells[0])
    assert (
        page.get("readout").text == f"Layer 0, KV head 0: full head, gate {profile.gates[0][0]:.3f}"
    )
    page.browser.switch_to.active_element.send_keys(Keys.ARROW_DOWN, Keys.ARROW_DOWN, Keys.END)
    assert page.get("readout").text == "Layer 2, KV head 3: streaming head, gate 0.000"
    assert page.browser.switch_to.active_element.get_attribute("aria-label").startswith("Layer 2")
    webdriver.ActionChains(page.browser).move_to_element(cells[5]).perform()
    assert page.get("readout").text.startswith("Layer 1, KV head 1: full head")
    assert page.errors() == []


def test_capacity_slider_asks_the_server(page: Page) -> None:
    page.unlock()
    page.wait_for("forecast", lambda: page.get("verdict").text.startswith("Fits."))
    slider = page.get("requests-range")
    slider.send_keys(Keys.END)
    page.wait_for("too many", lambda: page.get("verdict").text.startswith("Does not fit."))
    slider.send_keys(Keys.HOME)
    page.wait_for("one", lambda: page.get("verdict").text.startswith("Fits."))
    assert page.get("requests").get_property("value") == "1"
    assert page.errors() == []
    page.get("tokens").clear()
    page.get("tokens").send_keys("99999")
    page.wait_for("reason", lambda: "longest request is 2048" in page.get("forecast-error").text)


def test_a_wrong_key_is_refused_and_asked_for_again(page: Page) -> None:
    page.unlock("wrong")
    page.wait_for("refusal", lambda: "refuses this key" in page.get("key-error").text)
    page.unlock()
    page.wait_for("state", lambda: page.get("state").text == "split active")
    stored = page.browser.execute_script(
        "return [localStorage.length, sessionStorage.length, document.cookie]"
    )
    assert stored == [0, 0, ""]


@contextmanager
def serving(app: FastAPI) -> Iterator[str]:
    """The address of an app that runs in a thread of this process."""
    port = free_port()
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="error", lifespan="off"))
    thread = Thread(target=server.run)
    thread.start()
    try:
        assert wait_for(lambda: server.started)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()


def test_html_from_the_model_or_the_server_is_shown_as_text(browser: WebDriver) -> None:
    plan = replace(make_plan(), profile_id=HTML)
    status = split_status(CacheFigures(plan, BLOCKS), [HTML], HTML)
    refusal = {"error": {"message": HTML}}
    deltas = [{"reasoning": HTML}, {"content": HTML}]
    parts = [*({"choices": [{"delta": delta}]} for delta in deltas), refusal]
    app = FastAPI()
    app.get("/rlkv")(lambda: show_page(needs_key=False, is_gated=False))
    app.get("/v1/rlkv")(lambda: status)
    app.get("/v1/rlkv/forecast")(lambda: JSONResponse(refusal, 400))
    app.post("/v1/chat/completions")(
        lambda: StreamingResponse(f"data: {json.dumps(part)}\n\n" for part in parts)
    )
    with serving(app) as url:
        page = Page(browser, url)
        page.wait_for("forecast", page.get("forecast-error").is_displayed)
        page.get("question").send_keys(Keys.CONTROL, Keys.ENTER)
        page.wait_for("error", page.get("ask-error").is_displayed)
        for place in ("model", "thought", "answer", "ask-error", "forecast-error"):
            assert page.get(place).text == HTML, place
        assert page.get("question").get_property("value") == HTML
        assert HTML in page.get("facts").text
        made = "return [window.hacked, document.images.length, document.scripts.length]"
        assert browser.execute_script(made) == [None, 0, 1]


def test_a_server_without_a_split_says_so_and_asks_for_no_key_again(browser: WebDriver) -> None:
    app = FastAPI()
    flags = {"api_key": [KEY], "open_routes": False, "guard_metrics": False}
    app.state.args = Namespace(**flags)
    RlkvEndpoint().attach_router(app)
    with serving(app) as url:
        page = Page(browser, url)
        page.unlock()
        page.wait_for("state", lambda: page.get("state").text == "no split cache")
        assert "start it with `rlkv serve`" in page.get("subtitle").text
        assert not page.get("key-card").is_displayed()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_readable_and_nothing_overflows_a_phone(page: Page, scheme: str) -> None:
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    page.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    size = {"width": 360, "height": 740, "deviceScaleFactor": 1, "mobile": True}
    page.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    page.unlock()
    page.wait_for("state", lambda: page.get("state").text == "split active")
    assert page.browser.execute_script("return document.documentElement.scrollWidth") <= 360
    for name in ("state", "use-note", "map-note", "verdict", "ask"):
        assert page.browser.execute_script(CONTRAST, page.get(name)) >= 4.5, name
    page.browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


#: WCAG contrast of an element's text against the first background behind it.
CONTRAST = """
const parse = (text) => text.match(/[\\d.]+/g).map(Number);
const light = (rgb) => rgb.slice(0, 3).map((c) => c / 255)
  .map((c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
  .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
let behind = arguments[0];
const isClear = (element) => parse(getComputedStyle(element).backgroundColor)[3] === 0;
while (isClear(behind)) behind = behind.parentElement;
const a = light(parse(getComputedStyle(arguments[0]).color));
const b = light(parse(getComputedStyle(behind).backgroundColor));
return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
"""
