"""What a pickle says, without running it.

A pickle is a program for a small stack machine, and some of its instructions call functions. Here the instructions are
read one after the other by a machine that knows plain values and one kind of object, a tensor, and that refuses all
else: it looks no name up and calls nothing. Files of tensors need no more.

This module knows neither files nor bytes of tensors.
"""

import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO, Any

import torch

MAX_INSTRUCTIONS = 1_000_000
"""A few dozen for each tensor: the largest checkpoints have some 2000 tensors."""

MAX_KEY = 1000
"""Characters of a key in a dictionary: no tensor's name is near it, and names of nested values are put together."""


class PickleError(Exception):
    """A pickle that says more than plain values and tensors, or that makes no sense; the text says what `it` does."""


class ForeignObjectError(PickleError):
    """A pickle that asks for an object other than a tensor."""


@dataclass(frozen=True)
class Storage:
    """The bytes that one or more tensors lie in.

    Args:
        key: Its name in the file.
        dtype: Type of its elements.
        count: Number of its elements.
        offset: For a storage that is a part of another: where it begins, in elements.
        is_view: Whether it is a part of another.
    """

    key: str
    dtype: torch.dtype
    count: int
    offset: int = 0
    is_view: bool = False


@dataclass(frozen=True)
class PickledTensor:
    """A tensor as a pickle describes it: a view of a storage.

    Args:
        storage: What it lies in.
        offset: Its first element in the storage.
        shape: Its shape.
        strides: Steps between neighbours, in elements.
    """

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def extent(self) -> int:
        """Elements from the first to the last one inclusive; 0 for an empty tensor."""
        if 0 in self.shape:
            return 0
        return 1 + sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))


@dataclass(frozen=True)
class _Name:
    """A name the pickle mentions; it is never looked up."""

    text: str


_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
}
_DTYPES = {str(dtype): dtype for dtype in _STORAGES.values()}
_MARK = object()


def read_pickle(file: IO[bytes], limit: int) -> object:
    """Read one pickle from where the file stands; afterwards the file stands behind it.

    Args:
        file: An open file.
        limit: The most bytes it may have.

    Returns:
        Its value, of plain values, containers and `PickledTensor`. Containers may be shared, and may even contain
        themselves: who walks them must count.

    Raises:
        PickleError: It holds something else, or is damaged.
    """
    machine = _Machine()
    try:
        instructions = pickletools.genops(_Limited(file, limit))  # type: ignore[arg-type]  # needs no more of a file
        for count, (opcode, argument, _) in enumerate(instructions):
            if count >= MAX_INSTRUCTIONS:
                raise PickleError("it has more entries than any checkpoint")
            machine.step(opcode.name, argument)
    except PickleError:
        raise
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError) as error:
        raise PickleError("it is damaged") from error
    return machine.result


class _Limited:
    """A file of which only so many bytes may be read, whatever a length in it says."""

    def __init__(self, file: IO[bytes], limit: int) -> None:
        self._file = file
        self._left = limit

    def read(self, size: int) -> bytes:
        if size > self._left:
            raise PickleError("it is damaged")
        self._left -= size
        return self._file.read(size)

    def readline(self) -> bytes:
        line = self._file.readline(self._left)
        self._left -= len(line)
        return line

    def tell(self) -> int:
        return self._file.tell()


class _Machine:
    """The stack machine: plain values, containers, tensors."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.result: Any = None

    def step(self, name: str, argument: object) -> None:
        if name in _CONSTANTS:
            self.stack.append(argument)
        elif name in _MAKERS:
            self.stack.append(_MAKERS[name]())
        elif name in _STEPS:
            _STEPS[name](self, argument)
        elif name not in ("PROTO", "FRAME"):
            raise ForeignObjectError(f"it holds objects other than tensors ({name})")

    def since_mark(self) -> list[Any]:
        """Take off the stack what was put there since the last mark."""
        place = len(self.stack) - 1
        while self.stack[place] is not _MARK:  # an IndexError for a pickle without one
            place -= 1
            if place < 0:
                raise PickleError("it is damaged")
        values = self.stack[place + 1 :]
        del self.stack[place:]
        return values

    def tuple_of(self, size: int) -> None:
        if len(self.stack) < size:
            raise PickleError("it is damaged")
        values = tuple(self.stack[len(self.stack) - size :])
        del self.stack[len(self.stack) - size :]
        self.stack.append(values)

    def append(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, list):
            raise PickleError("it is damaged")
        target.extend(values)

    def set_items(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict) or len(values) % 2:
            raise PickleError("it is damaged")
        for key, value in zip(values[::2], values[1::2], strict=True):
            target[_key(key)] = value

    def memoize(self, place: int) -> None:
        self.memo[place] = self.stack[-1]

    def call(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if not isinstance(function, _Name) or not isinstance(arguments, tuple):
            raise PickleError("it is damaged")
        if function.text not in _CALLS:
            raise _foreign(function)
        self.stack.append(_CALLS[function.text](*arguments))

    def build(self) -> None:
        """Drop an object's attributes: a state dictionary carries notes (`_metadata`) that no tensor needs."""
        self.stack.pop()
        if not isinstance(self.stack[-1], dict):
            raise ForeignObjectError("it holds objects other than tensors")

    def persistent(self) -> None:
        """Take a storage: `("storage", type, key, place, count)`, and in bare pickles a view of it or None."""
        kind, dtype, key, _, count, *view = self.stack.pop()
        if kind != "storage" or not isinstance(key, str | int) or len(view) > 1:
            raise PickleError("it is damaged")
        text = dtype.text if isinstance(dtype, _Name) else ""
        if not text.startswith("torch.") or text.removeprefix("torch.") not in _STORAGES:
            raise _foreign(dtype)
        offset, is_view = 0, bool(view and view[0] is not None)
        if is_view:
            _, offset, count = view[0]
        dtype = _STORAGES[text.removeprefix("torch.")]
        storage = Storage(str(key), dtype, _whole(count), _whole(offset), is_view=is_view)
        self.stack.append(storage)


