"""Hostile tensor files: none of their code runs, memory and time stay bounded, and one sentence says what is wrong."""

import pickle
import random
import re
import struct
import zipfile
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save as save_safetensors

from tests.weights.files.hostile_files import (
    STORAGE,
    Maker,
    archive,
    bare,
    changed,
    entry,
    named,
    open_apart,
    plain,
    program,
    safetensors,
    tensor,
)

SECONDS = 5.0
"""Of the processor, for a file of any kind; reached: below 3."""

SOUND: dict[str, Maker] = {
    "sound-archive.pth": lambda: archive(named(tensor())),
    "sound-bare.pth": lambda: bare(named(tensor(bare=True))),
    "sound.safetensors": lambda: safetensors({"a": entry()}),
}

CALL = b"cos\nsystem\n(" + plain("touch ran") + b"tR"
DEEP = 100_000
OBJECTS = "objects other than tensors"
DAMAGED = "damaged|cut short"
HARMLESS = ""

CODE: dict[str, tuple[bytes, str]] = {
    "global-reduce": (CALL, r"os\.system"),
    "stack-global": (plain("builtins") + plain("eval") + b"\x93(" + plain("1") + b"tR", OBJECTS),
    "inst": (b"(" + plain("touch ran") + b"ios\nsystem\n", r"os\.system"),
    "obj": (b"(cos\nsystem\n" + plain("touch ran") + b"o", r"os\.system"),
    "newobj": (b"cbuiltins\nexec\n(" + plain("1") + b"t\x81", r"builtins\.exec"),
    "newobj-ex": (b"ccollections\nOrderedDict\n)}\x92", OBJECTS),
    "newobj-of-a-known-name": (b"ccollections\nOrderedDict\n)\x81", HARMLESS),
    "extension": (b"\x82\x01", OBJECTS),
    "old-persistent-id": (b"Pos.system\n", OBJECTS),
    "set": (b"\x8f", OBJECTS),
    "getattr": (b"cbuiltins\ngetattr\n(" + plain("a") + plain("b") + b"tR", r"builtins\.getattr"),
    "name-with-spaces": (b"cos system\nsystem\n)R", OBJECTS),
    "name-in-a-module": (b"ctorch.hub\nload\n(" + plain("a/b") + plain("c") + b"tR", r"torch\.hub\.load"),
    "load-in-a-load": (b"ctorch\nload\n(" + plain("/etc/passwd") + b"tR", r"torch\.load"),
    "numpy-scalar": (b"cnumpy.core.multiarray\nscalar\n)R", "numpy"),
    "name-as-a-value": (b"cos\nsystem\n", r"os\.system"),
    "known-name-as-a-value": (b"ccollections\nOrderedDict\n", OBJECTS),
    "state-of-a-name": (b"ccollections\nOrderedDict\n" + plain({"a": 1}) + b"b", OBJECTS),
    "object-as-storage-type": (tensor(storage=b"cos\nsystem\n"), r"os\.system"),
}

LIES: dict[str, tuple[bytes, str]] = {
    "expands-to-terabytes": (tensor(shape=(10**9, 1000), strides=(0, 0)), "claims more bytes than it has"),
    "one-row-a-million-times": (tensor(shape=(10**6, 4), strides=(0, 1)), "claims more bytes than it has"),
    "product-overflows": (tensor(shape=(2**40, 2**40), strides=(0, 0)), "damaged|claims more"),
    "empty-with-a-huge-side": (tensor(shape=(0, 2**40), strides=(2**40, 1)), ""),
    "shape-beyond-a-word": (tensor(shape=(2**63,), strides=(0,)), "damaged|claims more"),
    "negative-side": (tensor(shape=(-1,)), "damaged|claims more"),
    "negative-stride": (tensor(shape=(4,), strides=(-1,), offset=3), "damaged|claims more"),
    "negative-offset": (tensor(offset=-4), "damaged|claims more"),
    "offset-beyond": (tensor(offset=2**40), "claims more bytes than it has"),
    "stride-beyond": (tensor(shape=(2, 2), strides=(2**40, 1)), "claims more bytes than it has"),
    "truth-for-a-size": (tensor(shape=(True,)), "damaged|claims more"),
    "fraction-for-a-size": (tensor(shape=(4.0,)), "damaged|claims more"),
    "more-strides-than-sides": (tensor(strides=(1, 1)), "damaged"),
    "hundred-sides": (tensor(shape=(1,) * 100, strides=(1,) * 100), HARMLESS),
    "storage-larger-than-its-bytes": (tensor(count=10**12), HARMLESS),
    "storage-smaller-than-its-bytes": (tensor(count=1, shape=(1,)), HARMLESS),
    "storage-without-bytes": (tensor(key="9"), DAMAGED),
    "storage-outside": (tensor(key="../../0"), DAMAGED),
    "type-larger-than-its-bytes": (tensor(storage=b"ctorch\nComplexDoubleStorage\n"), "claims more"),
}

