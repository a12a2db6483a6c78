"""Bodies that are no acceptable request: a table of hundreds, for the fast tests and the long ones."""

import json
from collections.abc import Iterator
from typing import Any

from tests.serving.live import data_url, large_picture, picture_file

USER = {"role": "user", "content": "hello"}
PICTURE = data_url(picture_file(1))
NO_JSON = [None, True, 0, -1, 1.5, "", "x", [], [[]], {}, {"x": 1}]

# What each field takes, and so what is left of the values of every kind to be refused.
WRONG: dict[str, list[Any]] = {
    "messages": [None, True, 0, "x", [], {}, {"0": USER}],
    "model": [True, 0, 1.5, [], {}, "", "gpt-4o", "Tiny", "tiny ", "../tiny", "/etc/passwd", "x" * 10_000],
    "stream": [0, 1, "true", "yes", [], {}],
    "stream_options": [True, 1, "x", [], {"include_usage": 1}, {"include_usage": "true"}, {"x": 1}, {}],
    "max_tokens": [0, -1, 1.5, True, "5", [], {}, 10**9, 2**70, -(2**70)],
    "max_completion_tokens": [0, -1, 1.5, True, "5", [], {}, 10**9, 2**70],
    "temperature": [-1, -0.001, 101, 1e308, True, "1", [], {}],
    "top_p": [-0.1, 1.1, True, "1", [], {}, 10**30],
    "min_p": [-0.1, 1.1, True, "1", [], {}],
    "top_k": [-1, 1.5, True, "1", [], {}, 2**70],
    "num_beams": [0, -1, 1.5, True, "2", [], {}, 11, 64, 65, 2**70],
    "seed": [-(2**63) - 1, 1.5, True, "1", [], {}, 2**63, 2**70],
    "repetition_penalty": [0, -1, 101, True, "1", [], {}],
    "length_penalty": [-101, 101, True, "1", [], {}],
    "stop": [0, True, "", [""], ["a", ""], ["a"] * 5, [1], [None], [["a"]], {}, {"a": 1}, "x" * 201, ["x" * 201]],
    "n": [0, 2, -1, 1.0, True, "1", [], 2**70],
    "frequency_penalty": [0.1, -2, True, "0", []],
    "presence_penalty": [0.1, 2, False, "0", {}],
    "logit_bias": [{"50256": -100}, [], "x", 0],
    "logprobs": [True, 1, "false", 0],
    "top_logprobs": [1, 20, False, "0"],
    "tools": [[{"type": "function"}], {}, "x", True],
    "tool_choice": ["required", {"type": "function"}, 1, True],
    "functions": [[{"name": "f"}], "x", {}],
    "function_call": [{"name": "f"}, True, "f"],
    "parallel_tool_calls": [0, 1, "true"],
    "response_format": [{"type": "json_object"}, {"type": "json_schema"}, "text", {}, []],
    "modalities": [["audio"], ["text", "audio"], "text", []],
    "audio": [{"voice": "x"}, {}, True],
    "prediction": [{"type": "content"}, {}],
    "reasoning_effort": ["low", "none", 0],
    "verbosity": ["low", 1],
    "web_search_options": [{}, True],
    "best_of": [2, True, "1"],
    "echo": [True, 0, "x"],
    "suffix": ["x", 1],
    "max_new_tokens": [5],
    "chat_template": ["{{ 1 }}", "{% for x in range(10**9) %}{% endfor %}"],
    "chat_template_kwargs": [{"x": 1}],
    "add_generation_prompt": [True],
    "guided_regex": ["(a+)+$"],
    "prompt": ["x"],
    "input": ["x"],
    "__class__": [1],
    "": [1],
    "x" * 5000: [1],
    "\u0000": [1],
    "\U0001f600": [1],
}

