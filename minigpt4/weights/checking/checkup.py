"""Whether a model will run here: the machine, the installation, the memory it needs, and the sanity of its weights.

Everything is found out before a model is loaded. Returns what was found; prints nothing.
"""

import platform
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minigpt4 import __version__
from minigpt4.errors import ConfigError, MiniGPT4Error, StorageError, WeightsError
from minigpt4.weights import nano
from minigpt4.weights.checking.machine import Cache, Device, Library, cache_folder, cores, devices, libraries
from minigpt4.weights.checking.model_size import Described, describe
from minigpt4.weights.checking.needs import DEFAULT_CONTEXT, NANO_DISK_BYTES, Need, Placement, fits, nearest_fit, need
from minigpt4.weights.checking.sanity import SMALL_MODEL_BYTES, Sanity, check_language_model
from minigpt4.weights.folder import placement, quantization
from minigpt4.weights.parts import home

UPGRADE_HINT = "pip install --upgrade minigpt4"


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
        nearest: The nearest placement that fits, where the one asked for does not; None also where none fits.
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
    nearest: Placement | None = None
    sanity: Sanity | None = None
    notes: list[str] = field(default_factory=list)
    problems: list[MiniGPT4Error] = field(default_factory=list)

    @property
    def free(self) -> dict[str, int]:
        """Bytes of memory that are free, by device."""
        return {device.name: device.free for device in self.devices}

    def as_dict(self) -> dict[str, Any]:
        """Return it ready for JSON."""
        parts = {
            "version": __version__,
            "python": platform.python_version(),
            "system": platform.platform(),
            "cores": cores(),
            "devices": [vars(device) for device in self.devices],
            "libraries": [vars(library) for library in self.libraries],
            "cache": {**vars(self.cache), "folder": str(self.cache.folder)},
            "model": None,
            "placement": vars(self.placement) if self.placement else None,
            "need": None,
            "nearest": vars(self.nearest) if self.nearest else None,
            "weights": vars(self.sanity) if self.sanity else None,
            "notes": self.notes,
            "problems": [{"message": problem.message, "hint": problem.hint} for problem in self.problems],
        }
        if self.model is not None:
            parts["model"] = {"name": self.model.name, "kind": self.model.kind, **vars(self.model.size)}
        if self.need is not None:
            parts["need"] = {"on_device": self.need.on_device, "total": self.need.total, "loading": self.need.loading}
        return parts


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
        wanted = _placement(found.model, device, dtype, quantize, num_beams, context)
        _check_memory(found, found.model, wanted)
    except MiniGPT4Error as error:
        found.problems.append(error)
    if found.model is not None and check_weights is not False:
        _check_weights(found, found.model, asked=check_weights is True)
    return found


def _check_installation(found: CheckUp) -> None:
    for library in found.libraries:
        if not library.fits:
            what = f"is version {library.version}" if library.version else "is not installed"
            found.problems.append(
                ConfigError(
                    f"{library.name} {what}, minigpt4 {__version__} works with {library.promised}", UPGRADE_HINT
                )
            )
    if not found.libraries:
        found.notes.append("minigpt4 runs from its source and is not installed: versions were not compared")
    if found.cache.problem:
        hint = "allow writing there, or set MINIGPT4_HOME to another folder"
        found.problems.append(StorageError(found.cache.problem, hint))


def _check_disk(found: CheckUp, model: Described) -> None:
    """See that what nano is made of has room, where it has not been made yet."""
    if model.kind not in ("nano", "alignment") or found.cache.problem or _language_model_folder(model) is not None:
        return
    if found.cache.free < NANO_DISK_BYTES:
        found.problems.append(
            StorageError(
                f"nano's parts take {_gigabytes(NANO_DISK_BYTES)} on disk, {_gigabytes(found.cache.free)} are free in "
                f"{found.cache.folder}",
                "free some space there, or set MINIGPT4_HOME to another folder",
            )
        )


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


def _check_memory(found: CheckUp, model: Described, wanted: Placement) -> None:
    found.placement = wanted
    found.need = need(model.size, wanted)
    if fits(model.size, wanted, found.free):
        return
    found.nearest = nearest_fit(model.size, wanted, found.free)
    free = found.free[wanted.device]
    if found.need.total > free:
        what = f"{_gigabytes(found.need.total)} of memory on {wanted.device}, {_gigabytes(free)} are free"
    else:
        what = (
            f"{_gigabytes(found.need.loading)} of the computer's memory while it is loaded, "
            f"{_gigabytes(found.free['cpu'])} are free"
        )
    found.problems.append(ConfigError(f"{model.name} needs {what}", _cure(found, model, wanted)))


def _cure(found: CheckUp, model: Described, wanted: Placement) -> str:
    if found.nearest is None:
        return "nothing that can be chosen makes it fit: close other programs, or use a smaller model (-m nano)"
    options = found.nearest.as_options(wanted)
    takes = _gigabytes(need(model.size, found.nearest).total)
    extra = ' (pip install "minigpt4[quant]")' if "--quantize" in options else ""
    return f"the nearest that fits takes {takes}: {options}{extra}"


def _check_weights(found: CheckUp, model: Described, *, asked: bool) -> None:
    folder = _language_model_folder(model)
    if folder is None:
        found.notes.append("the language model has not been fetched yet: there are no weights to look at")
        return
    size = sum(file.stat().st_size for file in folder.iterdir() if file.suffix in (".safetensors", ".bin", ".pth"))
    if size > SMALL_MODEL_BYTES and not asked:
        found.notes.append(f"the weights ({_gigabytes(size)}) were not looked at; --check-weights reads them once")
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


def _gigabytes(number: int) -> str:
    return f"{number / 1e9:.1f} GB"
