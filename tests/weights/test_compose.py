"""A model is put together of any vision encoder and any language model; both work in it as they do alone.

The parts are tiny and random, in folders as the library writes them. Features and numbers of tensors are compared
exactly, logits of float32 to 1e-5.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

import minigpt4
from minigpt4.errors import ConfigError, MiniGPT4Error, PromptError, StorageError, WeightsError
from minigpt4.training.recipe import make_recipe
from minigpt4.training.run import run
from minigpt4.weights.compose import COMPOSED_FILE, compose
from tests import tiny_chat
from tests.processing.tiny_tokenizers import byte_level_kind, sentencepiece_model

SIDE = 28
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "initializer_range": 0.2,
}
SEES: dict[str, Any] = {**SIZES, "image_size": SIDE, "patch_size": 7}
PICTURES: dict[str, Any] = {
    "size": {"height": SIDE, "width": SIDE},
    "image_mean": [0.5, 0.4, 0.3],
    "image_std": [0.2, 0.3, 0.4],
    "resample": 2,
}
CROPPED = {**PICTURES, "size": {"shortest_edge": 32}, "crop_size": {"height": SIDE, "width": SIDE}}
TEXT = {**SIZES, "vocab_size": 60}

# The library's class, its configuration, its settings for pictures, and where the vision encoder is in it.
VISION: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {
    "dinov2": ("Dinov2Model", {**SEES, "image_size": 42}, CROPPED, ""),  # configured for larger pictures
    "registers": ("Dinov2WithRegistersModel", {**SEES, "num_register_tokens": 3}, CROPPED, ""),
    "vit": ("ViTForImageClassification", SEES, {**PICTURES, "size": SIDE}, "vit"),
    "clip": ("CLIPModel", {"vision_config": SEES, "text_config": TEXT, "projection_dim": 8}, CROPPED, "vision_model"),
    "clip alone": ("CLIPVisionModel", SEES, CROPPED, ""),
    "siglip": ("SiglipModel", {"vision_config": SEES, "text_config": TEXT}, PICTURES, "vision_model"),
    "blip-2": (
        "Blip2Model",
        {
            "vision_config": SEES,
            "qformer_config": {**SIZES, "vocab_size": 60},
            "text_config": {"model_type": "opt", **TEXT, "ffn_dim": 32, "word_embed_proj_dim": 32},
        },
        PICTURES,
        "vision_model",
    ),
    "swin": (
        "SwinModel",
        {"image_size": SIDE, "patch_size": 7, "embed_dim": 16, "depths": [1, 1], "num_heads": [1, 2], "window_size": 2},
        PICTURES,
        "",
    ),
}
# Class and register tokens, and those that stand for a place.
PATCHES = [("dinov2", 1, 16), ("registers", 4, 16), ("siglip", 0, 16), ("clip", 1, 16), ("swin", 0, 4)]

_SPEAKS = {**SIZES, "max_position_embeddings": 512, "num_key_value_heads": 1, "bos_token_id": 0, "eos_token_id": 1}
# The configuration, rows of the table more than tokens, and control tokens of the tokenizer besides ChatML's.
LANGUAGE: dict[str, tuple[dict[str, Any], int, list[str]]] = {
    "llama": ({"model_type": "llama", **_SPEAKS}, 0, ["<|reserved_special_token_0|>"]),
    "qwen2": ({"model_type": "qwen2", **_SPEAKS, "tie_word_embeddings": True}, 0, ["<|image_pad|>", "<|endoftext|>"]),
    "qwen3": ({"model_type": "qwen3", **_SPEAKS, "head_dim": 16}, 24, []),  # a padded table
    "gpt2": ({"model_type": "gpt2", **SIZES, "n_positions": 512}, 0, []),  # the table has to grow; it is the head, too
    "phi": ({"model_type": "phi", **_SPEAKS}, 0, []),  # a head of its own, with a bias, has to grow
    "gemma": ({"model_type": "gemma", **_SPEAKS, "head_dim": 16}, 0, []),
    "mixtral": ({"model_type": "mixtral", **_SPEAKS, "num_local_experts": 2}, 0, []),
}

Parts = Callable[[str], Path]
Whole = Callable[..., Path]


def make_vision(folder: Path, name: str) -> Path:
    kind, sizes, pictures, _ = VISION[name]
    torch.manual_seed(0)
    model_class = getattr(transformers, kind)
    model = model_class(model_class.config_class(**sizes))
    with torch.no_grad():
        for parameter in model.parameters():  # BLIP-2's start near zero
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(pictures))
    return folder


def tokenizer(controls: list[str]) -> PreTrainedTokenizerFast:
    """A tokenizer with ChatML's control tokens and these."""
    content = json.loads(byte_level_kind().backend_tokenizer.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] != "<image>"]
    made = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(content)), bos_token="<s>", eos_token="</s>"
    )
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>", *controls]})
    return made


