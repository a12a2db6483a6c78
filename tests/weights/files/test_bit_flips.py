"""One flipped bit in a file that others wrote: an error where the format has a checksum, and never a traceback.

Archives have one of every member. Safetensors files and bare pickles have none: there a bit in the numbers is another
number, and a bit in the lists is mostly an error.
"""

import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from minigpt4.errors import WeightsError
from minigpt4.weights.files.model_writer import Entry, write_torch_archive
from minigpt4.weights.files.tensor_files import TensorFiles, open_tensors

WHOLE = torch.arange(40.0)
TENSORS: dict[str, Tensor] = {
    "matrix": torch.arange(60.0).view(6, 10),
    "half": torch.linspace(-1, 1, 33).to(torch.bfloat16),
    "number": torch.tensor(7),
    "empty": torch.empty(0, 5),
    "whole": WHOLE,
    "part": WHOLE[3:11],
    "turned": WHOLE.view(8, 5).T,
}


def archive(path: Path) -> None:
    torch.save({"model": TENSORS, "epoch": 3}, path)


def our_archive(path: Path) -> None:
    own = {name: TENSORS[name] for name in ("matrix", "half", "number", "empty")}
    entries = [Entry(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in own.items()]
    write_torch_archive(path, entries, lambda entry: [own[entry.name].flatten()])


def bare(path: Path) -> None:
    torch.save(TENSORS, path, _use_new_zipfile_serialization=False)


def safetensors(path: Path) -> None:
    save_file({name: tensor.clone().contiguous() for name, tensor in TENSORS.items()}, path)


MAKERS: dict[str, tuple[Callable[[Path], None], str]] = {
    "archive": (archive, "pth"),
    "our archive": (our_archive, "bin"),
    "bare": (bare, "pth"),
    "safetensors": (safetensors, "safetensors"),
}
WITH_CHECKSUMS = ("archive", "our archive")


def flipped(path: Path, seed: int, step: int = 1) -> Iterator[int]:
    """Flip one bit of each byte in turn, or of each `step`th; yield the byte's place while the file is so."""
    content = path.read_bytes()
    chance = random.Random(seed)
    with path.open("r+b", buffering=0) as file:
        for place in range(seed % step, len(content), step):
            byte = content[place]
            file.seek(place)
            file.write(bytes([byte ^ 1 << chance.randrange(8)]))
            yield place
            file.seek(place)
            file.write(bytes([byte]))


def read_mapped(files: TensorFiles, name: str) -> Tensor:
    return files.read(name)


def read_in_pieces(files: TensorFiles, name: str) -> Tensor:
    pieces = [piece.clone() for piece in files.stored(name).pieces(16)]
    return torch.cat(pieces).view(files.shape(name)) if pieces else torch.empty(files.shape(name))


def bits(tensor: Tensor) -> tuple[torch.dtype, list[int]]:
    return tensor.dtype, tensor.contiguous().flatten().view(torch.uint8).tolist()


def check_one_sentence(error: WeightsError, path: Path) -> None:
    assert path.name in error.message
    assert "\n" not in error.message
    assert len(error.message) < 300
    assert error.hint


@pytest.mark.parametrize("step", [5, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("read", [read_mapped, read_in_pieces])
@pytest.mark.parametrize("kind", WITH_CHECKSUMS)
def test_bit_flipped_anywhere_in_an_archive_never_gives_other_tensors(
    kind: str, read: Callable[[TensorFiles, str], Tensor], step: int, tmp_path: Path
) -> None:
    make, suffix = MAKERS[kind]
    path = tmp_path / f"file.{suffix}"
    make(path)
    sound = {name: bits(read(open_tensors(path), name)) for name in open_tensors(path)}
    refused = 0
    for place in flipped(path, 1, step):
        try:
            files = open_tensors(path)
            found = {name: bits(read(files, name)) for name in files}
        except WeightsError as error:
            check_one_sentence(error, path)
            refused += 1
        else:
            assert found == sound, place
    assert refused * step > 500


@pytest.mark.parametrize("read", [read_mapped, read_in_pieces])
@pytest.mark.parametrize("kind", WITH_CHECKSUMS)
def test_bit_flipped_in_a_tensor_of_an_archive_is_an_error_that_names_file_and_tensor(
    kind: str, read: Callable[[TensorFiles, str], Tensor], tmp_path: Path
) -> None:
    make, suffix = MAKERS[kind]
    path = tmp_path / f"file.{suffix}"
    make(path)
    stored = open_tensors(path).stored("matrix")
    inside = range(stored.start, stored.start + stored.num_bytes)
    for place in flipped(path, seed=2):
        if place in inside:
            files = open_tensors(path)  # the lists are sound
            with pytest.raises(WeightsError, match=r"the tensor (model\.)?matrix in .*file.*checksum"):
                read(files, "matrix")
            read(files, "half")  # the others are too


def test_bit_outside_a_tensor_but_in_its_storage_counts(tmp_path: Path) -> None:
    archive(tmp_path / "file.pth")
    content = bytearray((tmp_path / "file.pth").read_bytes())
    content[open_tensors(tmp_path / "file.pth").stored("whole").start + 39 * 4] ^= 1
    (tmp_path / "file.pth").write_bytes(content)

    with pytest.raises(WeightsError, match=r"whole in .*file\.pth is damaged"):
        open_tensors(tmp_path / "file.pth").read("part")


def test_checksum_is_compared_before_the_last_piece(tmp_path: Path) -> None:
    archive(tmp_path / "file.pth")
    stored = open_tensors(tmp_path / "file.pth").stored("matrix")
    content = bytearray((tmp_path / "file.pth").read_bytes())
    content[stored.start] ^= 1
    (tmp_path / "file.pth").write_bytes(content)

    pieces = stored.pieces(100)
    given = 0
    with pytest.raises(WeightsError, match="damaged"):
        for piece in pieces:
            given += len(piece)
    assert given < stored.count


def test_archive_written_without_checksums_is_read(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        archive(tmp_path / "file.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    files = open_tensors(tmp_path / "file.pth")
    assert all(bits(files.read(name)) == bits(tensor) for name, tensor in TENSORS.items())


@pytest.mark.parametrize("kind", ["bare", "safetensors"])
def test_bit_flipped_in_a_file_without_checksums_is_an_error_or_another_number(kind: str, tmp_path: Path) -> None:
    make, suffix = MAKERS[kind]
    path = tmp_path / f"file.{suffix}"
    make(path)
    files = open_tensors(path)
    sound = {name: bits(files.read(name)) for name in files}
    first = min(files.stored(name).start for name in files)
    numbers = errors = 0
    for place in flipped(path, seed=3):
        try:
            files = open_tensors(path)
            found = {name: bits(files.read(name)) for name in files}
        except WeightsError as error:
            check_one_sentence(error, path)
            errors += 1
        else:
            if kind == "safetensors" and place >= first:  # behind the header there are numbers only
                changed = [name for name in sound if found[name] != sound[name]]
                assert len(changed) == 1
                (before, after) = (sound[changed[0]][1], found[changed[0]][1])
                assert sum(one != other for one, other in zip(before, after, strict=True)) == 1
                numbers += 1
    assert errors > 100
    assert kind == "bare" or numbers == path.stat().st_size - first


def test_flipped_number_that_is_not_finite_is_still_there_for_the_sanity_check(tmp_path: Path) -> None:
    save_file({"weight": torch.ones(8)}, tmp_path / "file.safetensors")
    content = bytearray((tmp_path / "file.safetensors").read_bytes())
    content[-1] ^= 0x40  # 1.0 becomes infinity
    (tmp_path / "file.safetensors").write_bytes(content)

    assert math.isinf(open_tensors(tmp_path / "file.safetensors").read("weight")[-1])
