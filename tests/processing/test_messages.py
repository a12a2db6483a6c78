"""Which conversations are read, and that a refusal names the message, what was found there and what was expected."""

import pytest

from minigpt4.errors import PromptError
from minigpt4.processing.messages import MAX_MESSAGE_CHARACTERS, Message, Turn, read_turns

IMAGE = {"type": "image"}


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def answer(text: str) -> Message:
    return {"role": "assistant", "content": text}


def test_parts_are_reduced_to_their_text_and_the_number_of_pictures() -> None:
    url = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    parts = [{"type": "text", "text": "a"}, IMAGE, {"type": "text", "text": "b"}, url]
    messages: list[Message] = [{"role": "system", "content": "s", "name": "x"}, {"role": "user", "content": parts}]
    assert read_turns(messages, answer_wanted=True) == [Turn("system", "s", 0), Turn("user", "a\nb", 2)]


def test_conversation_that_waits_for_nothing_may_end_anywhere() -> None:
    for messages in ([], [user("a")], [user("a"), answer("")]):
        assert len(read_turns(messages, answer_wanted=False)) == len(messages)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "There are no messages, expected 'user' at the end"),
        ([{"role": "system", "content": "a"}], r"messages\[0\] has the role 'system', expected 'user' at the end"),
        ([user("a"), answer("b")], r"messages\[1\] has the role 'assistant', expected 'user' at the end"),
        ([answer("b"), user("a")], r"messages\[0\] has the role 'assistant', expected 'system' or 'user'"),
        ([user("a"), user("b")], r"messages\[1\] has the role 'user', expected 'assistant'"),
        ([user("a"), {"role": "system", "content": "b"}], r"messages\[1\] has the role 'system', expected 'assistant'"),
        ([{"role": "tool", "content": "a"}], r"messages\[0\] has the role 'tool', expected 'system', 'user' or"),
        ([{"role": ["user"], "content": "a"}], r"messages\[0\] has the role a list"),
        (["hello"], r"messages\[0\] is 'hello', expected a mapping"),
        ([{"role": "user"}], r"messages\[0\].content is None, expected a string or a list"),
        ([{"role": "user", "content": b"abc"}], r"messages\[0\].content is a bytes"),
        ([{"role": "user", "content": ["a"]}], r"messages\[0\].content\[0\] is 'a', expected a part"),
        ([{"role": "user", "content": [IMAGE, {"type": "audio"}]}], r"content\[1\] has the type 'audio', expected"),
        ([{"role": "user", "content": [{"type": "text", "text": 3}]}], r"content\[0\].text is 3, expected a string"),
        ([{"role": "system", "content": [IMAGE]}, user("a")], r"messages\[0\] has a picture and the role 'system'"),
        ([user(" \n")], r"messages\[0\] is empty, expected a question or a picture"),
        ([user("x" * 100_001)], r"messages\[0\] has 100001 characters of text, expected at most 32768"),
    ],
)
def test_malformed_conversation_is_refused_with_position_value_and_expectation(
    messages: list[Message], message: str
) -> None:
    with pytest.raises(PromptError, match=message) as caught:
        read_turns(messages, answer_wanted=True)
    assert caught.value.hint


def test_longest_allowed_message_is_accepted_and_a_long_value_is_not_repeated_in_the_error() -> None:
    assert read_turns([user("x" * MAX_MESSAGE_CHARACTERS)], answer_wanted=True)
    with pytest.raises(PromptError) as caught:
        read_turns([{"role": "x" * 1_000_000, "content": "a"}], answer_wanted=True)
    assert len(caught.value.message) < 200
