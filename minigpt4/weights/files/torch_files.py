"""PyTorch's tensor files, `.pth` and `.bin`: the one module that unpickles, with `torch.load(weights_only=True)`.

That runs no code of a file. Checked here is what torch leaves open: the archive around the pickle, a pickle that keeps
torch busy for ever, tensors that claim more bytes than the file has, and the CRC-32 of an archive's members: of the
list of tensors when the file is opened, of a tensor's bytes when they are read (`stored_tensor`).

An archive's tensors stay on the disk until they are read. Those of a pickle without an archive (torch before 1.6)
cannot be mapped: they are in memory while the file is open, as many bytes as the file has.
"""

import codecs
import io
import pickle
import pickletools
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from minigpt4.errors import WeightsError
from minigpt4.weights.files.disk import storing
from minigpt4.weights.files.stored_tensor import Member, StoredTensor, refused

MAX_PICKLE_BYTES = 64 * 2**20
MAX_DIRECTORY_BYTES = 16 * 2**20
MAX_INSTRUCTIONS = 1_000_000
"""A few dozen for each tensor: the largest checkpoints have some 2000 tensors."""
MAX_WORK = 20 * MAX_INSTRUCTIONS
MAX_DEPTH = 32
MAX_VALUES = 300_000
SHARING = 4
"""How many times larger than its file the tensors may be together: some share their bytes, as tied embeddings do."""
_ARCHIVE = b"PK\x03\x04"  # as torch recognises it
_OBJECTS = "it holds objects other than tensors"
_NAMES = {
    "collections OrderedDict", "torch Size", "torch device", "torch._utils _rebuild_tensor",
    "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter",
}  # fmt: skip
_OTHERS_BEGIN = {
    b"version https://git-lfs": ("it is a git-lfs pointer, the file was not fetched", "run `git lfs pull` there"),
    b"<": ("it is a web page, not the file", "download the file itself"),
    b"\x1f\x8b": ("it is compressed", "unpack it with gunzip first"),
    b"GGUF": ("it is a GGUF file", "use the files in the .bin or .safetensors format"),
    **dict.fromkeys(
        (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"RIFF"),
        ("it is a picture, a file of weights was expected", "`minigpt4 ask` takes pictures"),
    ),
}
_WEIGHTS_HINT = "name a .safetensors, .pth or .bin file, or the folder of a model"


def read_torch_file(path: Path) -> dict[str, Any]:
    """Read a PyTorch file of tensors in plain containers; the tensors are mapped from the file.

    Raises:
        WeightsError: Not such a file, a damaged or a hostile one.
        StorageError: It cannot be read.
    """
    return {name: _with_tensors(value) for name, value in scan_torch_file(path).items()}


def scan_torch_file(path: Path) -> dict[Any, Any]:
    """Read what a PyTorch file says it holds: plain values, and a `StoredTensor` for each tensor.

    Raises:
        WeightsError: Not such a file, a damaged or a hostile one.
        StorageError: It cannot be read.
    """
    if not path.is_file():
        raise WeightsError(f"{path} is not a file", hint="name the .pth file itself")
    with storing(path, doing="read"):
        refuse_other_kinds(path)
        with path.open("rb") as file:
            is_archive = file.read(len(_ARCHIVE)) == _ARCHIVE
            file.seek(0)
            members = _check_archive(path, file) if is_archive else _check_bare(path, file)
        try:
            content, places = _load(path, members)
        except pickle.UnpicklingError as error:
            raise refused(path, _OBJECTS) from error
        except OSError:
            raise
        except Exception as error:  # whatever the instructions of a damaged or hostile file lead to
            raise refused(path, "it is damaged or cut short, or no file of tensors") from error
    if not isinstance(content, dict):
        kind = "Tensor" if isinstance(content, Tensor) else type(content).__name__
        raise refused(path, f"it holds a {kind}, expected a dictionary of tensors")
    return _Scan(path, places).container(content, ())


