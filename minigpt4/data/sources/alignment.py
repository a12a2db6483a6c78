"""MiniGPT-4's second stage, `cc_sbu_align`: `filter_cap.json` beside a folder `image` with `ID.jpg`.

Captions are taken raw, case and punctuation as they are, as the original does.
"""

from pathlib import Path

from minigpt4.data.sources.faults import WRONG_TEXT, BadRecordError, checked_text
from minigpt4.data.sources.guarded_folder import GuardedFolder
from minigpt4.data.sources.listed import Count, ListSource, Rows, list_source, picture_name, read_json
from minigpt4.errors import DataError

LIST_NAME = "filter_cap.json"


def open_alignment(
    path: Path,
    *,
    images: Path | None = None,
    text: str | None = None,
    within: Path | None = None,
    count: Count | None = None,
) -> ListSource:
    """Open pairs of the second stage.

    Args:
        path: The folder, or its list.
        images: Where `ID.jpg` lie; left out: in `image` beside the list.
        text: The caption's key.
        within: Links may lead anywhere in this folder.
        count: Told of the rows read.

    Raises:
        DataError: The list is missing or of another form.
    """
    file = path / LIST_NAME if path.is_dir() else path
    content = read_json(file)
    annotations = content.get("annotations") if isinstance(content, dict) else None
    if not isinstance(annotations, list):
        raise DataError(
            f'{file} is not of the form {{"annotations": [{{"image_id": ..., "caption": ...}}]}}',
            "a list of captions of another form is read with format: captions",
        )
    rows = Rows(count=count)
    for number, item in enumerate(annotations, 1):
        key = f"{file.name}:{number}"
        try:
            if not isinstance(item, dict):
                raise BadRecordError(WRONG_TEXT, f"{key} is not an object with image_id and caption")
            name = f"{picture_name(item.get('image_id'), key)}.jpg"
            key = f"image/{name}"
            rows.add(key, [name], [("", checked_text(item.get(text or "caption"), key))])
        except BadRecordError as error:
            rows.add_bad(error)
    return list_source(str(path), file, GuardedFolder(images or file.parent / "image", within), rows)
