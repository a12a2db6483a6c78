"""The examples nano learns from: photographs with a name, drawn scenes, and imagined pictures of every class.

Every example is a function of seed, stage, step and row alone, so a resumed run sees what it would have seen. Knows
pictures and words; knows no tensors, no model and no tokenizer.

An *imagined* picture is what the vision encoder would report of something no photograph here shows: made-up class
probabilities over the feature maps of an unrelated photograph, or over none. It teaches that the words of the encoder
are to be believed, for all of its classes and not only for those that happen to be in the photographs.
"""

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image

from nano.scenes.drawing import caption, dialogue, draw_scene
from nano.shards import Sample, index_shards
from nano.sprites import Sprites

Turns = list[tuple[str, str]]

WHAT_IS_THIS = (
    "What is this?",
    "What is it?",
    "Can you tell me what this is?",
    "What am I looking at?",
    "What thing is this?",
    "What do we have here?",
    "Do you know what this is?",
)
WHAT_IS_SHOWN = (
    "What is in this picture?",
    "What is in the picture?",
    "What's in this image?",
    "What do you see?",
    "What does the picture show?",
    "What is shown here?",
    "What can you see in the photo?",
    "What object is in the image?",
    "Name the main object in the picture.",
    "Describe the picture.",
    "Describe this image.",
    "Describe this picture in one sentence.",
    "Please describe the image.",
    "Describe this image in detail.",
    "Take a look at this image and describe what you notice.",
    "Please provide a detailed description of the picture.",
    "Could you describe the contents of this image for me?",
    "Tell me about this picture.",
)
WHAT_IS_NEXT = (
    "And what is this?",
    "And this?",
    "What is this one?",
    "And what is it now?",
    "What about this one?",
    "And what do we have here?",
)
WHAT_IS_SHOWN_NEXT = (
    "And what is in this picture?",
    "What is in the new picture?",
    "And what does this picture show?",
    "What do you see now?",
    "What about this picture?",
    "Now describe this picture.",
    "And here, what can you see?",
)
WHAT_IS_IN_NUMBER = (
    "What is in the {} picture?",
    "What's in the {} image?",
    "What does the {} picture show?",
    "Describe the {} picture.",
    "And what is in the {} picture?",
)
_NEXT_OPENING = 0.6
"""So often the question about a second picture says that it is another one."""
_BACK_SHARE = 0.15
_LONGER_SHARE = 0.3
_FRAME = re.compile(r"^(?:a photo of|a picture of|an image of|there is) | in (?:the|a) (?:photo|picture|image)$")
_PLACE = re.compile(r" in a grocery store$")
_SEVERAL = re.compile(r"^(?:two|three|four|five|six) | and ")


@dataclass(frozen=True)
class Example:
    """One picture and what is said about it, then perhaps the next.

    Args:
        picture: RGB, any size; None for nothing but words.
        imagined: Class numbers and probabilities that replace what the vision encoder would say; None to ask it.
        caption: A phrase without a full stop, lower case except names; empty where nothing certain can be said.
        turns: Questions and answers.
        then: What the conversation goes on with: another picture, and what is said about that one.
    """

    picture: Image.Image | None
    imagined: tuple[tuple[int, float], ...] | None
    caption: str
    turns: Turns
    then: "Example | None" = None

    @property
    def parts(self) -> list["Example"]:
        """The pictures of the conversation, in order."""
        return [self, *(self.then.parts if self.then else [])]


def phrase(text: str) -> str:
    """Strip a caption to the thing it names: "there is a lamp in the photo" to "a lamp"."""
    return _PLACE.sub("", _FRAME.sub("", _PLACE.sub("", _FRAME.sub("", text))))


def with_article(name: str) -> str:
    """Put "a" or "an" before a name, nothing before a plural."""
    if re.search(r"(?<!s)s$", name) and name.split()[-1] not in _SINGULAR_IN_S:
        return name
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"


_SINGULAR_IN_S = {
    "bus", "minibus", "trolleybus", "school bus", "gas", "canvas", "mantis", "hippopotamus", "platypus", "triceratops",
    "abacus", "cactus", "walrus", "lens", "pants", "iris", "sea", "ibis", "octopus", "nautilus", "radius", "lupus",
}  # fmt: skip


