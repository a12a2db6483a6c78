"""The tokenizer files of LLaMA and Vicuna folders, mended where old converters left them broken.

The vocabulary itself (`tokenizer.model`, a SentencePiece file) is never mended; what is around it often must be: the
class name `LLaMATokenizer` of a pre-release, a `special_tokens_map.json` that is missing or empty, special tokens that
are empty strings, and the ids 0 and 1 for the beginning and end of a text, which are 1 and 2. Every mend is one
sentence for the user.
"""

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sentencepiece

from minigpt4.errors import WeightsError
from minigpt4.processing.text_encoding import TextEncoder
from minigpt4.text import first_line, read_json_object
from minigpt4.weights.files.disk import storing

if TYPE_CHECKING:  # loaded where a tokenizer is built: mending the files of a 13 GB model needs no 100 MB library
    from transformers import PreTrainedTokenizerBase

VOCABULARY_FILE = "tokenizer.model"
CONFIG_FILE = "tokenizer_config.json"
SPECIAL_TOKENS_FILE = "special_tokens_map.json"
FAST_FILE = "tokenizer.json"
TOKENIZER_FILES = (
    VOCABULARY_FILE, CONFIG_FILE, SPECIAL_TOKENS_FILE, FAST_FILE,
    "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja",
)  # fmt: skip
ORIGINAL_DIR = "original"
"""In an imported model folder: the language model's own tokenizer files, which the original code reads."""

OLD_CLASSES = ("LLaMATokenizer", "LLaMATokenizerFast")
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token")
LFS_POINTER = b"version https://git-lfs"
MAX_FILE_BYTES = 256 * 2**20
"""No tokenizer file is near this; a larger one is something else under its name."""

_PROBES = (
    "###Human: <Img>",
    "  What  is\nhere? ",
    "\ufb01\u00bd \u4f60\U0001f600",
    "questions about pictures, and answers",
)
"""Texts in which a vocabulary of another kind shows: separators, spaces, and characters that some rewrite or lack."""

_NORMALIZER = 3
"""The field of a SentencePiece file that says how text is normalized; it comes after the pieces."""


@dataclass
class MendedTokenizer:
    """The tokenizer files of a folder as they should be, by name, and one sentence for each thing that was mended."""

    files: dict[str, bytes]
    notes: list[str] = field(default_factory=list)


def mended_tokenizer(folder: Path) -> MendedTokenizer:
    """Read the tokenizer files of a language model's folder and mend them.

    A folder without `tokenizer.model` but with `tokenizer.json` (a newer tokenizer) is returned as it is.

    Raises:
        WeightsError: The folder has no tokenizer, or one of its files cannot be read as what it is.
        StorageError: The folder cannot be read.
    """
    files: dict[str, bytes] = {}
    with storing(folder, doing="read"):
        for name in TOKENIZER_FILES:
            if (folder / name).is_file():
                if (folder / name).stat().st_size > MAX_FILE_BYTES:
                    raise WeightsError(f"{folder / name} is too large for a tokenizer file", "fetch it again")
                files[name] = (folder / name).read_bytes()
    if VOCABULARY_FILE not in files:
        if FAST_FILE in files:
            return MendedTokenizer(files)
        raise WeightsError(
            f"{folder} has no tokenizer: neither {VOCABULARY_FILE} nor {FAST_FILE}",
            f"copy {VOCABULARY_FILE} of the LLaMA model there",
        )
    pieces = special_pieces(folder / VOCABULARY_FILE, files[VOCABULARY_FILE])
    return _mended(folder, files, pieces)


def mended_ids(config: Mapping[str, Any], where: str) -> tuple[dict[str, Any], list[str]]:
    """Mend the special ids in a LLaMA's `config.json` or `generation_config.json`.

    The pre-release converter wrote 0 for the beginning and 1 for the end of a text; LLaMA's vocabulary has 1 and 2.

    Returns:
        The content with `bos_token_id` 1, `eos_token_id` 2 and no negative `pad_token_id`, and a sentence for each
        mend, with `where` as the file's name. Other content comes back unchanged.
    """
    mended, notes = dict(config), []
    if (config.get("bos_token_id"), config.get("eos_token_id")) == (0, 1):
        mended |= {"bos_token_id": 1, "eos_token_id": 2}
        notes.append(
            f"{where} said bos_token_id 0 and eos_token_id 1, as an old converter wrote them; LLaMA's are 1 and 2"
        )
    pad = config.get("pad_token_id")
    if isinstance(pad, int) and pad < 0:
        mended["pad_token_id"] = 0  # what the converters of that time wrote otherwise
        notes.append(f"{where} said pad_token_id {pad}, which is no id; it is 0 now")
    return mended, notes


def load_llama_tokenizer(folder: Path) -> tuple["PreTrainedTokenizerBase", list[str]]:
    """Load the tokenizer of a language model's folder, mended, and return it with the sentences about that.

    Its padding token is the end of text where it has none, as in the original.

    Raises:
        WeightsError: As `mended_tokenizer`, or the library cannot build a tokenizer of the files.
    """
    from transformers import AutoTokenizer, LlamaTokenizer

    mended = mended_tokenizer(folder)
    kind: Any = LlamaTokenizer if VOCABULARY_FILE in mended.files else AutoTokenizer
    with tempfile.TemporaryDirectory(prefix="minigpt4-tokenizer-") as scratch:
        for name, content in mended.files.items():
            (Path(scratch) / name).write_bytes(content)
        try:
            tokenizer: PreTrainedTokenizerBase = kind.from_pretrained(scratch, local_files_only=True)
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise WeightsError(
                f"the tokenizer of {folder} cannot be read: {first_line(error)}",
                "copy the tokenizer files of the same language model from where it was published",
            ) from error
    says_how = FAST_FILE in mended.files or getattr(tokenizer, "add_prefix_space", None) is False
    if VOCABULARY_FILE in mended.files and not says_how:
        _refuse_other_splitting(folder / VOCABULARY_FILE, mended.files[VOCABULARY_FILE], tokenizer)
    tokenizer.name_or_path = folder.name  # not the scratch folder, which is gone
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer, mended.notes


