"""Pictures and text in, logits out: the parts, how they are joined, and what must not change the numbers.

Tolerances are for float32 logits of standard deviation 1.5, unless said otherwise.
"""

from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoModelForImageTextToText
from transformers.modeling_outputs import BaseModelOutputWithPooling

from minigpt4.model import MiniGPT4ForConditionalGeneration, MiniGPT4Model
from tests.model import tiny

ROUNDING = {"rtol": 0.0, "atol": 2e-5}


@pytest.fixture(scope="module")
def model() -> MiniGPT4ForConditionalGeneration:
    return tiny.model()


def logits(model: MiniGPT4ForConditionalGeneration, num_pictures: int = 1, **kwargs: torch.Tensor) -> torch.Tensor:
    ids = torch.tensor([tiny.row(num_pictures, words=5, num_image_tokens=model.config.num_image_tokens)])
    if num_pictures:
        kwargs["pixel_values"] = tiny.pictures(num_pictures, size=model.config.vision_config.image_size)
    with torch.no_grad():
        return model(input_ids=ids, **kwargs).logits


@pytest.mark.parametrize(("vision", "text"), tiny.PAIRS)
def test_every_kind_of_part_comes_back_from_its_folder_unchanged(tmp_path: Path, vision: str, text: str) -> None:
    model = tiny.model(vision=vision, text=text)
    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is MiniGPT4ForConditionalGeneration
    assert {kind: set(names) for kind, names in info.items() if names} == {}
    expected, actual = model.state_dict(), loaded.state_dict()
    assert expected.keys() == actual.keys()
    assert all(torch.equal(tensor, actual[name]) for name, tensor in expected.items())
    assert torch.equal(logits(model), logits(loaded))


@pytest.mark.parametrize("qformer", [True, False])
def test_model_without_a_head_is_the_same_model(tmp_path: Path, qformer: bool) -> None:
    model = tiny.model(qformer=qformer)
    model.save_pretrained(tmp_path)
    headless = AutoModel.from_pretrained(tmp_path)
    assert type(headless) is MiniGPT4Model
    ids, pixels = torch.tensor([tiny.row(1, 5)]), tiny.pictures(1)
    with torch.no_grad():
        assert torch.equal(
            headless(input_ids=ids, pixel_values=pixels).last_hidden_state,
            model.model(input_ids=ids, pixel_values=pixels).last_hidden_state,
        )


def test_model_without_qformer_has_neither_qformer_nor_queries_after_loading(tmp_path: Path) -> None:
    model = tiny.model(qformer=False)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert loaded.config.qformer_config is None
    assert loaded.model.qformer is None and loaded.model.query_tokens is None
    assert torch.equal(logits(model), logits(loaded))


def test_tied_head_is_one_tensor_with_the_embeddings_and_stored_once(tmp_path: Path) -> None:
    for text in ["llama, tied", "qwen2", "gpt2"]:
        model = tiny.model(text=text)
        model.save_pretrained(tmp_path / text)
        loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / text)
        for one in (model, loaded):
            assert one.lm_head.weight is one.get_input_embeddings().weight
    assert tiny.model(text="llama").lm_head.weight is not tiny.model(text="llama").get_input_embeddings().weight


def test_loading_weights_of_original_norm_keeps_its_epsilon(tmp_path: Path) -> None:
    model = tiny.model(post_layernorm_eps=1e-2)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert loaded.model.vision_model.post_layernorm.eps == 1e-2
    assert tiny.model().model.vision_model.post_layernorm.eps == 1e-5
    assert tiny.model(post_layernorm_eps=None).model.vision_model.post_layernorm.eps == 1e-6


def test_picture_is_seen_and_its_place_matters(model: MiniGPT4ForConditionalGeneration) -> None:
    ids, pixels = torch.tensor([tiny.row(2, 5)]), tiny.pictures(2)
    with torch.no_grad():
        both, swapped, dark = (
            model(input_ids=ids, pixel_values=value).logits for value in (pixels, pixels.flip(0), pixels * 0)
        )
    before = ids[0].tolist().index(tiny.IMAGE_TOKEN_ID)
    assert torch.equal(both[:, :before], swapped[:, :before])
    assert (both - swapped).abs().max() > 0.1
    assert (both - dark).abs().max() > 0.1


def test_embedding_of_the_image_token_is_never_read(model: MiniGPT4ForConditionalGeneration) -> None:
    expected = logits(model)
    row = model.get_input_embeddings().weight.data[tiny.IMAGE_TOKEN_ID]
    kept = row.clone()
    row.fill_(1e3)
    actual = logits(model)
    row.copy_(kept)
    assert torch.equal(expected, actual)


