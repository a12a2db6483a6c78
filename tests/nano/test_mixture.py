"""Examples are a function of their place, and say what is shown."""

import io
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nano.batches import NanoBatches
from nano.mixture import WHAT_IS_NEXT, Example, NanoMixture, phrase, with_article
from tests import tiny_chat
from tests.nano.test_shards import shard

WORDS = ["cat", "owl", "bus", "jeans", "red fox", "apple", "lamp"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    members: dict[str, bytes] = {}
    for number, word in enumerate(WORDS):
        buffer = io.BytesIO()
        tiny_chat.picture(number).resize((64, 48)).save(buffer, "JPEG")
        members |= {f"{number}.jpg": buffer.getvalue(), f"{number}.json": json.dumps({"caption": f"a {word}"}).encode()}
    shard(folder / "0.tar", members)
    return folder


def mixture(photos: Path, **changes: Any) -> NanoMixture:
    return NanoMixture(
        **{"photos": photos, "backgrounds": photos, "sprites": None, "words": WORDS, "seed": 1, **changes}
    )


def same(a: Example, b: Example) -> bool:
    pictures = [None if example.picture is None else example.picture.tobytes() for example in (a, b)]
    return pictures[0] == pictures[1] and (a.imagined, a.caption, a.turns) == (b.imagined, b.caption, b.turns)


def test_an_example_is_a_function_of_its_place(photos: Path) -> None:
    first, second = mixture(photos), mixture(photos)
    places = [(stage, step, row) for stage in (0, 1) for step in (0, 5) for row in range(4)]

    backwards = {place: second.example(*place, turns=3) for place in reversed(places)}

    assert all(same(first.example(*place, turns=3), backwards[place]) for place in places)


@pytest.mark.parametrize("place", [(1, 0, 0), (0, 1, 0), (0, 0, 1)])
def test_every_part_of_the_place_counts(place: tuple[int, int, int], photos: Path) -> None:
    data = mixture(photos, share_photos=0.0, share_imagined=1.0, share_unsure=0.0)

    assert not same(data.example(0, 0, 0, turns=1), data.example(*place, turns=1))


def test_seed_counts(photos: Path) -> None:
    assert not same(
        mixture(photos, share_photos=0.0, share_imagined=1.0).example(0, 0, 0, 1),
        mixture(photos, share_photos=0.0, share_imagined=1.0, seed=2).example(0, 0, 0, 1),
    )


def test_kinds_come_in_their_shares(photos: Path) -> None:
    data = mixture(photos, share_photos=0.3, share_imagined=0.3, share_unsure=0.2)

    def kind(example: Example) -> str:
        if example.imagined is None:
            return "photo" if example.caption in {f"a {word}" for word in WORDS} else "scene"
        return "imagined" if example.caption else "unsure"

    counts = Counter(kind(data.example(0, step, 0, 1)) for step in range(300))

    for name, share in {"photo": 0.3, "imagined": 0.3, "unsure": 0.2, "scene": 0.2}.items():
        assert counts[name] / 300 == pytest.approx(share, abs=0.1), name  # four standard deviations


def test_imagined_probabilities_name_the_caption_first(photos: Path) -> None:
    data = mixture(photos, share_photos=0.0, share_imagined=1.0, share_unsure=0.0)
    for step in range(50):
        example = data.example(0, step, 0, turns=4)

        assert example.imagined is not None
        numbers, shares = zip(*example.imagined, strict=True)
        assert shares[0] == max(shares) and sum(shares) <= 1
        assert len(set(numbers)) == 5
        assert example.caption == with_article(WORDS[numbers[0]])
        assert all(WORDS[numbers[0]] in answer or "photo" in answer for _, answer in example.turns)


def test_nothing_clear_is_answered_so(photos: Path) -> None:
    data = mixture(photos, share_photos=0.0, share_imagined=0.0, share_unsure=1.0)

    example = data.example(0, 0, 0, turns=4)

    assert example.caption == ""
    assert [answer for _, answer in example.turns] == ["I am not sure what this picture shows."]
    assert example.imagined is not None and max(p for _, p in example.imagined) < 0.4


def test_no_more_questions_than_wanted(photos: Path) -> None:
    data = mixture(photos)
    for step in range(40):
        for turns in (1, 4):
            assert 1 <= len(data.example(0, step, 0, turns).turns) <= turns


@pytest.mark.parametrize(
    ("caption", "thing"),
    [("a photo of a cat", "a cat"), ("there is a lamp in the photo", "a lamp"), ("milk in a grocery store", "milk")],
)
def test_phrase_keeps_the_thing(caption: str, thing: str) -> None:
    assert phrase(caption) == thing


@pytest.mark.parametrize(
    ("name", "named"),
    [("cat", "a cat"), ("owl", "an owl"), ("jeans", "jeans"), ("bus", "a bus"), ("dress", "a dress")],
)
def test_article_fits(name: str, named: str) -> None:
    assert with_article(name) == named


@pytest.mark.parametrize("objective", ["words", "language"])
def test_batch_of_a_step_is_what_the_objective_reads(objective: str, photos: Path) -> None:
    model = tiny_chat.model(vision="efficientnet_lite")
    words = tiny_chat.tokenizer()
    image_token_id = model.config.image_token_id

    def batches() -> NanoBatches:
        return NanoBatches(
            mixture=mixture(photos),
            vision_model=model.model.vision_model,
            tokenizer=words,
            image_token_id=image_token_id,
            stage=0,
            steps=2,
            batch_size=3,
            turns=2,
            objective=objective,
            num_image_tokens=4,
            num_word_places=2,
        )

    batch, again = batches()[1], batches()[1]

    assert torch.equal(batch["vision_outputs"].last_hidden_state, again["vision_outputs"].last_hidden_state)
    if objective == "words":
        assert torch.equal(batch["labels"], again["labels"])
        assert batch["labels"].shape[1] == 3
        assert image_token_id not in batch["distractor_ids"]
        return
    ids, labels, mask = batch["input_ids"], batch["labels"], batch["attention_mask"]
    assert ((ids == image_token_id).sum(dim=1) == 4).all()
    assert torch.equal(labels[labels != -100], ids[labels != -100])
    assert (labels[mask == 0] == -100).all()
    example = batches()._example(1, 0)
    said = words.decode(labels[0][labels[0] != -100])
    assert said == "".join(f"{answer}<|im_end|>" for _, answer in example.turns)


def test_photos_are_cropped_within_their_borders(photos: Path) -> None:
    data = mixture(photos, share_photos=1.0)
    for step in range(20):
        picture = data.example(0, step, 0, 1).picture
        assert picture is not None
        area = np.prod(picture.size) / (64 * 48)
        assert 0.55 <= area <= 1.0


def test_a_second_picture_is_asked_about_and_the_first_part_stays_as_it_was(photos: Path) -> None:
    data = mixture(photos, share_unsure=0.0, share_second=1.0)
    alone = mixture(photos, share_unsure=0.0)
    for step in range(40):
        example = data.example(0, step, 0, turns=1)
        first, second = example.parts

        assert same(first, alone.example(0, step, 0, turns=1))
        assert first.turns and second.turns
        answers = [answer for question, answer in second.turns if "first" not in question]
        assert len(answers) == 1
        back = [answer for question, answer in second.turns if "first" in question]
        assert back in ([], [f"The first picture shows {first.caption}."])


def test_question_that_names_the_second_picture_is_answered_of_it(photos: Path) -> None:
    data = mixture(photos, share_photos=1.0, share_second=1.0)
    seconds = [data.example(0, step, 0, turns=1).parts[1] for step in range(60)]

    asked = [second for second in seconds if "second" in second.turns[0][0]]

    assert asked
    assert all(second.turns[0][1] == f"The second picture shows {second.caption}." for second in asked)


def test_several_things_are_not_called_this(photos: Path) -> None:
    data = mixture(photos, share_photos=0.0, share_imagined=0.0, share_unsure=0.0, share_second=1.0)
    for step in range(60):
        _, second = data.example(0, step, 0, turns=1).parts
        question, answer = second.turns[0]
        if answer.startswith("This is"):
            assert question in WHAT_IS_NEXT
            assert second.caption.startswith(("a ", "an ")) and " and " not in second.caption


def test_second_pictures_come_in_their_share_and_leave_the_other_examples_alone(photos: Path) -> None:
    data, plain = mixture(photos, share_second=0.4), mixture(photos)
    examples = [data.example(0, step, 0, turns=2) for step in range(200)]

    share = sum(len(example.parts) == 2 for example in examples) / 200

    assert share == pytest.approx(0.4, abs=0.14)  # four standard deviations
    for step, example in enumerate(examples):
        if example.then is None:
            assert same(example, plain.example(0, step, 0, turns=2))
            # What the stages without second pictures were trained on: nothing is drawn before the example itself.
            assert same(example, plain._drawn(np.random.default_rng([1, 0, step, 0]), 2))


def second_pictures(photos: Path, objective: str) -> NanoBatches:
    model = tiny_chat.model(vision="efficientnet_lite")
    return NanoBatches(
        mixture=mixture(photos, share_photos=1.0, share_second=1.0),
        vision_model=model.model.vision_model,
        tokenizer=tiny_chat.tokenizer(),
        image_token_id=model.config.image_token_id,
        stage=0,
        steps=1,
        batch_size=3,
        turns=1,
        objective=objective,
        num_image_tokens=4,
        num_word_places=2,
    )


def test_pictures_of_a_conversation_stand_before_their_questions(photos: Path) -> None:
    batches = second_pictures(photos, "language")

    batch = batches[0]

    parts = [part for row in range(3) for part in batches._example(0, row).parts]
    seen = batch["vision_outputs"].last_hidden_state
    assert len(seen) == 6
    for outputs, part in zip(seen, parts, strict=True):
        assert torch.equal(outputs, batches._see([part]).last_hidden_state[0])
    for row in range(3):
        ids, labels = batch["input_ids"][row], batch["labels"][row]
        runs = "".join(
            "i" if i == batches.image_token_id else "a" if n != -100 else "q" for i, n in zip(ids, labels, strict=True)
        )
        assert re.fullmatch(r"q+i{4}q+a+q+i{4}q+a+[qa]*", runs)
        said = batches.tokenizer.decode(labels[labels != -100])
        turns = [turn for part in parts[2 * row : 2 * row + 2] for turn in part.turns]
        assert said == "".join(f"{answer}<|im_end|>" for _, answer in turns)


def test_words_are_taught_of_second_pictures_too(photos: Path) -> None:
    batch = second_pictures(photos, "words")[0]

    assert len(batch["labels"]) == len(batch["vision_outputs"].last_hidden_state) == 6