def _refuse_other_splitting(path: Path, vocabulary: bytes, tokenizer: "PreTrainedTokenizerBase") -> None:
    """Refuse a vocabulary that is not of LLaMA's kind: the library would split texts by it as if it were."""
    pieces, encoder = sentencepiece.SentencePieceProcessor(model_proto=vocabulary), TextEncoder(tokenizer)
    for text in _PROBES:
        if encoder.encode(text) != pieces.encode(text):
            raise WeightsError(
                f"{path} is no vocabulary of LLaMA's kind: it splits {text!r} in another way than byte-pair encoding "
                "with bytes for unknown characters and no change of the text",
                "use the language model's tokenizer.json beside it, or a LLaMA or Vicuna",
            )


def special_pieces(path: Path, content: bytes) -> dict[str, str]:
    """Return what a SentencePiece vocabulary calls `bos_token`, `eos_token` and `unk_token`.

    Raises:
        WeightsError: It is a git-lfs pointer, or no SentencePiece vocabulary, or lacks one of the three.
    """
    if content.startswith(LFS_POINTER):
        raise WeightsError(f"{path} is a git-lfs pointer, not the file itself", "run `git lfs pull` in its folder")
    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(content)
    except (RuntimeError, OSError, TypeError) as error:
        raise WeightsError(f"{path} is not a SentencePiece vocabulary", "download it again") from error
    if _NORMALIZER not in _fields(content):  # the library reads what is left, and splits texts in another way
        raise WeightsError(f"{path} is cut short: it does not say how text is normalized", "download it again")
    ids = (processor.bos_id(), processor.eos_id(), processor.unk_id())
    if min(ids) < 0:
        raise WeightsError(f"{path} lacks a token for the beginning, the end or the unknown", "download it again")
    return {name: str(processor.IdToPiece(i)) for name, i in zip(SPECIAL_TOKENS, ids, strict=True)}


def _fields(content: bytes) -> set[int]:
    """List the fields of a protocol buffer that the library has read: a tag, a length and as many bytes each."""
    fields, place = set(), 0
    while place < len(content):
        numbers: list[int] = []
        while len(numbers) < 2 and place < len(content):  # seven bits a byte, the highest bit of the last is 0
            longest = min(place + 10, len(content))
            end = next((end for end in range(place, longest) if content[end] < 0x80), longest - 1)
            numbers.append(sum((content[at] & 0x7F) << 7 * (at - place) for at in range(place, end + 1)))
            place = end + 1
        fields.add(numbers[0] >> 3)
        place += numbers[-1]
    return fields


def _mended(folder: Path, files: dict[str, bytes], pieces: dict[str, str]) -> MendedTokenizer:
    notes: list[str] = []
    config = _read_json(folder / CONFIG_FILE, files)
    special = _read_json(folder / SPECIAL_TOKENS_FILE, files)
    if CONFIG_FILE not in files:
        config = {"add_bos_token": True, "add_eos_token": False, "tokenizer_class": "LlamaTokenizer"}
        notes.append(f"{CONFIG_FILE} was missing and was written")
    if config.get("tokenizer_class") in OLD_CLASSES:
        notes.append(f"{CONFIG_FILE} named the class {config['tokenizer_class']}, which is LlamaTokenizer now")
        config["tokenizer_class"] = "LlamaTokenizer"
    empty = [name for name in SPECIAL_TOKENS if not _content(config.get(name, special.get(name)))]
    if empty:
        notes.append(f"{CONFIG_FILE} had no {', '.join(empty)}; the vocabulary's own were written")
    tokens = {name: _content(special.get(name)) or _content(config.get(name)) or pieces[name] for name in pieces}
    if not any(_content(special.get(name)) for name in pieces):
        what = "was missing" if SPECIAL_TOKENS_FILE not in files else "was empty"
        notes.append(f"{SPECIAL_TOKENS_FILE} {what} and was written from the vocabulary")
    if "add_bos_token" not in config and (notes or FAST_FILE not in files):  # a sound tokenizer.json says it itself
        config["add_bos_token"] = True  # what the first LlamaTokenizer took; today's takes false
        notes.append(
            f"{CONFIG_FILE} did not say that a text begins with bos_token, as LLaMA's do; add_bos_token is true"
        )
    if not notes:
        return MendedTokenizer(files)
    for name, token in tokens.items():
        if not _content(special.get(name)):
            special[name] = _token(token)
        if not _content(config.get(name)):
            config[name] = {"__type": "AddedToken", **_token(token)}
    mended = {name: content for name, content in files.items() if name != FAST_FILE}  # it was built from the broken
    mended |= {CONFIG_FILE: _json(config), SPECIAL_TOKENS_FILE: _json(special)}
    return MendedTokenizer(mended, notes)


def _token(content: str) -> dict[str, Any]:
    """Write a token as LLaMA's converters do."""
    return {"content": content, "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}


def _content(token: object) -> str:
    """Return a token's text; it is stored as a string or as a dictionary."""
    content = token.get("content") if isinstance(token, Mapping) else token
    return content if isinstance(content, str) else ""


def _read_json(path: Path, files: Mapping[str, bytes]) -> dict[str, Any]:
    return (
        read_json_object(path, WeightsError, "copy it again from where the model was published")
        if path.name in files
        else {}
    )


def _json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=1, sort_keys=True) + "\n").encode()