def test_image_embeddings_stand_at_their_places_between_the_word_embeddings(
    model: MiniGPT4ForConditionalGeneration,
) -> None:
    ids, pixels = torch.tensor([tiny.row(1, 3), tiny.row(1, 3, seed=1)]), tiny.pictures(2)
    with torch.no_grad():
        embeds = model.get_input_embeddings()(ids).clone()
        embeds[ids == tiny.IMAGE_TOKEN_ID] = model.get_image_features(pixels).pooler_output.flatten(0, 1)
        joined = model(inputs_embeds=embeds).logits
        assert torch.equal(joined, model(input_ids=ids, pixel_values=pixels).logits)


def test_pictures_can_be_given_with_embeddings_in_place_of_ids(model: MiniGPT4ForConditionalGeneration) -> None:
    ids, pixels = torch.tensor([tiny.row(1, 3)]), tiny.pictures(1)
    with torch.no_grad():
        embeds = model.get_input_embeddings()(ids)
        actual = model(inputs_embeds=embeds, pixel_values=pixels).logits
        assert torch.equal(actual, model(input_ids=ids, pixel_values=pixels).logits)


@pytest.mark.parametrize("qformer", [True, False])
@pytest.mark.parametrize("vision", tiny.VISION)
def test_eager_attention_and_sdpa_agree(vision: str, qformer: bool) -> None:
    prefix = 1 if vision in ("blip_2_vision_model", "dinov2", "clip_vision_model") else 0
    model = tiny.model(vision=vision, qformer=qformer, num_prefix_tokens=prefix)
    model.set_attn_implementation("sdpa")
    sdpa = logits(model, num_pictures=2)
    model.set_attn_implementation("eager")
    assert model.model.language_model.config._attn_implementation == "eager"
    torch.testing.assert_close(logits(model, num_pictures=2), sdpa, **ROUNDING)


def test_attention_can_be_chosen_at_loading_and_shows_where_the_queries_look(tmp_path: Path) -> None:
    tiny.model().save_pretrained(tmp_path)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path, attn_implementation="eager")
    with torch.no_grad():
        features = model.get_image_features(tiny.pictures(2), output_attentions=True)
    maps = [layer for layer in features.cross_attentions if layer is not None]
    assert maps and maps[0].shape == (2, 2, tiny.NUM_IMAGE_TOKENS, 17)
    torch.testing.assert_close(maps[0].sum(-1), torch.ones(2, 2, tiny.NUM_IMAGE_TOKENS))
    assert features.last_hidden_state.shape == (2, 17, 32)


def test_pictures_read_before_give_the_same_logits(model: MiniGPT4ForConditionalGeneration) -> None:
    ids, pixels = torch.tensor([tiny.row(2, 5)]), tiny.pictures(2)
    with torch.no_grad():
        features = model.get_image_features(pixels)
        expected = model(input_ids=ids, pixel_values=pixels)
        actual = model(input_ids=ids, mm_encoder_outputs={"image": features})
    assert torch.equal(actual.logits, expected.logits)
    assert torch.equal(actual.image_hidden_states, features.pooler_output)


def test_vision_tokens_from_a_store_can_be_aligned_later(model: MiniGPT4ForConditionalGeneration) -> None:
    pixels = tiny.pictures(2)
    with torch.no_grad():
        stored = BaseModelOutputWithPooling(last_hidden_state=model.model.vision_model(pixels).last_hidden_state)
        aligned = model.model.align_image_features(stored).pooler_output
        assert torch.equal(aligned, model.get_image_features(pixels).pooler_output)


def test_both_kinds_of_picture_at_once_are_refused(model: MiniGPT4ForConditionalGeneration) -> None:
    pixels = tiny.pictures(1)
    features = model.get_image_features(pixels)
    with pytest.raises(ValueError, match="both pixel_values and mm_encoder_outputs"):
        model(input_ids=torch.tensor([tiny.row(1, 1)]), pixel_values=pixels, mm_encoder_outputs={"image": features})


def test_ids_and_embeddings_exclude_each_other(model: MiniGPT4ForConditionalGeneration) -> None:
    ids = torch.tensor([tiny.row(0, 3)])
    for inputs in ({}, {"input_ids": ids, "inputs_embeds": model.get_input_embeddings()(ids)}):
        with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
            model(**inputs)


@pytest.mark.parametrize(("places", "given"), [(1, 2), (2, 1), (0, 1)])
def test_pictures_that_do_not_match_their_places_are_refused_with_both_numbers(
    model: MiniGPT4ForConditionalGeneration, places: int, given: int
) -> None:
    numbers = (places * tiny.NUM_IMAGE_TOKENS, given * tiny.NUM_IMAGE_TOKENS)
    with pytest.raises(ValueError, match=r"tokens: {}\b.*features {}$".format(*numbers)):
        model(input_ids=torch.tensor([tiny.row(places, 4)]), pixel_values=tiny.pictures(given))


