"""The one door for tensor files that others wrote: PyTorch's `.pth` and `.bin`, archives and bare pickles.

Nothing in the package unpickles. What a file's pickle says is read by a machine that knows tensors and plain values
only (`pickles`), the archive round it is looked at first, and every tensor must own the bytes it claims: a kilobyte
can otherwise declare terabytes. Until a tensor is read, only the file's lists are.

An archive has a CRC-32 of every member, which torch itself does not look at. Here it is compared: that of the lists
when the file is opened, that of a tensor's bytes when they are read (`stored`). So a flipped bit is an error or, in the
fields that nothing is taken from (times, padding), without effect. Bare pickles have no checksum: there a flipped bit
in the numbers is another number, and only what is checked of the numbers themselves can tell (`sanity`).
"""

import codecs
import struct
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from minigpt4.errors import WeightsError
from minigpt4.weights.files.disk import storing
from minigpt4.weights.files.pickles import PickledTensor, PickleError, Storage, read_pickle
from minigpt4.weights.files.safetensors_header import refused
from minigpt4.weights.files.stored import Checksum, StoredTensor

MAX_PICKLE_BYTES = 64 * 2**20
MAX_MEMBERS = 100_000
MAX_DIRECTORY_BYTES = 16 * 2**20
MAX_DEPTH = 32
MAX_VALUES = 300_000
SHARING = 4
"""How many times larger than its file the tensors may be together: some share their bytes, as tied embeddings do."""

_MAGIC_NUMBER = 0x1950A86A20F9469CFC6C
_BARE_PROTOCOL = 1001
_LOCAL_HEADER = struct.Struct("<4s5H3I2H")
_ARCHIVE = b"PK"  # as torch tells them
_END_OF_ARCHIVE, _END_OF_LARGE_ARCHIVE = b"PK\x05\x06", b"PK\x06\x06"
_END_BYTES = 66_000  # the two records of an archive's end, and the comment that may follow them
_NAME_SHOWN = 200
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
    content = scan_torch_file(path)
    return {name: _with_tensors(value) for name, value in content.items()}


def scan_torch_file(path: Path) -> dict[Any, Any]:
    """Read what a PyTorch file says it holds, without its tensors.

    Returns:
        The dictionary in the file: plain values, and a `StoredTensor` for each tensor.

    Raises:
        WeightsError: Not such a file, a damaged or a hostile one.
        StorageError: It cannot be read.
    """
    if not path.is_file():
        raise WeightsError(f"{path} is not a file", hint="name the .pth file itself")
    with storing(path, doing="read"):
        refuse_other_kinds(path)
        try:
            with path.open("rb") as file:
                is_archive = file.read(len(_ARCHIVE)) == _ARCHIVE
                file.seek(0)
                content, places = _read_archive(path, file) if is_archive else _read_bare(path, file)
        except PickleError as error:
            raise refused(path, str(error)) from error
    if not isinstance(content, dict):
        kind = "Tensor" if isinstance(content, PickledTensor) else type(content).__name__
        raise refused(path, f"it holds a {kind}, expected a dictionary of tensors")
    placing = _Placing(path, places)
    return {key: placing.placed(value, (key,)) for key, value in content.items()}


def refuse_other_kinds(path: Path) -> None:
    """Refuse what often lies under a weight file's name and is none, and say what it is.

    Raises:
        WeightsError: The file is a git-lfs pointer, a web page, a picture, or of another format.
    """
    with path.open("rb") as file:
        start = file.read(64)
    for beginning, (why, hint) in _OTHERS_BEGIN.items():
        if start.lstrip().startswith(beginning):
            raise refused(path, why, hint)


def refuse_words(path: Path) -> None:
    """Refuse a file of words, or of nothing, where tensors are expected.

    Raises:
        WeightsError: It is one.
    """
    with path.open("rb") as file:
        start = file.read(64)
    if not start:
        raise refused(path, "it is empty", _WEIGHTS_HINT)
    if _is_text(start):
        raise refused(path, "it is a text, a file of weights was expected", _WEIGHTS_HINT)


def _is_text(start: bytes) -> bool:
    """Tell whether a file's first bytes, cut anywhere, are words."""
    try:
        words = codecs.getincrementaldecoder("utf-8")().decode(start)
    except UnicodeDecodeError:
        return False
    return all(character.isprintable() or character.isspace() for character in words)


def tensors_in(value: object, name: str = "") -> Iterator[tuple[str, StoredTensor]]:
    """Yield the tensors in nested containers, each with its dotted place."""
    if isinstance(value, StoredTensor):
        yield name, value
    elif isinstance(value, dict | list | tuple):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from tensors_in(part, f"{name}.{key}" if name else str(key))


class Place(NamedTuple):
    """Where the bytes of a storage or member begin in the file, how many they are, and their CRC-32 if it is known."""

    start: int
    size: int
    crc32: int | None


Places = dict[str, Place]


