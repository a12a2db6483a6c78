"""What a file or folder of weights is, told from its headers."""

import json
import tracemalloc
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import save_file

from minigpt4.errors import WeightsError
from minigpt4.weights.checking.inspection import inspect
from minigpt4.weights.checking.inspection_kinds import Inspection
from minigpt4.weights.llama.version import LAST_NORM
from tests import golden
from tests.model import tiny
from tests.weights.files.sparse_files import write_sparse
from tests.weights.original import original_files as original

V0 = replace(original.PUBLISHED, vocabulary=32001)


def llama_folder(folder: Path, sizes: original.Sizes, *, delta: bool = False, **config: Any) -> Path:
    """A folder of full size and no weight: the last norm holds ones, or a delta's zeros."""
    folder.mkdir(parents=True)
    write_sparse(folder / "model.safetensors", original.llama(sizes, buffers=False), ones=[] if delta else [LAST_NORM])
    (folder / "config.json").write_text(json.dumps({**original.text_config(sizes), **config}))
    original.write_tokenizer(folder)
    return folder


def one_file(folder: Path, shapes: original.Shapes) -> Inspection:
    return inspect(write_sparse(folder / "file.safetensors", shapes))


# The original's files at their published sizes


def test_vision_encoder(tmp_path: Path) -> None:
    found = one_file(tmp_path, original.vision(original.PUBLISHED))
    assert found.kind == "vision encoder"
    assert found.sizes == {"width": 1408, "blocks": 40, "patch": 14, "pixels": 224}
    assert found.dtypes == {"float16": found.parameters}
    assert found.parameters == 985_894_528 + 25_248_768  # the published model's, and one block more
    assert "1408" in found.fits[0]
    assert any("0 to 38" in note for note in found.notes)


def test_qformer_of_flan_t5_xxl_fits_and_others_do_not(tmp_path: Path) -> None:
    shapes = original.qformer(original.PUBLISHED)
    found = one_file(tmp_path, {**shapes, "t5_proj.weight": (4096, 768), "t5_proj.bias": (4096,)})
    assert (found.kind, found.version) == ("Q-Former", "flan-t5-xxl")
    assert found.sizes == {"queries": 32, "width": 768, "layers": 12, "reads": 1408}
    assert found.parameters == 105_137_664 + 32 * 768 + 2 * 1408
    other = one_file(tmp_path, {**shapes, "t5_proj.weight": (2048, 768), "t5_proj.bias": (2048,)})
    assert (other.version, other.fits) == ("flan-t5-xl", [])
    assert "flan-t5-xxl" in other.notes[0]


@pytest.mark.parametrize(
    ("sizes", "with_qformer", "version", "template", "model"),
    [
        (original.PUBLISHED, True, "Vicuna 7B", "vicuna-v0", "Vicuna 7B"),
        (original.PUBLISHED_13B, True, "Vicuna 13B", "vicuna-v0", "Vicuna 13B"),
        (original.PUBLISHED, False, "Llama-2-chat 7B", "llama-2", "Llama-2-chat 7B"),
    ],
)
def test_projection_says_which_language_model_it_is_for(
    sizes: original.Sizes, with_qformer: bool, version: str, template: str, model: str, tmp_path: Path
) -> None:
    found = one_file(tmp_path, original.checkpoint(sizes, with_qformer))
    assert found.kind == "MiniGPT-4 checkpoint"
    assert version in found.version
    assert found.template == template
    assert model in found.fits[0]
    assert ("Q-Former 768" in found.fits[1]) == with_qformer
    assert found.parameters == sizes.text_width * (768 if with_qformer else 5632) + sizes.text_width


def test_second_generation_checkpoint(tmp_path: Path) -> None:
    found = one_file(tmp_path, original.second_version(original.PUBLISHED))
    assert found.kind == "MiniGPT-v2 checkpoint"
    assert found.sizes["LoRA rank"] == 64
    assert found.fits[0] == "Llama-2-chat 7B"
    assert found.parameters == 33_554_432 + 5632 * 4096 + 4096
    assert "later" in found.notes[0]


