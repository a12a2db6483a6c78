"""What belongs to one answer in the page: its map, its model and its settings, and where it is kept."""

import json
import re
import socket
from typing import Any

import pytest

from minigpt4.serving.page import read_page
from minigpt4.serving.settings import Settings
from tests.serving.browser.visitor import EYE, Visitor, until
from tests.serving.live import live, picture_file

pytestmark = pytest.mark.slow

AGAIN = "button[aria-label='Ask again']"
MAPS, ANSWERS = "**/v1/attention", "**/v1/chat/completions"


def sent_by(visitor: Visitor, path: str) -> list[Any]:
    """Return a list that grows with each request to a path, by what was sent."""
    sent: list[Any] = []
    visitor.page.on("request", lambda r: sent.append(json.loads(r.post_data)) if r.url.endswith(path) else None)
    return sent


@pytest.mark.parametrize("how", ["again", "edited", "undone"])
def test_a_new_answer_has_no_map_and_no_chosen_word_of_the_old_one(visitor: Visitor, how: str) -> None:
    page, maps = visitor.page, sent_by(visitor, "/v1/attention")
    visitor.bring(("noise.png", picture_file()))
    visitor.ask("What is it?")
    old = visitor.wait_answered()
    page.click(EYE)
    page.wait_for_selector(".view:not(.waiting)")
    page.locator(".word").last.click()
    page.wait_for_selector(".word[aria-pressed=true]")
    page.wait_for_selector(".view:not(.waiting)")
    visitor.choose(temperature=2, seed=3, max_tokens=25)
    if how == "again":
        page.click(AGAIN)
    else:
        page.locator(".asked").hover()
        page.click("button[aria-label='Edit this question']" if how == "edited" else "button[aria-label^='Take back']")
        page.press("#question", "Enter")
    new = visitor.wait_answered()
    assert new != old
    assert page.locator(".turn").count() == 1
    assert page.locator(".gaze, .word").count() == 0
    page.click(EYE)
    page.wait_for_selector(".view:not(.waiting)")
    assert [asked["messages"][-1]["content"].strip() for asked in maps] == [old.strip(), old.strip(), new.strip()]
    assert "span" in maps[1] and "span" not in maps[2]


def test_a_map_that_comes_after_asking_again_is_not_taken_for_the_new_answers(visitor: Visitor) -> None:
    page = visitor.page
    held: list[Any] = []
    page.route(MAPS, lambda route: held.append(route))
    visitor.bring(("noise.png", picture_file()))
    visitor.ask("What is it?")
    visitor.wait_answered()
    page.click(EYE)
    page.click(AGAIN)
    visitor.wait_answered()
    page.click(EYE)
    with page.expect_response(MAPS):
        held[0].fulfill(json={"values": [[0, 1], [1, 0]]})
    page.wait_for_timeout(200)  # for the page to read it
    page.click(EYE)
    with page.expect_request(MAPS):  # the second, held as well, has not come
        page.click(EYE)
    assert page.locator(".view.waiting").count() == 1


