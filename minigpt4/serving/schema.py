"""Requests and responses: OpenAI's chat completions, a few fields of our own, and every other refused by name."""

import difflib
import json
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

from minigpt4.serving.errors import ApiError

if TYPE_CHECKING:
    from minigpt4.inference.request import Answer

# Fields of OpenAI's that change no answer; their values are not looked at.
IGNORED = {"metadata", "prompt_cache_key", "prompt_cache_retention", "safety_identifier", "service_tier", "store",
           "user"}  # fmt: skip

# Fields of OpenAI's that would change the answer: only the value that changes nothing is taken.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,), "best_of": (1,), "frequency_penalty": (0, 0.0), "presence_penalty": (0, 0.0), "logit_bias": ({},),
    "logprobs": (False,), "top_logprobs": (0,), "tools": ([],), "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False), "functions": ([],), "function_call": ("none", "auto"), "echo": (False,),
    "response_format": ({"type": "text"},), "modalities": (["text"],), "audio": (), "prediction": (), "suffix": (),
    "reasoning_effort": (), "verbosity": (), "web_search_options": (),
}  # fmt: skip

EMPTY_IN_ANSWERS = {"annotations", "audio", "function_call", "parsed", "reasoning", "reasoning_content", "refusal",
                    "tool_calls"}  # fmt: skip
"""Fields of an answer that clients send back with it; ignored when empty."""

OPTIONS = ("num_beams", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "length_penalty", "seed")
"""Fields handed to the engine under their own names."""

COLDEST = 1e-5
"""Temperatures below it are 0: they draw the same token, and dividing by them would overflow."""


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class TextPart(_Strict):
    """A piece of text."""

    type: Literal["text"]
    text: str


class ImageUrl(_Strict):
    """A picture: `data:image/...;base64,...`, or an address of a host that the server allows."""

    url: Annotated[str, Field(min_length=1)]
    detail: Literal["auto", "low", "high"] | None = None


class ImagePart(_Strict):
    """A picture among the parts of a message."""

    type: Literal["image_url"]
    image_url: ImageUrl


def _kind_of_part(value: object) -> str | None:
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return f"<{kind}>" if isinstance(kind, str) and len(kind) <= 40 else None


def _kind_of_content(value: object) -> str:
    return "<parts>" if isinstance(value, list) else "<string>"


Part = Annotated[
    Annotated[TextPart, Tag("<text>")] | Annotated[ImagePart, Tag("<image_url>")], Discriminator(_kind_of_part)
]
Content = Annotated[
    Annotated[str, Tag("<string>")] | Annotated[list[Part], Field(min_length=1), Tag("<parts>")],
    Discriminator(_kind_of_content),
]


class Message(_Strict):
    """One turn."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Content
    name: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_empty_fields(cls, value: Any) -> Any:  # noqa: ANN401  (anything a client sends)
        if not isinstance(value, dict) or value.get("role") != "assistant":
            return value
        return {name: given for name, given in value.items() if name not in EMPTY_IN_ANSWERS or given not in (None, [])}


class StreamOptions(_Strict):
    """What a stream brings besides text."""

    include_usage: bool = False
    include_obfuscation: bool | None = None


StopString = Annotated[str, Field(min_length=1, max_length=200)]
Stop = Annotated[
    Annotated[StopString, Tag("<string>")] | Annotated[list[StopString], Field(max_length=4), Tag("<parts>")],
    Discriminator(_kind_of_content),
]


class ChatRequest(_Strict):
    """The body of `POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1)]
    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    stop: Stop | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    num_beams: Annotated[int, Field(ge=1, le=64)] | None = None
    top_k: Annotated[int, Field(ge=0, le=10**9)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    length_penalty: Annotated[float, Field(ge=-100, le=100)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_by_name(cls, value: Any) -> Any:  # noqa: ANN401  (anything a client sends)
        if not isinstance(value, dict):
            return value
        kept = {}
        for name, given in value.items():
            if name in cls.model_fields:
                kept[name] = given
            elif name in NEUTRAL:
                if given is not None and not any(type(given) is type(n) and given == n for n in NEUTRAL[name]):
                    _refuse(name, NEUTRAL[name])
            elif name not in IGNORED:
                _unknown(name, list(cls.model_fields))
        return kept

    @property
    def options(self) -> dict[str, Any]:
        """Generation options that were given, by the engine's names."""
        given = {name: getattr(self, name) for name in OPTIONS if getattr(self, name) is not None}
        if self.temperature is not None and self.temperature < COLDEST:
            given["temperature"] = 0.0
        if self.seed is not None:
            given["seed"] = self.seed % 2**63  # the engine's are not negative
        longest = self.max_completion_tokens or self.max_tokens
        return given | ({"max_new_tokens": longest} if longest else {})

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """Strings that end the answer, besides the template's own."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


_OF_MAPS = "As for a chat completion; the last may be the assistant's, which is meant then."
_SPAN = "First character and the one after the last of the answer's words that are meant; else all."


class AttentionRequest(_Strict):
    """The body of `POST /v1/attention`."""

    messages: Annotated[list[Message], Field(min_length=1, description=_OF_MAPS)]
    model: str | None = None
    span: Annotated[
        list[Annotated[int, Field(ge=0, le=1_000_000)]] | None,
        Field(min_length=2, max_length=2, description=_SPAN),
    ] = None


FinishReason = Literal["stop", "length"]


class ErrorDetail(BaseModel):
    """An error."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of every response whose status is 400 or more."""

    error: ErrorDetail


class PromptTokensDetails(BaseModel):
    """Tokens of a prompt that were in the prefix cache."""

    cached_tokens: int


class Usage(BaseModel):
    """Tokens of a request; a picture's are among the prompt's."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class AnswerMessage(BaseModel):
    """The text of an answer."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class Choice(BaseModel):
    """The only choice."""

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
    """A model."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["minigpt4"] = "minigpt4"
    max_model_len: int | None = None
    attention_maps: bool | None = None
    input_modalities: list[str] = ["text", "image"]
    output_modalities: list[str] = ["text"]


class ModelList(BaseModel):
    """All models: one."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class AttentionAnswer(BaseModel):
    """Where the model looked."""

    object: Literal["attention_map"] = "attention_map"
    model: str
    of: Literal["picture", "answer"]
    text: str
    values: list[list[float]]


def usage(answer: "Answer") -> Usage:
    """Return the tokens of an answer."""
    return Usage(
        prompt_tokens=answer.prompt_tokens,
        completion_tokens=answer.completion_tokens,
        total_tokens=answer.prompt_tokens + answer.completion_tokens,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=answer.cached_tokens),
    )


def finish_reason(answer: "Answer") -> FinishReason:
    """Return why an answer ended, in OpenAI's words."""
    return "length" if answer.finish_reason == "length" else "stop"


def _refuse(name: str, neutral: tuple[Any, ...]) -> None:
    only = " or ".join(json.dumps(value) for n, value in enumerate(neutral) if value not in neutral[:n])
    message = f"{name} is not supported here" + (f" with another value than {only}" if only else "")
    raise ApiError(400, message, "leave it out", param=name, code="unsupported_parameter")


def _unknown(name: str, known: list[str]) -> None:
    close = difflib.get_close_matches(name[:80], known, 1)
    message = f"there is no parameter {name if len(name) <= 40 else f'{name[:40]}...'!r}"
    hint = f"perhaps {close[0]} is meant" if close else "leave it out"
    raise ApiError(400, message, hint, param=name[:80], code="unknown_parameter")
