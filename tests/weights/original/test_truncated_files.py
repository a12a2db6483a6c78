"""Every kind of file that an import reads, cut at many places: one sentence that names it, and nothing written."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from minigpt4.errors import MiniGPT4Error
from minigpt4.weights.files.tensor_files import open_tensors
from minigpt4.weights.llama.meta import from_meta
from minigpt4.weights.original.importing import import_original
from minigpt4.weights.original.prepare import find_files
from minigpt4.weights.original.yaml import read_original_yaml
from tests.weights.original import original_files

HEADS = ["vision_config.num_attention_heads=2", "qformer_config.num_attention_heads=2"]
PLACES = 20
YAML = """model:
  arch: mini_gpt4
  model_type: pretrain_vicuna
  max_txt_len: 160
  end_sym: "###"
  low_resource: False
  prompt_template: '###Human: {{}} ###Assistant: '
  llama_model: "{folder}/vicuna"
  vit_model: "{folder}/eva_vit_g.pth"
  q_former_model: "{folder}/blip2_pretrained_flant5xxl.pth"
  ckpt: "{folder}/pretrained_minigpt4.pth"
"""
IMPORTED = (
    "eva.yaml", "eva_vit_g.pth", "blip2_pretrained_flant5xxl.pth", "pretrained_minigpt4.pth", "vicuna/config.json",
    "vicuna/pytorch_model-00001-of-00002.bin", "vicuna/pytorch_model.bin.index.json", "vicuna/tokenizer.model",
    "vicuna/special_tokens_map.json", "vicuna/tokenizer_config.json",
)  # fmt: skip
CONVERTED = ("consolidated.00.pth", "params.json", "tokenizer.model")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole set, with bare pickles for the checkpoint, and a YAML that names it."""
    folder = tmp_path_factory.mktemp("original")
    written = original_files.write(folder)
    content = torch.load(written["projection"], weights_only=True)
    torch.save(content, written["projection"], _use_new_zipfile_serialization=False)
    (folder / "eva.yaml").write_text(YAML.format(folder=folder), encoding="utf-8")
    return folder


def cuts(path: Path) -> Iterator[int]:
    """Cut a file at places all over it, then give it back; yields what is left."""
    whole = path.read_bytes()
    last = len(whole.rstrip()) - 1
    try:
        for length in sorted({0, 1, last, *(last * place // PLACES for place in range(1, PLACES))}):
            path.write_bytes(whole[:length])
            yield length
    finally:
        path.write_bytes(whole)


def import_all(folder: Path, target: Path) -> None:
    read = read_original_yaml(folder / "eva.yaml", [])
    import_original(target, find_files(read), overrides=[*read.overrides, *HEADS])


def check_refused(error: MiniGPT4Error, path: Path, target: Path) -> None:
    assert path.name in error.message
    assert "\n" not in error.message
    assert len(error.message) < 300
    assert error.hint
    assert not list(target.parent.iterdir())


@pytest.mark.parametrize("name", IMPORTED)
def test_cut_file_is_named_and_nothing_is_written(name: str, files: Path, tmp_path: Path) -> None:
    for _ in cuts(files / name):
        with pytest.raises(MiniGPT4Error) as error:
            import_all(files, tmp_path / "out")
        check_refused(error.value, files / name, tmp_path / "out")
    import_all(files, tmp_path / "out")


@pytest.mark.parametrize("name", CONVERTED)
def test_cut_file_of_metas_is_named_and_nothing_is_written(
    name: str, files: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    source = tmp_path_factory.mktemp("meta")
    width, rows = 8, 380
    shapes: dict[str, tuple[int, ...]] = {}
    shapes |= {f"layers.0.attention.w{part}.weight": (width, width) for part in "qkvo"}
    shapes |= {f"layers.0.feed_forward.w{part}.weight": (width, width) for part in "123"}
    shapes |= {f"layers.0.{part}_norm.weight": (width,) for part in ("attention", "ffn")}
    shapes |= {"tok_embeddings.weight": (rows, width), "output.weight": (rows, width), "norm.weight": (width,)}
    torch.save({key: torch.ones(shape).half() for key, shape in shapes.items()}, source / "consolidated.00.pth")
    params = {"dim": width, "n_heads": 2, "n_layers": 1, "norm_eps": 1e-6, "vocab_size": -1}
    (source / "params.json").write_text(json.dumps(params), encoding="utf-8")
    (source / "tokenizer.model").write_bytes((files / "vicuna" / "tokenizer.model").read_bytes())
    for _ in cuts(source / name):
        with pytest.raises(MiniGPT4Error) as error:
            from_meta(source, tmp_path / "out")
        check_refused(error.value, source / name, tmp_path / "out")
    from_meta(source, tmp_path / "out")


def test_cut_safetensors_file_is_named(tmp_path: Path, files: Path) -> None:
    import_all(files, tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    for _ in cuts(path):
        with pytest.raises(MiniGPT4Error, match=r"model\.safetensors was not opened"):
            open_tensors(tmp_path / "model")
    open_tensors(tmp_path / "model")
