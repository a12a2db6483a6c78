"""Whether a model will run here: the machine, the installation, the memory it needs, and the sanity of its weights.

Everything is found out before a model is loaded. Returns what was found; prints nothing.
"""

import os
import platform
import re
import shutil
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]  # comes with accelerate
import torch
from packaging.requirements import Requirement

from minigpt4 import __version__
from minigpt4.errors import ConfigError, MiniGPT4Error, StorageError, WeightsError
from minigpt4.text import gigabytes_text
from minigpt4.weights import nano
from minigpt4.weights.checking.memory import DEFAULT_CONTEXT, Described, Need, Placement, describe, need
from minigpt4.weights.checking.sanity import SMALL_MODEL_BYTES, Sanity, check_language_model
from minigpt4.weights.files.disk import make_folder, scratch_folder
from minigpt4.weights.folder import placement, quantization
from minigpt4.weights.parts import home

NANO_DISK_BYTES = 800_000_000
"""Measured: nano's two parts as they come, the language model converted, and the folder that joins them."""

ADVICE = (
    "choose --dtype bfloat16, or on a GPU --quantize nf4; lower --num-beams or --context; or use a smaller model (-m "
    "nano) and close other programs"
)

CGROUP = Path("/sys/fs/cgroup")
_CGROUP_FILES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
)
_NO_LIMIT = 2**60
"""A cgroup of the first version writes a number above this where there is no limit."""


@dataclass(frozen=True)
class Device:
    """Something a model can run on: what `--device` takes, its maker's name, and its bytes of memory."""

    name: str
    description: str
    free: int
    total: int


@dataclass(frozen=True)
class Library:
    """A library that the package needs: the version installed, if any, and the range the package promises."""

    name: str
    version: str | None
    promised: str
    fits: bool


@dataclass(frozen=True)
class Cache:
    """The folder for what is fetched and converted, the bytes free there, and why it cannot be written, if so."""

    folder: Path
    free: int
    problem: str = ""


@dataclass
class CheckUp:
    """What was found out.

    Args:
        devices: What a model can run on here, the CPU first.
        libraries: What the package needs, and whether it is the right version.
        cache: The folder for what is fetched and converted.
        model: The model asked about; None where there is no such model.
        placement: Where and how it is to run; None where that is not possible.
        need: What the placement takes.
        sanity: Of the language model's weights; None where they were not looked at.
        notes: Sentences about what was left out, and why.
        problems: Why the model will not run here; the first is the one to mend first.
    """

    devices: list[Device]
    libraries: list[Library]
    cache: Cache
    model: Described | None = None
    placement: Placement | None = None
    need: Need | None = None
    sanity: Sanity | None = None
    notes: list[str] = field(default_factory=list)
    problems: list[MiniGPT4Error] = field(default_factory=list)

    @property
    def free(self) -> dict[str, int]:
        """Bytes of memory that are free, by device."""
        return {device.name: device.free for device in self.devices}

    def as_dict(self) -> dict[str, Any]:
        """Return it ready for JSON."""
        model = self.model and {"name": self.model.name, "kind": self.model.kind, **vars(self.model.size)}
        needed = self.need and {
            "on_device": self.need.on_device, "total": self.need.total, "loading": self.need.loading
        }  # fmt: skip
        return {
            "version": __version__,
            "python": platform.python_version(),
            "system": platform.platform(),
            "cores": cores(),
            "devices": [vars(device) for device in self.devices],
            "libraries": [vars(library) for library in self.libraries],
            "cache": {**vars(self.cache), "folder": str(self.cache.folder)},
            "model": model,
            "placement": self.placement and vars(self.placement),
            "need": needed,
            "weights": self.sanity and vars(self.sanity),
            "notes": self.notes,
            "problems": [{"message": problem.message, "hint": problem.hint} for problem in self.problems],
        }


def check_up(
    name: str = "nano",
    *,
    device: str = "auto",
    dtype: str = "auto",
    quantize: str = "none",
    num_beams: int = 1,
    context: int | None = None,
    check_weights: bool | None = None,
) -> CheckUp:
    """Find out whether a model will run here.

    Args:
        name: As `folder.load` takes it; or a language model's folder, for a look at its weights.
        device: As there.
        dtype: As there.
        quantize: As there.
        num_beams: Answers followed at once.
        context: Tokens of the conversation and the answer together; default 2048, or what the model reads if less.
        check_weights: Whether to look at the language model's numbers; default for weights up to a gigabyte.
    """
    found = CheckUp(devices(), libraries(), cache_folder(home()))
    _check_installation(found)
    try:
        found.model = describe(name)
        _check_disk(found, found.model)
        found.placement = _placement(found.model, device, dtype, quantize, num_beams, context)
        found.need = need(found.model.size, found.placement)
        _check_memory(found, found.need, found.placement.device)
    except MiniGPT4Error as error:
        found.problems.append(error)
    if found.model is not None and check_weights is not False:
        _check_weights(found, found.model, asked=check_weights is True)
    return found


def _check_installation(found: CheckUp) -> None:
    for library in found.libraries:
        if not library.fits:
            what = f"is version {library.version}" if library.version else "is not installed"
            message = f"{library.name} {what}, minigpt4 {__version__} works with {library.promised}"
            found.problems.append(ConfigError(message, "pip install --upgrade minigpt4"))
    if not found.libraries:
        found.notes.append("minigpt4 runs from its source and is not installed: versions were not compared")
    if found.cache.problem:
        hint = "allow writing there, or set MINIGPT4_HOME to another folder"
        found.problems.append(StorageError(found.cache.problem, hint))