BOMBS: dict[str, tuple[bytes, str]] = {
    "lists-of-lists-of-lists": (
        b"]q\x09" + b"".join(b"0(" + b"h\x09" * 10 + b"lq\x09" for _ in range(40)),
        OBJECTS,
    ),
    "contains-itself": (b"}q\x09" + plain("me") + b"h\x09s", "without end"),
    "nested-deeply": (b"]" * DEEP + b"a" * (DEEP - 1), "without end"),
    "tuples-nested-deeply": (b")" + b"\x85" * DEEP, "without end"),
    "tuple-nest-for-a-key": (b"})" + b"q\x09h\x09h\x09\x87" * 60 + b"Ns", "without end"),
    "number-of-a-million-digits": (b"I" + b"9" * 10**6 + b"\n", "damaged"),
    "text-longer-than-the-file": (b"X" + struct.pack("<I", 2**31) + b"a", "damaged"),
    "text-longer-than-memory": (b"\x8d" + struct.pack("<Q", 2**62) + b"a", "damaged"),
    "bytes-longer-than-memory": (b"\x8e" + struct.pack("<Q", 2**62) + b"a", "damaged"),
    "number-longer-than-memory": (b"\x8b" + struct.pack("<i", 2**31 - 1) + b"a", "damaged"),
    "memo-far-away": (b"Nr" + struct.pack("<I", 2**32 - 1), "OK"),
    "long-names-of-many-values": (
        b"}" + plain("n" * 10**6) + b"](" + b"N" * 300_000 + b"es",
        "without end",
    ),
    "instructions-without-end": (b"N0" * 2_000_000 + b"N", "more entries than any checkpoint"),
    "nothing-on-the-stack": (b"0000", "damaged"),
    "mark-without-an-end": (b"(" * 1000, "damaged"),
    "unknown-instruction": (b"\xff", "damaged"),
    "memo-of-nothing": (b"h\x07", "damaged"),
    "call-without-arguments": (b"ccollections\nOrderedDict\nR", OBJECTS),
    "wrong-arguments": (b"ccollections\nOrderedDict\n(" + plain(1) + plain(2) + b"tR", "damaged"),
    "tensor-of-no-storage": (b"ctorch._utils\n_rebuild_tensor_v2\n(NNNNtR", "damaged"),
}

ARCHIVES: dict[str, tuple[Maker, str]] = {
    "compressed": (lambda: archive(named(tensor()), compression=zipfile.ZIP_DEFLATED), "compressed members"),
    "compressed-bomb": (
        lambda: archive(named(tensor()), {"a/data/0": b"\0" * 2**26}, compression=zipfile.ZIP_DEFLATED),
        "compressed members",
    ),
    "leads-outside": (lambda: archive(named(tensor()), {"a/data/0": STORAGE, "../x": b""}), DAMAGED),
    "absolute": (lambda: archive(named(tensor()), {"a/data/0": STORAGE, "/etc/x": b""}), DAMAGED),
    "two-pickles": (lambda: archive(named(tensor()), {"a/data/0": STORAGE, "a/b/data.pkl": b""}), "not of tensors"),
    "no-pickle": (lambda: archive(named(tensor()), pickle_name="a/other"), "not of tensors"),
    "script": (lambda: archive(named(tensor()), {"a/data/0": STORAGE, "a/constants.pkl": b""}), "TorchScript"),
    "big-endian": (lambda: archive(named(tensor()), {"a/data/0": STORAGE, "a/byteorder": b"big"}), "big-endian"),
    "encrypted": (
        lambda: changed(archive(named(tensor())), b"PK\x01\x02", 8, b"\x01"),
        "compressed members, which torch never writes",
    ),
    "size-lie": (
        lambda: changed(archive(named(tensor())), b"PK\x01\x02", 20, struct.pack("<II", 10**9, 10**9), last=True),
        "more bytes than the file has",
    ),
    "size-lie-within": (
        lambda: changed(archive(named(tensor())), b"PK\x01\x02", 20, struct.pack("<II", 70, 70), last=True),
        DAMAGED,
    ),
    "two-entries-for-one-member": (
        lambda: changed(archive(named(tensor())), b"PK\x01\x02", 42, struct.pack("<I", 0), last=True),
        DAMAGED,
    ),
    "other-name-inside": (
        lambda: changed(archive(named(tensor())), b"a/data/0", 0, b"a/data/1"),
        HARMLESS,
    ),
    "directory-elsewhere": (
        lambda: changed(archive(named(tensor())), b"PK\x05\x06", 16, struct.pack("<I", 2**31)),
        DAMAGED,
    ),
    "directory-without-end": (
        lambda: b"PK\x01\x02" + b"\0" * 42 + archive(named(tensor())) + b"PK\x05\x06" + b"\0" * 18,
        "neither an archive",
    ),
    "many-views-of-one": (
        lambda: archive(named(*[tensor(count=2**18, shape=(2**18,)) for _ in range(100)]), {"a/data/0": b"\0" * 2**20}),
        "claim many times the bytes",
    ),
    "members-without-end": (
        lambda: (
            archive(named(tensor()))
            + b"PK\x01\x02".ljust(46, b"\0") * 400_000
            + b"PK\x05\x06"
            + struct.pack("<HHHHIIH", 0, 0, 0xFFFF, 0xFFFF, 46 * 400_000, 0, 0)
        ),
        "more members than any checkpoint",
    ),
    "tar": (lambda: b"storages\0".ljust(512, b"\0") + b"\0" * 1024, "neither an archive nor a pickle"),
}