@pytest.mark.parametrize("qformer", [True, False])
def test_left_padded_rows_with_no_one_and_two_pictures_are_read_as_alone(qformer: bool) -> None:
    model = tiny.model(qformer=qformer)
    rows = [tiny.row(0, 3), tiny.row(1, 7, seed=1), tiny.row(2, 2, seed=2)]
    pixels = tiny.pictures(3)
    with torch.no_grad():
        together = model(**tiny.batch(rows), pixel_values=pixels).logits
        alone = [
            model(input_ids=torch.tensor([ids]), pixel_values=pixels[slice(*owned)] if owned else None).logits[0]
            for ids, owned in zip(rows, [None, (0, 1), (1, 3)], strict=True)
        ]
    for row, expected in zip(together, alone, strict=True):
        torch.testing.assert_close(row[-len(expected) :], expected, **ROUNDING)


@pytest.mark.parametrize("text", tiny.TEXT)
def test_reading_in_pieces_with_a_cache_gives_the_logits_of_reading_at_once(text: str) -> None:
    model = tiny.model(text=text)
    ids, pixels = torch.tensor([tiny.row(1, 3) + tiny.row(1, 6, seed=1)]), tiny.pictures(2)
    first = len(tiny.row(1, 3))
    with torch.no_grad():
        whole = model(input_ids=ids, pixel_values=pixels, use_cache=False).logits
        start = model(input_ids=ids[:, :first], pixel_values=pixels[:1], use_cache=True)
        cache, pieces = start.past_key_values, [start.logits]
        second = model(input_ids=ids[:, first:-3], pixel_values=pixels[1:], past_key_values=cache)
        pieces.append(second.logits)
        for place in range(ids.shape[1] - 3, ids.shape[1]):
            pieces.append(model(input_ids=ids[:, place : place + 1], past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, **ROUNDING)


def test_only_the_asked_places_get_logits(model: MiniGPT4ForConditionalGeneration) -> None:
    whole = logits(model)
    torch.testing.assert_close(logits(model, logits_to_keep=1), whole[:, -1:], **ROUNDING)
    chosen = torch.tensor([0, 4])
    torch.testing.assert_close(logits(model, logits_to_keep=chosen), whole[:, chosen], **ROUNDING)


def test_loss_is_the_mean_cross_entropy_of_the_next_labelled_word(model: MiniGPT4ForConditionalGeneration) -> None:
    ids, pixels = torch.tensor([tiny.row(1, 6)]), tiny.pictures(1)
    labels = ids.clone()
    labels[:, :-4] = -100
    with torch.no_grad():
        output = model(input_ids=ids, pixel_values=pixels, labels=labels)
    expected = torch.nn.functional.cross_entropy(output.logits[0, -5:-1], ids[0, -4:])
    torch.testing.assert_close(output.loss, expected, rtol=0.0, atol=1e-6)


def test_tuple_output_has_the_fields_of_the_named_one(model: MiniGPT4ForConditionalGeneration) -> None:
    inputs = {"input_ids": torch.tensor([tiny.row(1, 2)]), "pixel_values": tiny.pictures(1)}
    with torch.no_grad():
        named, plain = model(**inputs, use_cache=False), model(**inputs, use_cache=False, return_dict=False)
    assert torch.equal(plain[0], named.logits)
    assert torch.equal(plain[-1], named.image_hidden_states)


def test_configuration_can_ask_for_tuples_throughout() -> None:
    model = tiny.model()
    ids, pixels = torch.tensor([tiny.row(1, 2)]), tiny.pictures(1)
    with torch.no_grad():
        named, features = model(input_ids=ids, pixel_values=pixels), model.get_image_features(pixels)
        model.config.return_dict = False
        plain = model(input_ids=ids, pixel_values=pixels)
        assert torch.equal(plain[0], named.logits)
        assert torch.equal(model.model(input_ids=ids, pixel_values=pixels)[-1], named.image_hidden_states)
        assert torch.equal(model.get_image_features(pixels)[1], features.pooler_output)
        assert torch.equal(model(input_ids=ids, pixel_values=pixels, return_dict=True).logits, named.logits)


@pytest.mark.parametrize("how", ["argument", "configuration"])
@pytest.mark.parametrize("vision", tiny.VISION)
def test_states_and_attentions_of_every_layer_can_be_had(vision: str, how: str) -> None:
    model = tiny.model(vision=vision)
    model.set_attn_implementation("eager")
    options = {"output_hidden_states": True, "output_attentions": True}
    if how == "configuration":
        for config in (model.config, model.config.vision_config, model.config.qformer_config, model.config.text_config):
            for name, value in options.items():
                setattr(config, name, value)
        options = {}
    ids, pixels = torch.tensor([tiny.row(1, 3)]), tiny.pictures(1)
    with torch.no_grad():
        output = model(input_ids=ids, pixel_values=pixels, **options)
        features = model.get_image_features(pixels, **options)
    length = ids.shape[1]
    assert [tuple(states.shape) for states in output.hidden_states] == [(1, length, 64)] * 3
    assert [tuple(map_.shape) for map_ in output.attentions] == [(1, 2, length, length)] * 2
    assert len(features.hidden_states) == 3  # two layers or stages, and what went in
    assert features.cross_attentions is not None
    assert vision == "efficientnet_lite" or len(features.attentions) == 2


def test_merge_joins_four_neighbours_of_one_row_and_drops_the_class_token() -> None:
    model = tiny.model(qformer=False)
    pixels = tiny.pictures(2)
    with torch.no_grad():
        tokens = model.model.vision_model(pixels).last_hidden_state
        features = model.get_image_features(pixels).pooler_output
    assert tokens.shape == (2, 17, 32)
    strips = torch.stack(
        [torch.cat([tokens[:, 1 + 4 * strip + place] for place in range(4)], -1) for strip in range(4)]
    )
    projection = model.model.language_projection
    expected = strips.transpose(0, 1) @ projection.weight.T + projection.bias
    torch.testing.assert_close(features, expected, rtol=0.0, atol=1e-5)


def test_concept_words_start_the_first_queries_and_leave_the_others_alone() -> None:
    model = tiny.model(vision="efficientnet_lite")
    seen = model.model.vision_model(tiny.pictures(2))
    given: dict[str, torch.Tensor] = {}
    hook = model.model.qformer.register_forward_pre_hook(
        lambda _module, _args, kwargs: given.update(kwargs), with_kwargs=True
    )
    with torch.no_grad():
        with_words = model.get_image_features(tiny.pictures(2)).pooler_output
        plain = BaseModelOutputWithPooling(last_hidden_state=seen.last_hidden_state)
        queries = given["query_embeds"]
        without_words = model.model.align_image_features(plain).pooler_output
    hook.remove()
    words = seen.concept_embeds.detach()
    assert words.shape == (2, 2, 32) and words.abs().min() > 0
    learned = model.model.query_tokens.detach().expand(2, -1, -1)
    assert torch.equal(queries[:, :2], learned[:, :2] + words)
    assert torch.equal(queries[:, 2:], learned[:, 2:])
    assert (with_words - without_words).abs().max() > 1e-3


@pytest.mark.parametrize("qformer", [True, False])
def test_bfloat16_follows_float32(tmp_path: Path, qformer: bool) -> None:
    model = tiny.model(qformer=qformer)
    exact = logits(model, num_pictures=2)
    model.save_pretrained(tmp_path)
    short = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in short.parameters()} == {torch.bfloat16}
    actual = logits(short, num_pictures=2)
    assert actual.dtype == torch.bfloat16
    # 8 bits of precision through some ten layers.
    assert (actual.float() - exact).abs().mean() < 0.05 * exact.std()


