"""Tokenizer folders as old converters left them: mended, with one sentence for each mend."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from minigpt4.errors import WeightsError
from minigpt4.processing.text_encoding import TextEncoder
from minigpt4.weights.llama.tokenizer import load_llama_tokenizer, mended_ids, mended_tokenizer
from tests.processing.tiny_tokenizers import SENTENCES, llama_kind, sentencepiece_model
from tests.weights.original.original_files import write_tokenizer

CONFIG, SPECIAL = "tokenizer_config.json", "special_tokens_map.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_tokenizer(tmp_path)
    return tmp_path


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | values), encoding="utf-8")


def test_folder_in_order_comes_back_as_it_is(folder: Path) -> None:
    mended = mended_tokenizer(folder)
    assert mended.notes == []
    assert mended.files == {path.name: path.read_bytes() for path in folder.iterdir()}


def old_class(folder: Path) -> None:
    change(folder / CONFIG, tokenizer_class="LLaMATokenizer")


def empty_strings(folder: Path) -> None:
    (folder / SPECIAL).write_text("{}", encoding="utf-8")
    config = {"bos_token": "", "eos_token": "", "unk_token": "", "tokenizer_class": "LLaMATokenizer"}
    (folder / CONFIG).write_text(json.dumps(config), encoding="utf-8")


def no_special_tokens_map(folder: Path) -> None:
    (folder / SPECIAL).unlink()


def nothing_but_the_vocabulary(folder: Path) -> None:
    (folder / SPECIAL).unlink()
    (folder / CONFIG).unlink()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (old_class, ["LLaMATokenizer"]),
        (empty_strings, ["LLaMATokenizer", "no bos_token, eos_token, unk_token", "was empty", "add_bos_token is true"]),
        (no_special_tokens_map, ["special_tokens_map.json was missing"]),
        (nothing_but_the_vocabulary, ["tokenizer_config.json was missing", "special_tokens_map.json was missing"]),
    ],
)  # fmt: skip
def test_broken_folder_gives_the_sound_folders_tokenizer_and_says_what_was_mended(
    damage: Callable[[Path], object], said: list[str], folder: Path
) -> None:
    damage(folder)
    tokenizer, notes = load_llama_tokenizer(folder)
    for words in said:
        assert sum(words in note for note in notes) == 1, words
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (1, 2, 0)
    assert tokenizer.pad_token == "</s>"
    assert tokenizer("a").input_ids[0] == 1
    sound = TextEncoder(llama_kind())
    for text in SENTENCES:
        plain = text.replace("<s>", "").replace("</s>", "").replace("<|im_end|>", "")
        assert TextEncoder(tokenizer).encode(plain) == sound.encode(plain)
    written = mended_tokenizer(folder).files
    assert json.loads(written[CONFIG])["tokenizer_class"] == "LlamaTokenizer"
    assert json.loads(written[SPECIAL])["eos_token"]["content"] == "</s>"


def test_text_begins_with_bos_where_the_configuration_does_not_say(folder: Path) -> None:
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    del config["add_bos_token"]
    (folder / CONFIG).write_text(json.dumps(config), encoding="utf-8")
    tokenizer, notes = load_llama_tokenizer(folder)
    assert tokenizer("a").input_ids[0] == 1
    assert [note for note in notes if "add_bos_token is true" in note] == notes


def test_sound_tokenizer_json_says_itself_how_a_text_begins(folder: Path) -> None:
    load_llama_tokenizer(folder)[0].save_pretrained(folder)
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    config.pop("add_bos_token", None)
    (folder / CONFIG).write_text(json.dumps(config), encoding="utf-8")
    assert (folder / "tokenizer.json").is_file()
    assert "tokenizer.json" in mended_tokenizer(folder).files
    assert load_llama_tokenizer(folder)[0]("a").input_ids[0] == 1


def test_mended_files_need_no_mending(folder: Path, tmp_path: Path) -> None:
    empty_strings(folder)
    again = tmp_path / "again"
    again.mkdir()
    for name, content in mended_tokenizer(folder).files.items():
        (again / name).write_bytes(content)
    assert mended_tokenizer(again).notes == []


def test_padding_token_of_an_early_vicuna_is_kept(folder: Path) -> None:
    (folder / "added_tokens.json").write_text('{"[PAD]": 380}', encoding="utf-8")
    change(folder / SPECIAL, pad_token="[PAD]")
    tokenizer, notes = load_llama_tokenizer(folder)
    assert (tokenizer.pad_token, tokenizer.pad_token_id, len(tokenizer)) == ("[PAD]", 380, 381)
    assert notes == []


@pytest.mark.parametrize(
    ("damage", "message", "hint"),
    [
        (lambda folder: (folder / "tokenizer.model").unlink(), "has no tokenizer", "tokenizer.model"),
        (
            lambda folder: (folder / "tokenizer.model").write_text("version https://git-lfs.github.com/spec/v1\n"),
            "git-lfs pointer", "git lfs pull",
        ),
        (
            lambda folder: (folder / "tokenizer.model").write_bytes((folder / "tokenizer.model").read_bytes()[:1000]),
            "is not a SentencePiece vocabulary", "again",
        ),
        (lambda folder: (folder / CONFIG).write_text("{"), "tokenizer_config.json cannot be read as JSON", "again"),
        (lambda folder: (folder / SPECIAL).write_text("[]"), "special_tokens_map.json holds no keys", "again"),
    ],
)  # fmt: skip
def test_folder_that_cannot_be_mended_is_refused(
    damage: Callable[[Path], object], message: str, hint: str, folder: Path
) -> None:
    damage(folder)
    with pytest.raises(WeightsError) as error:
        load_llama_tokenizer(folder)
    assert message in error.value.message
    assert hint in error.value.hint


@pytest.mark.parametrize(
    "other",
    [
        {"model_type": "unigram", "vocab_size": 322}, {"byte_fallback": False, "vocab_size": 100},
        {"add_dummy_prefix": False}, {"normalization_rule_name": "nmt_nfkc"}, {"remove_extra_whitespaces": True},
        {"treat_whitespace_as_suffix": True}, {"user_defined_symbols": ["###"]},
    ],
    ids=lambda other: next(iter(other)),
)  # fmt: skip
def test_vocabulary_of_another_kind_is_refused_and_not_read_as_llamas(other: dict[str, Any], folder: Path) -> None:
    """The library builds LLaMA's pipeline of any vocabulary, whose ids would then be others than SentencePiece's."""
    (folder / "tokenizer.model").write_bytes(sentencepiece_model(**other))
    with pytest.raises(WeightsError, match="is no vocabulary of LLaMA's kind: it splits"):
        load_llama_tokenizer(folder)


def test_folder_that_wants_no_space_before_a_text_is_taken_at_its_word(folder: Path) -> None:
    change(folder / CONFIG, add_prefix_space=False)
    tokenizer, _ = load_llama_tokenizer(folder)
    with_space = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model")).encode("## #")
    assert TextEncoder(tokenizer).encode("## #") != with_space


def test_swapped_ids_are_mended_and_right_ones_left() -> None:
    mended, notes = mended_ids({"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": -1, "x": 3}, "config.json")
    assert mended == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "x": 3}
    assert len(notes) == 2
    assert all("config.json" in note for note in notes)
    right = {"bos_token_id": 1, "eos_token_id": [2, 3], "pad_token_id": None}
    assert mended_ids(right, "config.json") == (right, [])
