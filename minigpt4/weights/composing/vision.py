"""The vision encoder of a new model: what its folder says, what it makes of a picture, and its weights.

All is known before a weight is read: the encoder is built without memory (torch's device `meta`) and a picture of the
folder's size goes through it, which tells the number and the width of its tokens and the tensors they depend on.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from transformers import MODEL_MAPPING, AutoModel, Blip2VisionModel, PreTrainedConfig, PreTrainedModel

from minigpt4.errors import ConfigError, WeightsError
from minigpt4.processing.image_processing_minigpt4 import MiniGPT4ImageProcessor
from minigpt4.weights.composing.part_folder import CONFIG_FILE, UNREADABLE, first_line, read_config
from minigpt4.weights.files.tensors import open_tensors

WHAT = "vision encoder"
PICTURE_FILES = ("preprocessor_config.json", "processor_config.json")
"""Where the library keeps the settings of pictures: of a model that reads pictures alone, and of one with text."""

_HINT = "name a vision model such as DINOv2, ViT, SigLIP, CLIP or BLIP-2"


@dataclass(frozen=True)
class VisionPart:
    """A vision encoder that was looked at, not loaded.

    Args:
        folder: Where it is.
        config: Of the encoder alone, also where the folder holds more.
        inside: The folder holds more than the encoder, such as CLIP's.
        model: The encoder without weights.
        tokens: What it makes of a picture, without numbers: `(1, tokens, width)`.
        num_prefix_tokens: Of these, class and register tokens before the patches.
        pictures: Makes its pixel values.
    """

    folder: Path
    config: PreTrainedConfig
    inside: bool
    model: PreTrainedModel
    tokens: torch.Tensor
    num_prefix_tokens: int
    pictures: MiniGPT4ImageProcessor

    @property
    def num_patches(self) -> int:
        """Tokens that stand for a place in the picture."""
        return self.tokens.shape[1] - self.num_prefix_tokens

    def needs(self, names: set[str]) -> set[str]:
        """Return those of its tensors on which the tokens depend; a pooler's, for example, may be missing.

        Gradients tell, which exist without numbers, too.
        """
        named = {name: p for name, p in self.model.named_parameters() if p.requires_grad and name in names}
        if not named:
            return set()
        gradients = torch.autograd.grad(self.tokens.sum(), list(named.values()), allow_unused=True)
        return {name for name, gradient in zip(named, gradients, strict=True) if gradient is not None}


def read_vision(folder: Path) -> VisionPart:
    """Look at a vision encoder's folder.

    Raises:
        WeightsError: Its files are missing or no model's.
        ConfigError: It is no vision encoder, or one that a MiniGPT-4 cannot use.
    """
    whole = read_config(folder, WHAT)
    config: Any = getattr(whole, "vision_config", None) or whole
    if not isinstance(config, PreTrainedConfig):
        _refuse(folder, "has a vision_config of no kind that transformers knows")
    pictures = read_picture_settings(folder, config)
    if config.model_type == "vit_mae":
        _refuse(folder, "hides most of a picture by chance, as it was trained to")
    if config.model_type == "efficientnet_lite":
        config.num_concepts = 0  # words in the embeddings of nano's language model, which others cannot read
    model = _without_weights(folder, config)
    height, width = pictures.size["height"], pictures.size["width"]
    try:
        tokens = model(torch.zeros(1, 3, height, width, device="meta")).last_hidden_state
    except UNREADABLE as error:
        _refuse(folder, f"does not read a picture of {height} x {width} pixels: {first_line(error)}")
    if tokens.ndim != 3:
        _refuse(folder, f"makes a map of the shape {tuple(tokens.shape[1:])} of a picture, expected tokens")
    if getattr(config, "hidden_size", None) is None:
        config.hidden_size = tokens.shape[2]
    if tokens.shape[2] != config.hidden_size:
        _refuse(folder, f"makes tokens {tokens.shape[2]} wide, while its hidden_size is {config.hidden_size}")
    return VisionPart(
        folder,
        config,
        inside=config is not whole,
        model=model,
        tokens=tokens,
        num_prefix_tokens=_prefix_tokens(tokens.shape[1], config, height, width),
        pictures=pictures,
    )


def read_picture_settings(folder: Path, config: PreTrainedConfig) -> MiniGPT4ImageProcessor:
    """Make an image processor of the settings that a vision encoder was trained with.

    Colours are scaled and pictures are resized as there. Where the settings cut out the middle (CLIP, DINOv2: the
    short side to 256, then the middle 224 x 224), the whole picture is squashed to that size in its place, as
    MiniGPT-4 does: an answer should be about all of a picture, and its border is a part of it.

    Raises:
        WeightsError: The folder has no settings, or they lack one.
    """
    settings = _picture_settings(folder)
    size = settings.get("size")
    if settings.get("crop_size") is not None and settings.get("do_center_crop", True):
        size = settings["crop_size"]
    height, width = _height_and_width(size, getattr(config, "image_size", None), folder)
    normalize = settings.get("do_normalize", True)
    lacking = [name for name in ("image_mean", "image_std") if normalize and not settings.get(name)]
    if lacking:
        raise WeightsError(
            f"the {WHAT} in {folder} has settings for pictures without {lacking[0]}",
            hint="copy preprocessor_config.json again from where the model was published",
        )
    taken = {
        name: settings[name]
        for name in ("resample", "image_mean", "image_std", "do_rescale", "rescale_factor", "do_normalize")
        if settings.get(name) is not None
    }
    return MiniGPT4ImageProcessor(size={"height": height, "width": width}, **taken)


def load_vision(part: VisionPart) -> PreTrainedModel:
    """Load a vision encoder in the number type it is stored in.

    Raises:
        WeightsError: A tensor that its tokens depend on is missing or of another shape, or a file is damaged.
    """
    options: dict[str, Any] = {"dtype": "auto", "output_loading_info": True, "ignore_mismatched_sizes": True}
    model_class: Any = type(part.model)
    try:
        if part.inside:
            tensors = _tensors_inside(part)
            model, loading = model_class.from_pretrained(None, config=part.config, state_dict=tensors, **options)
        else:
            options |= {"config": part.config, "local_files_only": True, "use_safetensors": True}
            model, loading = model_class.from_pretrained(part.folder, **options)
    except (*UNREADABLE, WeightsError) as error:
        raise WeightsError(
            f"the {WHAT} in {part.folder} cannot be loaded: {first_line(error)}", hint="fetch or copy its files again"
        ) from error
    unfit = part.needs({*loading["missing_keys"], *(name for name, *_ in loading["mismatched_keys"])})
    if unfit:
        raise WeightsError(
            f"the {WHAT} in {part.folder} lacks the tensor {min(unfit)}, or has it in another shape",
            hint="fetch or copy its files again",
        )
    return model.eval()


def _refuse(folder: Path, why: str) -> NoReturn:
    raise ConfigError(f"the {WHAT} in {folder} {why}", _HINT)


def _without_weights(folder: Path, config: PreTrainedConfig) -> PreTrainedModel:
    is_blip2 = config.model_type == "blip_2_vision_model"  # which is not among the library's AutoModel classes
    if not is_blip2 and type(config) not in MODEL_MAPPING:
        _refuse(folder, f"is of the kind {config.model_type}, which is none of transformers' vision models")
    with torch.device("meta"):
        try:
            model = Blip2VisionModel._from_config(config) if is_blip2 else AutoModel.from_config(config)
        except UNREADABLE as error:
            _refuse(folder, f"cannot be built: {first_line(error)}")
    if model.main_input_name != "pixel_values":
        _refuse(folder, f"is of the kind {config.model_type}, which reads no pictures alone")
    built: PreTrainedModel = model.eval()
    return built


def _prefix_tokens(num_tokens: int, config: Any, height: int, width: int) -> int:  # noqa: ANN401  (of any kind)
    """Count the tokens beyond one for each patch; encoders that join patches on their way (Swin) have none."""
    patch = getattr(config, "patch_size", None)
    if not isinstance(patch, int):
        return 0
    return max(0, num_tokens - (height // patch) * (width // patch))


def _picture_settings(folder: Path) -> dict[str, Any]:
    for name in PICTURE_FILES:
        path = folder / name
        if not path.is_file():
            continue
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise WeightsError(f"{path} cannot be read as JSON", "copy it again") from error
        if name == PICTURE_FILES[1] and isinstance(content, dict):
            content = content.get("image_processor")  # beside settings of the text
        if isinstance(content, dict):
            return content
    raise WeightsError(
        f"the {WHAT} in {folder} has no {PICTURE_FILES[0]}, which tells how its pictures are scaled",
        hint=f"copy it from where the model was published, beside {CONFIG_FILE}",
    )


def _height_and_width(size: Any, image_size: Any, folder: Path) -> tuple[int, int]:  # noqa: ANN401  (JSON)
    """Read the forms in which the library has written sizes over the years."""
    size = image_size if size is None else size
    if isinstance(size, dict):
        side = size.get("shortest_edge")
        size = (size.get("height", side), size.get("width", side))
    sides = (size, size) if isinstance(size, int) else size
    if not isinstance(sides, tuple | list) or len(sides) != 2 or not all(isinstance(n, int) and n > 0 for n in sides):
        raise WeightsError(
            f"the {WHAT} in {folder} has settings for pictures whose size is {size}, expected a height and a width",
            hint="copy preprocessor_config.json again from where the model was published",
        )
    return sides[0], sides[1]


def _tensors_inside(part: VisionPart) -> dict[str, torch.Tensor]:
    """Read the encoder's tensors out of a larger model: those under the name where most of them are found.

    A text encoder of the same build (CLIP's) shares the names of its layers, but not of what reads a picture.
    """
    files = open_tensors(part.folder)
    expected = {name: tuple(tensor.shape) for name, tensor in part.model.state_dict().items()}
    found: dict[str, int] = {}
    for name in files.names():
        parts = name.split(".")
        for cut in range(1, len(parts)):
            if expected.get(".".join(parts[cut:])) == files.shape(name):
                prefix = ".".join(parts[:cut]) + "."
                found[prefix] = found.get(prefix, 0) + 1
    if not found:
        raise WeightsError(
            f"the {WHAT} in {part.folder} has no tensors of a {part.config.model_type}",
            hint="fetch or copy its files again",
        )
    prefix = max(found, key=lambda place: found[place])
    return {name.removeprefix(prefix): files.read(name) for name in files.names() if name.startswith(prefix)}