def make_language(folder: Path, name: str, dtype: torch.dtype = torch.float32) -> Path:
    sizes, more_rows, controls = LANGUAGE[name]
    words = tokenizer(controls)
    sizes = {**sizes, "vocab_size": len(words) + more_rows}
    config = CONFIG_MAPPING[sizes.pop("model_type")](**sizes)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    """Every part by its name, made once."""
    root = tmp_path_factory.mktemp("parts")

    def part(name: str) -> Path:
        folder = root / name.replace(" ", "-")
        if not folder.exists():
            (make_vision if name in VISION else make_language)(folder, name)
        return folder

    return part


def composed(target: Path, vision: Path, language: Path, **choices: Any) -> Path:
    small = {"qformer_layers": 2, "num_query_tokens": 5}
    return compose(target, vision_model=str(vision), language_model=str(language), **{**small, **choices})


@pytest.fixture(scope="module")
def whole(parts: Parts, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """Two parts put together by their names, made once for all tests that only read."""
    made: dict[tuple[str, ...], Path] = {}

    def put_together(vision: str, language: str, qformer: str = "new") -> Path:
        names = (vision, language, qformer)
        if names not in made:
            target = tmp_path_factory.mktemp("whole") / "model"
            made[names] = composed(target, parts(vision), parts(language), qformer=qformer)
        return made[names]

    return put_together


def answer(folder: Path) -> str:
    model, processor = minigpt4.load(folder, device="cpu")
    chat = minigpt4.ChatSession(model, processor)
    chat.add_image(tiny_chat.picture())
    return chat.ask("What is it?", max_new_tokens=8)


@pytest.mark.parametrize("name", VISION)
def test_vision_encoder_sees_what_it_sees_alone(name: str, parts: Parts, whole: Whole) -> None:
    model, processor = minigpt4.load(whole(name, "llama"), device="cpu")

    kind, _, _, place = VISION[name]
    alone = getattr(transformers, kind).from_pretrained(parts(name)).eval()
    alone = getattr(alone, place) if place else alone
    pixels = processor.image_processor([tiny_chat.picture()], return_tensors="pt").pixel_values
    with torch.no_grad():
        assert torch.equal(model.model.vision_model(pixels).last_hidden_state, alone(pixels).last_hidden_state)
        seen = model.get_image_features(pixels).pooler_output
    assert seen.shape == (1, 5, 32)
    assert torch.isfinite(seen).all()


@pytest.mark.parametrize(("name", "prefix", "patches"), PATCHES)
def test_tokens_are_joined_by_fours_without_a_qformer(name: str, prefix: int, patches: int, whole: Whole) -> None:
    folder = whole(name, "llama", "none")

    model, processor = minigpt4.load(folder, device="cpu")
    assert (model.config.num_prefix_tokens, model.config.num_image_tokens) == (prefix, patches // 4)
    assert processor.num_image_tokens == patches // 4
    assert model.config.trainable_parts == ["language_projection"]
    assert isinstance(answer(folder), str)


@pytest.mark.parametrize("name", LANGUAGE)
def test_language_model_speaks_as_it_does_alone(name: str, parts: Parts, whole: Whole, tmp_path: Path) -> None:
    folder = whole("siglip", name)
    model, processor = minigpt4.load(folder, device="cpu")
    alone = AutoModelForCausalLM.from_pretrained(parts(name)).eval()

    ids = torch.tensor([[0, *range(10, 40)]])
    with torch.no_grad():
        expected = alone(input_ids=ids).logits
        actual = model(input_ids=ids).logits[..., : expected.shape[-1]]
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
    assert expected.std() > 0.05

    said = answer(folder)
    model.save_pretrained(tmp_path / "again")
    processor.save_pretrained(tmp_path / "again")
    assert answer(tmp_path / "again") == said


@pytest.mark.parametrize(
    ("name", "token", "rows_more"),
    [
        ("llama", "<|reserved_special_token_0|>", 0),
        ("qwen2", "<|image_pad|>", 0),
        ("qwen3", "<image>", 0),
        ("gpt2", "<image>", 1),
        ("phi", "<image>", 1),
    ],
)
def test_picture_has_a_token_that_no_text_makes_and_no_answer_says(
    name: str, token: str, rows_more: int, parts: Parts, whole: Whole
) -> None:
    model, processor = minigpt4.load(whole("siglip", name), device="cpu")

    rows = AutoModelForCausalLM.from_pretrained(parts(name)).config.vocab_size
    assert processor.image_token == token
    assert processor.image_token_id == model.config.image_token_id < model.config.text_config.vocab_size
    assert model.config.text_config.vocab_size == len(model.get_input_embeddings().weight) == rows + rows_more
    assert model.lm_head.weight.shape[0] == rows + rows_more
    typed = processor.encode([{"role": "user", "content": f"{token} is typed"}])
    assert model.config.image_token_id not in typed.input_ids

    with torch.no_grad():
        model.lm_head.weight.zero_()
        if model.lm_head.bias is None:
            model.lm_head.bias = torch.nn.Parameter(torch.zeros(rows + rows_more))
        model.lm_head.bias.zero_()
        model.lm_head.bias[model.config.image_token_id] = 5.0
    said = model.generate(torch.tensor([[0, 9]]), max_new_tokens=3, do_sample=False)
    assert model.config.image_token_id not in said[0].tolist()


def test_llama_of_the_first_kind_holds_pictures_by_its_unknown_token(parts: Parts, tmp_path: Path) -> None:
    language = tmp_path / "llama"
    config = CONFIG_MAPPING["llama"](**{**_SPEAKS, "vocab_size": 380, "bos_token_id": 1, "eos_token_id": 2})
    AutoModelForCausalLM.from_config(config).save_pretrained(language)
    (language / "tokenizer.model").write_bytes(sentencepiece_model())

    folder = composed(tmp_path / "model", parts("clip"), language, template="vicuna-v0")

    _, processor = minigpt4.load(folder, device="cpu")
    assert (processor.image_token, processor.image_token_id) == ("<unk>", 0)
    assert processor.template == "vicuna-v0"
    assert isinstance(answer(folder), str)


def test_answer_ends_where_template_tokenizer_and_makers_say(parts: Parts, tmp_path: Path) -> None:
    language = shutil.copytree(parts("qwen3"), tmp_path / "language")
    (language / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 20, 21], "temperature": 0.6}))

    model, processor = minigpt4.load(composed(tmp_path / "model", parts("vit"), language), device="cpu")

    ends = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert model.generation_config.eos_token_id == [ends, 1, 20, 21]
    assert model.generation_config.pad_token_id == 1
    assert not model.generation_config.do_sample