def _read_archive(path: Path, file: IO[bytes]) -> tuple[object, Places]:
    """Read the lists of an archive, as torch writes since 1.6."""
    members = _members(path, file)
    pickles = [name for name in members if name.endswith("/data.pkl") or name == "data.pkl"]
    if len(pickles) != 1:
        raise refused(path, "its archive is not of tensors")
    root = pickles[0].removesuffix("data.pkl")
    if any(not name.startswith(root) for name in members):
        raise refused(path, "its archive has members outside its folder")
    if f"{root}constants.pkl" in members:
        raise refused(path, "it is a TorchScript program, not a file of tensors")
    listing, order = members[pickles[0]], members.get(f"{root}byteorder")
    if not listing.crc32:  # written with torch.serialization.set_crc32_options(False): all are 0
        members = {name: place._replace(crc32=None) for name, place in members.items()}
        listing = members[pickles[0]]
    if order is not None:
        file.seek(order.start)
        if file.read(min(order.size, 16)) != b"little":
            raise refused(path, "its numbers are stored in big-endian order")
    _confirm_listing(path, file, listing)
    file.seek(listing.start)
    content = read_pickle(file, min(listing.size, MAX_PICKLE_BYTES))
    prefix = f"{root}data/"
    return content, {name.removeprefix(prefix): place for name, place in members.items() if name.startswith(prefix)}


def _confirm_listing(path: Path, file: IO[bytes], listing: Place) -> None:
    """Compare the list of tensors with its checksum, so that no name, shape or place in it is believed by mistake."""
    if listing.crc32 is None or listing.size > MAX_PICKLE_BYTES:  # one that is too long is refused when it is read
        return
    file.seek(listing.start)
    if zlib.crc32(file.read(listing.size)) != listing.crc32:
        raise refused(path, "it is damaged: its list of tensors does not have the checksum that the file says")


def _members(path: Path, file: IO[bytes]) -> Places:
    """Look at the archive's directory: stored members only, no name twice, each within the file, none over another."""
    size = path.stat().st_size
    members, end = _directory(path, file, size)
    names = {member.filename for member in members}
    if len(names) != len(members):
        raise refused(path, "its archive has two members of one name")
    if any(member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1 for member in members):
        raise refused(path, "its archive has compressed members, which torch never writes")
    if sum(max(member.file_size, member.compress_size) for member in members) > size:
        raise refused(path, "its archive declares more bytes than the file has")
    overlap = refused(path, "its archive has members that lie over each other")
    places = {}
    behind = 0
    for member in sorted(members, key=lambda member: member.header_offset):
        if member.header_offset < behind:
            raise overlap
        start = _member_start(path, file, member)
        if start + member.file_size > end:
            raise overlap
        behind = start + member.file_size
        places[member.filename] = Place(start, member.file_size, member.CRC)
    return places


def _directory(path: Path, file: IO[bytes], size: int) -> tuple[list[zipfile.ZipInfo], int]:
    """Read the archive's directory; return its entries and where it begins."""
    too_many = refused(path, "its archive has more members than any checkpoint")
    if _directory_bytes(file, size) > MAX_DIRECTORY_BYTES:
        raise too_many
    try:
        with zipfile.ZipFile(file) as archive:
            members, start = archive.infolist(), archive.start_dir
    except (zipfile.BadZipFile, ValueError, NotImplementedError, EOFError, struct.error) as error:
        if isinstance(error.__context__, OSError):  # the library takes an error of the disk for one of the file
            raise error.__context__ from error
        raise refused(path, "its archive is damaged or cut short") from error
    if len(members) > MAX_MEMBERS:
        raise too_many
    return members, start


def _directory_bytes(file: IO[bytes], size: int) -> int:
    """Read how long the archive's directory is said to be, before it is read into memory."""
    file.seek(max(0, size - _END_BYTES))
    tail = file.read(_END_BYTES)
    small, large = tail.rfind(_END_OF_ARCHIVE), tail.rfind(_END_OF_LARGE_ARCHIVE)
    lengths = [int.from_bytes(tail[small + 12 : small + 16], "little")]
    if lengths[0] == 2**32 - 1:  # the other record says it
        lengths = []
    if large >= 0:
        lengths.append(int.from_bytes(tail[large + 40 : large + 48], "little"))
    return max(lengths, default=0)


def _member_start(path: Path, file: IO[bytes], member: zipfile.ZipInfo) -> int:
    """Find a member's bytes, which lie behind a header of its own; it must tell what the directory tells."""
    file.seek(member.header_offset)
    header = file.read(_LOCAL_HEADER.size)
    if len(header) < _LOCAL_HEADER.size:
        raise refused(path, "its archive is damaged")
    magic, _, flags, method, *_, name_length, extra_length = _LOCAL_HEADER.unpack(header)
    name = file.read(name_length)
    encoded = member.orig_filename.encode("utf-8" if flags & 0x800 else "cp437", "replace")
    if magic != b"PK\x03\x04" or method != zipfile.ZIP_STORED or name != encoded:
        raise refused(path, "its archive contradicts itself")
    return member.header_offset + _LOCAL_HEADER.size + name_length + extra_length


