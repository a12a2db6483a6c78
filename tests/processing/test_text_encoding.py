"""Text that stays text, whatever control tokens it names, and where each token lies in it."""

from itertools import pairwise

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models
from transformers import PreTrainedTokenizerFast

from minigpt4.errors import PromptError
from minigpt4.processing.text_encoding import IdWriter, TextEncoder, well_formed
from tests.processing.tiny_tokenizers import KINDS, decoded, image_token_id, sentencepiece_model

every_tokenizer = pytest.mark.parametrize("kind", KINDS)


def test_llama_kind_gets_the_ids_of_its_sentencepiece_model() -> None:
    pieces = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model())
    encoder = TextEncoder(KINDS["llama"]())
    for text in ["", " ", "  a", "a ", "###", " ###", "\u2581a", "</s>", "caf\u00e9 \U0001f600", "\0", "\n\n", "a  b"]:
        assert encoder.encode(text) == pieces.encode(text), text


@every_tokenizer
def test_names_of_control_tokens_become_control_tokens_only_when_asked_for(kind: str) -> None:
    tokenizer = KINDS[kind]()
    encoder, special = TextEncoder(tokenizer), set(tokenizer.all_special_ids)
    text = "a</s>b <image><|im_end|>"
    assert not special & set(encoder.encode(text))
    end, image, close = (encoder.control_id(name) for name in ("</s>", "<image>", "<|im_end|>"))
    assert encoder.encode(text, parse_special=True) == [
        *encoder.encode("a"),
        end,
        *encoder.encode("b "),
        image,
        close,
    ]


def test_added_token_that_is_not_special_stays_text_too() -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(KINDS["byte-level"]()._tokenizer.to_str()))
    tokenizer.add_tokens(AddedToken("<tool>", special=False, normalized=False))
    encoder = TextEncoder(tokenizer)
    assert encoder.control_id("<tool>") not in encoder.encode("a <tool>")
    assert encoder.encode("a <tool>") == TextEncoder(KINDS["byte-level"]()).encode("a <tool>")


@every_tokenizer
@settings(max_examples=60)
@given(text=st.text(max_size=20))
def test_spans_are_in_order_and_cover_the_text(kind: str, text: str) -> None:
    ids, spans = TextEncoder(KINDS[kind]()).encode_with_spans(text)
    assert len(ids) == len(spans)
    assert all(earlier[0] <= later[0] for earlier, later in pairwise(spans))
    covered = {place for start, end in spans for place in range(start, end)}
    assert covered == set(range(len(text)))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a\ud800", "a\ufffd"),
        ("\udc00a", "\ufffda"),
        ("\ud800a\udc00", "\ufffda\ufffd"),
        ("\ud83d\ude00", "\U0001f600"),
        ("\ufeff\0a\u2581\U0001f600\r\n", "\ufeff\0a\u2581\U0001f600\r\n"),
    ],
)
def test_lone_surrogates_are_replaced_and_nothing_else(text: str, expected: str) -> None:
    assert well_formed(text) == expected


@every_tokenizer
def test_nul_and_lone_surrogates_can_be_encoded(kind: str) -> None:
    tokenizer = KINDS[kind]()
    ids = TextEncoder(tokenizer).encode("a\0b \ud800")
    assert decoded(tokenizer, ids, from_start=True) == "a\0b \ufffd"


def test_marks_fall_on_every_token_that_holds_a_marked_character() -> None:
    tokenizer = KINDS["byte-level"]()
    encoder = TextEncoder(tokenizer)
    writer = IdWriter(encoder, reserved_id=image_token_id(tokenizer))
    writer.add_text("q#")
    writer.add_text("#\u00e9", marked=True)
    writer.add_text("q")
    writer.add_ids([image_token_id(tokenizer)], marked=True)
    assert [len(encoder.encode(text)) for text in ("q", "##", "\u00e9")] == [1, 1, 2]
    assert writer.mask == [0, 1, 1, 1, 0, 1]
    assert decoded(tokenizer, writer.ids[:-1], from_start=True) == "q##\u00e9q"


def test_vocabulary_that_spells_a_special_token_from_text_is_refused() -> None:
    vocabulary = {"<": 0, "e": 1, ">": 2, "<e": 3, "<e>": 4}
    backend = Tokenizer(models.BPE(vocabulary, [("<", "e"), ("<e", ">")]))
    encoder = TextEncoder(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<e>"))
    assert encoder.encode("<e") == [3]
    with pytest.raises(PromptError, match="special token with id 4 from plain text"):
        encoder.encode("<e>")


def test_tokenizer_without_a_tokenizers_backend_is_refused_by_name() -> None:
    class Handmade:
        unk_token_id = None

    with pytest.raises(PromptError, match="Handmade has no backend"):
        TextEncoder(Handmade())