def test_a_saved_conversation_tells_of_every_question_and_what_made_each_answer(browser: Any) -> None:  # noqa: ANN401
    """Between two answers the server stops, and another model takes its place."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    with live(Settings("tiny", decoders=1), page=read_page(), port=port) as server:
        visitor = Visitor(browser, server.url)
        visitor.bring(("one.png", picture_file(1)))
        visitor.ask("First?", 20)
        first = visitor.wait_answered()
    visitor.bring(("two.png", picture_file(2)))
    visitor.ask("Lost?", 30)
    visitor.page.wait_for_selector(".trouble:has-text('does not answer')")
    with live(Settings("other", decoders=1), page=read_page(), port=port) as server:
        visitor.page.wait_for_selector(".dot.ready")
        visitor.page.route(ANSWERS, lambda route: None)
        visitor.ask("Stopped?", 35)
        visitor.page.click("#stop")
        visitor.page.wait_for_selector("text=Stopped.")
        visitor.page.unroute(ANSWERS)
        visitor.choose(temperature=1.5, seed=7)
        visitor.ask("Second?", 25)
        last = visitor.wait_answered()
        visitor.choose(temperature=0, num_beams=3, max_tokens=99)
        saved, markdown = json.loads(visitor.save("#save-json")), visitor.save("#save-markdown")
        again = server.chat({"model": saved["model"], "messages": saved["messages"][:-1], **saved["settings"]})
        maps = sent_by(visitor, "/v1/attention")
        visitor.page.locator(EYE).first.click()
        visitor.page.wait_for_selector(".gaze .trouble:has-text('tiny')")
        visitor.context.close()
    made = [(turn["question"], turn["answer"].strip(), turn["model"], turn["settings"]) for turn in saved["turns"]]
    assert made == [
        ("First?", first.strip(), "tiny", {"max_tokens": 20}),
        ("Lost?", "", None, {"max_tokens": 30}),
        ("Stopped?", "", None, {"max_tokens": 35}),
        ("Second?", last.strip(), "other", {"max_tokens": 25, "temperature": 1.5, "seed": 7}),
    ]
    assert [turn["pictures"] for turn in saved["turns"]] == [1, 1, 0, 0]
    assert [turn["state"] for turn in saved["turns"]][1:3] == ["error", "stopped"]
    assert re.findall(r"\*\*You asked:\*\* (.*)", markdown) == [turn["question"] for turn in saved["turns"]]
    assert (saved["model"], saved["settings"]) == made[-1][2:]
    assert again.json["choices"][0]["message"]["content"] == saved["turns"][-1]["answer"]
    assert maps == []


def test_an_answer_asked_for_again_is_saved_with_what_made_it(visitor: Visitor) -> None:
    visitor.ask("Hello?", 5)
    visitor.wait_answered()
    visitor.choose(temperature=1.5, seed=7)
    visitor.page.click(AGAIN)
    visitor.wait_answered()
    visitor.choose(temperature=0, max_tokens=9)
    [turn] = json.loads(visitor.save("#save-json"))["turns"]
    assert (turn["model"], turn["settings"]) == ("tiny", {"max_tokens": 5, "temperature": 1.5, "seed": 7})
    visitor.page.route(ANSWERS, lambda route: route.abort())
    visitor.page.click(AGAIN)
    visitor.wait_answered()
    [turn] = json.loads(visitor.save("#save-json"))["turns"]
    assert (turn["answer"], turn["model"], turn["settings"]) == ("", None, {"max_tokens": 9})
    visitor.troubles.clear()  # Chromium notes the connection that was refused


def test_a_deleted_conversation_is_not_kept_again_by_the_answer_it_stops(visitor: Visitor) -> None:
    page = visitor.page
    for button in ("#chats button[aria-label^='Delete']", "#delete-all"):
        visitor.ask("Talk", 400)
        visitor.wait_for_text()
        page.click("#show-history")
        page.click(button)
        page.click("#sure-yes")
        page.wait_for_selector("#no-history:visible")
        page.wait_for_selector("#send:visible")
        page.keyboard.press("Escape")
        page.click("#show-history")
        page.wait_for_selector("#history[open]")
        assert page.locator("#chats li").count() == 0
        page.keyboard.press("Escape")


def test_a_chat_begun_during_an_answer_is_the_one_that_reloading_brings(visitor: Visitor) -> None:
    visitor.ask("Talk", 400)
    visitor.wait_for_text()
    visitor.page.click("#new-chat")
    visitor.page.wait_for_selector("#send:visible")
    visitor.arrive()
    assert visitor.page.locator(".turn").count() == 0
    visitor.page.click("#show-history")
    visitor.page.wait_for_selector("#chats li")


def test_choosing_the_open_conversation_does_not_stop_its_answer(visitor: Visitor) -> None:
    visitor.ask("Talk", 100)
    early = visitor.wait_for_text()
    visitor.page.click("#show-history")
    visitor.page.click("#chats .open")
    until(visitor.page, "!document.getElementById('history').open")
    assert len(visitor.wait_answered()) > len(early)
    assert visitor.page.locator("text=closed before").count() == 0
    assert visitor.page.locator("text=Stopped.").count() == 0
