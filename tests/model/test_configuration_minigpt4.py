"""A configuration says what a model is made of, survives being written, and refuses what cannot be."""

import json
from pathlib import Path

import pytest
from transformers import AutoConfig, Blip2QFormerConfig, Blip2VisionConfig, LlamaConfig

from minigpt4.model import EfficientNetLiteConfig, MiniGPT4Config
from tests.model import tiny


def test_defaults_are_the_sizes_of_the_published_7b_model() -> None:
    config = MiniGPT4Config()
    assert isinstance(config.vision_config, Blip2VisionConfig)
    assert (config.vision_config.hidden_size, config.vision_config.num_hidden_layers) == (1408, 39)
    assert isinstance(config.qformer_config, Blip2QFormerConfig)
    assert (config.qformer_config.hidden_size, config.qformer_config.encoder_hidden_size) == (768, 1408)
    assert isinstance(config.text_config, LlamaConfig)
    assert (config.text_config.hidden_size, config.text_config.num_hidden_layers) == (4096, 32)
    assert (config.num_image_tokens, config.image_embed_size) == (32, 768)
    assert list(config.trainable_parts) == ["language_projection"]


@pytest.mark.parametrize(("side", "tokens"), [(224, 64), (448, 256)])
def test_merging_four_tokens_gives_the_published_lengths_and_width(side: int, tokens: int) -> None:
    config = MiniGPT4Config(vision_config={"image_size": side}, qformer_config=None)
    assert config.num_image_tokens == tokens
    assert config.image_embed_size == 5632


@pytest.mark.parametrize("qformer", [True, False])
@pytest.mark.parametrize(("vision", "text"), tiny.PAIRS)
def test_written_configuration_is_read_back_whole(tmp_path: Path, vision: str, text: str, qformer: bool) -> None:
    config = tiny.config(vision, text, qformer, trainable_parts=["query_tokens"], post_layernorm_eps=None)
    config.save_pretrained(tmp_path)
    read = AutoConfig.from_pretrained(tmp_path)
    assert type(read) is MiniGPT4Config
    read._name_or_path = config._name_or_path
    assert read.to_dict() == config.to_dict()
    assert (read.qformer_config is None) == (not qformer)
    assert type(read.vision_config) is type(config.vision_config)
    assert type(read.text_config) is type(config.text_config)
    assert read.post_layernorm_eps is None
    written = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert written["model_type"] == "minigpt4"
    assert written["trainable_parts"] == ["query_tokens"]


def test_absent_qformer_is_written_as_null(tmp_path: Path) -> None:
    tiny.config(qformer=False).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert "qformer_config" in written and written["qformer_config"] is None


def test_qformer_reads_tokens_as_wide_as_the_encoder_makes_them() -> None:
    for vision, values in tiny.VISION.items():
        config = tiny.config(vision)
        assert config.qformer_config.encoder_hidden_size == config.vision_config.hidden_size
        assert vision == "efficientnet_lite" or config.vision_config.hidden_size == values["hidden_size"]


def test_tying_is_the_language_models_business() -> None:
    assert MiniGPT4Config(text_config=tiny.TEXT["llama, tied"]).tie_word_embeddings is True
    assert MiniGPT4Config(text_config=tiny.TEXT["llama"], tie_word_embeddings=True).tie_word_embeddings is False


def test_text_configuration_is_found_by_the_library() -> None:
    config = tiny.config()
    assert config.get_text_config() is config.text_config
    assert config.get_text_config(decoder=True) is config.text_config


def test_unknown_part_to_train_is_refused_with_the_known_ones() -> None:
    with pytest.raises(
        ValueError, match=r"trainable_parts has llama_proj, expected some of vision_model, .*language_model"
    ):
        tiny.config(trainable_parts=["llama_proj", "qformer"])


@pytest.mark.parametrize(
    "wrong",
    [{"num_query_tokens": "32"}, {"post_layernorm_eps": "small"}, {"trainable_parts": "qformer"}, {"vision_config": 3}],
)
def test_value_of_a_wrong_type_is_refused_with_its_name(wrong: dict[str, object]) -> None:
    with pytest.raises(Exception, match=next(iter(wrong))):
        MiniGPT4Config(**wrong)


def test_positions_need_a_multiple_of_four_channels() -> None:
    with pytest.raises(ValueError, match="position_channels is 6, expected a multiple of 4"):
        EfficientNetLiteConfig(position_channels=6)


def test_lite0_gives_196_tokens_of_512_channels() -> None:
    config = EfficientNetLiteConfig()
    assert (config.num_patches, config.hidden_size, config.num_concept_tokens) == (196, 512, 16)
