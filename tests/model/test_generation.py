"""`generate`: every way of choosing words, and every shortcut, gives what the plain way gives.

Comparisons of ids are exact; the random models' best and second best words are further apart than rounding.
"""

from threading import Thread
from typing import Any

import pytest
import torch
from transformers import DynamicCache, TextIteratorStreamer, set_seed

from minigpt4.model import MiniGPT4ForConditionalGeneration
from tests.model import tiny

# A random model says anything; what has a meaning for the test it must not say.
UNSAID = [tiny.PAD_ID, 2, tiny.IMAGE_TOKEN_ID]
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 12, "suppress_tokens": UNSAID}


@pytest.fixture(scope="module")
def model() -> MiniGPT4ForConditionalGeneration:
    return tiny.model()


def answer(model: MiniGPT4ForConditionalGeneration, ids: list[int], **options: Any) -> list[int]:
    """The new ids of one row."""
    inputs = torch.tensor([ids])
    new: list[int] = model.generate(input_ids=inputs, **{**GREEDY, **options})[0, len(ids) :].tolist()
    return new


def greedy_by_hand(model: MiniGPT4ForConditionalGeneration, ids: list[int], pixels: torch.Tensor) -> list[int]:
    """Take the best word again and again, without a cache and without `generate`."""
    ids, start = list(ids), len(ids)
    with torch.no_grad():
        for _ in range(GREEDY["max_new_tokens"]):
            logits = model(input_ids=torch.tensor([ids]), pixel_values=pixels, use_cache=False).logits[0, -1]
            logits[UNSAID] = -torch.inf
            best = logits.topk(2).values
            assert best[0] - best[1] > 2e-5, "the choice is too close to compare"
            ids.append(int(logits.argmax()))
    return ids[start:]


@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"cache_implementation": "static"}])
@pytest.mark.parametrize("qformer", [True, False])
def test_greedy_takes_the_best_word_with_any_cache_or_none(qformer: bool, options: dict[str, Any]) -> None:
    model, ids, pixels = tiny.model(qformer=qformer), tiny.row(2, 3), tiny.pictures(2)
    assert answer(model, ids, pixel_values=pixels, **options) == greedy_by_hand(model, ids, pixels)


@pytest.mark.parametrize(("vision", "text"), tiny.PAIRS)
def test_every_kind_of_part_generates(vision: str, text: str) -> None:
    model, ids, pixels = tiny.model(vision=vision, text=text), tiny.row(1, 3), tiny.pictures(1)
    assert answer(model, ids, pixel_values=pixels) == greedy_by_hand(model, ids, pixels)


def test_answer_depends_on_the_picture(model: MiniGPT4ForConditionalGeneration) -> None:
    ids = tiny.row(1, 3)
    answers = {tuple(answer(model, ids, pixel_values=tiny.pictures(1, seed))) for seed in range(4)}
    assert len(answers) > 1


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}])
def test_left_padded_rows_with_no_one_and_two_pictures_are_answered_as_alone(
    model: MiniGPT4ForConditionalGeneration, options: dict[str, Any]
) -> None:
    rows = [tiny.row(1, 7, seed=1), tiny.row(0, 3), tiny.row(2, 2, seed=2)]
    pixels = tiny.pictures(3)
    inputs = tiny.batch(rows)
    together = model.generate(**inputs, pixel_values=pixels, **{**GREEDY, **options})
    alone = [
        answer(model, ids, **options, **({} if owned is None else {"pixel_values": pixels[slice(*owned)]}))
        for ids, owned in zip(rows, [(0, 1), None, (1, 3)], strict=True)
    ]
    assert together[:, inputs["input_ids"].shape[1] :].tolist() == alone


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 3}])
def test_pictures_read_before_give_the_same_answer_and_stay_as_they_were(
    model: MiniGPT4ForConditionalGeneration, options: dict[str, Any]
) -> None:
    ids, pixels = tiny.row(2, 3), tiny.pictures(2)
    with torch.no_grad():
        features = model.get_image_features(pixels)
    before = features.pooler_output.clone()
    outputs = {"image": features}
    set_seed(5)
    expected = answer(model, ids, pixel_values=pixels, **options)
    for _ in range(2):  # once more: nothing was used up
        set_seed(5)
        assert answer(model, ids, mm_encoder_outputs=outputs, **options) == expected
    assert outputs == {"image": features}
    assert torch.equal(features.pooler_output, before)


def test_same_seed_samples_the_same_and_another_something_else(model: MiniGPT4ForConditionalGeneration) -> None:
    ids, pixels = tiny.row(1, 3), tiny.pictures(1)
    sampled = []
    for seed in (1, 1, 2):
        set_seed(seed)
        sampled.append(answer(model, ids, pixel_values=pixels, do_sample=True, temperature=1.5, top_p=0.95))
    assert sampled[0] == sampled[1] != sampled[2]


