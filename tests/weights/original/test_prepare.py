"""Running one of the original's YAML files: which files it means, where the import lies, what runs where."""

import importlib.util
from pathlib import Path

import pytest
import torch

import minigpt4
from minigpt4.errors import ConfigError
from minigpt4.weights.original.prepare import chosen_device, find_files, low_resource, prepare_original
from minigpt4.weights.original.yaml import read_original_yaml
from tests.weights.original import original_files

HEADS = ["model.vision_config.num_attention_heads=2", "model.qformer_config.num_attention_heads=2"]
YAML = """\
model:
  arch: mini_gpt4
  model_type: pretrain_vicuna
  low_resource: False
  llama_model: {llama_model}
  q_former_model: {q_former_model}
  ckpt: {ckpt}
"""
USUAL = {
    "llama_model": "weights/vicuna",
    "q_former_model": "weights/blip2_pretrained_flant5xxl.pth",
    "ckpt": "weights/pretrained_minigpt4.pth",
}


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An original tree with small weights, seen from elsewhere."""
    for folder in ("weights", "eval_configs", "elsewhere", "home"):
        (tmp_path / folder).mkdir()
    original_files.write(tmp_path / "weights")
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setenv("MINIGPT4_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return tmp_path


def write(tree: Path, **changed: str) -> Path:
    path = tree / "eval_configs/eval.yaml"
    path.write_text(YAML.format(**USUAL | changed), encoding="utf-8")
    return path


def test_named_model_is_imported_once_and_answers(tree: Path) -> None:
    path = write(tree)
    first = prepare_original(path, HEADS)
    assert first.folder.parent == tree / "home/models"
    assert any("blocks 0 to 2" in note for note in first.notes)
    second = prepare_original(path, HEADS)
    assert second.folder == first.folder
    assert len(list((tree / "home/models").iterdir())) == 1
    model, processor = minigpt4.load(first.folder, device="cpu")
    assert (processor.template, first.template) == ("vicuna-v0", "vicuna-v0")
    assert model.config.vision_config.num_attention_heads == 2
    assert (first.device, first.quantize) == ("auto", "none")


def test_other_files_or_other_settings_are_imported_anew(tree: Path) -> None:
    path = write(tree)
    first = prepare_original(path, HEADS)
    assert prepare_original(path, [HEADS[0], "model.qformer_config.num_attention_heads=4"]).folder != first.folder
    checkpoint = tree / "weights/pretrained_minigpt4.pth"
    content = torch.load(checkpoint, weights_only=True)
    content["model"]["llama_proj.bias"] += 1
    torch.save(content, checkpoint)
    assert prepare_original(path, HEADS).folder != first.folder


def test_paths_count_from_the_yaml_then_from_here_then_from_the_tree(tree: Path) -> None:
    path = write(tree, ckpt="mine.pth")
    source = (tree / "weights/pretrained_minigpt4.pth").read_bytes()
    for folder in (tree, tree / "elsewhere", tree / "eval_configs"):  # each goes before the one before
        (folder / "mine.pth").write_bytes(source)
        assert find_files(read_original_yaml(path)).projection == folder / "mine.pth"
    found = find_files(read_original_yaml(path, ["model.ckpt=mine.pth"]))
    assert found.projection == tree / "elsewhere/mine.pth"  # what is typed is meant from here


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("llama_model", '"/path/to/vicuna/weights/"', "line 5: `llama_model` is still the placeholder"),
        ("ckpt", "'/path/to/checkpoint/'", "line 7: `ckpt` is still the placeholder"),
        ("ckpt", "weights/missing.pth", "line 7: `ckpt` names 'weights/missing.pth', which is neither in"),
        ("ckpt", "/nowhere/x.pth", "line 7: `ckpt` names '/nowhere/x.pth', which does not exist"),
        ("llama_model", "lmsys/vicuna-7b-v1.1", "line 5: `llama_model` names 'lmsys/vicuna-7b-v1.1'"),
        ("q_former_model", "/path/to/blip2.pth", "line 6: `q_former_model` is still the placeholder"),
        ("ckpt", "", "line 7: `model` gives no `ckpt`"),
    ],
)
def test_placeholder_or_missing_file_is_named_with_file_key_and_line(
    key: str, value: str, message: str, tree: Path
) -> None:
    path = write(tree, **{key: value})
    with pytest.raises(ConfigError) as error:
        prepare_original(path, HEADS)
    assert f"{path}, {message}" in error.value.message
    assert f"--options model.{key}=" in error.value.hint
    assert not (tree / "home/models").exists()


def test_files_that_the_original_downloads_are_found_beside_the_others_or_in_its_cache(tree: Path) -> None:
    address = "https://storage.example.org/models/BLIP2/blip2_pretrained_flant5xxl.pth"
    path = write(tree, q_former_model=address)
    found = find_files(read_original_yaml(path))
    assert found.qformer == tree / "weights/blip2_pretrained_flant5xxl.pth"
    assert found.vision == tree / "weights/eva_vit_g.pth"
    cache = tree / "torch/hub/checkpoints"
    cache.mkdir(parents=True)
    (tree / "weights/eva_vit_g.pth").rename(cache / "eva_vit_g.pth")
    assert find_files(read_original_yaml(path)).vision == cache / "eva_vit_g.pth"
    (cache / "eva_vit_g.pth").unlink()
    with pytest.raises(
        ConfigError, match=r"eva_vit_g.pth, which the original downloads by itself, is not here"
    ) as error:
        find_files(read_original_yaml(path))
    assert "model.vit_model=" in error.value.hint


def test_given_files_go_before_those_of_the_yaml(tree: Path) -> None:
    path = write(tree, ckpt="/path/to/ckpt")
    given = {"projection": tree / "mine.pth", "vision": None}
    assert find_files(read_original_yaml(path), given).projection == tree / "mine.pth"


def test_stage_one_of_training_has_no_checkpoint(tree: Path) -> None:
    read = read_original_yaml(write(tree, ckpt=""))
    assert find_files(read, training=True).projection is None


def test_low_resource_is_eight_bits_where_the_device_can_and_said_where_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert low_resource("cuda:0") == ("int8", "low_resource: the language model is loaded with 8-bit weights on cuda")
    assert low_resource("cpu")[0] == "int8"
    quantize, sentence = low_resource("mps")
    assert quantize == "none"
    assert "bfloat16 instead" in sentence
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    quantize, sentence = low_resource("cpu")
    assert quantize == "none"
    assert "float32 instead" in sentence
    assert "pip install" in sentence


def test_gpu_id_is_a_cuda_device_and_said_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen_device(None, "mps") == ("mps", [])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    device, notes = chosen_device(0, "auto")
    assert device == "auto"
    assert "no CUDA device" in notes[0]
    assert "auto" not in notes[0]  # the device itself
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert chosen_device(1, "auto") == ("cuda:1", [])
    with pytest.raises(ConfigError, match="there are 2 CUDA devices"):
        chosen_device(2, "auto")
