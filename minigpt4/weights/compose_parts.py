"""Parts of a new MiniGPT-4: folders of `save_pretrained`, here or on the hub, and loading from them."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, PreTrainedModel
from transformers.utils import logging

from minigpt4.errors import ConfigError, WeightsError
from minigpt4.text import first_line
from minigpt4.weights.hub import Report, hub_folder, is_on_hub

UNREADABLE = (
    OSError, ValueError, KeyError, IndexError, TypeError, AttributeError, ImportError, RuntimeError,
    StrictDataclassError, SafetensorError,
)  # fmt: skip
"""What the library raises of files and sizes it cannot use."""

AGAIN = "fetch or copy its files again"


def part_folder(name: str, what: str, report: Report | None = None) -> Path:
    """Return the folder of a part (a path, or an id of the hub), fetching it from the hub if need be.

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
    if not (folder / "config.json").is_file():
        raise WeightsError(
            f"the {what} {name} has no config.json, expected a folder written by save_pretrained",
            hint="name the folder that holds the whole model, not one of its files, an adapter or a GGUF",
        )
    if not any(folder.glob("*.safetensors")):
        raise WeightsError(
            f"the {what} {name} has no tensors in safetensors files",
            hint="load it with transformers once and write it by save_pretrained, which makes them",
        )
    return folder


def read_config(folder: Path, what: str) -> Any:  # noqa: ANN401  (of any kind)
    """Read a part's configuration; nothing that comes with it is run."""
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except UNREADABLE as error:
        raise WeightsError(
            f"the {what} in {folder} has a config.json of no kind that transformers knows: {first_line(error)}",
            hint="name a model of transformers itself, not one that brings code of its own",
        ) from error
    if getattr(config, "quantization_config", None) is not None:
        raise ConfigError(
            f"the {what} in {folder} is quantized, expected its full weights",
            hint="name the model it was made from; quantize in the recipe loads it in fewer bits",
        )
    return config


def load_part(model_class: Any, folder: Path, what: str, **options: Any) -> tuple[PreTrainedModel, set[str]]:  # noqa: ANN401
    """Load a part in its stored number type; returns it, and the tensors that are missing or of another shape."""
    try:
        model, loading = model_class.from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **options,
        )
    except UNREADABLE as error:
        raise WeightsError(f"the {what} in {folder} cannot be loaded: {first_line(error)}", AGAIN) from error
    return model.eval(), {*loading["missing_keys"], *(name for name, *_ in loading["mismatched_keys"])}


def refuse_lacking(folder: Path, what: str, names: set[str]) -> None:
    """Raise WeightsError with one of the names, if there are any."""
    if names:
        raise WeightsError(f"the {what} in {folder} lacks the tensor {min(names)}, or has it in another shape", AGAIN)


@contextmanager
def quiet_library() -> Iterator[None]:
    """Keep the library from listing tensors that a part has too many or too few: those that matter are checked here."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
