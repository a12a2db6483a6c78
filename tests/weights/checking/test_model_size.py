"""The sizes that memory depends on are those of the model that would be loaded."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from minigpt4.errors import WeightsError
from minigpt4.model import MiniGPT4Config
from minigpt4.weights.checking.model_size import describe, size_of, size_of_language_model
from minigpt4.weights.checking.needs import LANGUAGE, PROJECTION, RESAMPLER, VISION
from tests.model import tiny


def test_published_7b_model_has_the_published_counts() -> None:
    size = size_of(MiniGPT4Config())
    assert size.parameters == {
        VISION: 985_894_528 + 39 * 1408 + 2_816,  # the original's, its key biases that are zero, the norm after it
        RESAMPLER: 105_137_664 + 32 * 768,
        PROJECTION: 768 * 4096 + 4096,
        LANGUAGE: 6_738_415_616,
    }
    assert size.cached_width * size.num_layers * 2 == 524_288  # bytes for a token in 16 bits
    assert size.packable == 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008)
    assert (size.image_tokens, size.image_size, size.max_context) == (32, 224, 2048)


def test_nano_is_sized_before_its_parts_are_fetched(home: Path) -> None:
    described = describe("nano")
    assert described.kind == "nano"
    assert described.size.parameters[LANGUAGE] == 134_515_008
    assert list(home.iterdir()) == []


@pytest.mark.parametrize("text", list(tiny.TEXT))
def test_sizes_are_those_of_the_model_itself(text: str, tmp_path: Path) -> None:
    model = tiny.model(text=text)
    model.config.save_pretrained(tmp_path)
    described = describe(str(tmp_path))
    assert described.kind == "full"
    assert sum(described.size.parameters.values()) == model.num_parameters()
    cache = model(input_ids=torch.arange(10, 15)[None]).past_key_values
    keys, values = cache.layers[0].keys, cache.layers[0].values
    assert described.size.cached_width * 5 == keys.numel() + values.numel()
    assert described.size.num_layers == len(cache.layers)


def test_language_model_alone_has_no_other_part() -> None:
    config = LlamaConfig(**{k: v for k, v in tiny.TEXT["llama"].items() if k != "model_type"})
    size = size_of_language_model(config)
    assert list(size.parameters) == [LANGUAGE]
    assert (size.image_tokens, size.image_size) == (0, 0)


def test_what_is_no_model_is_told_apart(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="no model 'nonesuch'"):
        describe("nonesuch")
    with pytest.raises(WeightsError, match="neither config"):
        describe(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "no-such-model"}')
    with pytest.raises(WeightsError, match="describes no model"):
        describe(str(tmp_path))
