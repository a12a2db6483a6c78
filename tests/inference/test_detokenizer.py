"""Ids become text as they come: no character is cut, no stop string is shown, nothing is lost."""

from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from minigpt4.inference.detokenizer import Detokenizer
from tests.processing.tiny_tokenizers import byte_level_kind, llama_kind


def streamed(tokenizer: PreTrainedTokenizerBase, ids: list[int], stops: tuple[str, ...] = ()) -> list[str]:
    writer = Detokenizer(tokenizer, stops)
    pieces = [*map(writer.add, ids), writer.end()]
    assert "".join(pieces) == writer.text
    return pieces


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd"), max_size=12))
def test_no_character_is_cut(words: str) -> None:
    ids = byte_level_kind().encode(words, add_special_tokens=False)

    pieces = streamed(byte_level_kind(), ids)

    assert "".join(pieces) == byte_level_kind().decode(ids, skip_special_tokens=True).strip()
    assert not any("\ufffd" in piece for piece in pieces)


@given(st.text("\u4f60\u597d\U0001f642\u00e9a ", max_size=8))
def test_no_character_of_byte_tokens_is_cut(words: str) -> None:
    ids = llama_kind().encode(words, add_special_tokens=False)

    pieces = streamed(llama_kind(), ids)

    assert "".join(pieces) == words.strip()
    assert not any("\ufffd" in piece for piece in pieces)


def test_words_after_broken_bytes_are_not_lost() -> None:
    tokenizer = llama_kind()
    good = tokenizer.encode("\u4f60", add_special_tokens=False)
    lone = tokenizer.convert_tokens_to_ids("<0xE5>")  # makes the decoder give up on the bytes before it as well
    after = tokenizer.encode("the circle", add_special_tokens=False)

    said = "".join(streamed(tokenizer, [*good, lone, *after]))

    assert said.startswith("\u4f60\ufffd")
    assert said.endswith("the circle")


@given(st.lists(st.sampled_from(["a", "#", "##", "b ", " ", "###", "c"]), max_size=10))
def test_stop_string_is_never_shown_nor_half_shown(parts: list[str]) -> None:
    ids = [i for part in parts for i in byte_level_kind().encode(part, add_special_tokens=False)]
    whole = "".join(parts)

    pieces = streamed(byte_level_kind(), ids, ("###",))

    stopped = "###" in whole
    assert "".join(pieces) == whole.lstrip().partition("###")[0].rstrip()
    if stopped:  # what was shown before it was certain never had to be taken back
        assert not "".join(pieces).endswith("###")


def test_text_that_only_begins_like_a_stop_string_is_shown_once_it_is_certain() -> None:
    ids = [i for part in ("a", "#", "#", "b") for i in byte_level_kind().encode(part, add_special_tokens=False)]

    assert streamed(byte_level_kind(), ids, ("###",)) == ["a", "", "", "##b", ""]