def test_pictures_are_scaled_as_the_encoder_was_trained(whole: Whole) -> None:
    _, processor = minigpt4.load(whole("vit", "llama"), device="cpu")

    picture = Image.fromarray(np.random.default_rng(1).integers(0, 256, (40, 60, 3), dtype=np.uint8))
    ours = processor.image_processor([picture], return_tensors="pt").pixel_values
    library = ViTImageProcessorPil(**PICTURES)([picture], return_tensors="pt").pixel_values
    assert torch.equal(ours, library)


def test_whole_picture_is_seen_where_the_middle_would_be_cut_out(whole: Whole) -> None:
    _, processor = minigpt4.load(whole("clip", "llama"), device="cpu")

    picture = Image.new("RGB", (90, 30), "black")
    picture.paste("white", (0, 0, 10, 30))  # out of the middle
    pixels = processor.image_processor([picture], return_tensors="pt").pixel_values
    assert pixels.shape == (1, 3, SIDE, SIDE)
    assert (pixels[0, :, :, 0] > pixels[0, :, :, -1]).all()


@pytest.mark.parametrize("inside", [True, False])
def test_settings_are_found_in_newer_folders_too(inside: bool, parts: Parts, tmp_path: Path) -> None:
    vision = shutil.copytree(parts("siglip"), tmp_path / "vision")
    (vision / "preprocessor_config.json").unlink()
    content = {"image_processor": PICTURES} if inside else {"processor_class": "SiglipProcessor"}
    (vision / "processor_config.json").write_text(json.dumps(content))

    if inside:
        _, processor = minigpt4.load(composed(tmp_path / "model", vision, parts("llama")), device="cpu")
        assert processor.image_processor.image_mean == tuple(PICTURES["image_mean"])
    else:
        with pytest.raises(WeightsError, match=r"has no preprocessor_config\.json"):
            composed(tmp_path / "model", vision, parts("llama"))