def test_beams_find_an_answer_at_least_as_likely_as_greedy(model: MiniGPT4ForConditionalGeneration) -> None:
    ids, pixels = tiny.row(2, 3), tiny.pictures(2)

    def likelihood(new: list[int]) -> float:
        whole = torch.tensor([ids + new])
        with torch.no_grad():
            logits = model(input_ids=whole, pixel_values=pixels).logits[0, len(ids) - 1 : -1]
        return float(logits.log_softmax(-1).gather(1, torch.tensor(new)[:, None]).sum())

    greedy = answer(model, ids, pixel_values=pixels)
    beams = answer(model, ids, pixel_values=pixels, num_beams=5)
    assert likelihood(beams) > likelihood(greedy)  # strictly: these two differ
    scored = model.generate(
        input_ids=torch.tensor([ids]),
        pixel_values=pixels,
        **{**GREEDY, "num_beams": 5, "return_dict_in_generate": True, "output_scores": True},
    )
    # Teacher-forced, so pictures reached every beam in their order. The score is a mean over the new words.
    torch.testing.assert_close(float(scored.sequences_scores[0]) * len(beams), likelihood(beams), rtol=0.0, atol=1e-3)


def test_embeddings_in_place_of_ids_give_the_new_ids_alone(model: MiniGPT4ForConditionalGeneration) -> None:
    ids, pixels = tiny.row(1, 3), tiny.pictures(1)
    embeds = model.get_input_embeddings()(torch.tensor([ids]))
    actual = model.generate(inputs_embeds=embeds, pixel_values=pixels, **GREEDY)
    assert actual[0].tolist() == answer(model, ids, pixel_values=pixels)


def test_answer_ends_with_the_stop_string(model: MiniGPT4ForConditionalGeneration) -> None:
    tokenizer, ids, pixels = tiny.tokenizer(), tiny.row(1, 3), tiny.pictures(1)
    whole = answer(model, ids, pixel_values=pixels)
    stop = tokenizer.decode(whole[4:6])
    stopped = answer(model, ids, pixel_values=pixels, stop_strings=[stop], tokenizer=tokenizer)
    assert tokenizer.decode(stopped).endswith(stop)
    assert stopped == whole[: len(stopped)] and len(stopped) <= 6


def test_streamed_pieces_join_to_the_answer(model: MiniGPT4ForConditionalGeneration) -> None:
    tokenizer, ids, pixels = tiny.tokenizer(), tiny.row(1, 3), tiny.pictures(1)
    expected = tokenizer.decode(answer(model, ids, pixel_values=pixels), skip_special_tokens=True)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60.0, skip_special_tokens=True)
    inputs = {"input_ids": torch.tensor([ids]), "pixel_values": pixels, "streamer": streamer, **GREEDY}
    thread = Thread(target=model.generate, kwargs=inputs)
    thread.start()
    pieces = list(streamer)
    thread.join()
    assert "".join(pieces) == expected
    assert len([piece for piece in pieces if piece]) > 1


@pytest.mark.parametrize("new_picture", [False, True])
def test_second_question_reuses_the_cache_and_needs_new_pictures_only(
    model: MiniGPT4ForConditionalGeneration, new_picture: bool
) -> None:
    ids, pixels = tiny.row(1, 3), tiny.pictures(2)
    cache = DynamicCache(config=model.config.get_text_config())
    first = answer(model, ids, pixel_values=pixels[:1], past_key_values=cache)
    more = tiny.row(int(new_picture), 4, seed=3)
    held = cache.get_seq_length()
    assert held == len(ids) + len(first) - 1
    again = ids + first + more
    fresh = {"pixel_values": pixels[1:]} if new_picture else {}
    second = answer(model, again, past_key_values=cache, **fresh)
    assert cache.get_seq_length() == len(again) + len(second) - 1
    assert second == answer(model, again, pixel_values=pixels[: 1 + new_picture])


def test_cropped_cache_answers_an_edited_question(model: MiniGPT4ForConditionalGeneration) -> None:
    ids, pixels = tiny.row(1, 6), tiny.pictures(1)
    cache = DynamicCache(config=model.config.get_text_config())
    answer(model, ids, pixel_values=pixels, past_key_values=cache)
    cache.crop(len(ids) - 4 - cache.get_seq_length())  # a negative number: so many fewer
    edited = ids[:-4] + tiny.row(0, 2, seed=9)
    assert answer(model, edited, past_key_values=cache) == answer(model, edited, pixel_values=pixels)


def test_old_pictures_given_again_with_their_cache_are_refused(model: MiniGPT4ForConditionalGeneration) -> None:
    ids, pixels = tiny.row(1, 3), tiny.pictures(1)
    cache = DynamicCache(config=model.config.get_text_config())
    first = answer(model, ids, pixel_values=pixels, past_key_values=cache)
    with pytest.raises(ValueError, match=r"tokens: 0, features 4"):
        answer(model, ids + first + [7, 8], pixel_values=pixels, past_key_values=cache)


def test_bfloat16_generates() -> None:
    model = tiny.model().to(torch.bfloat16)
    new = answer(model, tiny.row(1, 3), pixel_values=tiny.pictures(1))
    assert len(new) == GREEDY["max_new_tokens"]
    assert len(set(new)) > 2
