"""Conversations to token ids: the prompt templates of the MiniGPT-4 family.

A template renders messages into segments: ordinary text, control tokens, and places for pictures. Only then is
anything encoded, so no string in a message can become a control token, a picture or a turn. Where a template
separates turns by ordinary text ("###", "[INST]"), that text is broken up inside messages by a space.
This file knows no model, no pixels and no files.
"""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from minigpt4.errors import PromptError
from minigpt4.processing.chat_template import fill_chat_template
from minigpt4.processing.messages import Message, Turn, read_turns
from minigpt4.processing.text_encoding import IdWriter, TextEncoder, well_formed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ORIGINAL_SYSTEM = (
    "Give the following image: <Img>ImageContent</Img>. "
    "You will be able to see the image once I provide it to you. Please answer my questions."
)

IMAGE_TOKEN = "<image>"
"""What stands for a picture in a conversation written as one string, if the reader names no other."""


@dataclass(frozen=True)
class Text:
    """Ordinary text; a control token's name in it stays text."""

    text: str


@dataclass(frozen=True)
class Control:
    """One control token, by its name in the tokenizer, such as "<|im_start|>"."""

    token: str


@dataclass(frozen=True)
class ImageSlot:
    """The place of the `index`-th picture of the conversation."""

    index: int


Segment = Text | Control | ImageSlot
Fixed = tuple[Text | Control, ...]
Marked = tuple[Segment, bool]  # a segment, and whether it belongs to an answer of the assistant


@dataclass(frozen=True)
class EncodedPrompt:
    """A conversation as token ids.

    Attributes:
        input_ids: Ids with the image token's id repeated at each picture's place.
        assistant_mask: As long as `input_ids`: 1 on the tokens of the assistant's answers and of the symbol that
            ends each, else 0. Empty unless it was asked for.
        num_images: How many pictures the conversation has.
    """

    input_ids: list[int]
    assistant_mask: list[int]
    num_images: int


def as_text(segments: Sequence[Segment], image_token: str = IMAGE_TOKEN) -> str:
    """Return segments as one string, to be read and compared; it is not safe to encode."""
    return "".join(
        segment.text if isinstance(segment, Text) else segment.token if isinstance(segment, Control) else image_token
        for segment in segments
    )


