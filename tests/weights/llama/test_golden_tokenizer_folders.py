"""The three tokenizer folders that the original was run with, and what it made of each.

Ids are equal. Where the original itself went wrong (a folder with empty special tokens gave it 0 for start and end),
ours gives what the sound folder gives, and the test says what the original's mistake was.
"""

import json
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from minigpt4.processing.text_encoding import TextEncoder
from minigpt4.weights.llama.tokenizer import load_llama_tokenizer
from tests import golden

pytestmark = pytest.mark.reference
SOUND, BROKEN = "vicuna", "vicuna-decapoda-style"
FOLDERS = (SOUND, "vicuna-LLaMATokenizer", BROKEN)
SHORT, SPECIAL = ["a red", "a"], "foo </s> bar"  # the texts that were encoded


@pytest.fixture(scope="module")
def recorded() -> dict[str, Any]:
    return golden.content("golden/tokenizer_folder_variants.json")


def loaded(folder: str) -> PreTrainedTokenizerBase:
    return load_llama_tokenizer(golden.ROOT / "weights" / folder)[0]


def told(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What was recorded of each folder, of this tokenizer."""
    padded = tokenizer(SHORT, padding=True, padding_side="right", add_special_tokens=False)
    return {
        "bos_eos_unk": [tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token],
        "ids": [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id],
        "pad_token_id": tokenizer.pad_token_id,
        "special_encode": tokenizer(SHORT[0]).input_ids,
        "enc": TextEncoder(tokenizer).encode(SPECIAL, parse_special=True),
        "padded": padded.input_ids,
    }


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_folder_gives_what_the_sound_one_gave(folder: str, recorded: dict[str, Any]) -> None:
    for what, value in told(loaded(folder)).items():
        assert value == recorded[SOUND][what], what


def test_old_class_name_changes_nothing_but_the_class(recorded: dict[str, Any]) -> None:
    """In the original too, once it was loaded by the right class; its `AutoTokenizer` refused it."""
    automatic = "AutoTokenizer_use_fast_False"
    sound, old = dict(recorded[SOUND]), dict(recorded[FOLDERS[1]])
    assert sound.pop(automatic) == "ok"
    assert "LLaMATokenizer does not exist" in old.pop(automatic)
    assert old == sound


def test_empty_special_tokens_are_mended_where_the_original_took_zero(recorded: dict[str, Any]) -> None:
    broken = recorded[BROKEN]
    assert (broken["bos_eos_unk"], broken["ids"], broken["padded"]) == (["", "", ""], [0, 0, 0], None)
    tokenizer, notes = load_llama_tokenizer(golden.ROOT / "weights" / BROKEN)
    assert any("no bos_token, eos_token, unk_token" in note for note in notes)
    # Without special tokens the name of one is text like any other, which is how a user's text is read here.
    assert TextEncoder(tokenizer).encode(SPECIAL) == broken["enc"]


def test_every_recorded_folder_is_compared(recorded: dict[str, Any]) -> None:
    assert set(recorded) == set(FOLDERS)
    known = {"bos_eos_unk", "ids", "pad_token_id", "special_encode", "enc", "padded"}
    assert all(known <= set(case) for case in recorded.values())
    assert {name for case in recorded.values() for name in case} - known == {
        "padded_error", "AutoTokenizer_use_fast_False",
    }  # fmt: skip


def test_first_token_of_a_text_and_its_padding_are_the_slow_tokenizers() -> None:
    """With a beginning, as the original encodes a prompt's first half, and the pieces' own names."""
    vectors = json.loads((golden.ROOT / "golden/tokenizer.json").read_text(encoding="utf-8"))
    tokenizer = loaded(SOUND)
    assert tokenizer.pad_token == vectors["pad_token"]
    encoder = TextEncoder(tokenizer)
    for case in vectors["encode"]:
        ids = encoder.encode(case["text"], parse_special=True)
        assert [tokenizer.bos_token_id, *ids] == case["ids_special"], case["text"]
        assert tokenizer.convert_ids_to_tokens(ids) == case["tokens"], case["text"]


def test_ids_are_decoded_as_the_slow_tokenizer_does() -> None:
    """Without special tokens, as answers are read, but for one space that the old one put next to a left-out token."""
    vectors = json.loads((golden.ROOT / "golden/tokenizer.json").read_text(encoding="utf-8"))
    tokenizer = loaded(SOUND)
    special = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id}
    for case in vectors["decode"]:
        text = str(tokenizer.decode(case["ids"], skip_special_tokens=True, clean_up_tokenization_spaces=False))
        if special & set(case["ids"][1:-1]):
            assert text.split() == case["decode_skip_special"].split(), case["ids"]
        else:
            assert text.lstrip(" ") == case["decode_skip_special"].lstrip(" "), case["ids"]