def _read_bare(path: Path, file: IO[bytes]) -> tuple[object, Places]:
    """Read the lists of a bare pickle, as torch wrote before 1.6: five pickles, then the storages one after another."""
    if file.read(1) != b"\x80":
        raise refused(path, "it cannot be read: neither an archive nor a pickle of tensors, or cut short")
    file.seek(0)
    if read_pickle(file, 1024) != _MAGIC_NUMBER or read_pickle(file, 1024) != _BARE_PROTOCOL:
        raise refused(path, "it cannot be read: a pickle, but none of tensors")
    system = read_pickle(file, 4096)
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise refused(path, "its numbers are stored in big-endian order")
    content = read_pickle(file, MAX_PICKLE_BYTES)
    keys = read_pickle(file, MAX_PICKLE_BYTES)
    if not isinstance(keys, list) or not all(isinstance(key, str | int) for key in keys):
        raise refused(path, "it is damaged")
    return content, _bare_places(path, file, content, [str(key) for key in keys])


def _bare_places(path: Path, file: IO[bytes], content: object, keys: list[str]) -> Places:
    """Walk over the storages: each is a count of elements and their bytes."""
    size = path.stat().st_size
    item_sizes = {storage.key: storage.dtype.itemsize for storage in _storages(content)}
    places: Places = {}
    for key in keys:
        if key not in item_sizes or key in places:
            raise refused(path, "its list of storages contradicts its tensors")
        count = int.from_bytes(file.read(8), "little")
        start = file.tell()
        if start + count * item_sizes[key] > size:
            raise refused(path, "it cannot be read: it is cut short")
        places[key] = Place(start, count * item_sizes[key], None)
        file.seek(start + count * item_sizes[key])
    if file.tell() != size:
        raise refused(path, "it is damaged: bytes follow its last tensor")
    return places


def _storages(content: object) -> Iterator[Storage]:
    """Yield the storages of all tensors in nested containers, each container looked at once."""
    waiting, seen = [content], set()
    while waiting:
        value = waiting.pop()
        if isinstance(value, PickledTensor):
            yield value.storage
        elif isinstance(value, dict | list | tuple) and id(value) not in seen:
            seen.add(id(value))
            waiting.extend(value.values() if isinstance(value, dict) else value)


class _Placing:
    """Puts the places in the file where tensors were named, and checks that each owns what it claims."""

    def __init__(self, path: Path, places: Places) -> None:
        self._path = path
        self._places = places
        self._checksums: dict[str, Checksum] = {}
        self._values = 0
        self._bytes = 0
        self._limit = SHARING * path.stat().st_size

    def placed(self, value: object, place: Sequence[object]) -> object:
        """Copy nested containers with a `StoredTensor` for every tensor; `place` has the keys that lead there."""
        self._values += 1
        if len(place) > MAX_DEPTH or self._values > MAX_VALUES:
            raise refused(self._path, "its containers are nested without end")
        if isinstance(value, PickledTensor):
            return self._tensor(value, ".".join(map(str, place))[:_NAME_SHOWN])
        if isinstance(value, dict):
            return {key: self.placed(part, (*place, key)) for key, part in value.items()}
        if isinstance(value, list | tuple):
            parts = [self.placed(part, (*place, number)) for number, part in enumerate(value)]
            return parts if isinstance(value, list) else tuple(parts)
        if not isinstance(value, str | int | float | bytes | None) and type(value).__module__ != "torch":
            raise refused(self._path, f"it holds objects other than tensors ({type(value).__name__})")
        return value

    def _tensor(self, tensor: PickledTensor, name: str) -> StoredTensor:
        storage = tensor.storage
        if storage.key not in self._places:
            raise refused(self._path, f"the bytes of tensor {name} are missing")
        start, size, _ = self._places[storage.key]
        item = storage.dtype.itemsize
        whole = storage.offset + storage.count
        # What a storage is said to have and what it has must agree, or one of the two is a lie.
        if whole * item > size or (not storage.is_view and whole * item != size):
            raise refused(self._path, f"tensor {name} says its bytes are {whole * item:,}, the file has {size:,}")
        stored = StoredTensor(
            self._path, storage.dtype, tensor.shape, tensor.strides,
            start + (storage.offset + tensor.offset) * item, tensor.extent, self._checksum(storage.key, name),
        )  # fmt: skip
        beyond = tensor.extent > 0 and tensor.offset + tensor.extent > storage.count  # an empty one lies nowhere
        if beyond or stored.count > storage.count:
            raise refused(self._path, f"tensor {name} claims more bytes than it has")
        self._bytes += stored.num_bytes
        if self._bytes > self._limit:
            raise refused(self._path, "its tensors together claim many times the bytes that the file has")
        return stored

    def _checksum(self, key: str, name: str) -> Checksum | None:
        """Return the checksum of a storage, one for all tensors in it."""
        start, size, crc32 = self._places[key]
        if crc32 is None:
            return None
        return self._checksums.setdefault(key, Checksum(name, start, size, crc32))


def _with_tensors(value: object) -> object:
    if isinstance(value, StoredTensor):
        return value.read()
    if isinstance(value, dict):
        return {key: _with_tensors(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        parts = [_with_tensors(part) for part in value]
        return parts if isinstance(value, list) else tuple(parts)
    return value
