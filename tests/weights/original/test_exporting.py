"""A model folder as the original's files: bits, formats, and what the original has no place for."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import minigpt4
from minigpt4.errors import ConfigError, MiniGPT4Error, WeightsError
from minigpt4.weights.alignment import Origin, save_alignment
from minigpt4.weights.files.atomic import verify_folder
from minigpt4.weights.original import exporting
from minigpt4.weights.original.exporting import export_original
from minigpt4.weights.original.importing import import_original
from minigpt4.weights.original.names import OriginalFiles
from minigpt4.weights.original.prepare import prepare_original
from tests.weights.original import original_files

HEADS = ["vision_config.num_attention_heads=2", "qformer_config.num_attention_heads=2"]
BIAS = "model.vision_model.encoder.layers.1.self_attn.qkv.bias"


@pytest.fixture
def parts(tmp_path: Path) -> dict[str, Path]:
    return original_files.write(tmp_path)


@pytest.fixture
def model(tmp_path: Path, parts: dict[str, Path]) -> Path:
    import_original(tmp_path / "model", OriginalFiles(**parts), overrides=HEADS)
    return tmp_path / "model"


def change(model: Path, name: str, tensor: torch.Tensor) -> None:
    tensors = load_file(model / "model.safetensors")
    save_file(tensors | {name: tensor}, model / "model.safetensors", metadata={"format": "pt"})


def test_files_have_the_originals_form(model: Path, parts: dict[str, Path], tmp_path: Path) -> None:
    assert export_original(model, tmp_path / "out") == []
    verify_folder(tmp_path / "out")
    vision = torch.load(tmp_path / "out/eva_vit_g.pth", weights_only=True)
    source = torch.load(parts["vision"], weights_only=True)
    assert int(vision.pop("minigpt4_num_blocks")) == 3
    unused = {name for name in source if name.startswith(("blocks.3.", "norm.", "head."))}
    assert vision.keys() == source.keys() - unused
    qformer = torch.load(tmp_path / "out/blip2_pretrained_flant5xxl.pth", weights_only=True)
    source = torch.load(parts["qformer"], weights_only=True)["model"]
    assert qformer["model"].keys() == {name for name in source if "t5_proj" not in name and "position" not in name}
    assert all(torch.equal(qformer["model"][name], source[name]) for name in qformer["model"])
    checkpoint = torch.load(tmp_path / "out/pretrained_minigpt4.pth", weights_only=True)
    assert checkpoint["model"].keys() == {"llama_proj.weight", "llama_proj.bias"}
    for name in ("eva_vit_g.pth", "blip2_pretrained_flant5xxl.pth", "pretrained_minigpt4.pth"):
        assert (tmp_path / "out" / name).stat().st_size < 1.1 * (tmp_path / name).stat().st_size, name


def test_language_models_folder_is_one_that_transformers_loads(model: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    export_original(model, tmp_path / "out")
    folder = tmp_path / "out/language-model"
    language_model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    mine, _ = minigpt4.load(model, device="cpu")
    ids = torch.tensor([[1, 5, 9]])
    with torch.no_grad():
        assert torch.equal(language_model(ids).logits, mine(ids).logits)
    assert AutoTokenizer.from_pretrained(folder)("a red circle").input_ids[0] == 1
    assert (folder / "tokenizer.model").is_file()
    assert json.loads((folder / "config.json").read_text(encoding="utf-8"))["torch_dtype"] == "float16"


def test_language_model_in_many_files_has_an_index(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporting, "MAX_SHARD_BYTES", 5_000)
    export_original(model, tmp_path / "out")
    folder = tmp_path / "out/language-model"
    index = json.loads((folder / "pytorch_model.bin.index.json").read_text(encoding="utf-8"))
    assert len(set(index["weight_map"].values())) > 2
    for name, file in index["weight_map"].items():
        assert name in torch.load(folder / file, weights_only=True)


def test_yaml_of_an_export_runs_it(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINIGPT4_HOME", str(tmp_path / "home"))
    export_original(model, tmp_path / "out")
    found = prepare_original(tmp_path / "out/minigpt4_eval.yaml")
    one, two = (load_file(folder / "model.safetensors") for folder in (model, found.folder))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    values = yaml.safe_load((tmp_path / "out/minigpt4_eval.yaml").read_text(encoding="utf-8"))["model"]
    assert values["vision_config"] == {"num_attention_heads": 2}
    assert (values["arch"], values["num_query_token"]) == ("mini_gpt4", 3)


def test_yaml_of_an_export_has_the_sections_that_the_originals_demo_reads(model: Path, tmp_path: Path) -> None:
    """Its `Config` raises without `datasets` and `run`; its demo looks at pictures as `cc_sbu_align` says."""
    export_original(model, tmp_path / "out")
    content = yaml.safe_load((tmp_path / "out/minigpt4_eval.yaml").read_text(encoding="utf-8"))
    side = content["model"]["image_size"]
    pictures = content["datasets"]["cc_sbu_align"]["vis_processor"]["train"]
    assert pictures == {"name": "blip2_image_eval", "image_size": side}
    assert content["run"] == {"task": "image_text_pretrain"}


def test_yaml_of_an_export_says_heads_that_the_width_does_not_tell(tmp_path: Path) -> None:
    """An import takes 176 wide for 2 heads of 88, and published heads are 16."""
    sizes = replace(original_files.SMALL, vision_width=176, qformer_width=192)
    files = OriginalFiles(**original_files.write(tmp_path, sizes))
    heads = ["vision_config.num_attention_heads=16", "qformer_config.num_attention_heads=3"]
    export_original(import_original(tmp_path / "model", files, overrides=heads).folder, tmp_path / "out")
    values = yaml.safe_load((tmp_path / "out/minigpt4_eval.yaml").read_text(encoding="utf-8"))["model"]
    assert values["vision_config"] == {"num_attention_heads": 16}
    assert "qformer_config" not in values  # 192 wide is 3 heads of 64


def test_checkpoint_alone_holds_what_was_trained(model: Path, tmp_path: Path) -> None:
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    config["trainable_parts"] = ["query_tokens", "qformer", "language_projection"]
    (model / "config.json").write_text(json.dumps(config), encoding="utf-8")
    export_original(model, tmp_path / "out", only_checkpoint=True)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["manifest.json", "pretrained_minigpt4.pth"]
    trained = torch.load(tmp_path / "out/pretrained_minigpt4.pth", weights_only=True)["model"]
    assert {"query_tokens", "llama_proj.weight", "Qformer.bert.embeddings.LayerNorm.weight"} <= trained.keys()
    assert "ln_vision.weight" not in trained


def test_model_without_a_qformer_keeps_its_norm_in_the_checkpoint(tmp_path: Path) -> None:
    sizes = replace(original_files.SMALL, grid=4)
    parts = original_files.write(tmp_path, sizes, with_qformer=False)
    del parts["qformer"]
    import_original(tmp_path / "model", OriginalFiles(**parts), overrides=HEADS[:1])
    change(tmp_path / "model", "model.vision_model.post_layernorm.bias", torch.full((24,), 0.5))
    export_original(tmp_path / "model", tmp_path / "out")
    assert not (tmp_path / "out/blip2_pretrained_flant5xxl.pth").exists()
    again = OriginalFiles(
        tmp_path / "out/eva_vit_g.pth", tmp_path / "out/language-model", None, tmp_path / "out/pretrained_minigpt4.pth"
    )
    import_original(tmp_path / "again", again, overrides=HEADS[:1])
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("model", "again"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_folder_saved_by_the_library_is_exported_with_a_word_about_the_vocabulary(model: Path, tmp_path: Path) -> None:
    loaded, processor = minigpt4.load(model, device="cpu")
    loaded.save_pretrained(tmp_path / "saved")
    processor.save_pretrained(tmp_path / "saved")
    notes = export_original(tmp_path / "saved", tmp_path / "out")
    assert any("tokenizer.model" in note for note in notes)
    assert (tmp_path / "out/language-model/tokenizer.json").is_file()


def test_trained_key_bias_has_no_place_in_the_original(model: Path, tmp_path: Path) -> None:
    change(model, BIAS, torch.ones(72))
    with pytest.raises(WeightsError, match="key bias that is not zero"):
        export_original(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_tensor_of_another_model_has_no_place_in_the_original(model: Path, tmp_path: Path) -> None:
    change(model, "model.adapter.weight", torch.ones(2))
    with pytest.raises(WeightsError, match=r"no place for tensor model\.adapter\.weight"):
        export_original(model, tmp_path / "out")


def test_model_of_other_parts_is_refused(model: Path, tmp_path: Path) -> None:
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    config["vision_config"] = {"model_type": "dinov2"}
    (model / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ConfigError, match="of the type dinov2, expected blip_2_vision_model"):
        export_original(model, tmp_path / "out")


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no config.json"), ("{", "cannot be read"), ('{"model_type": "llama"}', "'llama', expected minigpt4")],
)
def test_folder_that_is_no_model_is_refused(content: str | None, message: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    if content is not None:
        (tmp_path / "folder/config.json").write_text(content, encoding="utf-8")
    with pytest.raises(MiniGPT4Error) as error:
        export_original(tmp_path / "folder", tmp_path / "out")
    assert message in error.value.message
    assert error.value.hint


def trained(model: Path, target: Path, **description: object) -> Path:
    """An alignment over a model, with another projection."""
    loaded, processor = minigpt4.load(model, device="cpu")
    with torch.no_grad():
        loaded.model.language_projection.weight.fill_(0.25)
    save_alignment(target, loaded, processor, origin=Origin(str(model)))
    if description:
        content = json.loads((target / "alignment.json").read_text(encoding="utf-8"))
        (target / "alignment.json").write_text(json.dumps(content | description), encoding="utf-8")
    return target


@pytest.mark.parametrize("only_checkpoint", [False, True])
def test_alignment_over_a_model_is_exported_with_its_own_projection(
    only_checkpoint: bool, model: Path, tmp_path: Path
) -> None:
    export_original(trained(model, tmp_path / "mine"), tmp_path / "out", only_checkpoint=only_checkpoint)
    export_original(model, tmp_path / "frozen", only_checkpoint=only_checkpoint)
    content = torch.load(tmp_path / "out/pretrained_minigpt4.pth", weights_only=True)["model"]
    assert (content["llama_proj.weight"] == 0.25).all()
    names = {path.name for path in (tmp_path / "out").rglob("*")}
    assert names == {path.name for path in (tmp_path / "frozen").rglob("*")}
    if not only_checkpoint:
        assert (tmp_path / "out/eva_vit_g.pth").read_bytes() == (tmp_path / "frozen/eva_vit_g.pth").read_bytes()


@pytest.mark.parametrize("only_checkpoint", [False, True])
def test_what_learned_in_the_vision_encoder_is_exported(only_checkpoint: bool, model: Path, tmp_path: Path) -> None:
    """In the checkpoint, as the original writes it, over the frozen encoder or its own."""
    loaded, processor = minigpt4.load(model, device="cpu")
    loaded.config.trainable_parts = ["vision_model", "language_projection"]
    with torch.no_grad():
        for name, parameter in loaded.freeze().model.vision_model.named_parameters():
            fused = name.endswith("qkv.bias")
            parameter.add_(torch.tensor([0.125, 0.0, 0.125]).repeat_interleave(len(parameter) // 3) if fused else 0.125)
    save_alignment(tmp_path / "mine", loaded, processor, origin=Origin(str(model)))

    export_original(tmp_path / "mine", tmp_path / "out", only_checkpoint=only_checkpoint)

    content = torch.load(tmp_path / "out/pretrained_minigpt4.pth", weights_only=True)["model"]
    assert {"visual_encoder.cls_token", "visual_encoder.blocks.1.attn.q_bias", "ln_vision.bias"} <= content.keys()
    exported = tmp_path if only_checkpoint else tmp_path / "out"
    again = OriginalFiles(
        exported / "eva_vit_g.pth",
        tmp_path / "vicuna",
        exported / "blip2_pretrained_flant5xxl.pth",
        tmp_path / "out/pretrained_minigpt4.pth",
    )
    import_original(tmp_path / "again", again, overrides=HEADS)
    one, two = loaded.state_dict(), load_file(tmp_path / "again/model.safetensors")
    assert all(torch.equal(one[name].float(), two[name].float()) for name in two)


@pytest.mark.parametrize(
    ("description", "message"),
    [
        ({"frozen_parts": "nano"}, "an alignment over the frozen parts of nano, which the original cannot run"),
        ({"frozen_parts": "someone/model"}, "over the frozen parts of someone/model, which is not a folder here"),
        ({"lora": {"rank": 4}}, "has adapters on its language model"),
    ],
)
def test_alignment_that_the_original_cannot_run_is_refused(
    description: dict[str, object], message: str, model: Path, tmp_path: Path
) -> None:
    with pytest.raises(MiniGPT4Error, match=message) as error:
        export_original(trained(model, tmp_path / "mine", **description), tmp_path / "out")
    assert error.value.hint
    assert not (tmp_path / "out").exists()


def test_name_that_is_no_folder_is_refused_with_what_can_be_exported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(WeightsError, match="nano does not exist") as error:
        export_original(Path("nano"), tmp_path / "out")
    assert "models of EVA-ViT and a LLaMA" in error.value.hint