def test_parts_keep_their_numbers_and_number_type(parts: Parts, tmp_path: Path) -> None:
    language = make_language(tmp_path / "language", "gpt2", dtype=torch.bfloat16)

    folder = composed(tmp_path / "model", parts("dinov2"), language)

    whole, stored = load_file(folder / "model.safetensors"), load_file(language / "model.safetensors")
    for name, tensor in stored.items():
        kept = whole[f"model.language_model.{name.removeprefix('transformer.')}"]
        assert kept.dtype == torch.bfloat16
        assert torch.equal(kept[: len(tensor)], tensor), name
    table = whole["model.language_model.wte.weight"]
    assert len(table) == len(stored["transformer.wte.weight"]) + 1
    torch.testing.assert_close(table[-1].float(), table[:-1].float().mean(dim=0), rtol=0.01, atol=1e-3)


def test_encoder_inside_a_larger_model_keeps_its_number_type(parts: Parts, tmp_path: Path) -> None:
    vision = shutil.copytree(parts("clip"), tmp_path / "vision")
    stored = load_file(vision / "model.safetensors")
    halves = {name: t if name.startswith("vision_model.") else t.bfloat16() for name, t in stored.items()}
    save_file(halves, vision / "model.safetensors", metadata={"format": "pt"})
    _with_config(dtype="bfloat16", vision_config={**SEES, "model_type": "clip_vision_model"})(vision)

    whole = load_file(composed(tmp_path / "model", vision, parts("llama")) / "model.safetensors")

    seen = {name: tensor for name, tensor in whole.items() if name.startswith("model.vision_model.")}
    assert len(seen) > 30
    assert all(torch.equal(tensor, stored[name.removeprefix("model.")]) for name, tensor in seen.items())


def test_new_parts_come_from_the_seed_alone(parts: Parts, tmp_path: Path) -> None:
    def made(name: str, seed: int) -> bytes:
        folder = composed(tmp_path / name, parts("siglip"), parts("llama"), seed=seed)
        return (folder / "model.safetensors").read_bytes()

    torch.manual_seed(5)
    drawn = torch.rand(3)
    torch.manual_seed(5)
    first = made("one", 1)
    assert torch.equal(torch.rand(3), drawn), "the caller's random numbers were used up"
    torch.manual_seed(8)
    assert made("two", 1) == first
    assert made("three", 2) != first


@pytest.mark.parametrize("language", ["llama", "gemma"])
def test_new_projection_speaks_at_the_loudness_of_words(language: str, whole: Whole) -> None:
    model, processor = minigpt4.load(whole("siglip", language), device="cpu")

    table = model.get_input_embeddings()(torch.arange(300)).detach()  # Gemma's are scaled
    pixels = processor.image_processor([tiny_chat.picture()], return_tensors="pt").pixel_values
    with torch.no_grad():
        spoken = model.get_image_features(pixels).pooler_output - table.mean(dim=0)
    assert 0.5 < spoken.std() / table.std() < 2


