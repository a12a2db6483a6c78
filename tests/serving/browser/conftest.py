"""A real Chromium, and a real server with the tiny model and the page."""

import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from minigpt4.serving.page import read_page
from tests.inference.slowness import slow_steps
from tests.serving.browser.slow_server import SECONDS
from tests.serving.browser.visitor import Visitor
from tests.serving.live import Live, live


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright, of the extra `test`")
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("needs the system's Chromium")
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(
            executable_path=found,
            args=["--no-sandbox", "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"],
        )
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def server() -> Iterator[Live]:
    with live(page=read_page()) as running:
        slow_steps(running.engine, SECONDS)
        yield running


@pytest.fixture
def visitor(browser: Any, server: Live) -> Iterator[Visitor]:  # noqa: ANN401
    made = Visitor(browser, server.url)
    yield made
    made.context.close()
    server.wait_idle()
    assert made.troubles == []
    assert made.hosts <= {server.url.removeprefix("http://"), ""}  # "" for data URLs
