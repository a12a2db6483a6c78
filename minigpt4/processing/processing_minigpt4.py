"""The processor: messages and pictures in, model inputs out.

A transformers processor with one difference: `apply_chat_template(..., tokenize=True)` encodes segment by segment
through the `PromptTemplate`, so that nothing in a message can become a control token, a picture or a turn. Calling the
processor with a string, as the library's tools do, encodes the string as it is and is for trusted text.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import BatchFeature, PreTrainedTokenizerBase, ProcessorMixin
from transformers.processing_utils import MultiModalData
from transformers.utils import logging

from minigpt4.errors import PromptError
from minigpt4.processing.image_processing_minigpt4 import MiniGPT4ImageProcessor
from minigpt4.processing.messages import IMAGE_PARTS, Message
from minigpt4.processing.prompts import IMAGE_TOKEN, EncodedPrompt, PromptTemplate, template

PICTURE_KEYS = ("image", "path", "url", "base64", "image_url")
"""Where a picture part of a message may hold its picture; an address may be a data URL, nothing is fetched."""

PADDING_OPTIONS = ("padding", "truncation", "max_length", "pad_to_multiple_of")

logger = logging.get_logger(__name__)


class MiniGPT4Processor(ProcessorMixin):
    """Image processor, tokenizer and prompt template in one.

    Args:
        image_processor: Turns pictures into pixel values.
        tokenizer: The language model's.
        num_image_tokens: Places a picture takes among the ids.
        image_token: The token of the tokenizer that holds those places and occurs in no text.
        template: Name of a `PromptTemplate`.
        chat_template: Its Jinja form; made from `template` where not given.
    """

    def __init__(
        self,
        image_processor: MiniGPT4ImageProcessor | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        num_image_tokens: int = 32,
        image_token: str = IMAGE_TOKEN,
        template: str = "vicuna-v0",
        chat_template: str | None = None,
        **kwargs: Any,
    ) -> None:
        self.num_image_tokens = num_image_tokens
        self.image_token = image_token
        self.template = template
        chat_template = chat_template or self.prompt_template.chat_template()
        super().__init__(image_processor, tokenizer, chat_template=chat_template, **kwargs)
        self.image_token_id: int = self.tokenizer.convert_tokens_to_ids(image_token)

    @property
    def prompt_template(self) -> PromptTemplate:
        """The template by its name."""
        return template(self.template)

    def replace_image_token(self, image_inputs: Any, image_idx: int, **kwargs: Any) -> str:
        """Return what stands for one picture in a string: its places (the library's hook)."""
        return self.image_token * self.num_image_tokens

    def _get_num_multimodal_tokens(self, image_sizes: Any = None, **kwargs: Any) -> MultiModalData:
        """Tell engines how many places each picture takes, before they have seen it."""
        num_images = len(image_sizes or [])
        return MultiModalData(num_image_tokens=[self.num_image_tokens] * num_images, num_image_patches=[1] * num_images)

    def encode(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = True, return_assistant_mask: bool = False
    ) -> EncodedPrompt:
        """Turn a conversation into token ids; see `PromptTemplate.encode`.

        Raises:
            PromptError: The messages are malformed, out of order, too long, or ask nothing.
        """
        return self.prompt_template.encode(
            self.tokenizer,
            messages,
            image_token_id=self.image_token_id,
            num_image_tokens=self.num_image_tokens,
            add_generation_prompt=add_generation_prompt,
            return_assistant_mask=return_assistant_mask,
        )

    def apply_chat_template(  # type: ignore[override]  # the library's own signatures differ between versions
        self,
        conversation: Sequence[Message] | Sequence[Sequence[Message]],
        chat_template: str | None = None,
        *,
        tokenize: bool = False,
        return_dict: bool = False,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        return_assistant_tokens_mask: bool = False,
        return_tensors: str | None = None,
        processor_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Turn conversations into model inputs, or into strings.

        Args:
            conversation: Messages, or a list of conversations. A picture part holds its picture under one of
                `PICTURE_KEYS`.
            chat_template: Another Jinja template; then, as for `tokenize=False`, the library's own way is taken.
            tokenize: Return ids.
            return_dict: Return all model inputs; else the ids alone.
            add_generation_prompt: End where an answer begins.
            continue_final_message: Let the model go on with the last message; only with `tokenize=False`.
            return_assistant_tokens_mask: Add `assistant_masks`.
            return_tensors: `"pt"`, or None for lists.
            processor_kwargs: Options for padding (`padding`, `max_length`, `pad_to_multiple_of`; on the left, where a
                batch that generates needs it), `truncation` (a conversation longer than `max_length` is refused, never
                cut: half a picture has no meaning), and the image processor's own.
            kwargs: For the library's own way.

        Raises:
            PromptError: The messages are malformed, too long for `truncation`, or a picture part holds none.
            ImageError: A picture cannot be opened.
        """
        if not tokenize or chat_template is not None or continue_final_message:
            kwargs |= {"tokenize": tokenize, "return_dict": return_dict, "return_tensors": return_tensors}
            kwargs |= {"add_generation_prompt": add_generation_prompt, "processor_kwargs": processor_kwargs or {}}
            return super().apply_chat_template(
                conversation,  # type: ignore[arg-type]  # the library asks for lists and dicts, and takes any
                chat_template,
                continue_final_message=continue_final_message,
                return_assistant_tokens_mask=return_assistant_tokens_mask,
                **kwargs,
            )
        batched = bool(conversation) and not isinstance(conversation[0], dict)
        conversations: Any = conversation if batched else [conversation]
        form = {"add_generation_prompt": add_generation_prompt, "return_assistant_mask": return_assistant_tokens_mask}
        prompts = [self.encode(messages, **form) for messages in conversations]
        text_options, image_options = self._sorted(processor_kwargs or {})
        inputs = self._pad(prompts, return_tensors, **text_options)
        pictures = [picture for messages in conversations for picture in pictures_of(messages)]
        if pictures:
            pixels = self.image_processor(pictures, return_tensors=return_tensors, **image_options)
            inputs["pixel_values"] = pixels.pixel_values
        if return_tensors is None and not batched:
            inputs = BatchFeature({k: v[0] if k != "pixel_values" else v for k, v in inputs.items()})
        return inputs if return_dict else inputs["input_ids"]

    def _sorted(self, options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Part options for padding from the image processor's; the library warns of others, and so does this."""
        text = {name: value for name, value in options.items() if name in PADDING_OPTIONS}
        known = self.image_processor.valid_kwargs.__annotations__
        image = {name: value for name, value in options.items() if name in known and name not in text}
        for name in options.keys() - text.keys() - image.keys():
            logger.warning_once(f"{name} is no option of this processor and is ignored")
        return text, image

    def _pad(
        self,
        prompts: list[EncodedPrompt],
        return_tensors: str | None,
        padding: bool | str = True,
        truncation: bool | str | None = None,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
    ) -> BatchFeature:
        """Pad on the left; see `apply_chat_template`."""
        longest = max(len(prompt.input_ids) for prompt in prompts)
        if truncation and max_length is not None and longest > max_length:
            raise PromptError(
                f"a conversation has {longest} tokens, expected at most max_length, {max_length}",
                hint="leave out its first turns, or raise max_length",
            )
        length = (max_length or longest) if padding == "max_length" else longest
        if pad_to_multiple_of:
            length = -(-length // pad_to_multiple_of) * pad_to_multiple_of
        pad_id = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.tokenizer.eos_token_id

        def padded(values: list[int], filler: int) -> list[int]:
            return [filler] * (length - len(values)) + values if padding not in (False, "do_not_pad") else values

        data = {
            "input_ids": [padded(prompt.input_ids, pad_id) for prompt in prompts],
            "attention_mask": [padded([1] * len(prompt.input_ids), 0) for prompt in prompts],
        }
        if prompts[0].assistant_mask:
            data["assistant_masks"] = [padded(prompt.assistant_mask, 0) for prompt in prompts]
        if return_tensors == "pt":
            return BatchFeature({name: torch.tensor(rows) for name, rows in data.items()})
        return BatchFeature(data, tensor_type=return_tensors)


def pictures_of(messages: Sequence[Message]) -> list[Any]:
    """List the pictures of a conversation in order.

    Raises:
        PromptError: A picture part without a picture.
    """
    pictures = []
    for number, message in enumerate(messages):
        content: Any = message["content"]
        for part in content if not isinstance(content, str) else []:
            if part["type"] not in IMAGE_PARTS:
                continue
            key = next((key for key in PICTURE_KEYS if part.get(key) is not None), "")
            picture = part.get(key)
            if key == "image_url" and isinstance(picture, Mapping):  # OpenAI's form
                picture = picture.get("url")
            if picture is None:
                raise PromptError(
                    f"messages[{number}] has an image part without a picture, expected one of {', '.join(PICTURE_KEYS)}"
                )
            pictures.append(f"data:image/*;base64,{picture}" if key == "base64" else picture)
    return pictures
