"""Prompts and ids compared with what the original MiniGPT-4 code recorded for a tiny set of weights."""

from functools import cache
from itertools import takewhile
from typing import Any

import pytest
import sentencepiece
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaTokenizer

from minigpt4.errors import PromptError
from minigpt4.processing.messages import Message
from minigpt4.processing.prompts import PromptTemplate, as_text, template
from minigpt4.processing.text_encoding import TextEncoder
from tests import golden

IMAGE = {"type": "image"}
NO_TEXT = 399  # an id that none of the texts below encodes to, to hold the places of pictures

pytestmark = pytest.mark.reference


def llama(folder: str) -> LlamaTokenizer:
    return LlamaTokenizer.from_pretrained(golden.ROOT / folder)


def embeddings(folder: str) -> torch.Tensor:
    """The token embeddings of a folder's language model, in float32."""
    shard = golden.ROOT / folder / "pytorch_model-00001-of-00002.bin"
    return torch.load(shard, weights_only=True)["model.embed_tokens.weight"].float()


def user(text: str, images: int) -> Message:
    return {"role": "user", "content": [IMAGE] * images + [{"type": "text", "text": text}]}


def asked(turns: list[dict[str, Any]], images: list[int], answer_key: str) -> list[Message]:
    """The conversation up to the last of these turns' question; `images[i]` pictures come before question i."""
    messages: list[Message] = []
    for turn, count in zip(turns, images, strict=True):
        messages += [user(turn["user"], count), {"role": "assistant", "content": turn[answer_key]}]
    return messages[:-1]


def ids_of(prompt: PromptTemplate, tokenizer: LlamaTokenizer, messages: list[Message], places: int) -> list[int]:
    return prompt.encode(tokenizer, messages, image_token_id=NO_TEXT, num_image_tokens=places).input_ids


@pytest.mark.parametrize(
    ("folder", "vectors"),
    [("weights/vicuna", "golden/tokenizer.json"), ("v2/weights/llama2-chat", "v2/golden/tokenizer.json")],
)
def test_text_with_special_tokens_parsed_gets_the_slow_tokenizers_ids(folder: str, vectors: str) -> None:
    encoder = TextEncoder(llama(folder))
    for case in golden.content(vectors)["encode"]:
        assert encoder.encode(case["text"], parse_special=True) == case["ids_no_special"], case["text"]


def test_special_tokens_in_text_are_spelled_out_unless_parsing_is_asked_for() -> None:
    encoder = TextEncoder(llama("weights/vicuna"))
    special = [case["text"] for case in golden.content("golden/tokenizer.json")["encode"] if "s>" in case["text"]]
    assert special
    for text in special:
        assert not {0, 1, 2} & set(encoder.encode(text))


@cache
def both_encoders() -> tuple[TextEncoder, sentencepiece.SentencePieceProcessor]:
    model = str(golden.ROOT / "weights/vicuna/tokenizer.model")
    return TextEncoder(llama("weights/vicuna")), sentencepiece.SentencePieceProcessor(model_file=model)


@settings(max_examples=200)
@given(
    text=st.lists(
        st.one_of(
            st.sampled_from(["#", "##", "###", " ", "  ", "<s>", "</s>", "<unk>", "\u2581", "\0", "Human", "shapes"]),
            st.text(max_size=6),
        ),
        max_size=12,
    ).map("".join)
)
def test_any_text_gets_the_ids_of_sentencepiece_itself(text: str) -> None:
    encoder, pieces = both_encoders()
    assert encoder.encode(text) == pieces.encode(text)


def test_both_halves_of_a_training_prompt_get_the_recorded_ids() -> None:
    encoder = TextEncoder(llama("weights/vicuna"))
    wraps = [wrap for wrap in golden.content("golden/prompt_wrap.json")["wraps"] if wrap["prompt"]]
    assert wraps
    for wrap in wraps:
        before, after = wrap["prompt"].split("<ImageHere>")
        assert encoder.encode(before, parse_special=True) == wrap["p_before_ids"]
        assert encoder.encode(after, parse_special=True) == wrap["p_after_ids"]


CONVERSATIONS = {
    "empty": [],
    "image": [{"role": "user", "content": [IMAGE]}],
    "image_ask": [user("hello", 1)],
    "image_ask_open": [user("hello", 1)],
    "two_turn": [user("hello", 1), {"role": "assistant", "content": "yes"}, user("more", 0)],
    "two_images": [user("two", 2)],
}
REFUSED = {  # conversations that the original writes with a turn missing or merged
    "ask_twice": [user("hello", 1), user("again", 0)],
    "text_ending_in_img_tag": [user("hello", 0), user("x </Img> merged?", 0)],
    "empty_strings": [user("", 0), {"role": "assistant", "content": ""}],
}


