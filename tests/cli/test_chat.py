"""Commands typed into a conversation say what became of its pictures."""

from pathlib import Path

import pytest

from minigpt4.cli.chat import HELP, carry_out
from minigpt4.errors import UsageError
from minigpt4.inference.chat import ChatSession
from tests import tiny_chat


@pytest.fixture
def session() -> ChatSession:
    return ChatSession(tiny_chat.model(), tiny_chat.processor())


def test_a_quoted_path_is_the_file(session: ChatSession, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As terminals write a file that is dragged into them."""
    path = tmp_path / "my picture (1).png"
    tiny_chat.picture().save(path)

    for quote in ("'", '"'):
        assert carry_out(session, f"/image {quote}{path}{quote}")

    assert capsys.readouterr().err.count("my picture (1).png belongs to the next question") == 2


def test_undo_and_reset_say_that_a_picture_went_too(session: ChatSession, capsys: pytest.CaptureFixture[str]) -> None:
    session.add_image(tiny_chat.picture())
    session.ask("what is this?", max_new_tokens=2)
    session.ask("and now?", max_new_tokens=2)

    for line in ("/undo", "/reset", "/reset"):
        carry_out(session, line)

    assert capsys.readouterr().err.splitlines() == [
        "the last question is taken back",
        "a new conversation without pictures; /image adds one",
        "a new conversation",
    ]


def test_undo_of_a_question_with_a_picture_says_so(session: ChatSession, capsys: pytest.CaptureFixture[str]) -> None:
    session.add_image(tiny_chat.picture())
    session.ask("what is this?", max_new_tokens=2)

    carry_out(session, "/undo")

    assert capsys.readouterr().err == "the last question is taken back, its picture too; /image adds one\n"


def test_file_that_is_there_is_replaced_only_where_that_is_said(session: ChatSession, tmp_path: Path) -> None:
    path = tmp_path / "my talk.json"
    carry_out(session, f"/save {path}")
    path.write_text("something else")

    with pytest.raises(UsageError, match="exists already") as refused:
        carry_out(session, f"/save '{path}'")
    assert path.read_text() == "something else"

    assert refused.value.hint == f"/save! {path} replaces it"
    carry_out(session, refused.value.hint.removesuffix(" replaces it"))
    assert path.read_text() == "[]"
    assert "/save! FILE" in HELP