@dataclass(frozen=True)
class NanoMixture:
    """Where examples come from, and in which proportion.

    Args:
        photos: A folder of shards whose records have a `caption`.
        backgrounds: A folder of shards of pictures with no clear subject; may be None.
        sprites: A folder of cut-out drawings (`nano.sprites`); may be None: shapes only.
        words: The vision encoder's class names.
        seed: Of everything drawn.
        share_photos: Of the examples, how many are photographs; the rest are drawn scenes.
        share_imagined: How many are imagined.
        share_unsure: How many show nothing clear, and are answered so.
        share_second: Of the conversations, how many go on with a second picture, drawn in the same proportion.
    """

    photos: Path
    backgrounds: Path | None
    sprites: Path | None
    words: Sequence[str]
    seed: int
    share_photos: float = 0.4
    share_imagined: float = 0.2
    share_unsure: float = 0.04
    share_second: float = 0.0

    def example(self, stage: int, step: int, row: int, turns: int) -> Example:
        """Return one example, the same for the same arguments.

        Args:
            stage: Number of the training stage.
            step: Step in that stage.
            row: Place in that step's batch.
            turns: Questions wanted, 1 to 4; fewer where there is no more to ask. With a second picture there are one
                or two about each.
        """
        rng = np.random.default_rng([self.seed, stage, step, row])
        # Of its own, so that all else stays as it is without second pictures.
        course = np.random.default_rng([self.seed, stage, step, row, 2])
        if course.random() >= self.share_second:
            return self._drawn(rng, turns)
        first, second = (self._drawn(rng, 1 + (turns > 1 and course.random() < _LONGER_SHARE)) for _ in range(2))
        return _joined(first, second, course)

    def _drawn(self, rng: np.random.Generator, turns: int) -> Example:
        """Draw a picture of one kind or another."""
        kinds: list[tuple[float, Callable[[np.random.Generator, int], Example]]] = [
            (self.share_photos, self._photo),
            (self.share_imagined, self._imagined),
            (self.share_unsure, self._unsure),
        ]
        drawn = rng.random()
        for share, make in kinds:
            if drawn < share:
                return make(rng, turns)
            drawn -= share
        return self._scene(rng, turns)

    def _photo(self, rng: np.random.Generator, turns: int) -> Example:
        sample = self._choose(self._photos, rng)
        thing = phrase(sample.read_record()["caption"])
        other = phrase(self._choose(self._photos, rng).read_record()["caption"])
        return Example(_augment(_open(sample), rng), None, thing, _name_dialogue(thing, other, "photo", turns, rng))

    def _imagined(self, rng: np.random.Generator, turns: int) -> Example:
        chosen = rng.choice(len(self.words), size=5, replace=False)
        best = rng.uniform(0.35, 0.98)
        rest = rng.dirichlet(np.ones(4)) * (1 - best) * rng.uniform(0.3, 1.0)
        rest = np.minimum(rest, best * 0.7)
        thing, other = (with_article(self.words[number]) for number in chosen[:2])
        picture = _augment(_open(self._choose(self._photos, rng)), rng) if rng.random() < 0.6 else None
        imagined = tuple((int(n), float(p)) for n, p in zip(chosen, [best, *rest], strict=True))
        return Example(picture, imagined, thing, _name_dialogue(thing, other, "photo", turns, rng))

    def _unsure(self, rng: np.random.Generator, turns: int) -> Example:
        chosen = rng.choice(len(self.words), size=5, replace=False)
        likely = rng.dirichlet(np.full(5, 4.0)) * rng.uniform(0.1, 0.4)
        picture = None
        if self._backgrounds and rng.random() < 0.8:
            picture = _augment(_open(self._choose(self._backgrounds, rng)), rng)
        imagined = tuple(sorted(((int(n), float(p)) for n, p in zip(chosen, likely, strict=True)), key=lambda x: -x[1]))
        answer = "I am not sure what this picture shows."
        questions = rng.permutation([*WHAT_IS_SHOWN, *WHAT_IS_THIS])[:1]
        return Example(picture, imagined, "", [(str(question), answer) for question in questions])

    def _scene(self, rng: np.random.Generator, turns: int) -> Example:
        photos = [_open(self._choose(self._backgrounds, rng))] if self._backgrounds and rng.random() < 0.1 else None
        picture, scene = draw_scene(rng, self._sprites, backgrounds=photos)
        return Example(picture, None, caption(scene), dialogue(scene, rng, turns))

    @cached_property
    def _photos(self) -> list[Sample]:
        return index_shards(self.photos)

    @cached_property
    def _backgrounds(self) -> list[Sample]:
        return index_shards(self.backgrounds) if self.backgrounds else []

    @cached_property
    def _sprites(self) -> Sprites | None:
        return Sprites(self.sprites, held_out=False) if self.sprites else None

    @staticmethod
    def _choose(samples: list[Sample], rng: np.random.Generator) -> Sample:
        return samples[int(rng.integers(len(samples)))]