@pytest.mark.parametrize(
    ("name", "sizes", "config", "delta", "kind", "version", "template"),
    [
        ("llama-7b-hf", original.PUBLISHED, {}, False, "language model", "LLaMA, by its name, 7B", None),
        ("llama-13b-hf", original.PUBLISHED_13B, {}, False, "language model", "LLaMA, by its name, 13B", None),
        (
            "vicuna-7b-v1.1",
            original.PUBLISHED,
            {},
            False,
            "language model",
            "Vicuna v1.1, merged, by its name, 7B",
            None,
        ),
        ("weight", original.PUBLISHED, {}, False, "language model", "LLaMA or Vicuna v1.1, merged, 7B", None),
        ("weight", V0, {}, False, "language model", "Vicuna v0, merged, 7B", "vicuna-v0"),
        ("delta", V0, {}, True, "delta", "Vicuna v0, delta, 7B", "vicuna-v0"),
        ("delta", original.PUBLISHED, {}, True, "delta", "Vicuna v1.1, delta, 7B", None),
        (
            "Llama-2-7b-chat-hf",
            original.PUBLISHED,
            {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5},
            False,
            "language model",
            "Llama-2-chat, 7B",
            "llama-2",
        ),
    ],
)
def test_language_models_are_told_apart(
    name: str,
    sizes: original.Sizes,
    config: dict[str, Any],
    delta: bool,
    kind: str,
    version: str,
    template: str | None,
    tmp_path: Path,
) -> None:
    found = inspect(llama_folder(tmp_path / name, sizes, delta=delta, **config))
    assert (found.kind, found.version, found.template) == (kind, version, template)
    assert found.sizes["rows"] == sizes.vocabulary
    assert found.parameters == original.count(original.llama(sizes, buffers=False))
    assert found.missing == []


def test_only_headers_are_read(tmp_path: Path) -> None:
    folder = llama_folder(tmp_path / "llama-13b", original.PUBLISHED_13B)
    inspect(folder)  # imports
    tracemalloc.start()
    found = inspect(folder)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found.bytes > 26e9
    assert peak < 5e6


def test_language_model_names_the_checkpoints_that_fit_it(tmp_path: Path) -> None:
    assert inspect(llama_folder(tmp_path / "a", V0)).fits == ["prerained_minigpt4_7b.pth (Vicuna 7B)"]
    thirteen = replace(original.PUBLISHED_13B, vocabulary=32001)
    assert inspect(llama_folder(tmp_path / "b", thirteen)).fits == ["pretrained_minigpt4.pth (Vicuna 13B)"]
    found = inspect(llama_folder(tmp_path / "c", V0, delta=True))
    assert found.fits[0] == "the LLaMA that it was made from (7B)"


def test_delta_of_no_published_size_says_its_own_rows_and_sizes() -> None:
    """`LLaMA 2 layers` would read as Llama-2, and 32001 rows are the published model's."""
    found = inspect(golden.recorded("delta/delta_v0"))
    rows = found.sizes["rows"]
    assert rows != 32001
    assert found.fits[0] == f"the LLaMA that it was made from (2 layers, {found.sizes['width']} wide)"
    assert found.notes[0].startswith(f"a delta of v0 ({rows} rows, the last one for [PAD])")
    other = inspect(golden.recorded("delta/delta_v1.1"))
    assert other.notes[0].startswith(f"a delta of v1.1 ({other.sizes['rows']} rows)")


def test_projection_of_unknown_width_says_what_either_make_up_needs(tmp_path: Path) -> None:
    found = one_file(tmp_path, original.checkpoint(original.SMALL))
    assert found.fits == [
        "a language model 12 wide",
        "a Q-Former 16 wide (blip2_pretrained_flant5xxl.pth), or a vision encoder 4 wide and no Q-Former: the file "
        "does not say which",
    ]
    published = one_file(tmp_path, original.checkpoint(original.PUBLISHED, with_qformer=False))
    assert published.fits[1] == "a vision encoder 1408 wide (eva_vit_g.pth), and no Q-Former"


# The golden files, written by the original itself


@pytest.mark.parametrize(
    ("name", "kind", "version"),
    [
        ("weights/eva_vit_g.pth", "vision encoder", ""),
        ("weights/eva_vit_g_grid3x3.pth", "vision encoder", ""),
        ("weights/blip2_pretrained_flant5xxl.pth", "Q-Former", ""),
        ("weights/blip2_with_text_side_keys.pth", "Q-Former", ""),
        ("weights/pretrained_minigpt4.pth", "MiniGPT-4 checkpoint", "stage 2"),
        ("weights/pretrained_minigpt4_minimal.pth", "MiniGPT-4 checkpoint", ""),
        ("weights/vicuna", "language model", "Vicuna"),
        ("delta/base", "language model", "LLaMA"),
        ("delta/delta_v0", "delta", "Vicuna v0, delta"),
        ("delta/delta_v1.1", "delta", "Vicuna v1.1, delta"),
        ("delta/expected_v0", "language model", "Vicuna v0, merged"),
        ("delta/expected_v1.1", "language model", "LLaMA or Vicuna v1.1, merged"),
        ("v2/weights/llama2-chat", "language model", "Llama-2-chat"),
        ("v2/weights/minigptv2_checkpoint.pth", "MiniGPT-v2 checkpoint", ""),
    ],
)
def test_golden_files_are_recognised(name: str, kind: str, version: str) -> None:
    found = inspect(golden.recorded(name))
    assert found.kind == kind
    assert version in found.version
    assert found.missing == []
    assert found.parameters
    assert json.loads(json.dumps(found.as_dict())) == found.as_dict()


