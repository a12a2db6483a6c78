"""The one door for tensor files that others wrote: PyTorch's `.pth` and `.bin`.

Nothing else in the package unpickles. A file is opened with `weights_only=True` after its archive was looked at, and
every tensor must own the bytes it claims: a kilobyte can otherwise declare terabytes.
"""

import pickle
import struct
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from minigpt4.errors import WeightsError


def read_torch_file(path: Path) -> dict[str, Any]:
    """Read a PyTorch file of tensors in plain containers, memory-mapped where its format allows.

    Raises:
        WeightsError: Not such a file, a damaged or a hostile one.
    """
    if not path.is_file():
        raise WeightsError(f"{path} is not a file", hint="name the .pth file itself")
    is_archive = zipfile.is_zipfile(path)  # torch before 1.6 wrote a bare pickle, which cannot be mapped
    if is_archive:
        _check_archive(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_archive)
    except pickle.UnpicklingError as error:
        raise _refused(path, "it holds objects other than tensors") from error
    except (RuntimeError, ValueError, EOFError, OSError, LookupError, AttributeError, TypeError, struct.error) as error:
        raise _refused(path, "it cannot be read") from error
    if not isinstance(content, dict):
        raise _refused(path, f"it holds a {type(content).__name__}, expected a dictionary of tensors")
    for name, tensor in _tensors(content, ""):
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise _refused(path, f"tensor {name} claims more bytes than it has")
    return content


def _tensors(value: object, name: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors in nested containers, each with its dotted place."""
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, Mapping | list | tuple):
        for key, part in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from _tensors(part, f"{name}.{key}" if name else str(key))


def _check_archive(path: Path) -> None:
    """Look at the zip directory: stored members only, no name twice, sizes within the file."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except zipfile.BadZipFile as error:
        raise _refused(path, "its archive is damaged") from error
    names = [member.filename for member in members]
    if len(set(names)) != len(names):
        raise _refused(path, "its archive has two members of one name")
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise _refused(path, "its archive has compressed members, which torch never writes")
    if sum(member.file_size for member in members) > path.stat().st_size:
        raise _refused(path, "its archive declares more bytes than the file has")


def _refused(path: Path, why: str) -> WeightsError:
    return WeightsError(f"{path.name} was not opened: {why}", hint="download the file again from its publisher")
