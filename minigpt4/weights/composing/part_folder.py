"""Where a part of a model lies: a folder of `save_pretrained`, or one of the hub; and what its configuration says.

Knows nothing of what kind of part it is.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, PreTrainedConfig
from transformers.utils import logging

from minigpt4.errors import ConfigError, WeightsError
from minigpt4.weights.hub import hub_folder, is_on_hub

CONFIG_FILE = "config.json"
UNREADABLE = (
    OSError, ValueError, KeyError, IndexError, TypeError, AttributeError, ImportError, RuntimeError,
    StrictDataclassError, SafetensorError,
)  # fmt: skip
"""What the library raises where it can make nothing of a folder's files or sizes."""

Report = Callable[[str, int, int], None]
"""Told what is being done, how much of it is done, and of how much; 0 of 0 where it cannot be known."""


def part_folder(name: str, what: str, report: Report | None = None) -> Path:
    """Return the folder of a part, fetching it from the hub where need be.

    Args:
        name: A folder, or `owner/name` or `owner/name@revision` of the hub.
        what: The part in words, for the complaint: `vision encoder`.
        report: Told that the hub is asked.

    Raises:
        WeightsError: There is no such folder, or it is no model's, or its tensors are in another format.
        DownloadError: The hub does not give it.
    """
    folder = hub_folder(name, report) if is_on_hub(name) else Path(name).expanduser()
    if not folder.is_dir():
        raise WeightsError(
            f"there is no {what} {name!r}, expected a folder written by save_pretrained or an id of the hub",
            hint="check the path, or name it as owner/name",
        )
    if not (folder / CONFIG_FILE).is_file():
        raise WeightsError(
            f"the {what} {name} has no {CONFIG_FILE}, expected a folder written by save_pretrained",
            hint="name the folder that holds the whole model, not one of its files, an adapter or a GGUF",
        )
    if not any(folder.glob("*.safetensors")):
        raise WeightsError(
            f"the {what} {name} has no tensors in safetensors files",
            hint="load it with transformers once and write it by save_pretrained, which makes them",
        )
    return folder


def read_config(folder: Path, what: str) -> PreTrainedConfig:
    """Read a part's configuration; nothing that comes with it is run.

    Raises:
        WeightsError: It cannot be read, or is of a kind that the library does not have.
        ConfigError: The weights are quantized.
    """
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except UNREADABLE as error:
        raise WeightsError(
            f"the {what} in {folder} has a {CONFIG_FILE} of no kind that transformers knows: {first_line(error)}",
            hint="name a model of transformers itself, not one that brings code of its own",
        ) from error
    if getattr(config, "quantization_config", None) is not None:
        raise ConfigError(
            f"the {what} in {folder} is quantized, expected its full weights",
            hint="name the model it was made from; quantize in the recipe loads it in fewer bits",
        )
    return config


@contextmanager
def quiet_library() -> Iterator[None]:
    """Keep the library from listing tensors that a part has too many or too few: those that matter are checked here."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def first_line(error: Exception) -> str:
    """Return the first line of what an error says, to be the end of a sentence."""
    return next(iter(str(error).strip().splitlines()), "").rstrip(".:") or type(error).__name__
