"""The API's description as a page: no script, and nothing loaded from anywhere."""

import html
import json
from typing import Any

_STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color-scheme:light dark}"
    "code,pre{font-family:ui-monospace,monospace;font-size:.9em}pre{overflow:auto;padding:1em;border:1px solid #8886}"
    "td,th{text-align:left;padding:.2em 1em .2em 0;vertical-align:top}"
)


def docs_page(description: dict[str, Any]) -> str:
    """Write an OpenAPI description as HTML.

    Args:
        description: What `/openapi.json` holds.
    """
    title = html.escape(f"{description['info']['title']} {description['info']['version']}")
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title>",
        f'<meta name=viewport content="width=device-width"><style>{_STYLE}</style><h1>{title}</h1>',
        f"<p>{html.escape(description['info']['description'])} ",
        "For programs: <a href=/openapi.json>openapi.json</a>.</p>",
    ]
    for path, methods in description["paths"].items():
        for method, operation in methods.items():
            parts.append(_operation(path, method, operation))
    parts.append("<h2>Forms</h2>")
    for name, schema in sorted(description["components"]["schemas"].items()):
        text = html.escape(json.dumps(schema, indent=1, ensure_ascii=False))
        parts.append(
            f"<details id={html.escape(name)}><summary>{html.escape(name)}</summary><pre>{text}</pre></details>"
        )
    return "".join(parts)


def _operation(path: str, method: str, operation: dict[str, Any]) -> str:
    rows = "".join(
        f"<tr><td>{html.escape(str(status))}<td>{html.escape(str(response.get('description', '')))}"
        for status, response in operation["responses"].items()
    )
    said = html.escape(operation.get("description", ""))
    return f"<h2><code>{method.upper()} {html.escape(path)}</code></h2><p>{said}</p><table>{rows}</table>"
