"""The vision encoder of a new MiniGPT-4: what its folder says, what it makes of a picture, and its weights.

Everything is known before a weight is read: the encoder is built on torch's device `meta`, and a picture of its
folder's size goes through it, which tells the number and the width of its tokens.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from transformers import MODEL_MAPPING, AutoModel, Blip2VisionModel, PreTrainedConfig, PreTrainedModel

from minigpt4.errors import ConfigError, WeightsError
from minigpt4.processing.image_processing_minigpt4 import MiniGPT4ImageProcessor
from minigpt4.text import first_line, read_json_object
from minigpt4.weights.compose_parts import UNREADABLE, load_part, read_config, refuse_lacking
from minigpt4.weights.files.tensor_files import open_tensors

VISION = "vision encoder"
PICTURES_AGAIN = "copy preprocessor_config.json from where the model was published"
PICTURE_FILES = ("preprocessor_config.json", "processor_config.json")
"""Settings of pictures: of a model that reads pictures alone, and of one with text."""

INSIDE = {r"^(.*\.)?vision_(model|tower)\.": ""}
"""Where larger models (CLIP, BLIP-2, LLaVA, ours) keep the tensors of their vision encoder."""


@dataclass(frozen=True)
class VisionPart:
    """A vision encoder whose folder was read and whose weights were not.

    Args:
        folder: Where it is.
        config: Of the encoder alone, also where the folder holds more.
        inside: The folder holds more than the encoder, as CLIP's does.
        model: The encoder without weights.
        tokens: What it makes of a picture, without numbers: `(1, tokens, width)`.
        pictures: Makes its pixel values.
    """

    folder: Path
    config: Any
    inside: bool
    model: PreTrainedModel
    tokens: torch.Tensor
    pictures: MiniGPT4ImageProcessor

    @property
    def num_prefix_tokens(self) -> int:
        """Class and register tokens, before the patches; encoders that join patches on their way (Swin) have none."""
        patch = getattr(self.config, "patch_size", None)
        if not isinstance(patch, int):
            return 0
        size = self.pictures.size
        return max(0, self.tokens.shape[1] - (size["height"] // patch) * (size["width"] // patch))

    @property
    def num_patches(self) -> int:
        """Tokens that stand for a place in the picture."""
        return self.tokens.shape[1] - self.num_prefix_tokens

    def load(self) -> PreTrainedModel:
        """Load it in its stored number type.

        Raises:
            WeightsError: A tensor that its tokens depend on is missing or of another shape, or a file is damaged.
        """
        options = {"config": self.config, "dtype": "auto"}
        if self.inside:  # where "auto" would be the type of the larger model's text part
            options |= {"key_mapping": INSIDE, "dtype": self._stored_dtype()}
        model, unfit = load_part(type(self.model), self.folder, VISION, **options)
        # A pooler's tensors, say, may be missing: the tokens have no gradient by them (which needs no numbers).
        named = {name: p for name, p in self.model.named_parameters() if p.requires_grad and name in unfit}
        gradients = torch.autograd.grad(self.tokens.sum(), [*named.values()], allow_unused=True) if named else ()
        needed = {name for name, gradient in zip(named, gradients, strict=True) if gradient is not None}
        refuse_lacking(self.folder, VISION, needed)
        return model

    def _stored_dtype(self) -> torch.dtype | str:
        tensors = open_tensors(self.folder)
        dtypes = (tensors.dtype(name) for name in tensors.names() if any(re.match(place, name) for place in INSIDE))
        return next((dtype for dtype in dtypes if dtype.is_floating_point), "auto")


def read_vision(folder: Path) -> VisionPart:
    """Read a vision encoder's folder, all but its weights.

    Raises:
        WeightsError: Its files are missing or no model's.
        ConfigError: It is no vision encoder, or one that a MiniGPT-4 cannot use.
    """
    whole = read_config(folder, VISION)
    config: Any = getattr(whole, "vision_config", None) or whole
    if not isinstance(config, PreTrainedConfig):
        _refuse_vision(folder, "has a vision_config of no kind that transformers knows")
    pictures = _image_processor(folder, config)
    if config.model_type == "vit_mae":
        _refuse_vision(folder, "hides most of a picture by chance, as it was trained to")
    if config.model_type == "efficientnet_lite":
        config.num_concepts = 0  # words in the embeddings of nano's language model, which others cannot read
    model = _vision_on_meta(folder, config)
    height, width = pictures.size["height"], pictures.size["width"]
    try:
        tokens = model(torch.zeros(1, 3, height, width, device="meta")).last_hidden_state
    except UNREADABLE as error:
        _refuse_vision(folder, f"does not read a picture of {height} x {width} pixels: {first_line(error)}")
    if tokens.ndim != 3:
        _refuse_vision(folder, f"makes a map of the shape {tuple(tokens.shape[1:])} of a picture, expected tokens")
    if getattr(config, "hidden_size", None) is None:
        config.hidden_size = tokens.shape[2]
    if tokens.shape[2] != config.hidden_size:
        _refuse_vision(folder, f"makes tokens {tokens.shape[2]} wide, while its hidden_size is {config.hidden_size}")
    return VisionPart(folder, config, config is not whole, model, tokens, pictures)


def _refuse_vision(folder: Path, why: str) -> NoReturn:
    hint = "name a vision model such as DINOv2, ViT, SigLIP, CLIP or BLIP-2"
    raise ConfigError(f"the {VISION} in {folder} {why}", hint)


def _vision_on_meta(folder: Path, config: PreTrainedConfig) -> Any:  # noqa: ANN401  (of any kind)
    is_blip2 = config.model_type == "blip_2_vision_model"  # which is not among the library's AutoModel classes
    if not is_blip2 and type(config) not in MODEL_MAPPING:
        _refuse_vision(folder, f"is of the kind {config.model_type}, which is none of transformers' vision models")
    with torch.device("meta"):
        try:
            model = Blip2VisionModel._from_config(config) if is_blip2 else AutoModel.from_config(config)
        except UNREADABLE as error:
            _refuse_vision(folder, f"cannot be built: {first_line(error)}")
    if model.main_input_name != "pixel_values":
        _refuse_vision(folder, f"is of the kind {config.model_type}, which reads no pictures alone")
    return model.eval()


def _image_processor(folder: Path, config: PreTrainedConfig) -> MiniGPT4ImageProcessor:
    """Return an image processor with the settings that a vision encoder was trained with.

    Where the settings cut out the middle (CLIP, DINOv2: the short side to 256, then the middle 224 x 224), the whole
    picture is squashed to that size instead, as MiniGPT-4 does: an answer should be about all of a picture.
    """
    settings = _picture_settings(folder)
    size = settings.get("size")
    if settings.get("crop_size") is not None and settings.get("do_center_crop", True):
        size = settings["crop_size"]
    size = getattr(config, "image_size", None) if size is None else size
    if isinstance(size, dict):  # the forms in which the library has written sizes over the years
        side = size.get("shortest_edge")
        size = (size.get("height", side), size.get("width", side))
    sides = (size, size) if isinstance(size, int) else size
    if not isinstance(sides, tuple | list) or len(sides) != 2 or not all(isinstance(n, int) and n > 0 for n in sides):
        raise WeightsError(
            f"the {VISION} in {folder} has settings for pictures whose size is {size}, expected a height and a width",
            PICTURES_AGAIN,
        )
    for name in ("image_mean", "image_std"):
        if settings.get("do_normalize", True) and not settings.get(name):
            raise WeightsError(f"the {VISION} in {folder} has settings for pictures without {name}", PICTURES_AGAIN)
    names = ("resample", "image_mean", "image_std", "do_rescale", "rescale_factor", "do_normalize")
    chosen = {name: settings[name] for name in names if settings.get(name) is not None}
    return MiniGPT4ImageProcessor(size={"height": sides[0], "width": sides[1]}, **chosen)


def _picture_settings(folder: Path) -> dict[str, Any]:
    for name in PICTURE_FILES:
        if (folder / name).is_file():
            content = read_json_object(folder / name, WeightsError, PICTURES_AGAIN)
            section = content if name == PICTURE_FILES[0] else content.get("image_processor")  # beside the text's
            if isinstance(section, dict):
                return section
    raise WeightsError(
        f"the {VISION} in {folder} has no {PICTURE_FILES[0]}, which tells how its pictures are scaled", PICTURES_AGAIN
    )
