"""Judges what is said about a scene from its record alone, sharing no code with the module that says it."""

import re

from nano.scenes.record import Scene, SceneObject

NUMBERS = {"no": 0, "a": 1, "an": 1, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6}
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white", "gray")
EVERYTHING = {"object", "objects", "thing", "things", "item", "items"}
SIDES = {
    "to the left of": (0, 1),
    "to the right of": (0, -1),
    "above": (1, 1),
    "below": (1, -1),
    "on the left": (0, 1),
    "on the right": (0, -1),
    "at the top": (1, 1),
    "at the bottom": (1, -1),
}
SIDE_WORDS = "|".join(SIDES)


def matching(scene: Scene, phrase: str) -> list[SceneObject]:
    """The things that a phrase such as "red circles", "dogs", "blue shape" or "objects" means."""
    phrase = phrase.removeprefix("the ")
    return [thing for thing in scene.objects if phrase in names(thing)]


def names(thing: SceneObject) -> set[str]:
    plain = {thing.kind, thing.plural, thing.category, f"{thing.category}s"} | EVERYTHING
    return plain | {f"{thing.colour} {name}" for name in plain if thing.colour}


def listed(text: str) -> list[tuple[int, str]]:
    """Read "two red circles, a dog and a cat" as numbers and phrases."""
    parts = re.split(r", | and (?=(?:a|an|one|two|three|four|five|six) )", text)
    return [(NUMBERS[part.split(" ", 1)[0]], part.split(" ", 1)[1]) for part in parts]


def check_list(scene: Scene, text: str, whole: bool) -> None:
    """Every number is right, and when the list is the whole picture nothing is left out."""
    entries = listed(text)
    for number, phrase in entries:
        assert len(matching(scene, phrase)) == number, (phrase, number)
    if whole:
        assert sum(number for number, _ in entries) == len(scene.objects)


def check_caption(scene: Scene, text: str) -> None:
    text = re.sub(r"^(there (is|are)|a picture of|a drawing of|an image of|the picture shows) ", "", text)
    text, background = _without_background(text)
    assert background in (None, scene.background)
    check_list(scene, text, whole=True)


def _without_background(text: str) -> tuple[str, str | None]:
    found = re.search(r" on an? (\w+) background$", text)
    return (text[: found.start()], found.group(1)) if found else (text, None)


def lies(scene: Scene, first: str, relation: str, second: str | None = None) -> bool:
    """Whether the first thing's middle is on the given side of the second's, or of everything else."""
    axis, sign = SIDES[relation]
    (one,) = matching(scene, first)
    others = matching(scene, second) if second else [thing for thing in scene.objects if thing is not one]
    return all(sign * (other.centre[axis] - one.centre[axis]) > 0.14 * scene.size for other in others)


def check(scene: Scene, task: str, question: str, answer: str) -> None:
    """Raise AssertionError unless the answer is a true one to the question."""
    assert answer[0].isupper() and answer.endswith(".") and question[0].isupper(), (question, answer)
    question = question.replace("grey", "gray").replace("Grey", "Gray")
    CHECKS[task](scene, question, answer)


def _check_name(scene: Scene, question: str, answer: str) -> None:
    single = re.fullmatch(r"It is (.*)\.", answer)
    if single:
        assert len(scene.objects) == 1
        check_list(scene, single.group(1), whole=True)
        return
    verb, text = re.fullmatch(r"There (is|are) (.*)\.", answer).groups()
    assert (verb == "is") == (listed(text)[0][0] == 1)
    check_list(scene, text, whole=True)


def _check_describe(scene: Scene, question: str, answer: str) -> None:
    text, places = re.fullmatch(r"The picture shows (.*?)\.(?: (The .*\.))?", answer).groups()
    text, background = _without_background(text)
    assert (background or "none") == (scene.background if scene.background in COLOURS else "none")
    check_list(scene, text, whole=True)
    if places:
        pattern = rf"The (.*) is ({SIDE_WORDS}) and the (.*) is ({SIDE_WORDS})\."
        first, side, second, other = re.fullmatch(pattern, places).groups()
        assert lies(scene, first, side, second) and lies(scene, second, other, first)


