"""The original's files, imported by one command's worth of code, give the numbers that the original code recorded.

Every test runs twice: on the model folder as it was imported, and after import, save, load, save, export, import. Ids
and strings are equal; floats lie within `RELATIVE` of the largest value of their tensor (reached: about 1e-6).
"""

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

import minigpt4
from minigpt4.processing.messages import Message
from minigpt4.processing.text_encoding import TextEncoder
from minigpt4.weights.original.exporting import export_original
from minigpt4.weights.original.importing import import_original
from minigpt4.weights.original.names import OriginalFiles
from tests import golden

IMAGE = {"type": "image"}
RELATIVE = 1e-5
CLEAR = 1e-3  # a gap between the best two words that rounding cannot close
WAYS = ("imported", "and back")

Loaded = tuple[minigpt4.MiniGPT4ForConditionalGeneration, minigpt4.MiniGPT4Processor]

pytestmark = pytest.mark.reference


@pytest.fixture(scope="module", params=WAYS)
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    """The model and its processor."""
    folder = tmp_path_factory.mktemp("models")
    first = imported(folder / "first")
    if request.param == "imported":
        return minigpt4.load(first, device="cpu")
    return minigpt4.load(there_and_back(first, folder), device="cpu")


def files(vision: str = "eva_vit_g.pth", language_model: str = "vicuna") -> OriginalFiles:
    weights = golden.ROOT / "weights"
    return OriginalFiles(
        weights / vision,
        weights / language_model,
        weights / "blip2_pretrained_flant5xxl.pth",
        weights / "pretrained_minigpt4.pth",
    )


def settings() -> list[str]:
    """What shapes cannot tell."""
    sizes = golden.content("configs/tiny_dims.json")
    return [
        f"vision_config.num_attention_heads={sizes['vit']['num_heads']}",
        f"qformer_config.num_attention_heads={sizes['qformer']['num_attention_heads']}",
        f"vision_config.image_size={sizes['image_size']}",
    ]


def imported(target: Path, **other: str) -> Path:
    import_original(target, files(**other), overrides=settings())
    return target


def there_and_back(first: Path, folder: Path) -> Path:
    """Load, save as the library does, export, and import that."""
    model, processor = minigpt4.load(first, device="cpu")
    model.save_pretrained(folder / "saved")
    processor.save_pretrained(folder / "saved")
    export_original(folder / "saved", folder / "exported")
    exported = OriginalFiles(
        folder / "exported/eva_vit_g.pth",
        folder / "exported/language-model",
        folder / "exported/blip2_pretrained_flant5xxl.pth",
        folder / "exported/pretrained_minigpt4.pth",
    )
    import_original(folder / "second", exported, overrides=settings())
    return folder / "second"


def assert_close(actual: Tensor, recorded: Tensor, name: str) -> None:
    assert actual.shape == recorded.shape, name
    error = (actual - recorded).abs().max() / recorded.abs().max()
    assert error <= RELATIVE, f"{name}: {error:.1e}"


@torch.no_grad()
def test_picture_is_the_originals_after_every_layer(loaded: Loaded) -> None:
    model, recorded = loaded[0].model, golden.tensors("golden/vision.safetensors")
    seen = model.vision_model(recorded["pixel_values"], output_hidden_states=True)
    read = model.qformer(
        query_embeds=model.query_tokens.expand(len(recorded["pixel_values"]), -1, -1),
        encoder_hidden_states=seen.last_hidden_state,
        output_hidden_states=True,
    )
    actual = {f"vit_block_{place}": state for place, state in enumerate(seen.hidden_states[1:])}
    actual |= {f"qformer_layer_{place}": state for place, state in enumerate(read.hidden_states[1:])}
    patches = model.vision_model.embeddings.patch_embedding(recorded["pixel_values"])
    actual |= {
        "patch_embed": patches.flatten(2).transpose(1, 2),
        "vit_output": seen.hidden_states[-1],
        "ln_vision_output": seen.last_hidden_state,
        "qformer_embeddings": read.hidden_states[0],
        "qformer_output": read.last_hidden_state,
        "inputs_llama": model.get_image_features(recorded["pixel_values"]).pooler_output,
    }
    assert actual.keys() | {"pixel_values", "atts_llama"} == recorded.keys()
    assert recorded["atts_llama"].shape == actual["inputs_llama"].shape[:2]
    for name, tensor in actual.items():
        assert_close(tensor, recorded[name], name)