def refuse_other_kinds(path: Path) -> None:
    """Raise WeightsError for a git-lfs pointer, a web page, a picture, or a file of another format of weights."""
    with path.open("rb") as file:
        start = file.read(64)
    for beginning, (why, hint) in _OTHERS_BEGIN.items():
        if start.lstrip().startswith(beginning):
            raise refused(path, why, hint)


def refuse_words(path: Path) -> None:
    """Raise WeightsError for a text, or an empty file, where tensors are expected."""
    with path.open("rb") as file:
        start = file.read(64)
    if not start:
        raise refused(path, "it is empty", _WEIGHTS_HINT)
    try:
        words = codecs.getincrementaldecoder("utf-8")().decode(start)
    except UnicodeDecodeError:
        return
    if all(character.isprintable() or character.isspace() for character in words):
        raise refused(path, "it is a text, a file of weights was expected", _WEIGHTS_HINT)


def tensors_in(value: object, name: str = "") -> Iterator[tuple[str, StoredTensor]]:
    """Yield the tensors in nested containers, each with its dotted place."""
    if isinstance(value, StoredTensor):
        yield name, value
    elif isinstance(value, dict | list | tuple):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from tensors_in(part, f"{name}.{key}" if name else str(key))


def _load(path: Path, members: dict[int, Member]) -> tuple[object, dict[int, Member]]:
    """Load a file's content; tensors of an archive without their bytes, each storage with its place in the file."""
    if members:
        try:
            content = torch.load(path, map_location="meta", weights_only=True)
            if all(offset in members for offset in _offsets(content)):
                return content, members
        except AssertionError:
            pass
        # Another program packed the archive again, so that torch reckons the places of its members wrongly (or torch is
        # older than 2.13 and tells none).
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged:
            raise refused(path, f"it is damaged: its member {damaged} does not have the checksum that the file says")
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True), {}
    return torch.load(path, map_location="cpu", weights_only=True), {}


def _offsets(content: object) -> Iterator[int]:
    """Yield the places of all storages in nested containers, each container looked at once."""
    waiting, seen = [content], set()
    while waiting:
        value = waiting.pop()
        if isinstance(value, Tensor):
            yield _offset(value)
        elif isinstance(value, dict | list | tuple) and id(value) not in seen:
            seen.add(id(value))
            waiting.extend(value.values() if isinstance(value, dict) else value)


def _offset(tensor: Tensor) -> int:
    """Return where an archive has a tensor's storage; -1 for a tensor that was loaded with its bytes."""
    offset: int = getattr(tensor.untyped_storage(), "_checkpoint_offset", -1)
    return offset


def _directory(path: Path, file: IO[bytes]) -> list[zipfile.ZipInfo]:
    """Read an archive's directory: stored members only, no name twice, no more bytes than the file has."""
    size = path.stat().st_size
    file.seek(max(0, size - 66_000))  # the records at an archive's end, and the comment that may follow them
    tail = file.read()
    small, large = tail.rfind(b"PK\x05\x06"), tail.rfind(b"PK\x06\x06")
    lengths = tail[small + 12 : small + 16], tail[large + 40 : large + 48] if large >= 0 else b""
    if max(int.from_bytes(length, "little") for length in lengths) > MAX_DIRECTORY_BYTES:
        raise refused(path, "its archive has more members than any checkpoint")
    try:
        with zipfile.ZipFile(file) as archive:
            infos = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, EOFError) as error:
        if isinstance(error.__context__, OSError):  # the library takes an error of the disk for one of the file
            raise error.__context__ from error
        raise refused(path, "its archive is damaged or cut short") from error
    if len({info.filename for info in infos}) != len(infos):
        raise refused(path, "its archive has two members of one name")
    if any(info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1 for info in infos):
        raise refused(path, "its archive has compressed members, which torch never writes")
    if sum(info.file_size for info in infos) > size:
        raise refused(path, "its archive declares more bytes than the file has")
    return infos