def test_a_model_of_the_same_parts_is_not_made_again(parts: Parts, tmp_path: Path) -> None:
    vision = shutil.copytree(parts("vit"), tmp_path / "vision")
    folder = composed(tmp_path / "model", vision, parts("llama"))
    before = (folder / "model.safetensors").stat().st_mtime_ns
    shutil.rmtree(vision)  # not needed again

    assert composed(tmp_path / "model", vision, parts("llama")) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(ConfigError, match="was put together with num_query_tokens 5, now it is 6"):
        composed(tmp_path / "model", vision, parts("llama"), num_query_tokens=6)
    with pytest.raises(ConfigError, match="was put together with language_model"):
        composed(tmp_path / "model", vision, parts("qwen2"))
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(WeightsError, match="is 0 bytes"):
        composed(tmp_path / "model", vision, parts("llama"))


def test_another_folder_is_not_touched(parts: Parts, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "letter.txt").write_text("dear")

    with pytest.raises(StorageError, match="exists already"):
        composed(tmp_path / "model", parts("vit"), parts("llama"))
    assert (tmp_path / "model" / "letter.txt").read_text() == "dear"


def _without(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).unlink()


def _with_config(**changes: Any) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        content = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**content, **changes}))

    return change


def _with_pictures(**changes: Any) -> Callable[[Path], object]:
    return lambda folder: (folder / "preprocessor_config.json").write_text(json.dumps({**PICTURES, **changes}))


def _without_tensor(end: str) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        kept = {name: tensor for name, tensor in tensors.items() if not name.endswith(end)}
        assert len(kept) < len(tensors)
        save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})

    return change