def test_what_an_old_converter_left_broken_is_named() -> None:
    golden.recorded("weights/vicuna-decapoda-style/pytorch_model-00001-of-00002.bin")
    notes = "\n".join(inspect(golden.ROOT / "weights/vicuna-decapoda-style").notes)
    for word in ("LLaMATokenizer", "bos_token_id 0", "special_tokens_map.json"):
        assert word in notes


def test_file_with_objects_in_it_is_not_opened() -> None:
    with pytest.raises(WeightsError, match="objects other than tensors"):
        inspect(golden.recorded("weights/untrusted_like_reduce.pth"))


# This package's own folders, and what people have besides


def test_full_folder(tmp_path: Path) -> None:
    model = tiny.model()
    model.save_pretrained(tmp_path)
    (tmp_path / "processor_config.json").write_text('{"template": "chatml"}')
    found = inspect(tmp_path)
    assert found.kind == "model folder"
    assert found.parameters == model.num_parameters()
    assert (found.template, found.missing) == ("chatml", [])
    assert found.version == "EVA-ViT, a Q-Former, LLaMA"
    assert str(tmp_path) in found.fits[0]


def test_full_folder_with_a_tensor_too_few_names_it(tmp_path: Path) -> None:
    model = tiny.model()
    model.config.save_pretrained(tmp_path)
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    tensors.pop("model.query_tokens")
    save_file(tensors, tmp_path / "model.safetensors")
    found = inspect(tmp_path)
    assert found.missing == ["model.query_tokens", "processor_config.json"]
    assert found.fits == []


def test_alignment_folder_says_what_it_lies_on(tmp_path: Path) -> None:
    from minigpt4.weights.checking.models import ALIGNMENT_DIR

    found = inspect(ALIGNMENT_DIR)
    assert found.kind == "alignment folder"
    assert found.sizes["vocabulary"] == 49152
    assert any("fetched on first use" in note for note in found.notes)
    (tmp_path / "alignment.json").write_text((ALIGNMENT_DIR / "alignment.json").read_text())
    assert inspect(tmp_path).missing == ["alignment.safetensors"]


def test_lora_adapter(tmp_path: Path) -> None:
    LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj"]).save_pretrained(str(tmp_path))
    changes = {}
    for layer in (0, 1):
        module = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        changes |= {f"{module}.lora_A.weight": torch.zeros(3, 64), f"{module}.lora_B.weight": torch.zeros(64, 3)}
    save_file(changes, tmp_path / "adapter_model.safetensors")
    found = inspect(tmp_path)
    assert found.kind == "LoRA adapter"
    assert found.sizes == {"rank": 3, "alpha": 6, "layers": 2}
    assert "q_proj" in found.notes[0]
    assert inspect(tmp_path / "adapter_model.safetensors").kind == "LoRA adapter"
    (tmp_path / "adapter_model.safetensors").unlink()
    assert inspect(tmp_path).missing == ["adapter_model.safetensors"]


@pytest.mark.parametrize(("width", "fits"), [(4096, True), (2048, False)])
def test_hub_folder_of_blip2(width: int, fits: bool, tmp_path: Path) -> None:
    shapes = {"query_tokens": (1, 32, 768), "vision_model.embeddings.patch_embedding.weight": (1408, 3, 14, 14)}
    shapes |= {"vision_model.embeddings.class_embedding": (1, 1, 1408), "language_model.shared.weight": (32128, 4)}
    write_sparse(tmp_path / "model.safetensors", shapes)
    (tmp_path / "config.json").write_text(json.dumps({"text_config": {"model_type": "t5", "d_model": width}}))
    found = inspect(tmp_path)
    assert found.kind == "BLIP-2 folder"
    assert bool(found.fits) == fits
    assert found.parameters == 32 * 768 + 1408 * (3 * 14 * 14 + 1)


