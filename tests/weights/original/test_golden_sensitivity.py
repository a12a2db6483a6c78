"""Each plausible mistake, made on purpose, moves the outputs as far as it moved the original's.

That the numbers agree could be luck where a test's tolerance is wide. Here every mistake that the original's modules
were run with is made with ours, one at a time, and the largest change of the image embeddings, of the logits and of the
loss is compared with the recorded one, within the tolerances of those numbers themselves: 2e-5, 1e-4 and 1e-5.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

import minigpt4
from minigpt4.processing.pictures import open_image
from tests.weights.original.test_golden_import import SETS, Loaded, golden, imported, training_batch

pytestmark = [
    pytest.mark.reference,
    pytest.mark.skipif(not SETS, reason="the recorded outputs of the original code are not beside the project"),
]
TOLERANCES = {"inputs_llama": 2e-5, "logits": 1e-4, "loss": 1e-5}
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CASE = "batch3_reordered"  # the batch that was measured: all pictures, captions of three lengths

Mistake = Callable[["Run"], None]


@pytest.fixture(scope="module", params=SETS, ids=lambda path: path.name)
def reference(request: pytest.FixtureRequest) -> Path:
    folder: Path = request.param
    return folder


@pytest.fixture(scope="module")
def folder(reference: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return imported(reference, tmp_path_factory.mktemp("model") / "model")


class Run:
    """A model of its own, the pictures and the batch that it reads; a mistake changes any of them."""

    def __init__(self, reference: Path, folder: Path) -> None:
        loaded: Loaded = minigpt4.load(folder, device="cpu")
        self.whole, self.model = loaded[0], loaded[0].model
        self.pictures = [open_image(path) for path in sorted((reference / "inputs").glob("img*.png"))]
        self.side: int = golden(reference, "configs/tiny_dims.json")["image_size"]
        self.pixels = load_file(reference / "inputs/pixel_values.safetensors")["pixel_values"]
        self.case = golden(reference, "golden/train_forward.json")["cases"][CASE]
        self.batch, self.labels, _ = training_batch(loaded, self.case, self.case["prompt_used"])

    @torch.no_grad()
    def outputs(self) -> dict[str, Tensor]:
        features = self.model.get_image_features(self.pixels).pooler_output
        pixels = self.pixels[self.case["image_index"]]
        made = self.whole(**self.batch, pixel_values=pixels, labels=self.labels)
        return {"inputs_llama": features, "logits": made.logits, "loss": made.loss}


def set_epsilon(modules: list[Any], value: float) -> None:
    for module in modules:
        module.variance_epsilon = module.eps = value


def norms(module: nn.Module) -> list[nn.Module]:
    return [inner for inner in module.modules() if "Norm" in type(inner).__name__]


def approximate_gelu(module: nn.Module) -> None:
    for inner in module.modules():
        for name in ("activation_fn", "intermediate_act_fn"):
            if hasattr(inner, name):
                setattr(inner, name, nn.GELU(approximate="tanh"))


def change_biases(run: Run, query: str, value: str) -> None:
    for layer in run.model.vision_model.encoder.layers:
        old = layer.self_attn.qkv.bias.detach()
        thirds = dict(zip(("query", "key", "value"), old.chunk(3), strict=True)) | {"zero": torch.zeros(len(old) // 3)}
        layer.self_attn.qkv.bias.data = torch.cat([thirds[query], thirds["key"], thirds[value]])


def norm_not_loaded(run: Run) -> None:
    run.model.vision_model.post_layernorm.weight.data.fill_(1)
    run.model.vision_model.post_layernorm.bias.data.zero_()


def skip_cross_attention(run: Run) -> None:
    run.model.qformer.encoder.layer[2].has_cross_attention = False


def bias_dropped(run: Run) -> None:
    run.model.language_projection.bias.data.zero_()


def rounded_frequencies(run: Run) -> None:
    rotary = run.model.language_model.rotary_emb
    rotary.inv_freq = rotary.inv_freq.half().float()


def pad_with_unknown(run: Run) -> None:
    """`</s>` is read as `<unk>`: in this batch it stands at padding alone."""
    padding = run.batch["attention_mask"] == 0
    assert (run.batch["input_ids"][padding] == 2).all()
    assert not (run.batch["input_ids"][~padding] == 2).any()
    table = run.model.get_input_embeddings().weight.data
    table[2] = table[0]


def with_pixels(make: Callable[[Run], Tensor]) -> Mistake:
    def change(run: Run) -> None:
        run.pixels = make(run)

    return change


def as_tensor(picture: Image.Image) -> Tensor:
    rgb = picture.convert("RGB")
    values = torch.frombuffer(bytearray(rgb.tobytes()), dtype=torch.uint8)
    return values.reshape(rgb.height, rgb.width, 3).permute(2, 0, 1).float() / 255


def normalized(pixels: Tensor, mean: tuple[float, ...] = MEAN, std: tuple[float, ...] = STD) -> Tensor:
    return (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


def resized(run: Run, how: Image.Resampling) -> Tensor:
    size = (run.side, run.side)
    return torch.stack([as_tensor(picture.convert("RGB").resize(size, how)) for picture in run.pictures])


def resized_as_tensors(run: Run) -> Tensor:
    size = (run.side, run.side)
    return torch.cat(
        [
            nn.functional.interpolate(as_tensor(picture)[None], size, mode="bicubic", antialias=True)
            for picture in run.pictures
        ]
    )


MISTAKES: dict[str, Mistake] = {
    "none (control)": lambda run: None,
    "ViT LayerNorm eps 1e-5 instead of 1e-6": lambda run: set_epsilon(norms(run.model.vision_model.encoder), 1e-5),
    "ViT GELU tanh instead of erf": lambda run: approximate_gelu(run.model.vision_model),
    "ViT q_bias dropped": lambda run: change_biases(run, "zero", "value"),
    "ViT v_bias dropped": lambda run: change_biases(run, "query", "zero"),
    "ViT q_bias replaced by v_bias": lambda run: change_biases(run, "value", "value"),
    "ln_vision not loaded": norm_not_loaded,
    "ln_vision eps 1e-12 instead of 1e-5": lambda run: set_epsilon([run.model.vision_model.post_layernorm], 1e-12),
    "Q-Former LayerNorm eps 1e-5 instead of 1e-12": lambda run: set_epsilon(norms(run.model.qformer), 1e-5),
    "Q-Former GELU tanh instead of erf": lambda run: approximate_gelu(run.model.qformer),
    "Q-Former layer 2 cross attention skipped": skip_cross_attention,
    "LLaMA rms_norm_eps 1e-5 instead of 1e-6": lambda run: set_epsilon(norms(run.model.language_model), 1e-5),
    "RoPE built from the (fp16-rounded) inv_freq in the .bin files": rounded_frequencies,
    "pad token <unk> instead of </s>": pad_with_unknown,
    "llama_proj bias dropped": bias_dropped,
    "bilinear resize": with_pixels(lambda run: normalized(resized(run, Image.Resampling.BILINEAR))),
    "lanczos resize": with_pixels(lambda run: normalized(resized(run, Image.Resampling.LANCZOS))),
    "ImageNet mean/std": with_pixels(
        lambda run: normalized(resized(run, Image.Resampling.BICUBIC), IMAGENET_MEAN, IMAGENET_STD)
    ),
    "tensor bicubic resize with antialias (not PIL)": with_pixels(lambda run: normalized(resized_as_tensors(run))),
}
DROPOUT = "Q-Former left in train mode (dropout on)"  # at random, so how far is not comparable


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_moves_the_outputs_as_far_as_the_originals(name: str, reference: Path, folder: Path) -> None:
    recorded = golden(reference, "golden/sensitivity.json")["cases"][name]
    usual, run = Run(reference, folder).outputs(), Run(reference, folder)
    MISTAKES[name](run)
    for what, tensor in run.outputs().items():
        moved = (tensor - usual[what]).abs().max().item()
        assert moved == pytest.approx(recorded[what], abs=TOLERANCES[what], rel=0), what


def test_training_mode_alone_does_not_let_a_frozen_qformer_drop_out(reference: Path, folder: Path) -> None:
    recorded = golden(reference, "golden/sensitivity.json")["cases"][DROPOUT]
    usual, run = Run(reference, folder).outputs(), Run(reference, folder)
    run.whole.train()
    assert all(torch.equal(tensor, usual[what]) for what, tensor in run.outputs().items())
    run.model.qformer.train()  # the mistake itself
    moved = (run.outputs()["inputs_llama"] - usual["inputs_llama"]).abs().max().item()
    assert moved > recorded["inputs_llama"] / 4


def test_every_recorded_mistake_is_made(reference: Path) -> None:
    assert golden(reference, "golden/sensitivity.json")["cases"].keys() == MISTAKES.keys() | {DROPOUT}
