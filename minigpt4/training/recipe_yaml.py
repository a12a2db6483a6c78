"""A recipe's YAML file as keys and values, what values may be, `--set`, and what is wrong with a value in a sentence.

Does not know what a key means.
"""

from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, ValidationError

from minigpt4.errors import ConfigError
from minigpt4.text import did_you_mean, expected

LARGEST = 10**9
"""No count is larger."""

LARGEST_SEED = 2**63 - 1
"""What the library's generators take."""


def is_prompt_template(text: str) -> bool:
    """Return whether a text has one `{}`, for a prompt, and no other brace."""
    return text.count("{}") == 1 and not set(text.replace("{}", "")) & set("{}")


def _with_one_place(text: str) -> str:
    if not is_prompt_template(text):
        raise ValueError("expected one {} for the prompt, and no other brace")
    return text


def _not_empty(value: Any) -> Any:  # noqa: ANN401  (not validated yet)
    """Refuse an empty name: an empty path would be the working directory."""
    if isinstance(value, str) and (not value.strip() or "\0" in value):
        raise ValueError("expected a name")
    return value


def different(values: list[str]) -> list[str]:
    """Refuse a list that names something twice."""
    if twice := [value for value in values if values.count(value) > 1]:
        raise ValueError(f"{twice[0]} stands there twice")
    return values


Count = Annotated[int, Field(gt=0, le=LARGEST)]
Number = Annotated[int, Field(ge=0, le=LARGEST)]
Batch = Annotated[int, Field(gt=0, le=10**6)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Name = Annotated[str, BeforeValidator(_not_empty)]
Place = Annotated[Path, BeforeValidator(_not_empty)]
Template = Annotated[str, AfterValidator(_with_one_place)]


class _Loader(yaml.SafeLoader):
    """Makes no objects, and takes no key twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[object] = set()
        for key_node, _ in node.value:
            key = key_node.value
            if isinstance(key, str) and key in seen and key != "<<":
                raise yaml.MarkedYAMLError(
                    problem=f"the key {key} stands there twice", problem_mark=key_node.start_mark
                )
            seen.add(key if isinstance(key, str) else None)
        return super().construct_mapping(node, deep=deep)


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a recipe's keys.

    Raises:
        ConfigError: Not a file, not YAML, without keys, or with one that stands there twice.
    """
    try:
        loader = _Loader(path.read_text(encoding="utf-8"))
        content = loader.get_single_data()
    except OSError as error:
        raise ConfigError(
            f"cannot read the recipe {path}: {error.strerror}", hint="recipes/ in the source tree holds some to copy"
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{path} is not YAML: {_problem(error)}", hint="mend that line, or copy a file from recipes/"
        ) from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds no keys", hint="copy one of the files in recipes/")
    return content


def _problem(error: Exception) -> str:
    """Say what is wrong with a file, and where."""
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    if mark is None or not problem:
        return " ".join(str(error).split())
    return f"{problem}, in line {mark.line + 1}, column {mark.column + 1}"


def is_of_the_original(content: dict[str, Any]) -> bool:
    """Tell whether keys are those of one of the original's YAML files: `model` and `run` sections, and no stage."""
    return isinstance(content.get("run", content.get("datasets")), dict) and "stages" not in content


def is_recipe(path: Path) -> bool:
    """Tell whether a file holds a recipe, as far as its two main keys say."""
    try:
        return {"stages", "output"} <= read_yaml(path).keys()
    except ConfigError:
        return False


def set_value(content: dict[str, Any], override: str) -> None:
    """Put the value of `key=value` where its dotted key says; sections on the way are made.

    Raises:
        ConfigError: No value, none of YAML, or no such place.
    """
    key, equals, value = override.partition("=")
    if not equals:
        raise ConfigError(f"--set {override} has no value", hint="write --set key=value, for example --set seed=2")
    *parents, last = key.split(".")
    place: Any = content
    walked: list[str] = []
    try:
        read = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override}: the value is not YAML", hint="put it in quotes") from error
    try:
        for name in parents:
            place = place[int(name)] if isinstance(place, list) else place.setdefault(name, {})
            walked.append(name)
        place[int(last) if isinstance(place, list) else last] = read
    except (ValueError, IndexError, TypeError, AttributeError) as error:
        raise ConfigError(f"--set {key}: the recipe has no such place", hint=_what_is_there(walked, place)) from error


def _what_is_there(walked: list[str], place: object) -> str:
    """Say what stands where a key would go on."""
    where = ".".join(walked)
    if isinstance(place, list):
        counted = f"{where} is a list of {len(place)}, counted from 0"
        last = f" to {where}.{len(place) - 1}" if len(place) > 1 else " alone"
        return f"{counted}: {where}.0{last}" if place else counted
    return f"{where} is {place!r}, which has no keys: set {where} itself, to {{key: value, ...}}"[:200]


def named(path: Path, overridden: Sequence[str], place: str) -> str:
    """Return where a key comes from: the file, or the command line."""
    return "--set" if any(f"{place}.".startswith(f"{key}.") for key in overridden) else str(path)


def complaint(
    error: ValidationError,
    where: str,
    path: Path,
    overridden: Sequence[str],
    sections: Sequence[tuple[str, type[BaseModel]]],
) -> ConfigError:
    """Turn pydantic's complaint about a recipe into one sentence and a hint.

    Args:
        error: Pydantic's.
        where: The place of what was validated, with a dot behind; empty for the whole.
        path: The recipe's file.
        overridden: Keys that come from the command line, by their places.
        sections: Where keys may stand, and which.
    """
    # A misspelt key is often also a missing one; the misspelling is the cause.
    first = min(error.errors(), key=lambda one: one["type"] != "extra_forbidden")
    kind, found = first["type"], first["input"]
    known = sorted({name for _, section in sections for name in section.model_fields})
    *parents, last = first["loc"] or ("",)
    # Where a value may be of several kinds, the kind's name stands among the keys.
    keys = [part for part in parents if isinstance(part, int) or part in known]
    if isinstance(last, int) or last in known or kind == "extra_forbidden":
        keys.append(last)
    place = (where + ".".join(map(str, keys))).rstrip(".")
    origin = named(path, overridden, place)
    if kind == "extra_forbidden":
        elsewhere = dict.fromkeys(f"{p}.{last}".lstrip(".") for p, section in sections if last in section.model_fields)
        hint = f"that key is {' or '.join(elsewhere)}" if elsewhere else ""
        hint = hint or did_you_mean(str(last), known, f"the keys are {', '.join(known)}")
        return ConfigError(f"{origin}: unknown key {place}", hint=hint)
    if kind == "missing" and not isinstance(last, int):
        return ConfigError(f"{origin}: {place} is missing", hint="add that key; the files in recipes/ have it")
    reason = expected(first)
    if kind == "missing":  # of a list of a certain length
        place, reason = place.rpartition(".")[0], f"expected a list of more than {len(found):,}"
    if kind != "value_error" or not isinstance(found, dict | BaseModel):  # else its keys do not go together
        shown = "null" if found is None else str(found).lower() if isinstance(found, bool) else repr(found)
        reason = f"{reason}, but it is {shown[:180]}"
    in_brackets = kind in ("list_type", "tuple_type")
    hint = "put it in brackets: [...]" if in_brackets else "mend that value; the files in recipes/ have examples"
    return ConfigError(": ".join(part for part in (origin, place, reason) if part), hint=hint)