def _whole(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**62:
        raise PickleError("it says something else where a size belongs")
    return value


def _foreign(name: object) -> ForeignObjectError:
    text = name.text if isinstance(name, _Name) else type(name).__name__
    return ForeignObjectError(f"it holds objects other than tensors ({text})")


def _tensor(
    storage: object,
    offset: object,
    shape: object,
    strides: object,
    _gradient: object = None,
    _hooks: object = None,
    flags: object = None,
    *_: object,
) -> PickledTensor:
    if not isinstance(storage, Storage) or not isinstance(shape, tuple) or not isinstance(strides, tuple):
        raise PickleError("it is damaged")
    if len(shape) != len(strides) or len(shape) > 16:
        raise PickleError("it is damaged")
    if flags:  # `conj`, `neg`: the bytes are not the numbers
        said = ", ".join(map(str, flags)) if isinstance(flags, dict) else type(flags).__name__
        raise ForeignObjectError(f"it holds a tensor with marks of its own ({said[:80]})")
    return PickledTensor(storage, _whole(offset), tuple(map(_whole, shape)), tuple(map(_whole, strides)))


def _parameter(tensor: object, *_: object) -> PickledTensor:
    if not isinstance(tensor, PickledTensor):
        raise PickleError("it is damaged")
    return tensor


def _ordered(*arguments: object) -> dict[Any, Any]:
    if arguments:
        (pairs,) = arguments
        if not isinstance(pairs, list | tuple) or not all(isinstance(pair, list | tuple) for pair in pairs):
            raise PickleError("it is damaged")
        return {_key(key): value for key, value in pairs}
    return {}


def _key(key: object) -> str | int | float | bytes | None:
    """Take a plain key: a nest of tuples could take for ever to hash."""
    if not isinstance(key, str | int | float | bytes | None):
        raise PickleError(f"it has a {type(key).__name__} for a key")
    if isinstance(key, str | bytes) and len(key) > MAX_KEY:
        raise PickleError(f"it has a name of {len(key):,} characters")
    return key


def _size(shape: object) -> tuple[int, ...]:
    if not isinstance(shape, tuple | list):
        raise PickleError("it is damaged")
    return tuple(map(_whole, shape))


def _device(kind: object, number: object = None) -> str:
    if not isinstance(kind, str) or not isinstance(number, int | None):
        raise PickleError("it is damaged")
    return kind if number is None else f"{kind}:{number}"


def _global(machine: _Machine, argument: str) -> None:
    machine.stack.append(_named(*argument.split(" ", 1)))


def _stack_global(machine: _Machine, _: object) -> None:
    name, module = machine.stack.pop(), machine.stack.pop()
    if not isinstance(name, str) or not isinstance(module, str):
        raise PickleError("it is damaged")
    machine.stack.append(_named(module, name))


def _named(module: str, name: str) -> object:
    """Take a name: known ones stand for what they mean, any other is refused at once."""
    text = f"{module}.{name}"
    if text in _DTYPES:
        return _DTYPES[text]
    if text not in _CALLS and not (module == "torch" and name in _STORAGES):
        raise _foreign(_Name(text))
    return _Name(text)


def _stop(machine: _Machine, _: object) -> None:
    (machine.result,) = machine.stack
    if isinstance(machine.result, _Name) or machine.result is _MARK:
        raise _foreign(machine.result)


_CALLS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": _ordered,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch.Size": _size,
    "torch.device": _device,
}
_CONSTANTS = {
    "INT", "BININT", "BININT1", "BININT2", "LONG1", "FLOAT", "BINFLOAT", "STRING", "BINSTRING", "SHORT_BINSTRING",
    "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES",
}  # fmt: skip
_MAKERS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "MARK": lambda: _MARK,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
}
_STEPS: dict[str, Callable[[_Machine, Any], None]] = {
    "TUPLE": lambda machine, _: machine.stack.append(tuple(machine.since_mark())),
    "TUPLE1": lambda machine, _: machine.tuple_of(1),
    "TUPLE2": lambda machine, _: machine.tuple_of(2),
    "TUPLE3": lambda machine, _: machine.tuple_of(3),
    "LIST": lambda machine, _: machine.stack.append(machine.since_mark()),
    "APPEND": lambda machine, _: machine.append([machine.stack.pop()]),
    "APPENDS": lambda machine, _: machine.append(machine.since_mark()),
    "SETITEM": lambda machine, _: machine.set_items([machine.stack.pop(-2), machine.stack.pop()]),
    "SETITEMS": lambda machine, _: machine.set_items(machine.since_mark()),
    "BINPUT": lambda machine, place: machine.memoize(place),
    "LONG_BINPUT": lambda machine, place: machine.memoize(place),
    "MEMOIZE": lambda machine, _: machine.memoize(len(machine.memo)),
    "BINGET": lambda machine, place: machine.stack.append(machine.memo[place]),
    "LONG_BINGET": lambda machine, place: machine.stack.append(machine.memo[place]),
    "POP": lambda machine, _: machine.stack.pop(),
    "GLOBAL": _global,
    "STACK_GLOBAL": _stack_global,
    "REDUCE": lambda machine, _: machine.call(),
    "BUILD": lambda machine, _: machine.build(),
    "BINPERSID": lambda machine, _: machine.persistent(),
    "STOP": _stop,
}
