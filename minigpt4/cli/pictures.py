"""Opening what the command line names: pictures, and standard input for one of them."""

from typing import TYPE_CHECKING

from minigpt4.errors import ImageError, UsageError

if TYPE_CHECKING:
    from PIL.Image import Image

QUESTION_HINT = 'for example: minigpt4 ask cat.jpg "What is in this picture?"'


def open_all(pictures: list[str], *, stdin_taken: bool = False) -> "list[Image]":
    """Open pictures by path, `-` for standard input; `stdin_taken` where questions come from there."""
    from minigpt4.processing.pictures import open_image

    if pictures.count("-") > (not stdin_taken):
        what = "questions from it" if stdin_taken else "one picture from it"
        raise UsageError(f"standard input was named for {pictures.count('-')} pictures", f"this command reads {what}")
    opened = []
    for number, picture in enumerate(pictures):
        try:
            opened.append(open_image(picture))
        except ImageError as error:
            if number and isinstance(error.__cause__, FileNotFoundError):
                raise ImageError(error.message, f"put the question in quotes; {QUESTION_HINT}") from error
            raise
    return opened