CONTENTS: list[Any] = [
    None,
    True,
    0,
    1.5,
    {},
    [],
    [None],
    [True],
    [0],
    ["x"],
    [[]],
    [{}],
    [{"type": None}],
    [{"type": 1}],
    [{"type": []}],
    [{"type": "text"}],
    [{"type": "text", "text": None}],
    [{"type": "text", "text": 1}],
    [{"type": "text", "text": []}],
    [{"type": "text", "text": "x", "more": 1}],
    [{"text": "x"}],
    [{"type": "Text", "text": "x"}],
    [{"type": "image"}],
    [{"type": "image", "image": "x"}],
    [{"type": "input_image", "image_url": PICTURE}],
    [{"type": "video_url", "video_url": {"url": "x"}}],
    [{"type": "input_audio", "input_audio": {"data": ""}}],
    [{"type": "file", "file": {"file_id": "x"}}],
    [{"type": "refusal", "refusal": "x"}],
    [{"type": "image_url"}],
    [{"type": "image_url", "image_url": PICTURE}],
    [{"type": "image_url", "image_url": None}],
    [{"type": "image_url", "image_url": {}}],
    [{"type": "image_url", "image_url": []}],
    [{"type": "image_url", "image_url": {"url": None}}],
    [{"type": "image_url", "image_url": {"url": 1}}],
    [{"type": "image_url", "image_url": {"url": PICTURE, "detail": "huge"}}],
    [{"type": "image_url", "image_url": {"url": PICTURE, "x": 1}}],
    "",
    " ",
    "\n\t",
    "x" * 32_769,
    "x" * 140_000,
    [{"type": "text", "text": ""}],
    [{"type": "text", "text": "x" * 20_000}] * 2,
    [{"type": "image_url", "image_url": {"url": PICTURE}}] * 17,
    [{"type": "text", "text": "x"}] * 10_000,
]