def _check_archive(path: Path, file: IO[bytes]) -> dict[int, Member]:
    """Check the directory and the list of tensors of an archive; return its members by the place of their bytes."""
    infos = _directory(path, file)
    if any(info.filename.endswith("/constants.pkl") for info in infos):
        raise refused(path, "it is a TorchScript program, not a file of tensors")
    members = {info.filename.partition("/")[2]: _member(file, info) for info in infos}
    if "data.pkl" not in members or sum(name.endswith("data.pkl") for name in members) > 1:
        raise refused(path, "its archive is not of tensors")
    if any(member.start < 0 or member.start + member.size > path.stat().st_size for member in members.values()):
        raise refused(path, "its archive is damaged or cut short")
    listing = members["data.pkl"]
    if not listing.crc32:  # written with torch.serialization.set_crc32_options(False): all are 0
        for member in members.values():
            member.crc32 = None
    text = _bytes_of(file, listing, MAX_PICKLE_BYTES)
    if listing.crc32 is not None and zlib.crc32(text) != listing.crc32:
        raise refused(path, "it is damaged: its list of tensors does not have the checksum that the file says")
    if "byteorder" in members and _bytes_of(file, members["byteorder"], 16) != b"little":
        raise refused(path, "its numbers are stored in big-endian order")
    _check_pickle(path, io.BytesIO(text))
    return {member.start: member for member in members.values()}


def _member(file: IO[bytes], info: zipfile.ZipInfo) -> Member:
    """Find a member's bytes: they lie behind a header of its own, whose name and extra field may have any length."""
    file.seek(max(0, info.header_offset + 26))
    lengths = file.read(4)
    start = info.header_offset + 30 + int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little")
    return Member(start, info.file_size, info.CRC)


def _bytes_of(file: IO[bytes], member: Member, limit: int) -> bytes:
    file.seek(member.start)
    return file.read(min(member.size, limit))


def _check_bare(path: Path, file: IO[bytes]) -> dict[int, Member]:
    """Check a file of torch before 1.6: five pickles, then the tensors' bytes."""
    pickles = io.BytesIO(file.read(MAX_PICKLE_BYTES))
    if pickles.getvalue()[:1] != b"\x80":
        raise refused(path, "it is neither an archive nor a pickle of tensors, or cut short")
    for _ in range(5):
        _check_pickle(path, pickles)
    return {}


def _check_pickle(path: Path, stream: IO[bytes]) -> None:
    """Refuse a pickle that torch would read for ever, or that asks for other than what files of tensors need.

    Follows the stack with the number of values in each tuple: torch hashes the keys of dictionaries, and a key of
    tuples in tuples, each three times in the next, takes for ever (`bomb-tuple-nest-for-a-key` in
    `tests/weights/files/test_hostile_files.py`; `genops` finds the texts there that are longer than the memory).
    """
    stack: list[int | None] = []  # None: a mark
    memo: dict[object, int | None] = {}
    work = 0
    try:
        for number, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
            if number >= MAX_INSTRUCTIONS:
                raise refused(path, "it has more entries than any checkpoint")
            if opcode.name in ("GLOBAL", "INST") and not _is_known(str(argument)):
                raise refused(path, f"{_OBJECTS} ({str(argument)[:80].replace(' ', '.')})")
            if "PUT" in opcode.name or opcode.name == "MEMOIZE":
                memo[len(memo) if argument is None else argument] = stack[-1]
                continue
            taken = _taken(stack, opcode.stack_before)
            weight: int | None = 1
            if "GET" in opcode.name:
                weight = memo[argument]
            elif opcode.name.startswith("TUPLE"):
                weight = 1 + sum(value or 0 for value in taken)
            stack += [None if kind is pickletools.markobject else weight for kind in opcode.stack_after]
            work += weight or 0
            if work > MAX_WORK:
                raise refused(path, "its containers are nested without end")
    except (ValueError, KeyError, IndexError, OverflowError) as error:
        raise refused(path, "it is damaged or cut short") from error


