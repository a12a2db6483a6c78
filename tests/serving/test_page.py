"""The page as a file: it asks nobody but its server, runs no text, and says everything in both languages."""

import base64
import hashlib
import json
import re
import subprocess
import sys
import urllib.request
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path

import pytest

from minigpt4.serving.errors import _CODES
from minigpt4.serving.page import page_policy, read_page
from tests import tiny_chat
from tests.serving.live import live

PAGE = read_page()
SOURCE = files("minigpt4.serving").joinpath("page.html").read_text(encoding="utf-8")
SCRIPTS = "".join(re.findall(r"<script>(.*?)</script>", PAGE, re.DOTALL))
STRINGS: dict[str, dict[str, str]] = json.loads(re.findall(r'id="strings">(.*?)</script>', PAGE, re.DOTALL)[0])


class _Elements(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


@pytest.fixture(scope="module")
def elements() -> list[tuple[str, dict[str, str | None]]]:
    parser = _Elements()
    parser.feed(PAGE)
    return parser.found


def test_the_page_is_small() -> None:
    assert len(PAGE.encode()) < 150_000


def test_no_other_host_is_named() -> None:
    assert set(re.findall(r"(?:\bhttps?:|\bwss?:|[\"'(])//[\w.-]+", SOURCE)) == {"http://www.w3.org"}  # SVG's own name


def test_every_resource_is_inside(elements: list[tuple[str, dict[str, str | None]]]) -> None:
    for tag, attributes in elements:
        for name in ("src", "href", "action", "srcset", "poster"):
            value = attributes.get(name)
            assert value is None or value.startswith(("#", "data:")), (tag, value)


def test_nothing_runs_text_or_writes_it_as_markup(elements: list[tuple[str, dict[str, str | None]]]) -> None:
    forbidden = (
        r"\beval\b|new Function|innerHTML|outerHTML|insertAdjacentHTML|document\.write|DOMParser|setTimeout\(\s*[\"'`]"
    )
    assert not re.findall(forbidden, SCRIPTS)
    for tag, attributes in elements:
        assert not [name for name in attributes if name.startswith("on") or name == "style"], tag


def test_the_policy_names_exactly_the_inline_parts() -> None:
    policy = page_policy(PAGE)
    assert "unsafe" not in policy
    for kind, count in (("script", 2), ("style", 1)):
        parts = re.findall(rf"<{kind}>(.*?)</{kind}>", PAGE, re.DOTALL)
        wanted = [f"'sha256-{base64.b64encode(hashlib.sha256(part.encode()).digest()).decode()}'" for part in parts]
        directive = next(part for part in policy.split("; ") if part.startswith(f"{kind}-src"))
        assert len(wanted) == count
        assert directive.split()[1:] == wanted


def test_both_languages_say_the_same_things() -> None:
    english, chinese = STRINGS["en"], STRINGS["zh"]
    assert list(english) == list(chinese)
    for name in english:
        holes = [sorted(re.findall(r"\{\w+\}", text)) for text in (english[name], chinese[name])]
        if name != "serverSays":
            assert holes[0] == holes[1] or name == "about_nano", name
        assert english[name].count("\n") == chinese[name].count("\n"), name


def test_every_string_is_used_and_every_used_string_exists() -> None:
    of_kinds = {"can_", "cannot_", "about_", "placeholder_"}  # followed by a model's kind
    called = set(re.findall(r'\bt\(\s*"(\w+)"', SCRIPTS)) - of_kinds
    marked = set(re.findall(r'data-(?:t|label|placeholder)="(\w+)"', PAGE)) | set(
        re.findall(r'"question": "(ask\w+)"', PAGE)
    )
    chosen = {name for pair in re.findall(r'\bt\([^;]*?\? "(\w+)" : "(\w+)"\)', SCRIPTS) for name in pair}
    by_kind = {name for name in STRINGS["en"] if name.startswith((*of_kinds, "e_"))}
    assert called | marked | chosen | by_kind == set(STRINGS["en"])


def test_every_error_that_a_user_of_the_page_can_meet_is_said_in_the_pages_language() -> None:
    sources = [path.read_text(encoding="utf-8") for path in Path("minigpt4/serving").rglob("*.py")]
    codes = {code for source in sources for code in re.findall(r"\bcode=\"(\w+)\"", source)} | set(_CODES.values())
    # What only another program than the page asks for.
    others = {"not_found", "method_not_allowed", "unsupported_media_type", "unsupported_parameter", "unknown_parameter"}
    assert {f"e_{code}" for code in codes - others} <= set(STRINGS["zh"])
    assert len(codes - others) >= 12


def test_no_text_stands_in_the_markup_itself() -> None:
    body = PAGE.partition("<body>")[2].partition("<script")[0]
    said = {text.strip() for text in re.findall(r">([^<]+)<", body) if text.strip()}
    assert said == {"MiniGPT-4", "English", "中文"}


def test_the_page_holds_no_key() -> None:
    assert not re.findall(r"sk-[\w-]{8,}|Bearer [\w-]{8,}", PAGE)


def test_the_server_sends_the_page_with_its_policy_and_models_say_whether_they_have_maps() -> None:
    with live(page=PAGE) as server:
        reply = server.ask("GET", "/")
        assert (reply.status, reply.body.decode()) == (200, PAGE)
        assert reply.headers["content-security-policy"] == page_policy(PAGE)
        assert server.ask("GET", "/v1/models").json["data"][0]["attention_maps"] is True


@pytest.mark.slow
def test_demo_serves_the_page_and_prints_its_address(tmp_path: Path) -> None:
    folder = tiny_chat.saved(tmp_path / "tiny")
    command = [sys.executable, "-m", "minigpt4", "demo", "-m", str(folder), "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            found = re.search(r"listening on (http://127\.0\.0\.1:\d+);", process.stderr.readline())
            assert found
            with urllib.request.urlopen(found[1], timeout=60) as response:
                assert response.read().decode() == PAGE
        finally:
            process.kill()