BARE: dict[str, tuple[Maker, str]] = {
    "code": (lambda: bare(program(CALL)), r"os\.system"),
    "code-in-the-list-of-storages": (
        lambda: bare(named(tensor(bare=True)))[:-24] .replace(pickle.dumps(["0"], protocol=2), program(CALL)),
        r"os\.system",
    ),
    "another-magic": (lambda: pickle.dumps(1, protocol=2) * 5, DAMAGED),
    "count-lie": (lambda: bare(named(tensor(bare=True)), counts={"0": 2**60}), "cut short"),
    "count-overflows": (lambda: bare(named(tensor(bare=True)), counts={"0": 2**64 - 1}), "cut short"),
    "storage-twice": (
        lambda: bare(named(tensor(bare=True))).replace(
            pickle.dumps(["0"], protocol=2), pickle.dumps(["0", "0"], protocol=2)
        ),
        DAMAGED,
    ),
    "unlisted-storage": (lambda: bare(named(tensor(bare=True)), {}), HARMLESS),
    "tail": (lambda: bare(named(tensor(bare=True))) + b"\0", HARMLESS),
    "expands": (lambda: bare(named(tensor(bare=True, shape=(10**9, 9), strides=(0, 0)))), "claims more bytes"),
    "view-beyond": (
        lambda: bare(
            named(
                b"ctorch._utils\n_rebuild_tensor_v2\n(("
                + plain("storage") + b"ctorch\nFloatStorage\n" + plain("0") + plain("cpu") + plain(4)
                + plain(("view", 2**40, 4)) + b"tQ" + plain(0) + plain((4,)) + plain((1,))
                + b"\x89ccollections\nOrderedDict\n)RtR"
            )
        ),
        DAMAGED,
    ),
}  # fmt: skip

SAFETENSORS: dict[str, tuple[Maker, str]] = {
    "header-longer-than-the-file": (lambda: safetensors({"a": entry()}, length=2**40), "no safetensors file"),
    "header-longer-than-a-word": (lambda: safetensors({"a": entry()}, length=2**64 - 1), "no safetensors file"),
    "no-header": (lambda: b"\0" * 8, "no safetensors file"),
    "three-bytes": (lambda: b"\0\0\0", "no safetensors file"),
    "not-json": (lambda: safetensors(b"{" + b"x" * 100), "no safetensors file"),
    "not-text": (lambda: safetensors(b"\xff\xfe" * 50), "no safetensors file"),
    "list": (lambda: safetensors([]), "no safetensors file"),
    "nested-deeply": (lambda: safetensors(b"[" * DEEP), "no safetensors file"),
    "key-twice": (
        lambda: safetensors(f'{{"a": {plain_json()}, "a": {plain_json()}}}'.encode()),
        HARMLESS,
    ),
    "notes-that-are-none": (lambda: safetensors({"__metadata__": {"a": 1}, "a": entry()}), "no safetensors file"),
    "unknown-type": (lambda: safetensors({"a": entry(dtype="F33")}), "no safetensors file"),
    "type-that-is-a-list": (lambda: safetensors({"a": entry(dtype=[])}), "no safetensors file"),
    "product-overflows": (lambda: safetensors({"a": entry(shape=(2**40, 2**40))}), "no safetensors file"),
    "negative-side": (lambda: safetensors({"a": entry(shape=(-4,))}), "no safetensors file"),
    "truth-for-a-side": (lambda: safetensors({"a": entry(shape=(True, 4))}), "no safetensors file"),
    "fraction-for-a-side": (lambda: safetensors({"a": entry(shape=(4.0,))}), "no safetensors file"),
    "backwards": (lambda: safetensors({"a": entry(offsets=(16, 0))}), "no safetensors file"),
    "three-offsets": (lambda: safetensors({"a": entry(offsets=(0, 16, 32))}), "no safetensors file"),
    "beyond-the-end": (lambda: safetensors({"a": entry((2**40,), (0, 2**42))}), "no safetensors file"),
    "over-each-other": (lambda: safetensors({"a": entry(), "b": entry()}), "no safetensors file"),
    "with-a-hole": (lambda: safetensors({"a": entry(offsets=(16, 32))}, b"\0" * 32), "no safetensors file"),
    "with-a-tail": (lambda: safetensors({"a": entry()}, b"\0" * 32), "no safetensors file"),
    "extra-key": (lambda: safetensors({"a": {**entry(), "x": 1}}), HARMLESS),
    "not-a-number": (lambda: safetensors(b'{"a": NaN}'), "no safetensors file"),
}


