"""The page in a real Chromium, against a real server with the tiny model."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from minigpt4.serving.page import read_page
from minigpt4.serving.settings import Limits, Settings
from tests import tiny_chat
from tests.inference.slowness import slow_steps
from tests.serving.browser.visitor import EYE, STRINGS, Visitor, until
from tests.serving.live import Live, live, picture_file

ROOT = Path(__file__).resolve().parents[3]

pytestmark = pytest.mark.slow


def test_a_picture_is_uploaded_and_the_answer_arrives_before_it_is_complete(visitor: Visitor) -> None:
    visitor.bring(("noise.png", picture_file()))
    visitor.page.wait_for_selector("#tray img")
    visitor.ask("What is it?", 60)
    early = visitor.wait_for_text()
    assert visitor.page.locator("#stop").is_visible()
    whole = visitor.wait_answered()
    assert whole.startswith(early.strip())
    assert len(whole) > len(early)
    assert visitor.page.locator(".shots img").count() == 1
    assert visitor.page.locator("#tray img").count() == 0


@pytest.mark.parametrize("how", ["button", "Escape"])
def test_stop_keeps_what_was_said_and_frees_the_place(visitor: Visitor, server: Live, how: str) -> None:
    visitor.ask("Talk", 400)
    visitor.wait_for_text()
    cancelled = server.engine.counts.cancelled
    if how == "button":
        visitor.page.click("#stop")
    else:
        visitor.page.keyboard.press("Escape")
    visitor.page.wait_for_selector("text=Stopped.")
    assert len(visitor.wait_answered()) > 3
    server.wait_idle(5)
    assert server.engine.counts.cancelled == cancelled + 1


def test_a_second_question_and_a_second_picture_send_the_whole_conversation(visitor: Visitor) -> None:
    sent: list[Any] = []
    visitor.page.on("request", lambda r: sent.append(json.loads(r.post_data)) if r.method == "POST" else None)
    visitor.bring(("one.png", picture_file(1)))
    visitor.ask("First?")
    first = visitor.wait_answered()
    visitor.ask("Second?")
    visitor.wait_answered()
    visitor.bring(("two.png", picture_file(2)), ("three.png", picture_file(3)))
    until(visitor.page, "document.querySelectorAll('#tray img').length === 2")
    visitor.page.click("#tray li:last-child button")
    visitor.ask("And this?")
    visitor.wait_answered()
    messages = sent[-1]["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant", "user", "assistant", "user"]
    kinds = [[part["type"] for part in m["content"]] if isinstance(m["content"], list) else "text" for m in messages]
    assert kinds == [["image_url", "text"], "text", "text", "text", ["image_url", "text"]]
    assert messages[1]["content"].strip() == first.strip()
    assert messages[0]["content"][0]["image_url"]["url"].startswith("data:image/jpeg;base64,")


def test_reloading_keeps_the_conversation_and_it_can_be_deleted(visitor: Visitor) -> None:
    visitor.bring(("noise.png", picture_file()))
    visitor.ask("What is it?")
    said = visitor.wait_answered()
    visitor.arrive()
    visitor.page.wait_for_selector(".turn")
    assert visitor.page.locator(".said").inner_text() == said
    assert visitor.page.locator(".bubble").inner_text() == "What is it?"
    assert visitor.page.locator(".shots img").evaluate("(image) => image.naturalWidth") > 0
    visitor.page.click("#show-history")
    visitor.page.click("#delete-all")
    visitor.page.click("#sure-yes")
    visitor.page.wait_for_selector("#no-history:visible")
    visitor.arrive()
    assert visitor.page.locator(".turn").count() == 0
    assert visitor.page.evaluate("indexedDB.databases().then((all) => all.length)") == 1


def test_a_wrong_file_is_told_and_the_conversation_goes_on(visitor: Visitor) -> None:
    visitor.bring(("letter.png", b"this is no picture"))
    visitor.page.wait_for_selector("#toast:has-text('letter.png cannot be opened as a picture')")
    assert visitor.page.locator("#tray img").count() == 0
    visitor.ask("Hello?")
    assert visitor.wait_answered()


def test_what_the_server_refuses_is_a_sentence_and_the_next_question_takes_its_picture(visitor: Visitor) -> None:
    sent: list[Any] = []
    visitor.page.on("request", lambda r: sent.append(json.loads(r.post_data)) if r.method == "POST" else None)
    visitor.bring(("noise.png", picture_file()))
    visitor.ask("Long?", 2000)
    visitor.page.wait_for_selector(".trouble:has-text('tokens')")
    visitor.troubles.clear()  # Chromium notes every status of 400 and more
    visitor.ask("Short?")
    assert visitor.wait_answered()
    assert [part["type"] for part in sent[-1]["messages"][0]["content"]] == ["image_url", "text"]
    assert len(sent[-1]["messages"]) == 1


def test_errors_are_in_the_pages_language_with_the_servers_numbers_and_in_sight(
    browser: Any,  # noqa: ANN401
    server: Live,
) -> None:
    small = Visitor(browser, server.url, viewport={"width": 360, "height": 740}, locale="zh-CN")
    small.ask("Hello?", 2000)
    told = small.page.wait_for_selector(".trouble:visible")
    assert re.findall(r"\d+", told.inner_text()) == ["2000", str(tiny_chat.CONTEXT)]
    assert not re.search("[a-z]{3}", told.inner_text())
    small.page.click(f"button[aria-label='{STRINGS['zh']['newChat']}']")
    small.ask("word " * 300, 1000)
    told = small.page.wait_for_selector(".trouble:visible")
    numbers = re.findall(r"\d+", told.inner_text())
    assert (len(numbers), numbers[1:]) == (3, ["1000", str(tiny_chat.CONTEXT)])
    assert not re.search("[a-z]{3}", told.inner_text())
    lowest = "document.querySelector('.trouble').getBoundingClientRect().bottom"
    until(small.page, f"{lowest} <= document.querySelector('.composer').getBoundingClientRect().top")
    small.context.close()


def test_what_a_proxy_says_in_the_servers_place_is_a_sentence(visitor: Visitor) -> None:
    path = "**/v1/chat/completions"
    visitor.page.route(
        path, lambda route: route.fulfill(status=502, body="<html>Bad gateway", content_type="text/html")
    )
    visitor.ask("Hello?")
    visitor.page.wait_for_selector(".trouble:has-text('answered in its place (HTTP 502)')")
    visitor.troubles.clear()
    visitor.page.unroute(path)
    visitor.ask("Hello?")
    assert visitor.wait_answered()


def test_edit_retry_undo_and_new_chat(visitor: Visitor) -> None:
    page = visitor.page
    visitor.ask("One?")
    visitor.wait_answered()
    visitor.ask("Two?")
    visitor.wait_answered()
    page.click("button[aria-label='Ask again']")
    visitor.wait_answered()
    assert page.locator(".turn").count() == 2
    page.locator(".asked").first.hover()
    page.locator("button[aria-label='Edit this question']").first.click()
    assert page.input_value("#question") == "One?"
    page.fill("#question", "Another?")
    page.press("#question", "Enter")
    visitor.wait_answered()
    assert page.locator(".bubble").all_inner_texts() == ["Another?"]
    page.click("button[aria-label='Take back the last question']")
    assert page.input_value("#question") == "Another?"
    assert page.locator("#welcome").is_visible()
    page.press("#question", "Enter")
    visitor.wait_answered()
    page.click("#new-chat")
    assert page.locator(".turn").count() == 0


def test_pictures_come_by_pasting_dropping_and_camera(visitor: Visitor) -> None:
    give = """([bytes, how]) => {
      const transfer = new DataTransfer();
      transfer.items.add(new File([new Uint8Array(bytes)], "given.png", { type: "image/png" }));
      const event = how === "paste" ? new ClipboardEvent("paste", { clipboardData: transfer, bubbles: true })
        : new DragEvent("drop", { dataTransfer: transfer, bubbles: true, cancelable: true });
      document.body.dispatchEvent(event);
    }"""
    for count, how in enumerate(("paste", "drop"), start=1):
        visitor.page.evaluate(give, [list(picture_file(count)), how])
        until(visitor.page, f"document.querySelectorAll('#tray img').length === {count}")
    visitor.page.click("#camera")
    until(visitor.page, "document.getElementById('video').videoWidth > 0")
    visitor.page.click("#shoot")
    until(visitor.page, "document.querySelectorAll('#tray img').length === 3")


def test_where_it_looked_for_an_answer_a_word_and_the_picture(visitor: Visitor) -> None:
    visitor.bring(("noise.png", picture_file()))
    visitor.ask("What is it?", 30)
    visitor.wait_answered()
    page = visitor.page
    page.click(EYE)
    page.wait_for_selector(".view:not(.waiting)")
    word = page.locator(".word").first
    word.focus()
    word.press("Enter")
    page.wait_for_selector(".word[aria-pressed=true]")
    page.wait_for_selector(".view:not(.waiting)")
    page.click("text=Picture alone")
    page.wait_for_selector(".view:not(.waiting)")
    assert page.locator(".gaze .trouble").count() == 0
    pixels = "canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data"
    painted = f"(canvas) => {pixels}.filter((value, place) => place % 4 === 3 && value).length"
    until(page, f"({painted})(document.querySelector('.view canvas')) > 100")


def test_conversations_are_saved_as_markdown_and_json(visitor: Visitor) -> None:
    visitor.bring(("noise.png", picture_file()))
    visitor.ask("What is it?")
    said = visitor.wait_answered()
    assert "**You asked:** What is it?" in visitor.save("#save-markdown")
    assert json.loads(visitor.save("#save-json"))["messages"][1]["content"].strip() == said.strip()


def test_what_users_and_models_write_stays_text(visitor: Visitor) -> None:
    visitor.ask("<img src=x onerror=alert(1)><b>bold</b>")
    visitor.wait_answered()
    assert visitor.page.locator(".bubble").inner_text() == "<img src=x onerror=alert(1)><b>bold</b>"
    assert visitor.page.locator(".bubble *").count() == 0


def test_the_keyboard_reaches_everything_and_enter_waits_for_a_composed_character(visitor: Visitor) -> None:
    page = visitor.page
    page.evaluate("document.activeElement.blur()")
    reached = []
    for _ in range(24):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.className"))
    for wanted in (
        "skip",
        "show-history",
        "show-about",
        "new-chat",
        "show-save",
        "show-settings",
        "example",
        "question",
        "attach",
        "camera",
        "send",
    ):
        assert wanted in reached
    page.fill("#question", "one")
    page.press("#question", "Shift+Enter")
    page.keyboard.type("two")
    assert page.input_value("#question") == "one\ntwo"
    composing = "new KeyboardEvent('keydown', { key: 'Enter', isComposing: true, bubbles: true, cancelable: true })"
    page.evaluate(f"document.getElementById('question').dispatchEvent({composing})")
    assert page.locator(".turn").count() == 0


def test_a_phone_shows_everything_in_chinese_and_in_the_dark(browser: Any, server: Live) -> None:  # noqa: ANN401
    phone = Visitor(
        browser, server.url, viewport={"width": 360, "height": 740}, is_mobile=True, has_touch=True,
        color_scheme="dark", locale="zh-CN",
    )  # fmt: skip
    page = phone.page
    assert page.evaluate("document.documentElement.lang") == "zh-CN"
    assert page.locator("#welcome h2").inner_text() == STRINGS["zh"]["welcome"]
    assert page.get_attribute("#question", "placeholder") == STRINGS["zh"]["placeholder_other"]
    phone.bring(("noise.png", picture_file()))
    phone.ask("\u8fd9\u662f\u4ec0\u4e48", 60)
    phone.wait_answered()
    page.locator(f"button[aria-label='{STRINGS['zh']['lookTitle']}']").click()
    page.wait_for_selector(".view:not(.waiting)")
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(18, 21, 23)"
    buttons = page.evaluate("[...document.querySelectorAll('button')].map((b) => [b.offsetWidth, b.offsetHeight])")
    assert min(min(size) for size in buttons if all(size)) >= 24
    page.click("#show-settings")
    page.click("#theme-choice button[value=light]")
    page.click("#language-choice button[value=en]")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(246, 247, 247)"
    phone.arrive()
    assert page.evaluate("document.documentElement.lang") == "en"
    assert page.evaluate("document.documentElement.dataset.theme") == "light"
    phone.context.close()


def test_a_server_that_wants_a_key_is_given_one_for_this_tab(browser: Any) -> None:  # noqa: ANN401
    key = "correct-horse"
    with live(Settings("tiny", api_key=key, decoders=1), page=read_page()) as locked:
        context = browser.new_context(http_credentials={"username": "", "password": key, "send": "always"})
        page = context.new_page()
        page.goto(locked.url)
        page.wait_for_selector(".dot.ready")  # the browser sends what it was asked for
        page.evaluate("sessionStorage.setItem('minigpt4.key', JSON.stringify('wrong-wrong'))")
        page.reload()
        page.wait_for_selector("#key-dialog[open]")
        for wrong in ("wrong-horse", "schl\u00fcssel-\u5bc6\u94a5"):  # no browser sends the second
            page.wait_for_selector("#key-wrong:visible")
            assert page.evaluate("document.activeElement.id") == "key"
            page.keyboard.type(wrong)
            page.press("#key", "Enter")
        page.fill("#key", key)
        page.press("#key", "Enter")
        page.wait_for_selector(".dot.ready")
        assert page.evaluate("localStorage.getItem('minigpt4.key')") is None
        context.close()


def test_the_place_in_the_queue_is_shown(browser: Any) -> None:  # noqa: ANN401
    often = Settings("tiny", decoders=1, limits=Limits(ping_seconds=0.2))
    with live(often, page=read_page(), max_concurrent=1) as narrow:
        slow_steps(narrow.engine, 0.2)
        first, second = Visitor(browser, narrow.url), Visitor(browser, narrow.url)
        first.ask("Talk", 300)
        first.wait_for_text()
        second.ask("Me too", 5)
        second.page.wait_for_selector("#queue:has-text('1 in line before you')")
        first.page.click("#stop")
        assert second.wait_answered()
        first.context.close()
        second.context.close()


def _start(port: int) -> "subprocess.Popen[str]":
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.serving.browser.slow_server", str(port)],
        stdout=subprocess.PIPE, text=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def _kill(process: "subprocess.Popen[str]") -> None:
    process.send_signal(signal.SIGKILL)
    process.communicate()


def test_a_server_killed_in_the_middle_of_an_answer_and_back(browser: Any) -> None:  # noqa: ANN401
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    process = _start(port)
    try:
        visitor = Visitor(browser, f"http://127.0.0.1:{port}")
        visitor.ask("Talk", 400)
        early = visitor.wait_for_text()
        _kill(process)
        visitor.page.wait_for_selector(".trouble:has-text('What arrived is kept')")
        assert visitor.page.locator(".said").inner_text().startswith(early.strip())
        visitor.page.wait_for_selector(".dot.away")
        visitor.ask("Still there?")
        visitor.page.wait_for_selector(".trouble:has-text('does not answer')")
        process = _start(port)
        visitor.page.wait_for_selector(".dot.ready")
        visitor.page.click("button[aria-label='Ask again']")
        time.sleep(0.1)
        assert visitor.wait_answered()
        visitor.context.close()
    finally:
        _kill(process)
