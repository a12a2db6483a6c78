"""Drawn scenes: the picture shows what the record says, and every sentence about it is true."""

import colorsys
import re
from collections import Counter

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from nano.scenes.colours import COLOUR_RANGES, COLOURS, PURE_COLOURS, name_pixels, sample_colour
from nano.scenes.drawing import caption, dialogue, draw_scene, questions
from nano.scenes.plan import confusable
from nano.scenes.record import Box, Scene, SceneObject, overlap
from nano.scenes.shapes import SHAPES
from nano.scenes.words import WORDINGS
from tests.nano.scene_checker import check, check_caption

SEEDS = range(300)
Drawn = tuple[Image.Image, Scene]
Asked = tuple[Scene, tuple[str, str, str]]


@pytest.fixture(scope="module")
def drawn() -> list[Drawn]:
    return [draw_scene(np.random.default_rng(seed)) for seed in SEEDS]


@pytest.fixture(scope="module")
def scenes(drawn: list[Drawn]) -> list[Scene]:
    return [scene for _, scene in drawn]


@pytest.fixture(scope="module")
def asked(scenes: list[Scene]) -> list[Asked]:
    return [
        (scene, item) for seed, scene in enumerate(scenes) for item in questions(scene, np.random.default_rng(seed))
    ]


def shape(kind: str, colour: str, box: Box = (0, 0, 40, 40)) -> SceneObject:
    return SceneObject(kind, SHAPES[kind].plural, colour, box)


def animal(kind: str, box: Box = (0, 0, 40, 40)) -> SceneObject:
    return SceneObject(kind, f"{kind}s", None, box, "animal")


# Drawing


def test_a_scene_is_a_function_of_its_generator() -> None:
    for seed in range(10):
        (first, record), (second, other) = (draw_scene(np.random.default_rng(seed)) for _ in range(2))
        assert record == other
        assert first.tobytes() == second.tobytes()
    assert len({draw_scene(np.random.default_rng(seed))[0].tobytes() for seed in range(10)}) == 10


@pytest.mark.parametrize("size", [96, 224, 384])
def test_a_scene_has_the_wanted_size_and_its_things_lie_inside(size: int) -> None:
    for seed in range(15):
        picture, scene = draw_scene(np.random.default_rng(seed), size=size)
        assert picture.size == (size, size) and picture.mode == "RGB" and scene.size == size
        for thing in scene.objects:
            left, top, right, bottom = thing.box
            assert 0 <= left < right <= size and 0 <= top < bottom <= size


def test_things_hardly_overlap_and_sizes_stay_within_the_promised_range(scenes: list[Scene]) -> None:
    for scene in scenes:
        for number, first in enumerate(scene.objects):
            assert all(overlap(first.box, second.box) < 0.1 for second in scene.objects[:number])
            longest = max(first.box[2] - first.box[0], first.box[3] - first.box[1])
            # An outline or a wobble may cost a pixel or two of the side that was asked for.
            assert 0.12 * scene.size <= longest <= 0.71 * scene.size


def test_scenes_vary_in_number_kind_colour_and_background(scenes: list[Scene]) -> None:
    numbers = Counter(len(scene.objects) for scene in scenes)
    assert set(numbers) == {1, 2, 3, 4, 5, 6} and numbers[1] + numbers[2] + numbers[3] > len(scenes) / 2
    assert {thing.kind for scene in scenes for thing in scene.objects} == set(SHAPES)
    assert {thing.colour for scene in scenes for thing in scene.objects} == set(COLOURS)
    backgrounds = Counter(scene.background for scene in scenes)
    assert 0.3 < backgrounds["white"] / len(scenes) < 0.55
    assert {"tint", "gradient", "noise", "horizon", "red", "blue"} <= set(backgrounds)


def test_photographs_become_backgrounds_when_given() -> None:
    photo = Image.effect_noise((300, 260), 60).convert("RGB")
    records = [draw_scene(np.random.default_rng(seed), backgrounds=[photo])[1] for seed in range(80)]
    assert any(record.background == "photo" for record in records)
    assert all(draw_scene(np.random.default_rng(seed))[1].background != "photo" for seed in range(80))


