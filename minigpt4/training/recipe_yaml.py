"""A recipe's YAML file as keys and values, and single values put in by `--set`. Does not know what a key means."""

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from minigpt4.errors import ConfigError


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
