"""Files of every make are read to the tensors that torch itself reads, bit for bit."""

import random
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from minigpt4.errors import WeightsError
from minigpt4.weights.files.torch_files import read_torch_file

COUNT = 100
DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool, torch.complex64, torch.complex128,
]  # fmt: skip
SHAPES = [(), (1,), (7,), (3, 4), (2, 3, 5), (0,), (0, 3), (4, 0, 2), (1, 1, 1), (2, 1, 3, 1, 2), (65, 3)]


def drawn(chance: random.Random) -> Tensor:
    """Any tensor: every bit pattern of its type."""
    dtype, shape = chance.choice(DTYPES), chance.choice(SHAPES)
    count = torch.Size(shape).numel()
    if dtype == torch.bool:
        return torch.tensor([chance.random() < 0.5 for _ in range(count)], dtype=dtype).view(shape)
    raw = torch.frombuffer(bytearray(chance.randbytes(count * dtype.itemsize) or b"\0" * dtype.itemsize), dtype=dtype)
    return raw[:count].clone().view(shape)


def view(tensor: Tensor, chance: random.Random) -> Tensor:
    """Some other look at the same bytes."""
    kind = chance.choice(["same", "turned", "rows", "steps", "flat", "one", "none"])
    if kind == "turned":
        return tensor.permute(tuple(reversed(range(tensor.ndim))))
    if kind == "rows" and tensor.ndim and len(tensor) > 1:
        return tensor[1:]
    if kind == "steps" and tensor.ndim:
        return tensor[::2]
    if kind == "flat":
        return tensor.view(-1)
    if kind == "one" and tensor.numel():
        return tensor.view(-1)[-1]
    if kind == "none" and tensor.ndim:
        return tensor[:0]
    return tensor


def content(chance: random.Random) -> dict[Any, Any]:
    """A dictionary of tensors, views of them, parameters, plain values and containers."""
    found: dict[Any, Any] = OrderedDict() if chance.random() < 0.3 else {}
    tensors = [drawn(chance) for _ in range(chance.randrange(1, 5))]
    for number, tensor in enumerate(tensors):
        found[f"layers.{number}.weight"] = tensor
    for number in range(chance.randrange(4)):
        found[f"view{number}"] = view(chance.choice(tensors), chance)
    if chance.random() < 0.3 and tensors[0].is_floating_point():
        found["parameter"] = torch.nn.Parameter(tensors[0], requires_grad=chance.random() < 0.5)
    if chance.random() < 0.4:
        found["plain"] = {"rate": 0.1, "names": ["x", None, True], "sizes": (1, -2, 2**40), 3: -0.0, "none": {}}
        found["shape"], found["dtype"] = torch.Size([2, 3]), torch.float16
    if chance.random() < 0.4:
        nested: dict[Any, Any] = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3)).state_dict()
        return {"model": nested, "optimizer": {"state": {0: {"step": tensors[0]}}, "groups": [{"lr": 1e-4}]}, **found}
    return found


def assert_same(ours: object, theirs: object) -> None:
    """Compare two values: tensors by type, shape and every bit, containers by their content."""
    if isinstance(theirs, Tensor):
        assert isinstance(ours, Tensor)
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
        assert ours.stride() == theirs.stride() or theirs.numel() <= 1  # then it says nothing
        whole = theirs.detach().clone(memory_format=torch.contiguous_format)
        assert torch.equal(ours.contiguous().flatten().view(torch.uint8), whole.flatten().view(torch.uint8))
    elif isinstance(theirs, dict):
        assert isinstance(ours, dict)
        assert list(ours) == list(theirs)
        for key, value in theirs.items():
            assert_same(ours[key], value)
    elif isinstance(theirs, list | tuple):
        assert isinstance(ours, list | tuple)
        for one, other in zip(ours, theirs, strict=True):
            assert_same(one, other)
    else:
        assert ours == theirs


def test_generated_files_are_read_as_torch_reads_them(tmp_path: Path) -> None:
    path = tmp_path / "file.pth"
    for seed in range(COUNT):
        made = content(random.Random(seed))
        torch.save(made, path, _use_new_zipfile_serialization=seed % 3 != 0)
        found = read_torch_file(path)
        assert_same(found, made)
        assert_same(found, torch.load(path, weights_only=True))
        path.unlink()


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (np.float64(0.5), "numpy"),
        (np.arange(3), "numpy"),
        (torch.ones(3).to_sparse(), "objects other than tensors"),
        (torch.ones(2, dtype=torch.complex64).conj(), "conjugate"),
        (torch.ones(2, dtype=torch.complex64).conj().imag, "negative"),
        ({1, 2}, "objects other than tensors"),
        (2 + 1j, "objects other than tensors"),
        (torch.ones(4).to(torch.float8_e4m3fn), "objects other than tensors"),
        (torch.ones(4).expand(100, 4), "claims more bytes than it has"),
        (torch.device("cpu"), None),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("as_archive", [True, False])
def test_what_is_not_read_is_refused_with_its_reason(
    value: object, reason: str | None, as_archive: bool, tmp_path: Path
) -> None:
    torch.save({"good": torch.ones(2), "value": value}, tmp_path / "file.pth",
               _use_new_zipfile_serialization=as_archive)  # fmt: skip
    if reason is None:
        read_torch_file(tmp_path / "file.pth")
        return
    with pytest.raises(WeightsError, match=reason):
        read_torch_file(tmp_path / "file.pth")


def test_archive_of_the_other_byte_order_is_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "little.pth")
    with zipfile.ZipFile(tmp_path / "little.pth") as old, zipfile.ZipFile(tmp_path / "file.pth", "w") as new:
        for member in old.infolist():
            new.writestr(member, b"big" if member.filename.endswith("/byteorder") else old.read(member))

    with pytest.raises(WeightsError, match="big-endian order"):
        read_torch_file(tmp_path / "file.pth")