URLS = [
    "",
    " ",
    "x",
    "data:",
    "data:,",
    "data:image/png",
    "data:image/png,",
    "data:image/png;base64",
    "data:image/png;base64,",
    "data:image/png;base64,!!!!",
    "data:image/png;base64,AAAA",
    "data:image/png;base64,AAA",
    "data:image/png;base64,====",
    "data:text/html;base64,PGI+",
    "data:image/svg+xml;base64,PHN2Zy8+",
    "data:image/svg+xml,<svg/>",
    "data:;base64,AAAA",
    "data:application/pdf;base64,JVBERi0xLjQ=",
    "DATA:IMAGE/PNG;BASE64,AAAA",
    "data:image/png;charset=x;base64,AAAA",
    "data:image/png;base64," + "A" * 100_001,
    "data:image/" + "p" * 500 + ";base64,AAAA",
    PICTURE[:-8] + "\u00e9" * 4,
    PICTURE[: len(PICTURE) // 2],
    PICTURE.replace("base64", "base32"),
    " " + PICTURE,
    "image/png;base64,AAAA",
    "file:///etc/passwd",
    "/etc/passwd",
    "~/x.png",
    "http://localhost/x.png",
    "https://example.org/x.png",
    "ftp://x/y",
    data_url(b"GIF89a"),
    data_url(b"\x89PNG\r\n\x1a\n"),
    data_url(b"\xff\xd8\xff\xe0"),
    data_url(b"RIFF\0\0\0\0WEBP"),
    data_url(b"BM"),
    data_url(b"%PDF-1.4"),
    data_url(b"<svg xmlns='http://www.w3.org/2000/svg'/>"),
    data_url(b"<html>"),
    data_url(b"\x7fELF"),
    data_url(b"MZ"),
    data_url(b"PK\x03\x04"),
    data_url(b"%!PS-Adobe-3.0 EPSF-3.0"),
    data_url(b"II*\0"),
    data_url(b"8BPS"),
    data_url(b"\0" * 1000),
    data_url(large_picture(20_001, 1)),
    data_url(large_picture(7000, 7000)),
    data_url(large_picture(50_000, 50_000)[:40_000]),
]

ROLES: list[Any] = [None, True, 0, "", "User", "users", "tool", "function", "bot", [], {}, "\u0000", "x" * 10_000]

CONVERSATIONS: list[Any] = [
    [[]],
    [None],
    [1],
    ["x"],
    [{}],
    [{"role": "user"}],
    [{"content": "x"}],
    [{**USER, "tool_calls": []}],
    [{**USER, "name": 1}],
    [{"role": "assistant", "content": "x"}],
    [{"role": "system", "content": "x"}],
    [USER, USER],
    [{"role": "system", "content": "x"}] * 2 + [USER],
    [USER, {"role": "assistant", "content": "x"}],
    [USER, {"role": "system", "content": "x"}, USER],
    [USER, {"role": "assistant", "content": None}, USER],
    [USER, {"role": "assistant", "content": None, "tool_calls": [{"id": "x"}]}, USER],
    [USER, {"role": "assistant", "content": [{"type": "image_url", "image_url": {"url": PICTURE}}]}, USER],
    [{"role": "system", "content": [{"type": "image_url", "image_url": {"url": PICTURE}}]}, USER],
    [USER] * 257,
    [{"role": "user", "content": "word " * 3000}],
    [USER, {"role": "tool", "content": "x"}, USER],
]

NO_BODIES = [
    b"",
    b" ",
    b"null",
    b"true",
    b"1",
    b'"x"',
    b"[]",
    b"{",
    b"}",
    b"{}",
    b"[",
    b"]",
    b"{]",
    b"x",
    b"{'messages': []}",
    b'{"messages": [{"role": "user", "content": "x"}]',
    b'{"messages": [{"role": "user", "content": "x"}]}}',
    b'{"messages": [{"role": "user", "content": "x"}],}',
    b"\xef\xbb\xbf{}",
    b"\xff\xfe{\0}\0",
    b"\x00",
    b"\xff" * 100,
    b'{"messages": "\xff"}',
    b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
    b'{"messages": [{"role": "user", "content": "\\udc00\\ud800"}]}',
    b'{"messages": [{"role": "user", "content": "a\nb"}]}',
    b'{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}',
    b'{"messages": [{"role": "user", "content": "x"}], "temperature": Infinity}',
    b'{"messages": [{"role": "user", "content": "x"}], "temperature": -Infinity}',
    b'{"messages": [{"role": "user", "content": "x"}], "temperature": 1e999}',
    b'{"messages": [{"role": "user", "content": "x"}], "seed": ' + b"9" * 5000 + b"}",
    b'{"messages": [{"role": "user", "content": "x"}], "seed": 01}',
    b'{"messages": [], "messages": [{"role": "user", "content": "x"}]}',
    b'{"\\ud800": 1}',
    b'{"messages": [{"role": "user", "role": "system", "content": "x"}]}',
    b"[" * 100_000,
    b'{"a":' * 50_000,
    b"[" * 1000 + b"]" * 1000,
    b'{"messages": ' + b"[" * 17 + b"]" * 17 + b"}",
    b"[" + b"0," * 200_000 + b"0]",
    b'{"messages": [' + b"[]," * 30_000 + b"[]]}",
    b"// x\n{}",
    b"<xml/>",
    b"messages=x",
    b"--x\r\n\r\nx\r\n--x--",
]


def bodies() -> Iterator[bytes]:
    """Every one has to be answered by a status from 400 to 499."""
    yield from NO_BODIES
    fields = ((name, value) for name, values in WRONG.items() for value in values)
    yield from (json.dumps({"messages": [USER], name: value}).encode() for name, value in fields)
    yield from (json.dumps(body).encode() for body in _conversations())
    for cut in range(1, 60):
        yield json.dumps({"messages": [USER], "max_tokens": 4}).encode()[:-cut]


def _conversations() -> Iterator[object]:
    for content in CONTENTS:
        yield {"messages": [{"role": "user", "content": content}]}
    for url in URLS:
        part = {"type": "image_url", "image_url": {"url": url}}
        yield {"messages": [{"role": "user", "content": [part]}]}
    for role in ROLES:
        yield {"messages": [{"role": role, "content": "x"}]}
    for messages in CONVERSATIONS:
        yield {"messages": messages}
    # Each value of a wrong kind where an object or a list has to be.
    for value in NO_JSON:
        yield from (value, [value], {"messages": value}, {"messages": [value]}, {"messages": [{"role": value}]})