def test_metas_folder_with_a_part_too_few_names_it(tmp_path: Path) -> None:
    for number in (0, 2):
        torch.save({"layers.0.attention.wq.weight": torch.zeros(4, 4)}, tmp_path / f"consolidated.{number:02}.pth")
    (tmp_path / "params.json").write_text('{"dim": 4, "n_layers": 1, "n_heads": 2}')
    found = inspect(tmp_path)
    assert found.kind == "Meta's LLaMA"
    assert found.sizes == {"width": 4, "layers": 1, "heads": 2, "files": 2}
    assert found.missing == ["tokenizer.model", "consolidated.01.pth"]
    assert "from-meta" in found.notes[0]


def pointer(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1234\nsize 9976576152\n")


def test_git_lfs_pointer_is_named_with_the_size_it_stands_for(tmp_path: Path) -> None:
    pointer(tmp_path / "pytorch_model-00001-of-00002.bin")
    found = inspect(tmp_path / "pytorch_model-00001-of-00002.bin")
    assert found.kind == "git-lfs pointer"
    assert "9,976.6 MB" in found.missing[0]
    assert "git lfs pull" in found.notes[0]


def test_folder_with_shards_missing_is_still_recognised(tmp_path: Path) -> None:
    names = list(original.llama(original.SMALL))
    shards = [f"pytorch_model-{number:05}-of-00002.bin" for number in (1, 2)]
    places = {name: shards[position % 2] for position, name in enumerate(names)}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    pointer(tmp_path / shards[0])
    found = inspect(tmp_path)
    assert found.kind == "language model"
    assert found.missing == shards


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("missing.pth", None, "does not exist"),
        ("other.safetensors", {"some.tensor": torch.zeros(2)}, "first tensor is some.tensor"),
        ("empty.pth", b"", "empty.pth"),
        ("text.pth", b"just text", "text.pth"),
    ],
)
def test_what_is_nothing_known_is_refused_in_a_sentence(
    name: str, content: bytes | dict[str, torch.Tensor] | None, words: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    if isinstance(content, dict):
        save_file(content, path)
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(WeightsError, match=words) as caught:
        inspect(path)
    assert caught.value.hint


def test_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="neither weights nor"):
        inspect(tmp_path)


HEADER = b"GGUF" + (3).to_bytes(4, "little") + (272).to_bytes(8, "little") + (34).to_bytes(8, "little")


def test_gguf_file_is_told_by_its_header(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(HEADER + b"\0" * 100)
    found = inspect(tmp_path / "model.gguf")
    assert (found.kind, found.version, found.sizes, found.fits) == ("GGUF file", "GGUF 3", {"tensors": 272}, [])
    assert found.bytes == 124


@pytest.mark.parametrize("length", [4, 23])
def test_gguf_file_that_is_cut_in_its_header_is_refused(length: int, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(HEADER[:length])
    with pytest.raises(WeightsError, match=r"model\.gguf is a GGUF file that is cut short"):
        inspect(tmp_path / "model.gguf")


def test_files_of_nano_by_name_and_size_say_so(tmp_path: Path) -> None:
    path = tmp_path / "SmolLM2-135M-Instruct.Q4_1.gguf"
    path.write_bytes(HEADER)
    assert inspect(path).fits == []
    with path.open("r+b") as file:
        file.truncate(98_362_432)
    assert inspect(path).fits == ["nano: by name and size it is its language model"]


@pytest.mark.parametrize("as_archive", [True, False])
def test_image_classifier_is_told_by_its_tensors(as_archive: bool, tmp_path: Path) -> None:
    tensors = {
        "_conv_stem.weight": torch.ones(4, 3, 3, 3),
        "_blocks.0._depthwise_conv.weight": torch.ones(4, 1, 3, 3),
        "_blocks.1._bn1.bias": torch.ones(4),
        "_fc.weight": torch.ones(1000, 8),
    }
    torch.save(tensors, tmp_path / "lite.pth", _use_new_zipfile_serialization=as_archive)
    found = inspect(tmp_path / "lite.pth")
    assert (found.kind, found.sizes) == ("image classifier", {"blocks": 2, "classes": 1000})
    assert found.parameters == 108 + 36 + 4 + 8000


def test_python_package_and_training_checkpoint_are_named(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as package:
        package.writestr("a/b.gguf", b"x")
    assert inspect(tmp_path / "a.whl").kind == "Python package"
    (tmp_path / "run").mkdir()
    for name in ("optimizer", "trained"):
        save_file({"a": torch.ones(2)}, tmp_path / "run" / f"{name}.safetensors")
    assert inspect(tmp_path / "run").kind == "training checkpoint"
