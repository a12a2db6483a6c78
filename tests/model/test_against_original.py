"""The whole model compared with what the original MiniGPT-4 code recorded for a tiny set of weights.

The original's files are read with the small map of names below, which is a second, independent one: the package's own
importer is tested elsewhere. Tolerances: 2e-5 for image embeddings, 1e-4 for logits (up to about 10), ids exact where
the recorded gap between the best two words is wide.
"""

import re
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaTokenizer

from minigpt4.model import MiniGPT4Config, MiniGPT4ForConditionalGeneration
from minigpt4.processing.messages import Message
from minigpt4.processing.prompts import template
from minigpt4.processing.text_encoding import TextEncoder
from tests import golden

IMAGE = {"type": "image"}
IMAGE_TOKEN_ID = 399  # an id that none of the texts encodes to
CLEAR = 1e-3  # a gap between the best two words that rounding cannot close
PICTURE = {"rtol": 0.0, "atol": 2e-5}

pytestmark = pytest.mark.reference

RENAMED = [  # regular expressions, tried in this order
    (r"^cls_token$", "model.vision_model.embeddings.class_embedding"),
    (r"^pos_embed$", "model.vision_model.embeddings.position_embedding"),
    (r"^patch_embed\.proj\.", "model.vision_model.embeddings.patch_embedding."),
    (r"^blocks\.(\d+)\.norm(\d)\.", r"model.vision_model.encoder.layers.\1.layer_norm\2."),
    (r"^blocks\.(\d+)\.attn\.proj\.", r"model.vision_model.encoder.layers.\1.self_attn.projection."),
    (r"^blocks\.(\d+)\.attn\.qkv\.", r"model.vision_model.encoder.layers.\1.self_attn.qkv."),
    (r"^blocks\.(\d+)\.mlp\.", r"model.vision_model.encoder.layers.\1.mlp."),
    (r"^ln_vision\.", "model.vision_model.post_layernorm."),
    (r"^query_tokens$", "model.query_tokens"),
    (r"^Qformer\.bert\.embeddings\.LayerNorm\.", "model.qformer.layernorm."),
    (r"^Qformer\.bert\.(.*attention)\.self\.", r"model.qformer.\1.attention."),
    (r"^Qformer\.bert\.", "model.qformer."),
    (r"^llama_proj\.", "model.language_projection."),
    (r"^model\.(embed_tokens|layers|norm)\.", r"model.language_model.\1."),
]
NOT_USED = r"^(head|norm|t5_proj)\.|position_ids$|inv_freq$"


def read(path: str) -> dict[str, Tensor]:
    content: dict[str, Any] = torch.load(golden.ROOT / path, weights_only=True)
    tensors: dict[str, Tensor] = content.get("model", content)
    return {name: tensor.float() for name, tensor in tensors.items()}


def renamed(name: str) -> str:
    for pattern, target in RENAMED:
        if re.search(pattern, name):
            return re.sub(pattern, target, name)
    return name


def fold_lora(tensors: dict[str, Tensor], scale: float) -> None:
    """Add the low-rank products to the matrices they belong to."""
    for name in [name for name in tensors if name.endswith("lora_A.weight")]:
        change = tensors.pop(name.replace("lora_A", "lora_B")) @ tensors.pop(name)
        tensors[name.removeprefix("llama_model.base_model.model.").replace("lora_A.", "")] += scale * change


