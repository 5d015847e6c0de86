"""The page in a browser: type, stream, move a slider, see the answer change.

Debian's chromium by playwright, whose own browsers are not fetched. Screenshots go to the folder
PYLORA_SHOTS, if that is set, to be looked at.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
if CHROMIUM is None:
    pytest.skip("chromium is not here (Debian: apt-get install chromium)", allow_module_level=True)

from served import serving, slowed, write_house

from pylora.web.server import Server

DONE = "body:not(.going) .answer footer .link"
LAST = ".turn:last-child .answer.mixed .said"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(write_house(tmp_path_factory.mktemp("house"))) as running:
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as library:
        running = library.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture
def page(browser: Any, server: Server, request: pytest.FixtureRequest) -> Iterator[Any]:
    """The page, in light or dark, wide or narrow. No error may be in its console."""
    settings = getattr(request, "param", {})
    context: Any = browser.new_context(**{"viewport": {"width": 1280, "height": 820}, **settings})
    context.set_default_timeout(60000)
    opened, said = context.new_page(), []
    opened.on("console", lambda m: said.append(m.text) if m.type == "error" else None)
    opened.on("pageerror", lambda e: said.append(str(e)))
    opened.goto(server.url)
    opened.wait_for_selector("#adapters .field", state="attached")
    opened.evaluate("document.getElementById('most').value = 24")
    yield opened
    folder = os.environ.get("PYLORA_SHOTS")
    if folder:
        opened.screenshot(path=Path(folder) / f"{request.node.name}.png")
    context.close()
    assert not said


def ask(page: Any, text: str) -> str:
    page.fill("#text", text)
    page.press("#text", "Enter")
    page.wait_for_selector(DONE)
    return str(page.text_content(LAST))


def move(page: Any, adapter: str, presses: int) -> None:
    """Moves a slider by the keyboard."""
    slider = f'input[data-adapter="{adapter}"]'
    page.focus(slider)
    for _ in range(presses):
        page.press(slider, "ArrowRight")
    page.wait_for_selector(DONE)


def test_type_stream_move_a_slider_see_the_answer_change(page: Any) -> None:
    base = ask(page, "truth exists:")
    assert base and page.text_content(".answer h3") == "base"
    footer = page.text_content(".answer footer")
    assert "tokens/s" in footer and "ms to the first" in footer
    move(page, "legal", 20)
    assert page.text_content(".answer h3") == "legal"
    mixed = page.text_content(LAST)
    assert mixed != base
    page.check("#compare", force=True)
    page.wait_for_selector("body:not(.going) .answer.base footer .link")
    assert page.text_content(".answer.base .said") == base  # the same seed, the same words
    assert page.text_content(LAST) == mixed
    page.click("#silence")
    page.wait_for_selector("body:not(.going) .answer footer .link")
    assert page.text_content(LAST) == base


def test_words_say_how_likely_they_were_by_mouse_and_by_keys(page: Any) -> None:
    ask(page, "life is")
    page.hover(f"{LAST} .t >> nth=1")
    assert page.is_visible("#tip") and page.locator("#tip p").count() >= 5
    assert page.locator("#tip p.chosen").count() == 1 and "%" in page.text_content("#tip")
    page.focus(LAST)
    page.press(LAST, "ArrowRight")
    assert page.is_visible("#tip") and page.locator(".t.on").count() == 1


def test_what_was_sent_is_shown(page: Any) -> None:
    page.fill("#system", "Be brief.")
    page.dispatch_event("#system", "change")
    ask(page, "truth exists:")
    page.click(".answer footer .link")
    page.wait_for_selector("#sent-tokens .piece")
    shown = page.text_content("#sent-tokens")
    assert "<|im_start|>system" in shown and "Be brief." in shown and "truth exists:" in shown
    page.press("#tab-tokens", "ArrowRight")
    assert '"logprobs": true' in page.text_content("#sent-body")
    page.keyboard.press("Escape")
    assert not page.is_visible("#sent")


def test_an_answer_can_be_stopped_and_the_next_one_asked(page: Any, server: Server) -> None:
    page.fill("#most", "400")
    page.fill("#text", "truth")
    with slowed(server):
        page.press("#text", "Enter")
        page.wait_for_selector("body.going .said .t")
        page.keyboard.press("Escape")
        page.wait_for_selector(DONE)
    assert "stopped" in page.text_content(".answer footer")
    page.fill("#most", "5")
    assert ask(page, "life") is not None and page.locator(".turn").count() == 2
    page.click("#new")
    assert page.locator(".turn").count() == 0 and page.is_visible("#welcome")


@pytest.mark.parametrize(
    "page",
    [{"viewport": {"width": 390, "height": 780}, "color_scheme": "dark", "has_touch": True}],
    indirect=True,
)
def test_on_a_phone_in_the_dark(page: Any) -> None:
    assert page.get_attribute("html", "data-theme") == "dark"
    ask(page, "truth exists:")
    page.tap(f"{LAST} .t >> nth=0")
    assert page.is_visible("#tip")
    wide = page.evaluate("document.documentElement.scrollWidth")
    assert wide <= 390
    assert not page.is_visible("#temperature")
    page.click("#panel-open")
    page.wait_for_selector("#panel.open")
    assert page.is_visible("#temperature")
    page.press("#panel-close", "Escape")
    page.wait_for_selector("#panel:not(.open)")


def test_a_key_is_asked_for_and_used(browser: Any, tmp_path: Path) -> None:
    with serving(write_house(tmp_path), api_key="a-secret-key") as server:
        page = browser.new_page()
        page.goto(server.url)
        page.wait_for_selector("#access[open]")
        page.fill("#key", "a-secret-key")
        page.press("#key", "Enter")
        page.wait_for_selector("#adapters .field")
        page.close()
