"""What engines that bring their own attention and scheduling (vLLM, SGLang) count on when they build the model.

They make the headless model from its configuration alone, without memory, fill in the weights, put an attention of
their own into the language model, merge image embeddings and word embeddings themselves, and split layers by the plan.
Tolerances are for float32 states of standard deviation 1.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, AutoModel, AutoModelForMultimodalLM, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from minigpt4.model import MiniGPT4Config, MiniGPT4ForConditionalGeneration, MiniGPT4Model
from tests.model import tiny

Attention = Callable[..., tuple[Tensor, Tensor | None]]


@pytest.mark.parametrize("qformer", [True, False])
@pytest.mark.parametrize("vision", tiny.VISION)
def test_headless_model_is_built_without_memory_and_takes_the_weights_of_the_whole(vision: str, qformer: bool) -> None:
    config = tiny.config(vision, qformer=qformer)
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    assert type(model) is MiniGPT4Model
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    whole = tiny.model(vision=vision, qformer=qformer)
    prefix = MiniGPT4ForConditionalGeneration.base_model_prefix + "."
    expected = {name.removeprefix(prefix) for name in whole.state_dict() if name != "lm_head.weight"}
    assert set(model.state_dict()) == expected


def test_generating_class_is_found_by_its_configuration() -> None:
    assert type(AutoModelForMultimodalLM.from_config(tiny.config())) is MiniGPT4ForConditionalGeneration


@pytest.mark.parametrize("qformer", [True, False])
def test_parts_are_built_from_the_configurations_of_the_whole_not_from_copies(qformer: bool) -> None:
    model = MiniGPT4ForConditionalGeneration(tiny.config(qformer=qformer))
    parts = [module.config for module in model.modules() if isinstance(module, PreTrainedModel)]
    own = [model.config, model.config.vision_config, model.config.qformer_config, model.config.text_config]
    assert all(any(part is config for config in own) for part in parts)
    assert {type(part) for part in parts} == {type(config) for config in own if config is not None}


@contextmanager
def attention(name: str, function: Attention) -> Iterator[None]:
    interface = AttentionInterface()
    interface.register(name, function)
    try:
        yield
    finally:
        del AttentionInterface._global_mapping[name]


def test_attention_of_an_engine_serves_every_layer_of_the_language_model() -> None:
    model = tiny.model().model
    ids, pixels, marker = torch.tensor([tiny.row(1, 5)]), tiny.pictures(1), object()
    seen = []

    def engine(
        module: torch.nn.Module, *states: Any, engine_state: object, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        seen.append((module.layer_idx, engine_state))
        return sdpa_attention_forward(module, *states, **kwargs)

    with torch.no_grad(), attention("an_engine", engine):
        expected = model(input_ids=ids, pixel_values=pixels, use_cache=False)[0]
        model.config.text_config._attn_implementation = "an_engine"
        actual = model(input_ids=ids, pixel_values=pixels, use_cache=False, engine_state=marker)[0]
    assert seen == [(0, marker), (1, marker)]
    torch.testing.assert_close(actual, expected, rtol=0.0, atol=2e-5)


def test_engine_merges_the_embeddings_and_reads_the_states_first_in_a_tuple() -> None:
    model = tiny.model().model
    ids, pixels = torch.tensor([tiny.row(2, 5)]), tiny.pictures(2)
    with torch.no_grad():
        expected = model(input_ids=ids, pixel_values=pixels).last_hidden_state
        blocks = model.get_image_features(pixels).pooler_output
        assert blocks.shape == (2, model.config.num_image_tokens, model.config.text_config.hidden_size)
        embeds = model.get_input_embeddings()(ids)
        embeds[ids == model.config.image_token_id] = blocks.flatten(0, 1)
        outputs = model(
            input_ids=None,
            inputs_embeds=embeds,
            position_ids=torch.arange(ids.shape[1])[None],
            use_cache=False,
            return_dict=False,
        )
    assert isinstance(outputs, tuple)
    torch.testing.assert_close(outputs[0], expected, rtol=0.0, atol=2e-5)


@pytest.mark.parametrize("text", ["llama", "llama, tied", "qwen2"])
def test_every_entry_of_the_tensor_parallel_plan_names_a_module_and_the_head_has_one(text: str) -> None:
    model = tiny.model(text=text)
    names = [name for name, _ in model.named_modules()]
    for entry in model.tp_plan:
        pattern = re.escape(entry).replace(r"\*", r"\d+")
        assert any(re.fullmatch(pattern, name) for name in names), entry
    assert "lm_head" in model.tp_plan
    assert any("language_model" in entry for entry in model.tp_plan)


def test_attention_heads_of_the_published_models_are_as_wide_as_kernels_ask() -> None:
    # A multiple of 32 is what vLLM's attention on a CPU needs, the narrowest of its kernels.
    assert MiniGPT4Config().text_config.head_dim == 128
