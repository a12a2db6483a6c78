"""A layer between a program and the operating system that fails, or kills, at the call one chooses."""

import fcntl
import io
import os
from collections.abc import Callable
from typing import Any

CALLS = [
    (os, "mkdir"),
    (os, "open"),
    (os, "fsync"),
    (os, "rename"),
    (os, "replace"),
    (os, "unlink"),
    (os, "rmdir"),
    (io, "open"),
    (fcntl, "flock"),
]
"""What changes something on the disk, or decides who may."""

TRANSFERS = ("read", "readinto", "write", "flush")


class Fault:
    """Count the calls to the operating system that change something, and act at the one with a given number.

    Args:
        number: Which call, from 1; 0 for none.
        act: Called before it with the call's first argument.
        transfers: Whether reading and writing of open files are calls too.
    """

    def __init__(self, number: int, act: Callable[[object], None], *, transfers: bool = False) -> None:
        self.number = number
        self.act = act
        self.transfers = transfers
        self.count = 0
        self.names: list[str] = []

    def __enter__(self) -> "Fault":
        self.real = [(module, name, getattr(module, name)) for module, name in CALLS]
        for module, name, function in self.real:
            setattr(module, name, self.wrapped(name, function))
        return self

    def __exit__(self, *exception: object) -> None:
        for module, name, function in self.real:
            setattr(module, name, function)

    def wrapped(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:  # noqa: ANN401
            self.met(name, arguments[0])
            made = function(*arguments, **keywords)
            return _Watched(made, self, arguments[0]) if self.transfers and function is self.opener else made

        return call

    @property
    def opener(self) -> Callable[..., Any]:
        opener: Callable[..., Any] = next(function for module, _, function in self.real if module is io)
        return opener

    def met(self, name: str, place: object) -> None:
        """Count a call and act if it is the one."""
        self.names.append(name)
        self.count += 1
        if self.count == self.number:
            self.act(place)


class _Watched:
    """An open file whose transfers are counted."""

    def __init__(self, file: Any, fault: Fault, place: object) -> None:  # noqa: ANN401
        self._file, self._fault, self._place = file, fault, place

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        found = getattr(self._file, name)
        if name not in TRANSFERS:
            return found

        def transfer(*arguments: Any) -> Any:  # noqa: ANN401
            self._fault.met(name, self._place)
            return found(*arguments)

        return transfer

    def __enter__(self) -> "_Watched":
        self._file.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.__exit__(*exception)

    def __iter__(self) -> Any:  # noqa: ANN401
        return iter(self._file)