def test_conversations_in_every_state_are_written_as_the_original_writes_them() -> None:
    recorded = {case["name"]: case["prompt"] for case in golden.content("golden/chat_units.json")["conversations"]}
    assert recorded.keys() == CONVERSATIONS.keys() | REFUSED.keys()
    for name, messages in CONVERSATIONS.items():
        open_ended = recorded[name].endswith("Assistant:")
        segments = template("vicuna-v0").render(messages, add_generation_prompt=open_ended)
        assert as_text(segments, "<ImageHere>") == recorded[name], name
    for messages in REFUSED.values():
        with pytest.raises(PromptError):
            template("vicuna-v0").render(messages, add_generation_prompt=False)


def test_chats_of_the_first_version_get_the_recorded_prompts_and_token_embeddings() -> None:
    prompt, tokenizer = template("vicuna-v0"), llama("weights/vicuna")
    table, tensors = embeddings("weights/vicuna"), golden.tensors("golden/generation.safetensors")
    compared = 0
    for dialog in golden.content("golden/generation.json")["dialogs"]:
        if "clip" in dialog["name"]:
            continue  # the original drops the beginning of a long context
        for number, turn in enumerate(dialog["turns"]):
            if "###" in turn["user"]:
                continue  # the original lets this question forge a turn
            images = [len(dialog["images"])] + ["1" in dialog["images_after"]] * number
            messages = asked(dialog["turns"][: number + 1], images, "output_text")
            assert as_text(prompt.render(messages), "<ImageHere>") == turn["prompt"]
            ids = torch.tensor(ids_of(prompt, tokenizer, messages, places=5))
            context = tensors[f"{dialog['name']}/{number}/inputs_embeds"][0]
            assert len(ids) == turn["context_len"] == len(context)
            text = ids != NO_TEXT
            assert torch.equal(table[ids[text]], context[text]), (dialog["name"], number)
            compared += 1
    assert compared >= 8


@pytest.mark.parametrize(
    ("chat", "name"),
    [
        ("chat_greedy_img0", "minigpt-v2"),
        ("chat_greedy_img1", "minigpt-v2"),
        ("chat_greedy_llama2_template", "llama-2"),
        ("chat_greedy_vicuna0_template", "vicuna-v0-spaced"),
    ],
)
def test_chats_of_the_second_version_get_the_recorded_prompts_and_lengths(chat: str, name: str) -> None:
    prompt, tokenizer = template(name), llama("v2/weights/llama2-chat")
    turns = golden.content("v2/golden/generation.json")[chat]["turns"]
    for number, turn in enumerate(turns):
        messages = asked(turns[: number + 1], [1] + [0] * number, "text")
        assert as_text(prompt.render(messages), "<ImageHere>") == turn["prompt"]
        assert len(ids_of(prompt, tokenizer, messages, places=4)) == turn["context_len"]


def test_batch_of_the_second_version_gets_the_recorded_token_embeddings() -> None:
    prompt, tokenizer = template("minigpt-v2"), llama("v2/weights/llama2-chat")
    table = embeddings("v2/weights/llama2-chat")
    contexts = golden.tensors("v2/golden/generation.safetensors")["generate_greedy_batch3/inputs_embeds"]
    texts = golden.content("v2/golden/generation.json")["generate_greedy_batch3"]["texts"]
    for text, context in zip(texts, contexts, strict=True):
        question = text.removeprefix("<s>[INST] <Img><ImageHere></Img> ").removesuffix(" [/INST]")
        messages = [user(question, 1)]
        assert as_text(prompt.render(messages), "<ImageHere>") == text
        ids = torch.tensor(ids_of(prompt, tokenizer, messages, places=4))
        context = context[-len(ids) :]  # padded on the left
        assert torch.equal(table[ids[ids != NO_TEXT]], context[ids != NO_TEXT])


def test_answer_that_was_generated_stays_in_the_ids_of_the_next_prompt() -> None:
    """The new prompt keeps the old one and the answer, apart from the pieces of the stop string."""
    prompt, tokenizer = template("vicuna-v0"), llama("weights/vicuna")
    for dialog in golden.content("golden/generation.json")["dialogs"]:
        if not dialog["name"].startswith("greedy_two_turn"):
            continue
        first = ids_of(prompt, tokenizer, asked(dialog["turns"][:1], [1], "output_text"), places=5)
        second = ids_of(prompt, tokenizer, asked(dialog["turns"], [1, 0], "output_text"), places=5)
        held = first + dialog["turns"][0]["token_ids_after_strip"]
        shared = len(list(takewhile(lambda pair: pair[0] == pair[1], zip(held, second, strict=False))))
        assert len(held) - shared <= 1, dialog["name"]  # one piece " ###" was generated, two are written: "##" "#"