@dataclass(frozen=True)
class PromptTemplate:
    """How a language model wants a conversation to be written.

    A conversation is `system_open system system_close`, then for each user message `user_open pictures question
    user_close` and for each answer `answer_open answer_gap answer answer_end answer_close`. A prompt that waits for
    an answer ends in `answer_open`. Pictures come before the question, wherever they stand in the message.

    Attributes:
        name: The name in `TEMPLATES`.
        stop_strings: Text that ends a generated answer and is no part of it.
        system: The system message of a conversation that brings none.
        system_open: Before the system message.
        system_close: After it.
        keeps_empty_system: Write `system_open` and `system_close` round an empty system message too.
        user_open: Before a user message.
        user_close: After it.
        answer_open: Before an answer, and the end of a prompt that waits for one.
        answer_gap: Between `answer_open` and an answer that is already known.
        answer_end: The symbol with which the model ends its answer; a target in training.
        end_in_history: Whether `answer_end` is also written in a prompt that waits for a further answer.
        answer_close: After `answer_end`; no target in training.
        image_open: Before each picture.
        image_close: After each picture.
        image_joint: Between two pictures of one message.
        image_gap: Between the last picture and the question.
        starts_with_bos: Begin the ids with the tokenizer's beginning-of-sequence token.
        breaks: Replacements, made in this order in every message, that break up the template's own separators.
        guarded_end: If a message ends in this character, a space follows, since a separator begins with it.
    """

    name: str
    stop_strings: tuple[str, ...]
    user_open: Fixed
    answer_open: Fixed
    system: str = ""
    system_open: Fixed = ()
    system_close: Fixed = ()
    keeps_empty_system: bool = False
    user_close: Fixed = ()
    answer_gap: str = ""
    answer_end: Fixed = ()
    end_in_history: bool = True
    answer_close: Fixed = ()
    image_open: str = ""
    image_close: str = ""
    image_joint: Fixed = ()
    image_gap: str = ""
    starts_with_bos: bool = False
    breaks: tuple[tuple[str, str], ...] = ()
    guarded_end: str = ""

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> list[Segment]:
        """Write a conversation as segments.

        Args:
            messages: `{"role": ..., "content": ...}` each: an optional "system", then "user" and "assistant" in turn.
                The content is a string or a list of parts `{"type": "text", "text": ...}`, joined by line breaks, and
                `{"type": "image", ...}`.
            add_generation_prompt: End where an answer begins; the last message must then be a user's. Otherwise the
                conversation is complete, as training sees it.

        Returns:
            Segments; the beginning-of-sequence token is not among them.

        Raises:
            PromptError: If the messages are malformed, out of order, too long, or ask nothing.
        """
        return [segment for segment, _ in self._marked(messages, add_generation_prompt)]

    def encode(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        messages: Sequence[Message],
        *,
        image_token_id: int,
        num_image_tokens: int | Sequence[int],
        add_generation_prompt: bool = True,
        return_assistant_mask: bool = False,
    ) -> EncodedPrompt:
        """Turn a conversation into token ids.

        Neighbouring texts are encoded as one stretch, and each stretch as if it stood alone. Ids of a longer
        conversation need not begin with those of its first turns plus a generated answer: an answer may have been
        generated in other pieces than its text is split into. Compare the ids to find how much a cache holds.

        Args:
            tokenizer: The language model's tokenizer.
            messages: See `render`.
            image_token_id: The id that holds a picture's place; it must not occur in text.
            num_image_tokens: Places of a picture, for all pictures or one number for each.
            add_generation_prompt: See `render`.
            return_assistant_mask: Fill `EncodedPrompt.assistant_mask`.

        Raises:
            PromptError: As `render`, or if the tokenizer lacks a control token of the template, the text encodes to
                `image_token_id`, or `num_image_tokens` has not one entry for each picture.
        """
        writer = IdWriter(encoder := TextEncoder(tokenizer), reserved_id=image_token_id)
        if self.starts_with_bos:
            if tokenizer.bos_token_id is None:
                raise PromptError(
                    f"The tokenizer has no bos_token, with which the prompt template {self.name} begins",
                    "set bos_token in the tokenizer's tokenizer_config.json",
                )
            writer.add_ids([tokenizer.bos_token_id])
        marked = self._marked(messages, add_generation_prompt)
        num_images = sum(isinstance(segment, ImageSlot) for segment, _ in marked)
        places = _places(num_images, num_image_tokens)
        for segment, answer in marked:
            match segment:
                case Text(text):
                    writer.add_text(text, answer)
                case Control(token):
                    writer.add_ids([encoder.control_id(token)], answer)
                case ImageSlot(index):
                    writer.add_ids([image_token_id] * places[index])
        writer.end_stretch()
        return EncodedPrompt(writer.ids, writer.mask if return_assistant_mask else [], num_images)

    def chat_template(self) -> str:
        """Return the template in the Jinja form that transformers and vLLM read from a model folder.

        It renders to the same string as `as_text(render(messages))`, with the variable `image_token`, "<image>"
        unless set, at each picture's place, and marks answers with their end symbols by `{% generation %}`. A string
        is all it can give: whoever encodes it must keep control tokens that a user typed from being parsed
        (transformers: `sanitize_control_tokens=True`). It neither limits lengths nor mends lone surrogates.
        """
        texts = {
            "default_system": as_text(self._system(self.system)),
            **{name: as_text(getattr(self, name)) for name in _FIXED_FIELDS},
            **{name: getattr(self, name) for name in ("answer_gap", "image_open", "image_close", "image_gap")},
            "guarded_end": self.guarded_end,
            "image_token": IMAGE_TOKEN,
        }
        flags = {name: getattr(self, name) for name in ("keeps_empty_system", "end_in_history")}
        return fill_chat_template(texts, flags, self.breaks)

    def neutralise(self, text: str) -> str:
        """Return a message's text with the template's separators broken up by a space.

        "a ### b" becomes "a ## # b", "[INST]" becomes "[ INST]", and a message that ends in "#" gets a space where
        "###" separates turns. Any other text is returned as it is, except for lone surrogates (see `well_formed`);
        a second pass changes nothing.
        """
        text = well_formed(text)
        for separator, broken in self.breaks:
            text = text.replace(separator, broken)
        return f"{text} " if self.guarded_end and text.endswith(self.guarded_end) else text

    def _marked(self, messages: Sequence[Message], add_generation_prompt: bool) -> list[Marked]:
        """Return the segments of a conversation; empty texts are left out."""
        turns = read_turns(messages, answer_wanted=add_generation_prompt)
        system = turns.pop(0).text if turns and turns[0].role == "system" else self.system
        num_images = 0
        marked: list[Marked] = [(segment, False) for segment in self._system(system)]
        for turn in turns:
            if turn.role == "assistant":
                marked += self._answer(turn.text, self.end_in_history or not add_generation_prompt)
            else:
                marked += [(segment, False) for segment in self._question(turn, num_images)]
                num_images += turn.num_images
        if add_generation_prompt:
            marked += [(segment, False) for segment in self.answer_open]
        return [pair for pair in marked if pair[0] != Text("")]

    def _system(self, system: str) -> list[Segment]:
        if not system and not self.keeps_empty_system:
            return []
        return [*self.system_open, Text(self.neutralise(system)), *self.system_close]

    def _question(self, turn: Turn, first_image: int) -> list[Segment]:
        segments: list[Segment] = list(self.user_open)
        for position in range(turn.num_images):
            segments += self.image_joint if position else ()
            segments += [Text(self.image_open), ImageSlot(first_image + position), Text(self.image_close)]
        if turn.num_images and turn.text:
            segments.append(Text(self.image_gap))
        return [*segments, Text(self.neutralise(turn.text)), *self.user_close]

    def _answer(self, answer: str, ended: bool) -> list[Marked]:
        before = [*self.answer_open, Text(self.answer_gap)]
        inside = [Text(self.neutralise(answer)), *(self.answer_end if ended else ())]
        return [
            *((segment, False) for segment in before),
            *((segment, True) for segment in inside),
            *((segment, False) for segment in self.answer_close),
        ]


