"""What a chat completion may be asked with: OpenAI's fields, a few of our own, and every other one refused by name."""

import difflib
import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

from minigpt4.serving.http.openai_errors import ApiError

# Fields of OpenAI's that change no answer; their values are not looked at.
IGNORED = {
    "metadata", "prompt_cache_key", "prompt_cache_retention", "safety_identifier", "service_tier", "store", "user",
}  # fmt: skip

# Fields of OpenAI's that would change the answer: only the value that changes nothing is taken.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "frequency_penalty": (0, 0.0),
    "presence_penalty": (0, 0.0),
    "logit_bias": ({},),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
    "best_of": (1,),
    "echo": (False,),
    "suffix": (),
}

NOT_SAID = {
    "annotations", "audio", "function_call", "parsed", "reasoning", "reasoning_content", "refusal", "tool_calls",
}  # fmt: skip
"""Fields of an answer that clients send back with it: empty, they say nothing."""

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
    def _without_what_is_not_said(cls, value: Any) -> Any:  # noqa: ANN401  (anything a client sends)
        if not isinstance(value, dict) or value.get("role") != "assistant":
            return value
        return {name: given for name, given in value.items() if name not in NOT_SAID or given not in (None, [])}


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
        """The generation options that were given, by the engine's names."""
        given = {name: getattr(self, name) for name in OPTIONS if getattr(self, name) is not None}
        if self.temperature is not None and self.temperature < COLDEST:
            given["temperature"] = 0.0
        if self.seed is not None:
            given["seed"] = self.seed % 2**63  # the engine's are not negative
        longest = self.max_completion_tokens or self.max_tokens
        return given | ({"max_new_tokens": longest} if longest else {})

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """What ends the answer, besides what ends every answer."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


def _refuse(name: str, neutral: tuple[Any, ...]) -> None:
    only = " or ".join(json.dumps(value) for n, value in enumerate(neutral) if value not in neutral[:n])
    raise ApiError(
        400,
        f"{name} is not supported here" + (f" with another value than {only}" if only else ""),
        "leave it out",
        param=name,
        code="unsupported_parameter",
    )


def _unknown(name: str, known: list[str]) -> None:
    close = difflib.get_close_matches(name[:80], known, 1)
    shown = repr(name if len(name) <= 40 else f"{name[:40]}...")
    raise ApiError(
        400,
        f"there is no parameter {shown}",
        f"perhaps {close[0]} is meant" if close else "leave it out",
        param=name[:80],
        code="unknown_parameter",
    )