def _taken(stack: list[int | None], kinds: list[pickletools.StackObject]) -> list[int | None]:
    """Take off the stack what an instruction uses."""
    count = len(kinds)
    if pickletools.markobject in kinds:
        mark = len(stack) - 1 - stack[::-1].index(None)
        count = len(stack) - mark + kinds.index(pickletools.markobject)
    if count > len(stack):
        raise IndexError
    taken = stack[len(stack) - count :]
    del stack[len(stack) - count :]
    return taken


def _is_known(name: str) -> bool:
    """Whether a pickle of tensors may ask for a name, `module name`."""
    module, _, attribute = name.partition(" ")
    found = getattr(torch, attribute, None) if module == "torch" and attribute.isidentifier() else None
    return name in _NAMES or isinstance(found, torch.dtype) or (isinstance(found, type) and name.endswith("Storage"))


class _Scan:
    """Copies loaded content with a `StoredTensor` for each tensor, and checks that each owns the bytes it claims."""

    def __init__(self, path: Path, members: dict[int, Member]) -> None:
        self._path = path
        self._members = members
        self._values = 0
        self._bytes = 0
        self._limit = SHARING * path.stat().st_size

    def container(self, content: dict[Any, Any], place: tuple[object, ...]) -> dict[Any, Any]:
        for key in content:
            if not isinstance(key, str | int | float | bytes | None):
                raise refused(self._path, f"it has a {type(key).__name__} for a key")
        return {key: self.value(part, (*place, key)) for key, part in content.items()}

    def value(self, value: object, place: tuple[object, ...]) -> object:
        """Copy a value; `place` has the keys that lead there."""
        self._values += 1
        if len(place) > MAX_DEPTH or self._values > MAX_VALUES:
            raise refused(self._path, "its containers are nested without end")
        if isinstance(value, Tensor):
            return self.tensor(value, ".".join(map(str, place))[:200])
        if isinstance(value, dict):
            return self.container(value, place)
        if isinstance(value, list | tuple):
            parts = [self.value(part, (*place, number)) for number, part in enumerate(value)]
            return parts if isinstance(value, list) else tuple(parts)
        if not isinstance(value, str | int | float | bytes | torch.dtype | torch.device | None):
            raise refused(self._path, f"{_OBJECTS} ({type(value).__name__})")
        return value

    def tensor(self, tensor: Tensor, name: str) -> StoredTensor:
        if tensor.layout != torch.strided or tensor.is_conj() or tensor.is_neg():  # the bytes are not the numbers
            raise refused(self._path, f"{_OBJECTS} (a view of conjugate or negative numbers: {name})")
        member = self._members.get(_offset(tensor))
        if member is not None:
            member.tensor = member.tensor or name
        item, first = tensor.dtype.itemsize, int(tensor.storage_offset())
        size = member.size if member else tensor.untyped_storage().nbytes()
        start = (member.start if member else 0) + first * item
        memory = None if member else tensor.detach()
        shape, strides = tuple(tensor.shape), tuple(tensor.stride())
        stored = StoredTensor(self._path, tensor.dtype, shape, strides, start, member, memory)
        if (stored.extent and (first + stored.extent) * item > size) or stored.num_bytes > size:
            raise refused(self._path, f"tensor {name} claims more bytes than it has")
        self._bytes += stored.num_bytes
        if self._bytes > self._limit:
            raise refused(self._path, "its tensors together claim many times the bytes that the file has")
        return stored


def _with_tensors(value: object) -> object:
    if isinstance(value, StoredTensor):
        return value.read()
    if isinstance(value, dict):
        return {key: _with_tensors(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        parts = [_with_tensors(part) for part in value]
        return parts if isinstance(value, list) else tuple(parts)
    return value
