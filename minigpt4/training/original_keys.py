"""The keys of one of the original's train YAMLs, each taken once: what nobody took in the end is refused.

Checks kinds and ranges, and collects the sentences that say what became of the keys. Does not know what a key means.
"""

import difflib
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from minigpt4.errors import ConfigError
from minigpt4.training.recipe_fields import LARGEST
from minigpt4.weights.original.configs import Key, OriginalYaml, Setting


@dataclass
class Keys:
    """What has not been taken yet, and what was said so far.

    Args:
        read: The files and options.
        notes: Sentences for the user, in order.
    """

    read: OriginalYaml
    notes: list[str] = field(default_factory=list)
    _left: dict[Key, Setting] = field(init=False, repr=False)
    _renamed: list[str] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        """Begin with all of them."""
        self._left = dict(self.read.settings)

    def names(self, *above: str) -> list[str]:
        """List the keys below a place, in the files' order, whether they were taken or not."""
        depth = len(above)
        found = (key[depth] for key in self.read.settings if len(key) > depth and key[:depth] == above)
        return list(dict.fromkeys(found))

    def take(self, *key: str) -> Setting | None:
        """Take a value; None where it is missing or null."""
        self._left.pop(key, None)
        setting = self.read.settings.get(key)
        return None if setting is None or setting.value is None else setting

    def whole(self, *key: str, least: int, most: int = LARGEST, default: int | None = None) -> int:
        """Take a whole number.

        Raises:
            ConfigError: It is none, or below `least` or above `most`, or missing without a default.
        """
        value = self._value(key, (int,), f"a whole number from {least}", default)
        if value < least:
            self._refuse_other(key, value, f"a whole number from {least}")
        if value > most:
            self._refuse_other(key, value, f"a whole number up to {most}")
        return int(value)

    def number(self, *key: str, least: float | None = 0, default: float | None = None) -> float:
        """Take a number.

        Raises:
            ConfigError: It is none or not finite, or below `least`, or missing without a default.
        """
        expected = "a number" if least is None else f"a number from {least}"
        value = self._value(key, (int, float), expected, default)
        if not abs(value) <= sys.float_info.max:
            self._refuse_other(key, value, expected.replace("a number", "a finite number"))
        if least is not None and value < least:
            self._refuse_other(key, value, expected)
        return float(value)

    def flag(self, *key: str, default: bool) -> bool:
        """Take a True or False.

        Raises:
            ConfigError: It is neither.
        """
        return bool(self._value(key, (bool,), "True or False", default))

    def text(self, *key: str, default: str | None = None) -> str:
        """Take a text.

        Raises:
            ConfigError: It is none, or missing without a default.
        """
        return str(self._value(key, (str,), "a text", default))

    def rename(self, *pairs: tuple[str, str]) -> None:
        """Note keys that only have another name in a recipe: those of them that are there."""
        self._renamed += [
            f"{old} is {new}" for old, new in pairs if self.read.settings.get(tuple(old.split("."))) is not None
        ]

    def ignore(self, reason: str, *keys: Key) -> None:
        """Take keys that have no effect, and say so of those that are there."""
        there = [".".join(key) for key in keys if key in self.read.settings]
        for key in keys:
            self._left.pop(key, None)
        if there:
            self.notes.append(f"{', '.join(there)}: {reason}")

    def below(self, *above: str) -> list[Key]:
        """List the keys below a place that nobody has taken yet."""
        return [key for key in self._left if key[: len(above)] == above and len(key) > len(above)]

    def refuse(self, key: Key, problem: str, hint: str) -> NoReturn:
        """Complain about a key.

        Raises:
            ConfigError: With the key's file and line.
        """
        setting = self.read.settings.get(key)
        place = setting.place if setting is not None else str(self.read.path)
        raise ConfigError(f"{place}: `{'.'.join(key)}` {problem}", hint)

    def _refuse_other(self, key: Key, value: object, expected: str) -> NoReturn:
        name = ".".join(key)
        setting = self.read.settings.get(key)
        in_file = setting is not None and setting.file is not None
        hint = f"write {expected} there, or override it: --options {name}=VALUE" if in_file else f"write {expected}"
        self.refuse(key, f"is {value!r}, expected {expected}", hint)

    def finish(self, known: Sequence[str]) -> list[str]:
        """Refuse what nobody has taken, and return the sentences.

        Args:
            known: Names to suggest for an unknown one.

        Raises:
            ConfigError: A key is left.
        """
        for key in self._left:
            if len(key) > 1:
                near = difflib.get_close_matches(key[-1], known, n=1)
                self.refuse(key, "is not known", f"did you mean {near[0]}?" if near else "remove it")
        renamed = [f"only named otherwise: {', '.join(self._renamed)}"] if self._renamed else []
        return [*renamed, *self.notes]

    def _value(self, key: Key, kinds: tuple[type, ...], expected: str, default: Any) -> Any:  # noqa: ANN401
        setting = self.take(*key)
        if setting is None:
            if default is None:
                raise ConfigError(
                    f"{self.read.path}: `{'.'.join(key)}` is missing, expected {expected}",
                    f"add it, or --options {'.'.join(key)}=VALUE",
                )
            return default
        if type(setting.value) not in kinds:
            self._refuse_other(key, setting.value, expected)
        return setting.value
