import pytest

from minigpt4.text import counted


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0 pictures"), (1, "1 picture"), (2, "2 pictures"), (1234, "1,234 pictures")]
)
def test_one_thing_is_not_named_as_many_are(number: int, text: str) -> None:
    assert counted(number, "picture") == text