def original(*files: str, qformer: bool, lora_scale: float = 0.0) -> MiniGPT4ForConditionalGeneration:
    """Build the model from the original's files; a later file's tensors replace an earlier one's."""
    sizes = golden.content("configs/tiny_dims.json")
    vit, queries = sizes["vit"], sizes["qformer"]
    language_dir = next(file for file in files if (golden.ROOT / file).is_dir())
    config = MiniGPT4Config(
        vision_config={
            "hidden_size": vit["embed_dim"],
            "intermediate_size": vit["mlp_hidden"],
            "num_hidden_layers": vit["depth"],
            "num_attention_heads": vit["num_heads"],
            "layer_norm_eps": vit["layer_norm_eps"],
            "image_size": sizes["image_size"],
            "patch_size": sizes["patch_size"],
        },
        qformer_config={
            "hidden_size": queries["hidden_size"],
            "num_hidden_layers": queries["num_hidden_layers"],
            "num_attention_heads": queries["num_attention_heads"],
            "intermediate_size": queries["intermediate_size"],
            "cross_attention_frequency": queries["cross_attention_freq"],
        }
        if qformer
        else None,
        text_config={**golden.content(f"{language_dir}/config.json"), "dtype": "float32"},  # the files hold float16
        num_query_tokens=queries["query_length"],
        image_token_id=IMAGE_TOKEN_ID,
    )
    tensors: dict[str, Tensor] = {}
    for file in files:
        path = golden.recorded(file)
        parts = sorted(path.glob("*.bin")) if path.is_dir() else [path]
        for part in parts:
            tensors |= read(str(part.relative_to(golden.ROOT)))
    fold_lora(tensors, lora_scale)
    used = {
        renamed(name): tensor
        for name, tensor in tensors.items()
        if not re.search(NOT_USED, name) and not name.startswith(f"blocks.{vit['depth']}.")
    }
    for name in [name for name in used if name.startswith("blocks.") and name.endswith("q_bias")]:
        query, value = used.pop(name), used.pop(name.replace("q_bias", "v_bias"))
        target = renamed(name.replace("q_bias", "qkv.bias"))
        used[target] = torch.cat([query, torch.zeros_like(query), value])
    model = MiniGPT4ForConditionalGeneration(config)
    missing, unexpected = model.load_state_dict(used, strict=False)
    # A second version's checkpoint may lack the norm, which is then new.
    assert not unexpected
    assert set(missing) <= ({f"model.vision_model.post_layernorm.{end}" for end in ("weight", "bias")})
    assert not (qformer and missing)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = 2, 0
    return model.eval()


@cache
def first_version() -> MiniGPT4ForConditionalGeneration:
    return original(
        "weights/eva_vit_g.pth",
        "weights/blip2_pretrained_flant5xxl.pth",
        "weights/pretrained_minigpt4.pth",
        "weights/vicuna",
        qformer=True,
    )


@cache
def second_version(checkpoint: str = "minigptv2_checkpoint.pth") -> MiniGPT4ForConditionalGeneration:
    files = ["v2/weights/eva_vit_g.pth", "v2/weights/llama2-chat", f"v2/weights/{checkpoint}"]
    return original(*files, qformer=False, lora_scale=8 / 4)


@cache
def llama(folder: str) -> LlamaTokenizer:
    return LlamaTokenizer.from_pretrained(golden.ROOT / folder)


def picture_values() -> Tensor:
    return golden.tensors("inputs/pixel_values.safetensors")["pixel_values"]


@torch.no_grad()
def test_picture_is_the_originals_after_every_layer_of_the_first_version() -> None:
    model, recorded = first_version().model, golden.tensors("golden/vision.safetensors")
    seen = model.vision_model(recorded["pixel_values"], output_hidden_states=True)
    queries = model.query_tokens.expand(3, -1, -1)
    read_out = model.qformer(
        query_embeds=queries, encoder_hidden_states=seen.last_hidden_state, output_hidden_states=True
    )
    actual = {f"vit_block_{place}": state for place, state in enumerate(seen.hidden_states[1:])}
    actual |= {f"qformer_layer_{place}": state for place, state in enumerate(read_out.hidden_states[1:])}
    actual |= {
        "vit_output": seen.hidden_states[-1],
        "ln_vision_output": seen.last_hidden_state,
        "qformer_embeddings": read_out.hidden_states[0],
        "qformer_output": read_out.last_hidden_state,
        "inputs_llama": model.get_image_features(recorded["pixel_values"]).pooler_output,
    }
    assert actual.keys() | {"pixel_values", "patch_embed", "atts_llama"} == recorded.keys()
    for name, tensor in actual.items():
        torch.testing.assert_close(tensor, recorded[name], **PICTURE, msg=lambda text, name=name: f"{name}: {text}")


