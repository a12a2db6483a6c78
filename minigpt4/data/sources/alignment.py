"""MiniGPT-4's second stage, `cc_sbu_align`: `filter_cap.json` beside a folder `image` with `ID.jpg`.

Captions are taken raw, case and punctuation as they are, as the original does.
"""

from pathlib import Path
from typing import Any

from minigpt4.data.sources.formats import Place, Request
from minigpt4.data.sources.lists import ListSource, Rows, list_source, numbered, picture_name, read_json
from minigpt4.data.sources.safe_files import WRONG_TEXT, BadRecordError, checked_text
from minigpt4.errors import DataError

LIST_NAME = "filter_cap.json"


def sniff(place: Place) -> Path | None:
    """Return a folder with the list, or a list of annotations without COCO's list of images."""
    if LIST_NAME in place.files and place.path.is_dir():
        return place.path
    found = isinstance(place.content, dict) and "annotations" in place.content
    return place.only_list if found and not {"images", "questions"} & set(place.content) else None


def open_source(request: Request) -> ListSource:
    """Open the pairs of a list, or of a folder with one."""
    file = request.path / LIST_NAME if request.path.is_dir() else request.path
    content = read_json(file)
    annotations = content.get("annotations") if isinstance(content, dict) else None
    if not isinstance(annotations, list):
        raise DataError(
            f'{file} is not of the form {{"annotations": [{{"image_id": ..., "caption": ...}}]}}',
            "a list of captions of another form is read with format: captions",
        )

    def add(rows: Rows, key: str, item: Any) -> None:  # noqa: ANN401  (whatever a list holds)
        if not isinstance(item, dict):
            raise BadRecordError(WRONG_TEXT, f"{key} is not an object with image_id and caption")
        name = f"{picture_name(item.get('image_id'), key)}.jpg"
        caption = checked_text(item.get(request.text or "caption"), f"image/{name}")
        rows.add(f"image/{name}", [name], [("", caption)])

    rows = Rows(request.count).add_all(numbered(file, annotations), add)
    return list_source(request, file, file.parent / "image", rows)