@pytest.mark.parametrize("word", ["black", "white"])
def test_nothing_is_drawn_on_its_own_colour(word: str) -> None:
    wall = [Image.new("RGB", (300, 300), word)]
    records = [draw_scene(np.random.default_rng(seed), backgrounds=wall)[1] for seed in range(200)]
    on_it = [record for record in records if record.background in ("photo", word)]
    assert len(on_it) > 15
    assert word not in {thing.colour for record in on_it for thing in record.objects}


def test_things_are_recorded_in_reading_order(scenes: list[Scene]) -> None:
    for scene in scenes:
        places = [(int(3 * thing.centre[1] / scene.size), thing.centre[0]) for thing in scene.objects]
        assert places == sorted(places)


def test_kinds_that_are_easily_mistaken_never_share_a_scene_or_a_question(scenes: list[Scene]) -> None:
    assert confusable("square", "rectangle") and confusable("circle", "ring") and not confusable("star", "heart")
    for scene in scenes:
        kinds = {thing.kind for thing in scene.objects}
        assert not any(confusable(one, other) for one in kinds for other in kinds if one < other)
        assert not any(confusable(one, absent) for one in kinds for absent, _ in scene.absent)


# Colours


def test_no_two_colour_words_share_a_colour() -> None:
    boxes = [(word, box) for word, boxes in COLOUR_RANGES.items() for box in boxes]
    for word, box in boxes:
        for other, other_box in boxes:
            if word != other:
                shifted = [(low + turn, high + turn) for low, high in [box[0]] for turn in (-360, 0, 360)]
                hue = any(low < other_box[0][1] and other_box[0][0] < high for low, high in shifted)
                rest = all(box[axis][0] < other_box[axis][1] and other_box[axis][0] < box[axis][1] for axis in (1, 2))
                assert not (hue and rest), (word, other)


@pytest.mark.parametrize("word", COLOURS)
def test_a_sampled_colour_is_named_by_its_word(word: str) -> None:
    rng = np.random.default_rng(0)
    pixels = np.array([sample_colour(word, rng) for _ in range(400)] + list(PURE_COLOURS[word]), dtype=np.uint8)
    assert {COLOURS[index] for index in name_pixels(pixels)} == {word}
    assert {rough_word(tuple(pixel)) for pixel in pixels} == {word}


def rough_word(rgb: tuple[int, ...]) -> str:
    """A colour word by a rule of thumb of its own."""
    hue, saturation, value = colorsys.rgb_to_hsv(*(int(channel) / 255 for channel in rgb))
    if value < 0.2:
        return "black"
    if saturation < 0.12:
        return "white" if value > 0.9 else "gray"
    hue *= 360
    if 10 < hue < 43:
        return "brown" if value < 0.7 else "orange"
    limits = ((10, "red"), (70, "yellow"), (165, "green"), (255, "blue"), (305, "purple"), (348, "pink"))
    word = next((name for limit, name in limits if hue <= limit), "red")
    return "pink" if word == "red" and saturation < 0.5 else word


def foreground(picture: Image.Image) -> NDArray[np.bool_]:
    """Where a picture with a plain background differs from it by more than anti-aliasing and shadows."""
    pixels = np.asarray(picture).astype(int)
    # The corner is background: things keep a margin.
    return np.abs(pixels - pixels[0, 0]).max(axis=-1) > 24


def test_the_measured_colour_of_a_drawn_shape_is_the_recorded_word(drawn: list[Drawn]) -> None:
    checked = 0
    for picture, scene in drawn:
        if scene.background not in COLOURS:
            continue
        seen = foreground(picture)
        pixels = np.asarray(picture)
        for thing in scene.objects:
            left, top, right, bottom = thing.box
            inside = pixels[top:bottom, left:right][seen[top:bottom, left:right]]
            words = Counter(rough_word(tuple(pixel)) for pixel in inside[::7])
            assert words.most_common(1)[0][0] == thing.colour, (thing, words)
            checked += 1
    assert checked > 300