@torch.no_grad()
def test_small_inputs_show_the_originals_epsilons(loaded: Loaded) -> None:
    model, recorded = loaded[0].model, golden.tensors("golden/eps_probe.safetensors")
    norm = model.vision_model.post_layernorm(recorded["ln_vision_in"])
    block = model.vision_model.encoder.layers[1](recorded["vit_block1_in"])
    read = model.qformer(
        query_embeds=recorded["qformer_query_in"], encoder_hidden_states=recorded["qformer_encoder_in"]
    )
    logits = loaded[0](inputs_embeds=recorded["llama_inputs_embeds"]).logits
    for name, tensor in {
        "ln_vision_out": norm,
        "vit_block1_out": block[0] if isinstance(block, tuple) else block,
        "qformer_out": read.last_hidden_state,
        "llama_logits": logits,
    }.items():
        assert_close(tensor, recorded[name], name)


def test_pictures_become_the_recorded_pixels(loaded: Loaded) -> None:
    pictures = [Image.open(path) for path in sorted((golden.ROOT / "inputs").glob("img*.png"))]
    pixels = loaded[1].image_processor(pictures, return_tensors="pt").pixel_values
    assert torch.equal(pixels, golden.tensors("inputs/pixel_values.safetensors")["pixel_values"])
    odd = np.load(golden.ROOT / "golden/eval_image_processor_odd_sizes.npz")
    for number in range(len(odd.files) // 2):
        picture = Image.fromarray(odd[f"rgb_{number}"])
        made = loaded[1].image_processor([picture], return_tensors="pt").pixel_values[0]
        assert torch.equal(made, torch.from_numpy(odd[f"eval_{number}"])), number


def test_text_gets_the_slow_tokenizers_ids(loaded: Loaded) -> None:
    recorded, encoder = golden.content("golden/tokenizer.json"), TextEncoder(loaded[1].tokenizer)
    for case in recorded["encode"]:
        assert encoder.encode(case["text"], parse_special=True) == case["ids_no_special"], case["text"]
    tokenizer = loaded[1].tokenizer
    ids = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id, tokenizer.pad_token_id)
    assert ids == tuple(recorded[name] for name in ("bos", "eos", "unk", "pad"))
    assert len(tokenizer) == recorded["len"]