def plain_json() -> str:
    return '{"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}'


def hostile() -> dict[str, tuple[Maker, str]]:
    """Every file by name, and what must be said of it."""
    files: dict[str, tuple[Maker, str]] = {}
    for kind, cases in (("code", CODE), ("lie", LIES), ("bomb", BOMBS)):
        for name, (value, said) in cases.items():
            files[f"{kind}-{name}.pth"] = partial(archive, named(value)), said
    for kind, makers, suffix in (
        ("archive", ARCHIVES, "pth"),
        ("bare", BARE, "pth"),
        ("st", SAFETENSORS, "safetensors"),
    ):
        files |= {f"{kind}-{name}.{suffix}": case for name, case in makers.items()}
    return files


HOSTILE = hostile()


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What became of every file, opened in one process that was watched."""
    folder = tmp_path_factory.mktemp("hostile")
    for name, make in [*SOUND.items(), *((name, make) for name, (make, _) in HOSTILE.items())]:
        (folder / name).write_bytes(make())
    found = open_apart(folder)
    assert sorted(path.name for path in folder.iterdir()) == sorted(found)
    return found


@pytest.mark.parametrize("name", SOUND)
def test_sound_file_of_the_same_make_is_read(name: str, reports: dict[str, dict[str, Any]]) -> None:
    assert (reports[name]["kind"], reports[name]["said"]) == ("opened", "1 tensors")


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_file_is_refused_or_harmless(name: str, reports: dict[str, dict[str, Any]]) -> None:
    report = reports[name]
    assert report["events"] == []
    assert report["seconds"] < SECONDS
    expected = HOSTILE[name][1]
    if report["kind"] == "opened":
        assert expected in ("", "OK"), "it was opened"
        return
    assert report["kind"] == "refused", report
    assert name in report["said"]
    assert report["hint"]
    assert len(report["said"]) < 300
    assert "\n" not in report["said"]
    assert re.search(expected, report["said"]), report["said"]


def mutants(content: bytes, count: int, seed: int) -> list[bytes]:
    """The content with a few bits flipped, or cut, or a stretch of it moved."""
    chance = random.Random(seed)
    found = []
    for number in range(count):
        changed_bytes = bytearray(content)
        if number % 3 == 0:
            found.append(bytes(changed_bytes[: chance.randrange(len(content))]))
            continue
        if number % 3 == 1:
            for _ in range(chance.choice([1, 1, 2, 8, 64])):
                changed_bytes[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        else:
            start, end = sorted(chance.sample(range(len(content)), 2))
            changed_bytes[start:end] = bytes(chance.randrange(256) for _ in range(min(end - start, 40)))
        found.append(bytes(changed_bytes))
    return found


def test_damaged_files_of_every_kind_are_refused_or_read_and_nothing_else(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}
    whole = {"archive.pth": b"", "bare.pth": b"", "file.safetensors": save_safetensors(tensors)}
    for name in ("archive.pth", "bare.pth"):
        content = {"model": tensors, "config": {"rate": 0.1, "names": ["x", None]}, "epoch": 3}
        torch.save(content, tmp_path / name, _use_new_zipfile_serialization=name == "archive.pth")
        whole[name] = (tmp_path / name).read_bytes()
        (tmp_path / name).rename(tmp_path / f"sound-{name}")
    (tmp_path / "sound.safetensors").write_bytes(whole["file.safetensors"])
    for name, content_bytes in whole.items():
        for number, mutant in enumerate(mutants(content_bytes, 150, seed=len(name))):
            (tmp_path / f"{number:03}-{name}").write_bytes(mutant)

    found = open_apart(tmp_path)

    assert len(found) == 453
    assert {report["kind"] for report in found.values()} == {"opened", "refused"}
    assert all(report["events"] == [] and report["seconds"] < SECONDS for report in found.values())
    assert sum(report["kind"] == "refused" for report in found.values()) > 250  # the others have another number in them
