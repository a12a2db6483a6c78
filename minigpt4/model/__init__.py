"""The model: tensors only, by the conventions of transformers."""

from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM

from .configuration_minigpt4 import MiniGPT4Config
from .vision_efficientnet_lite import EfficientNetLiteConfig, EfficientNetLiteModel

AutoConfig.register(EfficientNetLiteConfig.model_type, EfficientNetLiteConfig)
AutoConfig.register(MiniGPT4Config.model_type, MiniGPT4Config)

from .modeling_minigpt4 import MiniGPT4ForConditionalGeneration, MiniGPT4Model  # noqa: E402  (needs the registration)

AutoModel.register(EfficientNetLiteConfig, EfficientNetLiteModel)
AutoModel.register(MiniGPT4Config, MiniGPT4Model)
AutoModelForImageTextToText.register(MiniGPT4Config, MiniGPT4ForConditionalGeneration)
AutoModelForMultimodalLM.register(MiniGPT4Config, MiniGPT4ForConditionalGeneration)

__all__ = [
    "EfficientNetLiteConfig",
    "EfficientNetLiteModel",
    "MiniGPT4Config",
    "MiniGPT4ForConditionalGeneration",
    "MiniGPT4Model",
]