def training_batch(
    loaded: Loaded, case: dict[str, Any], prompt: str | None
) -> tuple[dict[str, Tensor], Tensor, list[list[int]]]:
    """A batch as the original lays it out: start, prompt round the picture, caption, padding on the right."""
    model, processor = loaded
    encoder, tokenizer = TextEncoder(processor.tokenizer), processor.tokenizer
    picture = [model.config.image_token_id] * model.config.num_image_tokens
    before, after = (
        ([], [])
        if prompt is None
        else (encoder.encode(half, parse_special=True) for half in prompt.split("<ImageHere>"))
    )
    start = [tokenizer.bos_token_id, *before, *picture, *after]
    captions = [
        encoder.encode(text + case["end_sym"], parse_special=True)[: case["max_txt_len"]] for text in case["text_input"]
    ]
    width = max(map(len, captions))
    pad = tokenizer.pad_token_id
    rows = [[*start, *caption, *[pad] * (width - len(caption))] for caption in captions]
    mask = [[1] * (len(start) + len(caption)) + [0] * (width - len(caption)) for caption in captions]
    labels = torch.tensor(rows)
    labels[:, : len(start)] = -100
    labels[labels == pad] = -100  # an end token inside a caption too: the original pads with it
    return {"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(mask)}, labels, captions


def test_training_step_has_the_recorded_labels_logits_loss_and_gradients(loaded: Loaded) -> None:
    model = loaded[0]
    pixels = golden.tensors("inputs/pixel_values.safetensors")["pixel_values"]
    compared = 0
    for name, case in golden.content("golden/train_forward.json")["cases"].items():
        recorded = golden.tensors(f"golden/train_forward_{name}.safetensors")
        prompt = case["prompt_used"]
        if "samples_type" in case:
            continue  # the original's prompt for visual questions is not recorded as text
        inputs, labels, captions = training_batch(loaded, case, prompt)
        for row, caption in enumerate(captions):
            assert recorded["to_regress_input_ids"][row, : len(caption)].tolist() == caption, name
        assert torch.equal(labels, recorded["targets"]), name
        assert torch.equal(inputs["attention_mask"], recorded["attention_mask"]), name
        given: dict[str, Tensor] = {}
        hook = model.model.language_model.register_forward_pre_hook(
            lambda _module, _args, kwargs, given=given: given.update(kwargs), with_kwargs=True
        )
        model.zero_grad()
        output = model(**inputs, pixel_values=pixels[case["image_index"]], labels=labels)
        output.loss.backward()
        hook.remove()
        assert_close(given["inputs_embeds"], recorded["inputs_embeds"], f"{name}: embeddings")
        read = inputs["attention_mask"].bool()  # what stands at padding is never read
        assert_close(output.logits[read], recorded["logits"][read], f"{name}: logits")
        assert_close(output.loss[None], recorded["loss"], f"{name}: loss")
        projection = model.model.language_projection
        assert_close(projection.weight.grad, recorded["grad_llama_proj_weight"], f"{name}: gradient of the weight")
        assert_close(projection.bias.grad, recorded["grad_llama_proj_bias"], f"{name}: gradient of the bias")
        compared += 1
    assert compared


def chats(start: str, path: str = "golden/generation.json") -> list[dict[str, Any]]:
    """The recorded conversations that compare: the same words had to come out whatever the rounding."""
    return [
        dialog
        for dialog in golden.content(path)["dialogs"]
        if start in dialog["name"] and all(turn.get("min_top2_gap", 1.0) > CLEAR for turn in dialog["turns"])
    ]


def prompt_ids(loaded: Loaded, dialog: dict[str, Any], number: int) -> tuple[list[int], list[int]]:
    """The ids of a turn's prompt, and which pictures it shows."""
    messages: list[Message] = []
    shown: list[int] = []
    for place, turn in enumerate(dialog["turns"][: number + 1]):
        new = dialog["images"] if place == 0 else [dialog["images_after"]["1"]] if dialog["images_after"] else []
        shown += new
        content = [IMAGE] * len(new) + [{"type": "text", "text": turn["user"]}]
        messages += [{"role": "user", "content": content}, {"role": "assistant", "content": turn["output_text"]}]
    return loaded[1].encode(messages[:-1]).input_ids, shown


@pytest.mark.parametrize(("start", "extra_end"), [("greedy_two", []), ("beam5_img", [2])])
def test_two_turns_have_the_recorded_ids(start: str, extra_end: list[int], loaded: Loaded) -> None:
    """Greedy and with five beams, which the original's library ended with one end token more."""
    model, processor = loaded
    pixels = golden.tensors("inputs/pixel_values.safetensors")["pixel_values"]
    dialogs = chats(start)
    assert len(dialogs) >= 3
    for dialog in dialogs:
        for number, turn in enumerate(dialog["turns"]):
            ids, shown = prompt_ids(loaded, dialog, number)
            assert len(ids) == turn["context_len"]
            answer = model.generate(
                input_ids=torch.tensor([ids]),
                attention_mask=torch.ones(1, len(ids), dtype=torch.long),
                pixel_values=pixels[shown],
                stop_strings=["###"],
                tokenizer=processor.tokenizer,
                do_sample=False,
                **dialog["answer_kwargs"],
            )
            assert [*answer[0, len(ids) :].tolist(), *extra_end] == turn["raw_sequence"][1:], (dialog["name"], number)


def test_conversation_says_what_the_originals_chat_said(loaded: Loaded) -> None:
    for dialog in [*chats("greedy_two"), *chats("beam5_img")]:
        chat = minigpt4.ChatSession(*loaded)
        for number, turn in enumerate(dialog["turns"]):
            new = dialog["images"] if number == 0 else [dialog["images_after"]["1"]] if dialog["images_after"] else []
            for picture in new:
                chat.add_image(golden.ROOT / f"inputs/img{picture}.png")
            assert chat.ask(turn["user"], **dialog["answer_kwargs"]) == turn["output_text"], (dialog["name"], number)


@pytest.mark.parametrize("folder", ["vicuna-LLaMATokenizer", "vicuna-decapoda-style"])
def test_broken_tokenizer_folders_give_the_same_chats(folder: str, tmp_path: Path) -> None:
    golden.recorded(f"weights/{folder}/pytorch_model-00001-of-00002.bin")
    made = import_original(tmp_path / "model", files(language_model=folder), overrides=settings())
    assert any("LLaMATokenizer" in note for note in made.notes)
    assert any("bos_token_id 0 and eos_token_id 1" in note for note in made.notes) == ("decapoda" in folder)
    loaded = minigpt4.load(tmp_path / "model", device="cpu")
    assert loaded[0].generation_config.eos_token_id == 2
    test_text_gets_the_slow_tokenizers_ids(loaded)
    for dialog in chats("decapoda_greedy", "golden/generation_decapoda_style.json"):
        chat = minigpt4.ChatSession(*loaded)
        chat.add_image(golden.ROOT / f"inputs/img{dialog['images'][0]}.png")
        for turn in dialog["turns"]:
            assert chat.ask(turn["user"], **dialog["answer_kwargs"]) == turn["output_text"]
            said = loaded[1].tokenizer.decode(turn["token_ids_after_strip"], skip_special_tokens=True)
            assert said.partition("###")[0].strip() == turn["output_text"]


@torch.no_grad()
def test_positions_of_another_grid_are_interpolated_as_the_original_does(tmp_path: Path) -> None:
    pixels = golden.tensors("inputs/pixel_values.safetensors")["pixel_values"]
    golden.recorded("golden/vision_interp_grid3x3.safetensors")
    variants = sorted((golden.ROOT / "golden").glob("vision_interp_*.safetensors"))
    for path in variants:
        name = f"eva_vit_g_{path.stem.removeprefix('vision_interp_')}.pth"
        target = imported(tmp_path / path.stem, vision=name)
        model, recorded = minigpt4.load(target, device="cpu")[0], load_file(path)
        features = model.get_image_features(pixels, output_hidden_states=True)
        table = model.model.vision_model.embeddings.position_embedding
        assert_close(table, recorded["pos_embed_interpolated"], "positions")
        assert_close(features.hidden_states[-1], recorded["vit_output"], "vit_output")
        assert_close(features.pooler_output, recorded["inputs_llama"], "inputs_llama")


@pytest.mark.parametrize(
    "other",
    ["blip2_with_text_side_keys.pth", "pretrained_minigpt4_amp_scaler.pth", "pretrained_minigpt4_minimal.pth"],
)
def test_other_forms_of_a_file_make_the_same_model(other: str, tmp_path: Path) -> None:
    usual = files()
    path = golden.recorded(f"weights/{other}")
    changed = (
        OriginalFiles(usual.vision, usual.language_model, path, usual.projection)
        if "blip2" in other
        else OriginalFiles(usual.vision, usual.language_model, usual.qformer, path)
    )
    import_original(tmp_path / "changed", changed, overrides=settings())
    one, two = tensors(imported(tmp_path / "usual")), tensors(tmp_path / "changed")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


@cache
def tensors(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def test_export_gives_every_used_tensor_back_bit_for_bit(tmp_path: Path) -> None:
    first = imported(tmp_path / "first")
    notes = export_original(first, tmp_path / "exported")
    assert notes == []
    for path in sorted((tmp_path / "exported").rglob("*")):
        if path.suffix not in (".pth", ".bin"):
            continue
        content = torch.load(path, weights_only=True)
        own = golden.ROOT / "weights"
        originals = sorted((own / "vicuna").glob("*.bin")) if path.suffix == ".bin" else [own / path.name]
        expected: dict[str, Tensor] = {}
        for original in originals:
            read = torch.load(original, weights_only=True)
            expected |= read.get("model", read)
        for name, tensor in content.get("model", content).items():
            if name == "minigpt4_num_blocks":
                continue
            assert tensor.dtype == expected[name].dtype, name
            assert torch.equal(tensor, expected[name]), name
    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
        kept = (tmp_path / "exported/language-model" / name).read_bytes()
        assert kept == (golden.ROOT / "weights/vicuna" / name).read_bytes()


def test_export_and_import_make_the_same_folder(tmp_path: Path) -> None:
    first = imported(tmp_path / "first")
    second = there_and_back(first, tmp_path)
    one, two = tensors(first), tensors(second)
    assert one.keys() == two.keys()
    for name in one:  # saved from float32 on the way, so types differ and values do not
        assert torch.equal(one[name].float(), two[name].float()), name
    one_config, two_config = (json.loads((made / "config.json").read_text()) for made in (first, second))
    assert one_config["vision_config"] == two_config["vision_config"]


def test_second_versions_files_are_recognised_and_refused(tmp_path: Path) -> None:
    own = golden.ROOT / "v2/weights"
    for name in ("minigptv2_checkpoint.pth", "minigptv2_checkpoint_with_ln_vision.pth"):
        given = OriginalFiles(own / "eva_vit_g.pth", own / "llama2-chat", None, own / name)
        with pytest.raises(minigpt4.MiniGPT4Error, match="MiniGPT-v2 checkpoint, which comes in a later version"):
            import_original(tmp_path / "model", given)
    assert not (tmp_path / "model").exists()


def test_files_that_hold_objects_are_refused(tmp_path: Path) -> None:
    for path in sorted((golden.ROOT / "weights").glob("untrusted_like_*.pth")):
        usual = files()
        given = OriginalFiles(usual.vision, usual.language_model, usual.qformer, path)
        with pytest.raises(minigpt4.MiniGPT4Error, match="objects other than tensors"):
            import_original(tmp_path / "model", given, overrides=settings())
    assert not (tmp_path / "model").exists()