def _check_count(scene: Scene, question: str, answer: str) -> None:
    part = re.fullmatch(r"(\w+) of them (?:is|are) (\w+)\.", answer)
    if part:
        number, colour = part.groups()
        assert NUMBERS[number.lower()] == sum(thing.colour == colour for thing in scene.objects)
        return
    text = re.fullmatch(r"There (?:is|are) (.*)\.", answer).group(1)
    ((number, phrase),) = listed(text)
    assert len(matching(scene, phrase)) == number
    things = matching(scene, phrase)
    assert phrase in question or any(thing.plural in question or f"{phrase}s" in question for thing in things)


def _check_colour(scene: Scene, question: str, answer: str) -> None:
    phrase, colour = re.fullmatch(r"The (.*) (?:is|are) (\w+)\.", answer).groups()
    assert phrase in question and {thing.colour for thing in matching(scene, phrase)} == {colour}


def _check_colours(scene: Scene, question: str, answer: str) -> None:
    phrase, colours = re.fullmatch(r"The (\w+) are (.*)\.", answer).groups()
    assert phrase in question
    assert set(re.split(r", | and ", colours)) == {thing.colour for thing in scene.objects}


def _check_background(scene: Scene, question: str, answer: str) -> None:
    assert answer == f"The background is {scene.background}." and "colo" in question


def _check_exists(scene: Scene, question: str, answer: str) -> None:
    yes = re.fullmatch(r"Yes, there (?:is|are) (.*)\.", answer)
    if yes:
        check_list(scene, yes.group(1), whole=False)
        ((_, phrase),) = listed(yes.group(1))
        assert any(name in question for thing in matching(scene, phrase) for name in names(thing) - EVERYTHING)
        return
    phrase = re.fullmatch(r"No, there is no (.*) in the picture\.", answer).group(1)
    absent = [plural for singular, plural in scene.absent if singular == phrase]
    assert not matching(scene, phrase)
    assert phrase in question or any(plural in question for plural in absent) or phrase.split()[0] in question


def _check_is_colour(scene: Scene, question: str, answer: str) -> None:
    verdict, phrase, colour = re.fullmatch(r"(Yes|No), the (.*) (?:is|are) (\w+)\.", answer).groups()
    asked = [word for word in COLOURS if re.search(rf"\b{word}\b", question.replace(phrase, "", 1))]
    assert {thing.colour for thing in matching(scene, phrase)} == {colour}
    assert asked == [colour] if verdict == "Yes" else colour not in asked and len(asked) == 1


def _check_identify(scene: Scene, question: str, answer: str) -> None:
    colour, kind = re.fullmatch(r"The (\w+) shape is an? (.*)\.", answer).groups()
    assert colour in question and [thing.kind for thing in matching(scene, f"{colour} shape")] == [kind]


def _check_compare(scene: Scene, question: str, answer: str) -> None:
    verdict, more, fewer = re.fullmatch(r"(?:(Yes|No), t|T)here are more (.*) than (.*)\.", answer).groups()
    assert len(matching(scene, more)) > len(matching(scene, fewer))
    first_is_more = question.index(more) < question.index(fewer)
    if "outnumbered" in question:
        first_is_more = not first_is_more
    assert verdict is None or (verdict == "Yes") == first_is_more


def _check_size(scene: Scene, question: str, answer: str) -> None:
    bigger, smaller = re.fullmatch(r"The (.*) is bigger than the (.*)\.", answer).groups()
    (one,), (other,) = matching(scene, bigger), matching(scene, smaller)
    assert one.area > 1.5 * other.area and bigger in question and smaller in question


def _check_position(scene: Scene, question: str, answer: str) -> None:
    side = re.fullmatch(r"The (.*) is (on the left|on the right|at the top|at the bottom)\.", answer)
    if side:
        assert len(scene.objects) == 2 and lies(scene, *side.groups()) and side.group(2) in question.lower()
        return
    pattern = rf"(?:(Yes|No), t|T)he (.*?) is ({SIDE_WORDS}) the (.*)\."
    verdict, first, relation, second = re.fullmatch(pattern, answer).groups()
    assert lies(scene, first, relation, second) and second in question
    asked = next(side for side in SIDES if f"{side} the" in question)
    assert (asked == relation) == (verdict != "No")


CHECKS = {
    "name": _check_name,
    "kinds": _check_name,
    "describe": _check_describe,
    "count": _check_count,
    "count_total": _check_count,
    "colour": _check_colour,
    "colours": _check_colours,
    "background": _check_background,
    "exists": _check_exists,
    "is_colour": _check_is_colour,
    "identify": _check_identify,
    "compare": _check_compare,
    "size": _check_size,
    "position": _check_position,
}
