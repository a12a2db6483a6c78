"""Values as the original's YAML files and options write them. Knows neither torch nor what a key means."""

from typing import Any

SECTIONS = ("vision_config", "qformer_config", "text_config")
"""The parts of a model's configuration that have keys of their own."""


def as_number(value: Any) -> Any:  # noqa: ANN401
    """Return a number for a word such as 1e-4, anything else as it is."""
    if not isinstance(value, str) or "e" not in value.lower():
        return value
    try:
        return float(value)
    except ValueError:
        return value
