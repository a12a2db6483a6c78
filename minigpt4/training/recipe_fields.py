"""What single values of a recipe may be: counts, names, and the text that stands round a prompt."""

from pathlib import Path
from typing import Annotated, Any, get_args

from pydantic import AfterValidator, BeforeValidator, Field

LARGEST = 10**9
"""No count is larger."""

LARGEST_SEED = 2**63 - 1
"""What the library's generators take."""


def is_prompt_template(text: str) -> bool:
    """Tell whether a text has one `{}`, for a prompt, and no other brace."""
    return text.count("{}") == 1 and not set(text.replace("{}", "")) & set("{}")


def prompt_template(text: str) -> str:
    """Refuse what stands round a prompt and has no place for it."""
    if not is_prompt_template(text):
        raise ValueError("expected one {} for the prompt, and no other brace")
    return text


def _not_empty(value: Any) -> Any:  # noqa: ANN401  (not validated yet)
    """Refuse a name that is none: an empty path would be the working directory."""
    if isinstance(value, str) and (not value.strip() or "\0" in value):
        raise ValueError("expected a name")
    return value


def different(values: list[str]) -> list[str]:
    """Refuse a list that names something twice."""
    if twice := [value for value in values if values.count(value) > 1]:
        raise ValueError(f"{twice[0]} stands there twice")
    return values


def kinds_of(annotation: Any) -> set[Any]:  # noqa: ANN401  (a type, or several)
    """Return the types that a field may have."""
    return {annotation, *get_args(annotation)}


Count = Annotated[int, Field(gt=0, le=LARGEST)]
Number = Annotated[int, Field(ge=0, le=LARGEST)]
Batch = Annotated[int, Field(gt=0, le=10**6)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Name = Annotated[str, BeforeValidator(_not_empty)]
Place = Annotated[Path, BeforeValidator(_not_empty)]
Template = Annotated[str, AfterValidator(prompt_template)]