def _joined(first: Example, second: Example, rng: np.random.Generator) -> Example:
    """Let one conversation go on with another; perhaps its last question goes back to the first picture."""
    turns = second.turns
    if second.caption and rng.random() < _NEXT_OPENING:
        turns = [_next_opening(second.caption, rng), *turns[1:]]
    if first.caption and rng.random() < _BACK_SHARE:
        turns = [*turns, _about(first.caption, "first", rng)]
    return replace(first, then=replace(second, turns=turns))


def _next_opening(caption: str, rng: np.random.Generator) -> tuple[str, str]:
    """Ask what the second picture shows."""
    kind = int(rng.integers(3))
    if kind == 0:
        return _about(caption, "second", rng)
    if kind == 1 and not _SEVERAL.search(caption):
        return str(rng.choice(WHAT_IS_NEXT)), f"This is {caption}."
    return str(rng.choice(WHAT_IS_SHOWN_NEXT)), f"The picture shows {caption}."


def _about(caption: str, ordinal: str, rng: np.random.Generator) -> tuple[str, str]:
    """Ask about one of the pictures by its number."""
    return str(rng.choice(WHAT_IS_IN_NUMBER)).format(ordinal), f"The {ordinal} picture shows {caption}."


def _name_dialogue(thing: str, other: str, kind: str, turns: int, rng: np.random.Generator) -> Turns:
    """Ask what it is, then about it."""
    ask_this = rng.random() < 0.4
    opening = str(rng.choice(WHAT_IS_THIS if ask_this else WHAT_IS_SHOWN))
    first = (opening, f"This is {thing}." if ask_this else f"The picture shows {thing}.")
    follow_ups: Turns = [
        (str(rng.choice(["Is it a photo or a drawing?", "Is this a photo?", "Photo or drawing?"])), f"It is a {kind}.")
    ]
    if other != thing:
        question = str(rng.choice(["Is there {} in the picture?", "Do you see {}?", "Is it {}?", "Is this {}?"]))
        no = question.startswith(("Is it", "Is this"))
        follow_ups.append(
            (question.format(thing), f"Yes, it is {thing}." if no else f"Yes, there is {thing} in the picture.")
            if rng.random() < 0.5
            else (question.format(other), f"No, it is {thing}." if no else f"No, I see {thing}.")
        )
    follow_ups.append(
        (str(rng.choice(["What did you say it is?", "What is it again?", "So what is it?"])), f"It is {thing}.")
    )
    order = rng.permutation(len(follow_ups))
    return [first, *(follow_ups[i] for i in order)][:turns]


def _open(sample: Sample) -> Image.Image:
    return Image.open(io.BytesIO(sample.read_picture())).convert("RGB")


def _augment(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Crop to 60-100 % of the area and mirror half of the pictures."""
    width, height = picture.size
    side = np.sqrt(rng.uniform(0.6, 1.0))
    left, top = rng.uniform(0, (1 - side) * width), rng.uniform(0, (1 - side) * height)
    picture = picture.crop((int(left), int(top), int(left + side * width), int(top + side * height)))
    return picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else picture
