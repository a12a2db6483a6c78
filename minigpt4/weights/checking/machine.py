"""The machine and the installation: processors, memory that is free, devices, versions, the cache folder.

Knows no model.
"""

import os
import platform
import re
import shutil
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import psutil  # type: ignore[import-untyped]  # comes with accelerate
import torch
from packaging.requirements import InvalidRequirement, Requirement

from minigpt4.errors import StorageError
from minigpt4.weights.files.disk import make_folder, scratch_folder

PACKAGE = "minigpt4"
CGROUP = Path("/sys/fs/cgroup")
_NO_LIMIT = 2**60
"""A cgroup of the first version writes a number above this where there is no limit."""


@dataclass(frozen=True)
class Device:
    """Something a model can run on.

    Args:
        name: What `--device` takes.
        description: Its maker's name.
        free: Bytes of memory that are free.
        total: Bytes of memory.
    """

    name: str
    description: str
    free: int
    total: int


@dataclass(frozen=True)
class Library:
    """A library that the package needs.

    Args:
        name: Of the package.
        version: The one installed; None where there is none.
        promised: The range that this package promises to work with.
        fits: Whether the version is in the range.
    """

    name: str
    version: str | None
    promised: str
    fits: bool


@dataclass(frozen=True)
class Cache:
    """The folder for what is fetched and converted.

    Args:
        folder: Where it is, or would be.
        free: Bytes free there.
        problem: Why it cannot be written; empty where it can.
    """

    folder: Path
    free: int
    problem: str = ""


def processor() -> str:
    """Return the processor's name, as the system tells it."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor() or platform.machine()
    named = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return named[1].strip() if named else platform.machine()


def cores() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def devices() -> list[Device]:
    """List what a model can run on here: the CPU first, then accelerators."""
    free, total = memory()
    found = [Device("cpu", processor(), free, total)]
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            free_there, total_there = torch.cuda.mem_get_info(number)
            name = torch.cuda.get_device_name(number)
            found.append(Device(f"cuda:{number}", name, free_there, total_there))
    if torch.backends.mps.is_available():
        found.append(Device("mps", "Apple graphics, with the computer's own memory", free, total))
    return found


def memory(cgroup: Path = CGROUP) -> tuple[int, int]:
    """Return the bytes of memory that are free and that there are, within the limit of a container.

    Args:
        cgroup: Where the system shows the limits of control groups.
    """
    system = psutil.virtual_memory()
    free, total = int(system.available), int(system.total)
    for limit_file, used_file, cached in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
    ):
        limit, used = _number(cgroup / limit_file), _number(cgroup / used_file)
        if limit is not None and used is not None and limit < _NO_LIMIT:
            reclaimable = _statistic((cgroup / used_file).parent / "memory.stat", cached)
            free, total = min(free, max(0, limit - used + reclaimable)), min(total, limit)
    return free, total


def _number(path: Path) -> int | None:
    """Read a file of one number; None where there is no such file, or it says `max`."""
    try:
        text = path.read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return None
    return int(text) if text.isdecimal() else None


def _statistic(path: Path, name: str) -> int:
    try:
        text = path.read_text(encoding="ascii")
    except (OSError, ValueError):
        return 0
    found = re.search(rf"^{name} (\d+)$", text, re.MULTILINE)
    return int(found[1]) if found else 0


def libraries() -> list[Library]:
    """List the libraries that this package promises to work with, and those of its extras that are installed.

    A copy of the source that is not installed promises nothing here: the list is then empty.
    """
    try:
        promised = metadata.requires(PACKAGE) or []
    except metadata.PackageNotFoundError:
        return []
    found: dict[str, Library] = {}
    for line in promised:
        try:
            requirement = Requirement(line)
        except InvalidRequirement:
            continue  # one that a newer tool wrote; nothing here depends on it
        version = _installed(requirement.name)
        optional = requirement.marker is not None and "extra" in str(requirement.marker)
        if optional and (version is None or "test" in str(requirement.marker) or requirement.name in found):
            continue
        fits = version is not None and requirement.specifier.contains(version, prereleases=True)
        found[requirement.name] = Library(requirement.name, version, str(requirement.specifier), fits)
    return sorted(found.values(), key=lambda library: library.name)


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def cache_folder(folder: Path) -> Cache:
    """Tell whether the cache folder can be written and how much is free there; makes it where it is missing.

    Args:
        folder: As `parts.home()` names it.
    """
    try:
        make_folder(folder)
        with scratch_folder(folder):
            return Cache(folder, shutil.disk_usage(folder).free)
    except StorageError as error:
        return Cache(folder, 0, error.message)