@torch.no_grad()
def test_small_inputs_tell_the_original_norms_epsilon_from_the_librarys() -> None:
    model, recorded = first_version().model, golden.tensors("golden/vision.safetensors")
    small = recorded["vit_output"] * 1e-3
    norm = model.vision_model.post_layernorm
    expected = torch.nn.functional.layer_norm(small, small.shape[-1:], norm.weight, norm.bias, eps=1e-5)
    assert torch.equal(norm(small), expected)
    library = torch.nn.functional.layer_norm(small, small.shape[-1:], norm.weight, norm.bias, eps=1e-6)
    assert (library - expected).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize(
    ("checkpoint", "recorded_in"),
    [
        ("minigptv2_checkpoint.pth", "vision.safetensors"),
        ("minigptv2_checkpoint_with_ln_vision.pth", "vision_ckpt_with_ln_vision.safetensors"),
    ],
)
def test_picture_is_the_originals_without_a_qformer(checkpoint: str, recorded_in: str) -> None:
    model, recorded = second_version(checkpoint).model, golden.tensors(f"v2/golden/{recorded_in}")
    features = model.get_image_features(picture_values(), output_hidden_states=True)
    torch.testing.assert_close(features.pooler_output, recorded["inputs_llama"], **PICTURE)
    if "vit_output" in recorded:
        torch.testing.assert_close(features.hidden_states[-1], recorded["vit_output"], **PICTURE)
        torch.testing.assert_close(features.last_hidden_state, recorded["ln_vision_output"], **PICTURE)


@torch.no_grad()
def test_wrapped_pictures_reach_the_language_model_as_recorded() -> None:
    model, encoder = first_version(), TextEncoder(llama("weights/vicuna"))
    recorded, pixels = golden.tensors("golden/prompt_wrap.safetensors"), picture_values()
    given: dict[str, Tensor] = {}
    hook = model.model.language_model.register_forward_pre_hook(
        lambda _module, _args, kwargs: given.update(kwargs), with_kwargs=True
    )
    for wrap in golden.content("golden/prompt_wrap.json")["wraps"]:
        halves = wrap["prompt"].split("<ImageHere>")
        ids = [IMAGE_TOKEN_ID] * 5
        if len(halves) == 2:
            before, after = (encoder.encode(half, parse_special=True) for half in halves)
            ids = before + ids + after
        model(input_ids=torch.tensor([ids] * 3), pixel_values=pixels)
        torch.testing.assert_close(given["inputs_embeds"], recorded[f"wrapped_embeds_{wrap['key']}"], **PICTURE)
        mask = recorded[f"wrapped_atts_{wrap['key']}"]
        assert (mask == 1).all()  # as where none is given
        assert mask.shape == given["inputs_embeds"].shape[:2]
    hook.remove()


def turns() -> list[tuple[str, int]]:
    """Greedy turns by name and number, those that compare at all."""
    return [
        (dialog["name"], number)
        for dialog in golden.content("golden/generation.json")["dialogs"]
        for number, turn in enumerate(dialog["turns"])
        if dialog["name"].startswith("greedy") and turn["min_top2_gap"] > CLEAR
    ]


def prompt_ids(dialog: dict[str, Any], number: int) -> tuple[list[int], list[int]]:
    """The ids of a turn's prompt through the package's template, and which pictures it has."""
    messages: list[Message] = []
    shown: list[int] = []
    for place, turn in enumerate(dialog["turns"][: number + 1]):
        new = dialog["images"] if place == 0 else [dialog["images_after"]["1"]] if dialog["images_after"] else []
        shown += new
        content = [IMAGE] * len(new) + [{"type": "text", "text": turn["user"]}]
        messages += [{"role": "user", "content": content}, {"role": "assistant", "content": turn["output_text"]}]
    encoded = template("vicuna-v0").encode(
        llama("weights/vicuna"), messages[:-1], image_token_id=IMAGE_TOKEN_ID, num_image_tokens=5
    )
    return encoded.input_ids, shown