def _check_disk(found: CheckUp, model: Described) -> None:
    """Compare the room that nano's parts need with what is free, if they are not here."""
    if model.kind not in ("nano", "alignment") or found.cache.problem or _language_model_folder(model) is not None:
        return
    if found.cache.free < NANO_DISK_BYTES:
        message = (
            f"nano's parts take {gigabytes_text(NANO_DISK_BYTES)} on disk, {gigabytes_text(found.cache.free)} are "
            f"free in {found.cache.folder}"
        )
        hint = "free some space there, or set MINIGPT4_HOME to another folder"
        found.problems.append(StorageError(message, hint))


def _placement(
    model: Described, device: str, dtype: str, quantize: str, num_beams: int, context: int | None
) -> Placement:
    """Turn what was asked for into a placement.

    Raises:
        ConfigError: The device, the number type or the quantization does not exist here, or the model reads less.
    """
    chosen, numbers = placement(device, dtype)
    quantization(quantize, chosen)
    most = model.size.max_context
    if context is not None and most is not None and context > most:
        raise ConfigError(
            f"a context of {context} tokens was asked for, the language model reads {most}", f"use --context {most}"
        )
    name = chosen.type if chosen.type != "cuda" else f"cuda:{chosen.index or 0}"
    length = context or min(DEFAULT_CONTEXT, most or DEFAULT_CONTEXT)
    return Placement(name, str(numbers).removeprefix("torch."), quantize, num_beams, length)


def _check_memory(found: CheckUp, needed: Need, device: str) -> None:
    name, free, own = found.model.name if found.model else "", found.free[device], found.free["cpu"]
    if needed.total > free:
        what = f"{gigabytes_text(needed.total)} of memory on {device}, {gigabytes_text(free)} are free"
        raise ConfigError(f"{name} needs {what}", ADVICE)
    if needed.loading > own:
        what = f"{gigabytes_text(needed.loading)} of the computer's memory while it is loaded"
        raise ConfigError(f"{name} needs {what}, {gigabytes_text(own)} are free", ADVICE)


def _check_weights(found: CheckUp, model: Described, *, asked: bool) -> None:
    folder = _language_model_folder(model)
    if folder is None:
        found.notes.append("the language model has not been fetched yet: there are no weights to look at")
        return
    size = sum(file.stat().st_size for file in folder.iterdir() if file.suffix in (".safetensors", ".bin", ".pth"))
    if size > SMALL_MODEL_BYTES and not asked:
        found.notes.append(f"the weights ({gigabytes_text(size)}) were not looked at; --check-weights reads them once")
        return
    try:
        found.sanity = check_language_model(folder)
    except MiniGPT4Error as error:
        found.problems.append(error)
        return
    if found.sanity.problem:
        found.problems.append(WeightsError(f"{folder}: {found.sanity.problem}", found.sanity.hint))


def _language_model_folder(model: Described) -> Path | None:
    """Return the folder with the language model's weights; None where it has not been made yet."""
    if model.kind in ("full", "language model"):
        return model.folder
    folder = home() / "models" / f"language-model-{nano.version()}"
    return folder if folder.is_dir() else None


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def devices() -> list[Device]:
    """List what a model can run on here: the CPU first, then accelerators."""
    free, total = memory()
    found = [Device("cpu", _processor(), free, total)]
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            name = torch.cuda.get_device_name(number)
            found.append(Device(f"cuda:{number}", name, *torch.cuda.mem_get_info(number)))
    if torch.backends.mps.is_available():
        found.append(Device("mps", "Apple graphics, with the computer's own memory", free, total))
    return found


def _processor() -> str:
    named = re.search(r"^model name\s*:\s*(.+)$", _text(Path("/proc/cpuinfo")), re.MULTILINE)
    return named[1].strip() if named else platform.processor() or platform.machine()


def memory(cgroup: Path = CGROUP) -> tuple[int, int]:
    """Return the bytes of memory that are free and that there are, within the limit of a container.

    psutil tells the machine's alone. `cgroup` is where the system shows the limits of control groups.
    """
    system = psutil.virtual_memory()
    free, total = int(system.available), int(system.total)
    for limit_file, used_file, cached in _CGROUP_FILES:
        limit, used = (_text(cgroup / name).strip() for name in (limit_file, used_file))
        if limit.isdecimal() and used.isdecimal() and int(limit) < _NO_LIMIT:
            statistics = _text((cgroup / used_file).parent / "memory.stat")
            reclaimable = re.search(rf"^{cached} (\d+)$", statistics, re.MULTILINE)
            left = int(limit) - int(used) + (int(reclaimable[1]) if reclaimable else 0)
            free, total = min(free, max(0, left)), min(total, int(limit))
    return free, total


def _text(path: Path) -> str:
    """Read a file of the system; nothing where there is no such file."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def libraries() -> list[Library]:
    """List the libraries that this package promises to work with, and those of its extras that are installed.

    A copy of the source that is not installed promises nothing here: the list is then empty.
    """
    try:
        promised = metadata.requires("minigpt4") or []
    except metadata.PackageNotFoundError:
        return []
    found: dict[str, Library] = {}
    for requirement in map(Requirement, promised):
        try:
            version: str | None = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            version = None
        optional = requirement.marker is not None and "extra" in str(requirement.marker)
        if optional and (version is None or "test" in str(requirement.marker) or requirement.name in found):
            continue
        fits = version is not None and requirement.specifier.contains(version, prereleases=True)
        found[requirement.name] = Library(requirement.name, version, str(requirement.specifier), fits)
    return sorted(found.values(), key=lambda library: library.name)


def cache_folder(folder: Path) -> Cache:
    """Tell whether the cache folder can be written and how much is free there; makes it where it is missing."""
    try:
        make_folder(folder)
        with scratch_folder(folder):
            return Cache(folder, shutil.disk_usage(folder).free)
    except StorageError as error:
        return Cache(folder, 0, error.message)