def test_new_model_of_a_half_precision_language_model_answers() -> None:
    config = tiny.config()
    config.text_config.dtype = torch.bfloat16
    model = MiniGPT4ForConditionalGeneration(config).eval()
    assert model.model.language_model.dtype == model.lm_head.weight.dtype == torch.bfloat16
    assert model.model.language_projection.weight.dtype == torch.float32
    assert logits(model).isfinite().all()


@pytest.mark.parametrize("device_map", ["auto", {"": "cpu"}])
def test_placement_by_a_device_map_changes_nothing(tmp_path: Path, device_map: str | dict[str, str]) -> None:
    model = tiny.model()
    model.save_pretrained(tmp_path)
    placed = AutoModelForImageTextToText.from_pretrained(tmp_path, device_map=device_map)
    assert torch.equal(logits(placed), logits(model))


def test_new_rows_can_be_added_to_the_vocabulary() -> None:
    model = tiny.model(text="llama, tied")
    expected = logits(model)
    model.resize_token_embeddings(tiny.VOCABULARY + 8, mean_resizing=False)
    assert model.config.text_config.vocab_size == tiny.VOCABULARY + 8
    assert torch.equal(logits(model)[..., : tiny.VOCABULARY], expected)


def test_new_weights_follow_the_configurations_deviation() -> None:
    torch.manual_seed(0)
    joined = MiniGPT4ForConditionalGeneration(tiny.config()).model
    assert 0.15 < joined.query_tokens.std() < 0.25
    assert 0.18 < joined.language_projection.weight.std() < 0.22
    assert joined.language_projection.bias.abs().max() == 0