def _cut_off(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


@pytest.mark.parametrize(
    ("name", "change", "complaint"),
    [
        ("vit", shutil.rmtree, "there is no vision encoder"),
        ("vit", _without("config.json"), r"the vision encoder .* has no config\.json"),
        ("vit", _without("model.safetensors"), "has no tensors in safetensors files"),
        ("vit", _without("preprocessor_config.json"), r"has no preprocessor_config\.json"),
        ("vit", _with_config(model_type="my_own"), "of no kind that transformers knows"),
        ("vit", _with_config(model_type="llama"), "reads no pictures alone"),
        ("vit", _with_config(model_type="vit_mae"), "hides most of a picture by chance"),
        (
            "vit",
            _with_config(model_type="resnet", depths=[1, 1, 1, 1], hidden_sizes=[8] * 4),
            "makes a map of the shape",
        ),
        ("vit", _with_config(quantization_config={"quant_method": "bitsandbytes"}), "is quantized"),
        ("vit", _with_pictures(size=35), "does not read a picture of 35 x 35 pixels"),
        ("vit", _with_pictures(size="large"), "whose size is large, expected a height and a width"),
        ("vit", _with_pictures(image_std=None), "settings for pictures without image_std"),
        ("vit", _without_tensor("layernorm_after.bias"), "lacks the tensor .*layernorm_after.bias"),
        ("siglip", _without_tensor("vision_model.post_layernorm.bias"), "lacks the tensor post_layernorm.bias"),
        ("siglip", _cut_off, "the vision encoder .* cannot be loaded|was not opened: it is damaged"),
        ("qwen3", shutil.rmtree, "there is no language model"),
        ("qwen3", _with_config(model_type="vit"), "of the kind vit, which is no causal language model"),
        ("qwen3", _with_config(vocab_size=300), "has the id [0-9]+, while the language model's table has 300 rows"),
        ("qwen3", _with_config(max_position_embeddings=20), "reads less than 20"),
        ("qwen3", _with_config(quantization_config={"quant_method": "gptq", "bits": 4}), "is quantized"),
        ("qwen3", _without("tokenizer.json"), "the tokenizer of the language model"),
        ("qwen3", _without_tensor("q_proj.weight"), "lacks the tensor .*q_proj.weight"),
        ("qwen3", _cut_off, "the language model .* cannot be loaded"),
    ],
)
def test_what_cannot_be_a_part_is_refused_and_leaves_nothing(
    name: str, change: Callable[[Path], object], complaint: str, parts: Parts, tmp_path: Path
) -> None:
    changed = shutil.copytree(parts(name), tmp_path / "changed")
    change(changed)
    pair = (changed, parts("llama")) if name in VISION else (parts("vit"), changed)

    with pytest.raises(MiniGPT4Error, match=complaint) as told:
        composed(tmp_path / "out" / "model", *pair)

    assert str(changed) in told.value.message
    assert told.value.hint
    assert "\n" not in told.value.message
    assert not list(tmp_path.glob("out/*"))


def test_template_that_the_tokenizer_cannot_write_is_refused_with_those_it_can(parts: Parts, tmp_path: Path) -> None:
    language = shutil.copytree(parts("gpt2"), tmp_path / "language")
    content = (language / "tokenizer.json").read_text()
    (language / "tokenizer.json").write_text(content.replace("<|im_", "<|other_"))
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (language / name).exists():
            (language / name).write_text((language / name).read_text().replace("<|im_", "<|other_"))

    with pytest.raises(ConfigError, match=r"template chatml does not fit .* no control token '<\|im_start\|>'") as told:
        composed(tmp_path / "model", parts("vit"), language)
    assert "vicuna-v0" in told.value.hint
    assert "chatml" not in told.value.hint
    assert isinstance(answer(composed(tmp_path / "model", parts("vit"), language, template="vicuna-v0")), str)


def test_unknown_template_is_refused_before_anything_is_looked_at(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match="no prompt template 'chatlm'"):
        composed(tmp_path / "model", tmp_path / "vision", tmp_path / "language", template="chatlm")


def test_odd_number_of_patches_needs_a_qformer(parts: Parts, tmp_path: Path) -> None:
    vision = shutil.copytree(parts("dinov2"), tmp_path / "vision")
    _with_pictures(size=35)(vision)

    with pytest.raises(ConfigError, match="makes 25 patch tokens of a picture") as told:
        composed(tmp_path / "model", vision, parts("llama"), qformer="none")
    assert "qformer" in told.value.hint
    assert isinstance(answer(composed(tmp_path / "model", vision, parts("llama"))), str)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for colour in ("red", "green", "blue", "white"):
        Image.new("RGB", (24, 24), colour).save(folder / f"{colour}.png")
        (folder / f"{colour}.txt").write_text(f"it is {colour}")
    return folder


@pytest.mark.parametrize("qformer", ["new", "none"])
def test_recipe_of_parts_trains_what_is_new_and_its_folder_can_be_moved(
    qformer: str, parts: Parts, pictures: Path, tmp_path: Path
) -> None:
    named = {"vision_model": str(parts("clip")), "language_model": str(parts("qwen2")), "qformer": qformer}
    stage = {"name": "only", "steps": 2, "batch_size": 2, "learning_rate": 0.01, "warmup_steps": 0}
    content = {
        "model": {**named, "qformer_layers": 2, "num_query_tokens": 5},
        "output": str(tmp_path / "run"),
        "data": {"sources": [{"path": str(pictures)}]},
        "stages": [stage],
        "workers": 0,
    }
    recipe = make_recipe(content, Path("made up"))

    alignment = run(recipe)

    began = load_file(tmp_path / "run" / "model" / "model.safetensors")
    learnt = load_file(alignment / "alignment.safetensors")
    expected = {"query_tokens", "qformer", "language_projection"} if qformer == "new" else {"language_projection"}
    assert {name.partition(".")[0] for name in learnt} == expected
    assert any(not torch.equal(tensor, began[f"model.{name}"]) for name, tensor in learnt.items())
    assert json.loads((alignment / "alignment.json").read_text())["frozen_parts"] == "../model"
    said = answer(alignment)
    shutil.move(tmp_path / "run", tmp_path / "elsewhere")
    assert answer(tmp_path / "elsewhere" / "alignment") == said

    shutil.move(tmp_path / "elsewhere", tmp_path / "run")
    written = (tmp_path / "run" / "model" / COMPOSED_FILE).stat().st_mtime_ns
    assert run(recipe) == alignment
    assert (tmp_path / "run" / "model" / COMPOSED_FILE).stat().st_mtime_ns == written
