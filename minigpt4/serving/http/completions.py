"""The form of what is answered: OpenAI's chat completions, whole or in chunks, and the list of models."""

import json
import secrets
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel

if TYPE_CHECKING:
    from minigpt4.inference.chat import Answer  # loads torch

FinishReason = Literal["stop", "length"]


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """Every answer whose status is 400 or more."""

    error: ErrorDetail


class PromptTokensDetails(BaseModel):
    """How much of a prompt did not have to be read again."""

    cached_tokens: int


class Usage(BaseModel):
    """Tokens of a request; a picture's are among the prompt's."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class AnswerMessage(BaseModel):
    """What the model said."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class Choice(BaseModel):
    """The one answer."""

    index: Literal[0] = 0
    message: AnswerMessage
    logprobs: None = None
    finish_reason: FinishReason


class ChatCompletion(BaseModel):
    """A whole answer."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage


class ModelCard(BaseModel):
    """A model that can be asked."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["minigpt4"] = "minigpt4"
    max_model_len: int | None = None
    attention_maps: bool | None = None
    input_modalities: list[str] = ["text", "image"]
    output_modalities: list[str] = ["text"]


class ModelList(BaseModel):
    """All of them: one."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


def usage(answer: "Answer") -> Usage:
    """Write what an answer took."""
    return Usage(
        prompt_tokens=answer.prompt_tokens,
        completion_tokens=answer.completion_tokens,
        total_tokens=answer.prompt_tokens + answer.completion_tokens,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=answer.cached_tokens),
    )


@dataclass(frozen=True)
class Writer:
    """Writes one answer.

    Args:
        model: What the client calls the model.
        with_usage: Chunks say that the usage comes at the end.
    """

    model: str
    with_usage: bool = False
    id: str = field(default_factory=lambda: f"chatcmpl-{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, answer: "Answer") -> ChatCompletion:
        """Write an answer that is complete."""
        reason: FinishReason = "length" if answer.finish_reason == "length" else "stop"
        return ChatCompletion(
            id=self.id,
            created=self.created,
            model=self.model,
            choices=[Choice(message=AnswerMessage(content=answer.text), finish_reason=reason)],
            usage=usage(answer),
        )

    def begin(self) -> bytes:
        """Write the first chunk, which says who speaks."""
        return self._chunk({"role": "assistant", "content": ""}, None)

    def piece(self, text: str) -> bytes:
        """Write a chunk of text."""
        return self._chunk({"content": text}, None)

    def end(self, answer: "Answer") -> bytes:
        """Write the last chunks."""
        written = self._chunk({}, "length" if answer.finish_reason == "length" else "stop")
        if self.with_usage:
            written += self._event({"choices": [], "usage": usage(answer).model_dump()})
        return written + b"data: [DONE]\n\n"

    def _chunk(self, delta: dict[str, Any], reason: FinishReason | None) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        return self._event({"choices": [choice]} | ({"usage": None} if self.with_usage else {}))

    def _event(self, content: dict[str, Any]) -> bytes:
        head = {"id": self.id, "object": "chat.completion.chunk", "created": self.created, "model": self.model}
        return event(head | content)


def event(content: dict[str, Any]) -> bytes:
    """Write one event of a stream."""
    return b"data: " + json.dumps(content, ensure_ascii=False).encode("utf-8", "replace") + b"\n\n"
