"""The web page as it is sent: `page.html` with the example pictures put in, and the policy that lets it run.

The page holds everything it needs, so that it works behind a key and asks no other host for anything.
"""

import base64
import hashlib
import re
from pathlib import Path

_FOLDER = Path(__file__).parent
_PLACE = re.compile(r"\{\{example:([a-z]+\.jpg)\}\}")
_INLINE = re.compile(r"<(script|style)>(.*?)</\1>", re.DOTALL)


def read_page() -> str:
    """Return the page, with the pictures of the folder `examples` beside it as data URLs."""
    html = (_FOLDER / "page.html").read_text(encoding="utf-8")
    return _PLACE.sub(lambda place: _data_url(_FOLDER / "examples" / place[1]), html)


def page_policy(page: str) -> str:
    """Return the Content-Security-Policy of a page: its own scripts and styles by their hashes, and this server.

    Args:
        page: The page as it is sent.
    """
    hashes: dict[str, list[str]] = {"script": [], "style": []}
    for kind, text in _INLINE.findall(page):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        hashes[kind].append(f"'sha256-{digest}'")
    return "; ".join(
        (
            "default-src 'none'",
            f"script-src {' '.join(hashes['script'])}",
            f"style-src {' '.join(hashes['style'])}",
            "img-src data: blob:",
            "media-src blob:",
            "connect-src 'self'",
            "form-action 'none'",
            "base-uri 'none'",
            "frame-ancestors 'none'",
            "require-trusted-types-for 'script'",
        )
    )


def _data_url(path: Path) -> str:
    return f"data:image/jpeg;base64,{base64.b64encode(path.read_bytes()).decode()}"