def options(dialog: dict[str, Any]) -> dict[str, Any]:
    """What `generate` takes of what the original was asked."""
    chosen: dict[str, Any] = {**dialog["answer_kwargs"], **dialog["generate_override"]}
    chosen.pop("max_length", None)  # of the context, which was clipped to it
    if least := chosen.pop("min_length", None):
        chosen["min_new_tokens"] = least - 1  # the original counted the start token
    if not dialog["no_stopping_criteria"]:
        chosen |= {"stop_strings": ["###"], "tokenizer": llama("weights/vicuna")}
    return chosen


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:Passing `repetition_penalty` with `inputs_embeds`:UserWarning")
@pytest.mark.parametrize(("name", "number"), turns())
def test_greedy_answers_are_the_originals_word_for_word(name: str, number: int) -> None:
    model = first_version()
    dialog = next(dialog for dialog in golden.content("golden/generation.json")["dialogs"] if dialog["name"] == name)
    turn, recorded = dialog["turns"][number], golden.tensors("golden/generation.safetensors")
    context = recorded[f"{name}/{number}/inputs_embeds"]
    if "clip" in name or "###" in turn["user"]:  # what the original did to these prompts is not done here
        inputs = {"inputs_embeds": context}
    else:
        ids, shown = prompt_ids(dialog, number)
        # As embeddings: the original's repetition penalty does not count the words of the prompt.
        inputs = {
            "inputs_embeds": model.get_input_embeddings()(torch.tensor([ids])),
            "pixel_values": picture_values()[shown],
        }
        assert inputs["inputs_embeds"].shape == context.shape
    answer = model.generate(**inputs, **options(dialog))[0].tolist()
    assert answer == turn["raw_sequence"][1:]  # there the first is the start token
    scores = model(**inputs).logits[:, -1]
    expected = recorded[f"{name}/{number}/first_step_scores"]
    compared = expected > -1e29  # the others were forbidden at the start
    compared[:, 1] = "repetition_penalty" not in dialog["answer_kwargs"]  # there it counted the start token
    torch.testing.assert_close(scores[compared], expected[compared], rtol=0.0, atol=1e-4)


def test_ids_in_place_of_embeddings_give_the_same_answer() -> None:
    model = first_version()
    for dialog in golden.content("golden/generation.json")["dialogs"]:
        if not dialog["name"].startswith("greedy_two"):
            continue
        for number, turn in enumerate(dialog["turns"]):
            ids, shown = prompt_ids(dialog, number)
            given = torch.tensor([ids])
            answer = model.generate(input_ids=given, pixel_values=picture_values()[shown], **options(dialog))
            assert answer[0, len(ids) :].tolist() == turn["raw_sequence"][1:], (dialog["name"], number)


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("picture", [0, 1, 2])
def test_five_beams_find_the_originals_answer(picture: int, number: int) -> None:
    name, model = f"beam5_img{picture}", first_version()
    dialog = next(dialog for dialog in golden.content("golden/generation.json")["dialogs"] if dialog["name"] == name)
    ids, shown = prompt_ids(dialog, number)
    answer = model.generate(input_ids=torch.tensor([ids]), pixel_values=picture_values()[shown], **options(dialog))
    # The original's library ended a stopped beam with the end token.
    assert [*answer[0, len(ids) :].tolist(), 2] == dialog["turns"][number]["raw_sequence"][1:]


def test_left_padded_batch_of_the_second_version_is_answered_word_for_word() -> None:
    """Without a Q-Former, and with the language model's low-rank adapter folded in."""
    model, tokenizer, prompt = second_version(), llama("v2/weights/llama2-chat"), template("minigpt-v2")
    case = golden.content("v2/golden/generation.json")["generate_greedy_batch3"]
    assert case["min_top2_gap"] > CLEAR
    rows = []
    for text in case["texts"]:
        question = text.removeprefix("<s>[INST] <Img><ImageHere></Img> ").removesuffix(" [/INST]")
        messages: list[Message] = [{"role": "user", "content": [IMAGE, {"type": "text", "text": question}]}]
        encoded = prompt.encode(tokenizer, messages, image_token_id=IMAGE_TOKEN_ID, num_image_tokens=4)
        rows.append(encoded.input_ids)
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    answers = model.generate(
        input_ids=ids, attention_mask=mask, pixel_values=picture_values(), do_sample=False, **case["kwargs"]
    )
    assert answers[:, width:].tolist() == [sequence[1:] for sequence in case["sequences"]]
