"""Who visits the page in a real Chromium: what is done on it, and what it complains of."""

import json
import re
import time
from typing import Any

from minigpt4.serving.page import read_page

STRINGS: dict[str, dict[str, str]] = json.loads(re.findall(r'id="strings">(.*?)</script>', read_page(), re.DOTALL)[0])
EYE = "button[aria-label='Where the model looked']"


def until(page: Any, expression: str, seconds: float = 30) -> None:  # noqa: ANN401
    """Wait for an expression to be true; Playwright's own way evaluates text in the page, which its policy forbids."""
    deadline = time.monotonic() + seconds
    while not page.evaluate(expression):
        assert time.monotonic() < deadline, expression
        page.wait_for_timeout(50)


class Visitor:
    """A page, what is done on it, and what it complained of."""

    def __init__(self, browser: Any, url: str, **options: Any) -> None:  # noqa: ANN401
        settings = {"viewport": {"width": 1180, "height": 860}, "locale": "en-GB", **options}
        self.context = browser.new_context(**settings)
        self.page = self.context.new_page()
        self.page.set_default_timeout(30_000)
        self.troubles: list[str] = []
        self.hosts: set[str] = set()
        self.page.on("pageerror", lambda error: self.troubles.append(str(error)))
        self.page.on("console", lambda said: self.troubles.append(said.text) if said.type == "error" else None)
        self.page.on(
            "request", lambda request: self.hosts.add(request.url.split("/")[2] if "//" in request.url else "")
        )
        self.url = url
        self.arrive()

    def arrive(self) -> None:
        self.page.goto(self.url)
        self.page.wait_for_selector(".dot.ready")

    def bring(self, *files: tuple[str, bytes]) -> None:
        self.page.set_input_files(
            "#files", [{"name": name, "mimeType": "image/png", "buffer": content} for name, content in files]
        )

    def choose(self, **settings: float) -> None:
        """Change settings, by their names."""
        self.page.click("#show-settings")
        for name, value in settings.items():
            self.page.fill(f"#{name}", str(value))
        self.page.keyboard.press("Escape")

    def ask(self, question: str, tokens: int = 20) -> None:
        """Type and press Enter."""
        self.choose(max_tokens=tokens)
        self.page.fill("#question", question)
        self.page.press("#question", "Enter")

    def wait_answered(self) -> str:
        self.page.wait_for_selector("#send:visible")
        answers: list[str] = self.page.locator(".said").all_inner_texts()
        return answers[-1] if answers else ""

    def wait_for_text(self) -> str:
        until(self.page, "[...document.querySelectorAll('.said.busy')].some((e) => e.textContent.length > 3)")
        text: str = self.page.locator(".said.busy").inner_text()
        return text

    def save(self, button: str) -> str:
        """Save the conversation by one of the buttons, and return what the file holds."""
        self.page.click("#show-save")
        with self.page.expect_download() as saving:
            self.page.click(button)
        text: str = saving.value.path().read_text("utf-8")
        return text