_FIXED_FIELDS = (
    "system_open",
    "system_close",
    "user_open",
    "user_close",
    "answer_open",
    "answer_end",
    "answer_close",
    "image_joint",
)

_VICUNA_V0 = PromptTemplate(
    name="vicuna-v0",
    stop_strings=("###",),
    system=ORIGINAL_SYSTEM,
    system_close=(Text("###"),),
    keeps_empty_system=True,
    user_open=(Text("Human: "),),
    user_close=(Text("###"),),
    answer_open=(Text("Assistant:"),),
    answer_gap=" ",
    answer_end=(Text("###"),),
    image_open="<Img>",
    image_close="</Img>",
    image_joint=(Text("###Human: "),),
    image_gap=" ",
    starts_with_bos=True,
    # Twice: where two broken runs meet, the first pass may leave three in a row, never more.
    breaks=(("###", "## #"), ("###", "## #")),
    guarded_end="#",
)

_MINIGPT_V2 = PromptTemplate(
    name="minigpt-v2",
    stop_strings=("</s>",),
    user_open=(Control("<s>"), Text("[INST] ")),
    answer_open=(Text(" [/INST]"),),
    answer_end=(Control("</s>"),),
    end_in_history=False,
    image_open="<Img>",
    image_close="</Img>",
    image_joint=(Control("<s>"), Text("[INST] ")),
    image_gap=" ",
    starts_with_bos=True,
    # The language model also knows <<SYS>>, though the template does not write it.
    breaks=(
        ("[INST]", "[ INST]"),
        ("[/INST]", "[ /INST]"),
        ("<<SYS>>", "< <SYS>>"),
        ("<</SYS>>", "< </SYS>>"),
    ),
)

TEMPLATES: Mapping[str, PromptTemplate] = {
    template.name: template
    for template in (
        _VICUNA_V0,
        # The later code of the original ends this prompt in a space; some of its results were taken that way.
        replace(_VICUNA_V0, name="vicuna-v0-spaced", answer_open=(Text("Assistant: "),), answer_gap=""),
        replace(_MINIGPT_V2, name="llama-2", system=ORIGINAL_SYSTEM, answer_open=(Text(" [/INST] "),)),
        _MINIGPT_V2,
        PromptTemplate(
            name="chatml",
            stop_strings=("<|im_end|>",),
            system_open=(Control("<|im_start|>"), Text("system\n")),
            system_close=(Control("<|im_end|>"), Text("\n")),
            user_open=(Control("<|im_start|>"), Text("user\n")),
            user_close=(Control("<|im_end|>"), Text("\n")),
            answer_open=(Control("<|im_start|>"), Text("assistant\n")),
            answer_end=(Control("<|im_end|>"),),
            answer_close=(Text("\n"),),
        ),
    )
}
"""The templates by name."""


def template(name: str) -> PromptTemplate:
    """Return the template of this name.

    Raises:
        PromptError: If there is none; names the nearest.
    """
    if name not in TEMPLATES:
        nearest = difflib.get_close_matches(name, TEMPLATES, n=1, cutoff=0.4)
        raise PromptError(
            f"There is no prompt template {name!r}, expected one of {', '.join(TEMPLATES)}",
            f"did you mean {nearest[0]}?" if nearest else "see `minigpt4 models` for what each model needs",
        )
    return TEMPLATES[name]


def _places(num_images: int, num_image_tokens: int | Sequence[int]) -> Sequence[int]:
    """Return how many places each picture takes."""
    if isinstance(num_image_tokens, int):
        return [num_image_tokens] * num_images
    if len(num_image_tokens) != num_images:
        raise PromptError(
            f"num_image_tokens has {len(num_image_tokens)} entries, expected one for each of {num_images} pictures",
            "send as many pictures as the messages have image parts",
        )
    return num_image_tokens
