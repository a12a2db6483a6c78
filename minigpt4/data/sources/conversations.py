"""LLaVA's form of conversations: `[{"id", "image", "conversations": [{"from", "value"}, ...]}, ...]`.

The form of OpenAI's messages is read as well, which other trainers take: `messages` with `role` and `content`, and
`images`, a list of one; a content may be a list of parts (`{"type": "text", "text": ...}`, and `image` or `image_url`
with the picture's file). A message of the role `system` at the beginning is passed over, as the template has its own.
`<image>` and the line breaks round it are removed from the text: where the picture stands, the prompt template says.
A record without a picture is text alone. The picture may also lie there under COCO's long name, `COCO_train2014_...`,
which the original puts before every name.
"""

import re
from pathlib import Path
from typing import Any

from minigpt4.data.sources.formats import Place, Request
from minigpt4.data.sources.lists import ListSource, Rows, items_of, list_source
from minigpt4.data.sources.safe_files import NO_PICTURE, NO_TEXT, WRONG_TEXT, BadRecordError, checked_text
from minigpt4.errors import DataError

TURNS = ("conversations", "conversation", "messages")
"""Names of the list of turns."""
COCO_PREFIX = "COCO_train2014_"
_PICTURES = ("image", "image_url")
"""Kinds of parts that stand for pictures."""
_MARK = re.compile(r"\n*<image>\n*")
_ASKS, _ANSWERS = frozenset(["human", "user"]), frozenset(["gpt", "assistant"])


def sniff(place: Place) -> Path | None:
    """Return the one list, if its entries have turns."""
    return place.only_list if place.keys.intersection(TURNS) else None


def open_source(request: Request) -> ListSource:
    """Open a list of conversations (`.json` or `.jsonl`), or the one list of a folder."""
    request.refuse("text", "the turns of its conversations and no captions")
    path = request.path
    if path.is_dir():
        found = sorted([*path.glob("*.json"), *path.glob("*.jsonl")])
        if len(found) != 1:
            raise DataError(f"{path} has {len(found)} JSON lists, expected one", "name the list itself")
        path = found[0]
    return list_source(request, path, path.parent, Rows(request.count).add_all(items_of(path), _add))


def coco_names(name: str) -> list[str]:
    """Return where a picture of COCO may lie: under its name, or the long one of 2014."""
    folder, slash, base = name.rpartition("/")
    return [name] if base.startswith("COCO_") else [name, f"{folder}{slash}{COCO_PREFIX}{base}"]


def _add(rows: Rows, place: str, item: Any) -> None:  # noqa: ANN401  (whatever a list holds)
    turns = next((item[name] for name in TURNS if name in item), None) if isinstance(item, dict) else None
    if not isinstance(turns, list) or not turns:
        raise BadRecordError(WRONG_TEXT, f"{place} has no list of conversations")
    if len(turns) % 2 and _said(turns[0])[0] == "system":
        turns = turns[1:]
        rows.skipped["system messages"] += 1
    key = f"{place} ({item['id']})"[:200] if isinstance(item.get("id"), str | int) else place
    image = item.get("image", item.get("images", _images_in(turns)))
    if isinstance(image, list) and len(image) == 1:
        image = image[0]
    if image in ("", []):  # as some lists write text alone
        image = None
    if image is not None and not (isinstance(image, str) and image.strip()):
        raise BadRecordError(NO_PICTURE, f"{key}: its image is not the name of one picture")
    pairs = [_pair(turns[start : start + 2], start, key) for start in range(0, len(turns), 2)]
    if image is None and item.get("video"):
        raise BadRecordError(NO_PICTURE, f"{key} is about a video, and pictures are read")
    if image is None and any("<image>" in str(_said(turn)[1]) for turn in turns[::2]):
        raise BadRecordError(NO_PICTURE, f"{key} speaks of <image> and names none")
    rows.add(key, None if image is None else coco_names(image), pairs)


def _said(turn: Any) -> tuple[Any, Any]:  # noqa: ANN401  (whatever a list holds)
    """Return the role of a turn, and its text."""
    if not isinstance(turn, dict):
        return None, None
    said = turn.get("value", turn.get("content"))
    if isinstance(said, list) and all(isinstance(part, dict) for part in said):
        texts = [part["text"] for part in said if isinstance(part.get("text"), str)]
        marks = ["<image>"] * any(part.get("type") in _PICTURES for part in said)
        said = "\n".join([*marks, *texts])
    return turn.get("from", turn.get("role")), said


def _images_in(turns: list[Any]) -> list[Any] | None:
    """Return the pictures that parts of messages name; None where there are none."""
    contents = [turn.get("content") for turn in turns if isinstance(turn, dict)]
    parts = [part for content in contents if isinstance(content, list) for part in content if isinstance(part, dict)]
    named = [part.get(kind) for part in parts for kind in _PICTURES if part.get("type") == kind]
    return [name.get("url") if isinstance(name, dict) else name for name in named] or None


def _pair(turns: list[Any], start: int, key: str) -> tuple[str, str]:
    """Return a question and its answer."""
    if len(turns) < 2:
        raise BadRecordError(NO_TEXT, f"{key} ends with a question, expected an answer")
    for offset, (turn, roles, role) in enumerate(zip(turns, (_ASKS, _ANSWERS), ("human", "gpt"), strict=True)):
        who = _said(turn)[0]
        if not isinstance(who, str) or who not in roles:
            raise BadRecordError(
                WRONG_TEXT, f"{key}: turn {start + offset + 1} is from {str(who)[:40]!r}, expected {role}"
            )
    question, answer = (_said(turn)[1] for turn in turns)
    # A picture alone may be the whole question: the recipe's prompts then ask.
    asked = _MARK.sub("", checked_text(question, key, "question")).strip()
    return asked, checked_text(answer, key, "answer")
