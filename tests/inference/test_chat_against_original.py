"""Conversations through `ChatSession`, compared with those through the original's `Chat`, text for text.

Texts are equal, seeded draws included. What a session leaves out of the original's on purpose is pinned here too: a
question cannot forge a turn, an answer is not cut before the word "Assistant:", and special tokens are not written.
"""

from typing import Any

import pytest

import minigpt4
from minigpt4.inference.detokenizer import Detokenizer
from tests import golden
from tests.weights.original.test_golden_import import CLEAR, Loaded, imported

pytestmark = pytest.mark.reference
DRAWN = {"temperature": 1.0, "top_p": 0.9, "top_k": 50}  # what the original's chat, and its library, took by themselves
STOP, ROLE = "###", "Assistant:"


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    return minigpt4.load(imported(tmp_path_factory.mktemp("model") / "model"), device="cpu")


def dialogs(start: str) -> list[dict[str, Any]]:
    """The recorded conversations that a session can have: it always stops, and at its model's own end."""
    return [
        dialog
        for dialog in golden.content("golden/generation.json")["dialogs"]
        if dialog["name"].startswith(start)
        and not dialog["no_stopping_criteria"]
        and "max_length" not in dialog["answer_kwargs"]  # which cuts the system message and the picture off a context
        and "eos_token_id" not in dialog["generate_override"]
    ]


def session_options(dialog: dict[str, Any], turn: dict[str, Any]) -> dict[str, Any]:
    """The options of a turn by the session's names."""
    options = dict(dialog["answer_kwargs"])
    if "min_length" in options:
        options["min_length"] -= 1  # the original counted the start token
    if "torch_manual_seed" in turn:
        options = DRAWN | options | {"seed": turn["torch_manual_seed"]}
        options["top_k"] = dialog["generate_override"].get("top_k", options["top_k"])
    return options


@pytest.mark.parametrize("start", ["greedy", "sample"])
def test_every_turn_says_what_the_originals_chat_said(start: str, loaded: Loaded) -> None:
    compared = 0
    for dialog in dialogs(start):
        chat = minigpt4.ChatSession(*loaded)
        for number, turn in enumerate(dialog["turns"]):
            if STOP in turn["user"] or (start == "greedy" and turn["min_top2_gap"] < CLEAR):
                break  # the first is no forged turn here, the second is decided by rounding; both change what follows
            new = dialog["images"] if number == 0 else [dialog["images_after"]["1"]] if dialog["images_after"] else []
            for picture in new:
                chat.add_image(golden.ROOT / f"inputs/img{picture}.png")
            said = chat.ask(turn["user"], **session_options(dialog, turn))
            assert said == turn["output_text"], (dialog["name"], number)
            compared += 1
    assert compared >= {"greedy": 6, "sample": 2}[start]


def test_answers_are_written_as_the_original_writes_them(loaded: Loaded) -> None:
    """Of the recorded ids: the text up to "###", without a space at either end."""
    tokenizer = loaded[1].tokenizer
    special = [tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token]
    compared = 0
    for case in golden.content("golden/chat_units.json")["postprocess"]:
        if "error" in case:
            continue  # an answer of no ids at all
        writer = Detokenizer(tokenizer, (STOP,))
        written = "".join(writer.add(token) for token in case["ids"]) + writer.end()
        whole = tokenizer.decode(case["ids"], skip_special_tokens=True).partition(STOP)[0].strip()
        assert written == whole, case["ids"]
        expected = case["text"]
        for token in special:
            expected = expected.replace(token, "")
        assert (whole.rpartition(ROLE)[2] if ROLE in whole else whole).strip() == expected.strip(), case["ids"]
        compared += ROLE not in whole
    assert compared >= 15


def test_an_answer_of_no_words_is_empty_where_the_original_failed(loaded: Loaded) -> None:
    failed = [case for case in golden.content("golden/chat_units.json")["postprocess"] if "error" in case]
    for case in failed:
        writer = Detokenizer(loaded[1].tokenizer, (STOP,))
        assert "".join(writer.add(token) for token in case["generated"]) + writer.end() == ""