def components(mask: NDArray[np.bool_]) -> list[Box]:
    """Boxes (left, top, right, bottom) of the eight-connected regions of more than a dozen pixels."""
    left_over, boxes = {(int(y), int(x)) for y, x in np.argwhere(mask)}, []
    while left_over:
        todo, found = [left_over.pop()], []
        while todo:
            y, x = todo.pop()
            found.append((y, x))
            near = {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & left_over
            left_over -= near
            todo += near
        if len(found) > 12:
            rows, columns = zip(*found, strict=True)
            boxes.append((min(columns), min(rows), max(columns) + 1, max(rows) + 1))
    return boxes


def test_a_plain_scene_has_as_many_separate_regions_as_things_each_in_its_box(drawn: list[Drawn]) -> None:
    checked = 0
    for picture, scene in drawn:
        wide = [tuple(np.add(thing.box, (-8, -8, 8, 8))) for thing in scene.objects]
        apart = all(overlap(one, other) == 0 for number, one in enumerate(wide) for other in wide[:number])
        if scene.background not in COLOURS or not apart or checked >= 80:
            continue
        regions = components(foreground(picture))
        assert len(regions) == len(scene.objects), scene
        for thing in scene.objects:
            # A shadow belongs to the region but not to the box.
            assert max(overlap(region, thing.box) for region in regions) > 0.9, (thing, regions)
        checked += 1
    assert checked >= 80


# Sentences


def test_every_answer_is_true_of_its_scene(asked: list[Asked]) -> None:
    for scene, (task, question, answer) in asked:
        try:
            check(scene, task, question, answer)
        except (AssertionError, AttributeError) as error:
            raise AssertionError(f"{task}: {question} {answer} {scene}") from error
    assert {item[0] for _, item in asked} >= {"name", "describe", "count", "count_total", "colour", "background"}
    assert {item[0] for _, item in asked} >= {"exists", "is_colour", "identify", "compare", "size", "position", "kinds"}


def test_the_checker_refuses_false_answers() -> None:
    scene = Scene("white", (shape("circle", "red"), shape("star", "blue", (150, 0, 190, 40))))
    false = [
        ("name", "What is this?", "There are two red circles."),
        ("count", "How many stars are there?", "There are two stars."),
        ("colour", "What color is the star?", "The star is red."),
        ("exists", "Is there a circle?", "No, there is no circle in the picture."),
        ("position", "Is the star to the left of the circle?", "Yes, the star is to the left of the circle."),
    ]
    for item in false:
        with pytest.raises(AssertionError):
            check(scene, *item)


def test_captions_name_everything_once_with_true_numbers_and_colours(scenes: list[Scene]) -> None:
    for seed, scene in enumerate(scenes):
        assert caption(scene) == caption(scene)
        for text in (caption(scene), caption(scene, np.random.default_rng(seed))):
            assert text == text.lower()
            check_caption(scene, text)


def test_canonical_captions_have_the_agreed_form() -> None:
    red = shape("circle", "red")
    assert caption(Scene("white", (red, red, red))) == "three red circles on a white background"
    assert caption(Scene("gradient", (red,))) == "a red circle"
    assert caption(Scene("orange", (shape("oval", "blue"),))) == "a blue oval on an orange background"
    dogs_and_star = Scene("white", (shape("star", "yellow"), animal("dog"), animal("dog")))
    assert caption(dogs_and_star) == "two dogs and a yellow star"
    assert caption(Scene("white", (shape("triangle", "blue"), shape("square", "green")))) == (
        "a blue triangle and a green square"
    )
    assert caption(Scene("red", tuple(shape(kind, "blue") for kind in ("star", "heart", "arrow")))) == (
        "a blue star, a blue heart and a blue arrow"
    )


def test_yes_and_no_are_balanced_exactly_for_every_wording(asked: list[Asked]) -> None:
    shapes = "|".join(sorted({*SHAPES, *(kind.plural for kind in SHAPES.values())}, key=len, reverse=True))
    blank = re.compile(rf"\b(?:an? )?(?:(?:{'|'.join(COLOURS)}|grey) )*(?:{shapes}|{'|'.join(COLOURS)}|grey)\b")
    sides = re.compile(r"to the left of|to the right of|above|below")
    verdicts = Counter()
    for _, (task, question, answer) in asked:
        if answer.startswith(("Yes,", "No,")):
            verdicts[task, sides.sub("*", blank.sub("*", question)), answer[:2]] += 1
    for task, wording, _ in list(verdicts):
        assert verdicts[task, wording, "Ye"] == verdicts[task, wording, "No"], (task, wording)
    assert {task for task, _, _ in verdicts} == {"exists", "is_colour", "compare", "position"}


@pytest.mark.parametrize("task", sorted(WORDINGS))
def test_every_task_has_at_least_ten_different_wordings(task: str) -> None:
    assert len(set(WORDINGS[task])) == len(WORDINGS[task]) >= 10


def test_both_spellings_are_asked_and_neither_is_answered(asked: list[Asked]) -> None:
    text = " ".join(question for _, (_, question, _) in asked)
    assert " colour " in text and " color " in text and "grey" in text and "gray" in text
    assert not any("grey" in answer or "colo" in answer for _, (_, _, answer) in asked)


def test_a_dialogue_repeats_no_question_and_no_answer_and_tells_the_truth(scenes: list[Scene]) -> None:
    pronouns = 0
    for seed, scene in enumerate(scenes):
        turns = dialogue(scene, np.random.default_rng(seed), 4)
        assert 2 <= len(turns) <= 4
        assert len({question for question, _ in turns}) == len({answer for _, answer in turns}) == len(turns)
        for _, answer in turns:
            said = re.search(r"(?:It is|They are|it is|they are) (\w+)\.$", answer)
            if said and said.group(1) in COLOURS:
                pronouns += 1
                assert {thing.colour for thing in scene.objects} == {said.group(1)}
    assert pronouns > 30


def test_a_dialogue_says_yes_as_often_as_no(scenes: list[Scene]) -> None:
    answers = [
        answer[:3]
        for seed in range(5)
        for number, scene in enumerate(scenes)
        for _, answer in dialogue(scene, np.random.default_rng((seed, number)), 3)
    ]
    yes, no = answers.count("Yes"), answers.count("No,")
    # Three standard errors of a fair coin.
    assert abs(yes - no) < 3 * (yes + no) ** 0.5 and yes > 100


@pytest.mark.parametrize(
    ("second", "sides"),
    [
        ((120, 10, 160, 50), {"left", "right"}),
        ((10, 120, 50, 160), {"above", "below", "top", "bottom"}),
        ((30, 10, 70, 50), set()),  # side by side, but one begins before the other ends
        ((52, 10, 62, 20), set()),  # a hair apart
        ((120, 120, 160, 160), set()),  # on a slant
    ],
)
def test_a_side_is_asked_about_only_when_it_is_clear(second: Box, sides: set[str]) -> None:
    first = shape("circle", "red", (10, 10, 50, 50))
    scene = Scene("white", (first, shape("star", "blue", second)))
    words = {
        word
        for seed in range(10)
        for task, question, _ in questions(scene, np.random.default_rng(seed))
        if task == "position"
        for word in re.findall("left|right|above|below|top|bottom", question)
    }
    assert words == sides


def test_what_the_record_names_as_absent_is_what_is_denied() -> None:
    scene = Scene("white", (animal("dog"),), absent=(("cat", "cats"),))
    denied = [
        answer for _, _, answer in questions(scene, np.random.default_rng(0)) if answer.startswith("No, there is")
    ]
    assert "No, there is no cat in the picture." in denied
