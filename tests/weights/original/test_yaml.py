"""The original's YAML files: what each key means, and that every mistake is named with file, key and line."""

from pathlib import Path

import pytest

from minigpt4.errors import ConfigError
from minigpt4.weights.original.yaml import read_original_yaml
from tests.weights.original.original_yamls import EVAL, MODEL, STAGE_1

VICUNA = "/path/to/vicuna/weights/"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """An original tree's two YAML files."""
    (tmp_path / "eval_configs").mkdir()
    (tmp_path / "minigpt4/configs/models").mkdir(parents=True)
    (tmp_path / "eval_configs/minigpt4_eval.yaml").write_text(EVAL, encoding="utf-8")
    (tmp_path / "minigpt4/configs/models/minigpt4.yaml").write_text(MODEL, encoding="utf-8")
    return tmp_path


def write(folder: Path, text: str) -> Path:
    path = folder / "eval.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_models_own_yaml_is_found_in_the_tree_and_the_named_one_goes_before_it(tree: Path) -> None:
    read = read_original_yaml(tree / "eval_configs/minigpt4_eval.yaml", ["model.num_query_token=8"])
    assert read.defaults == tree / "minigpt4/configs/models/minigpt4.yaml"
    assert (read.value("llama_model"), read.value("ckpt")) == (VICUNA, "pretrained_minigpt4.pth")
    assert read.value("num_query_token") == 8
    assert read.value("low_resource") is True
    assert read.overrides == ["vision_config.image_size=224", "num_query_tokens=8"]
    assert read.family.template == "vicuna-v0"
    assert not read.is_for_training


def test_every_key_is_used_or_said_to_be_ignored(tree: Path) -> None:
    notes = "\n".join(read_original_yaml(tree / "eval_configs/minigpt4_eval.yaml").notes)
    for key in (
        "drop_path_rate", "use_grad_checkpoint", "vit_precision", "freeze_vit", "freeze_qformer", "max_txt_len",
        "end_sym", "prompt_path", "prompt_template", "prompt", "run", "datasets", "text_processor",
    ):  # fmt: skip
        assert key in notes, key
    assert len([note for note in notes.splitlines() if "training" in note]) == 1
    for key in ("arch", "model_type", "image_size", "num_query_token", "llama_model", "ckpt", "low_resource"):
        assert f" {key}" not in notes, key


def test_model_yaml_can_be_named_itself(tree: Path) -> None:
    read = read_original_yaml(tree / "minigpt4/configs/models/minigpt4.yaml", ["model.ckpt=here.pth"])
    assert (read.value("llama_model"), read.value("ckpt")) == (VICUNA, "here.pth")
    assert read.defaults is None


def test_yaml_of_training_is_read_with_numbers_as_numbers(tmp_path: Path) -> None:
    read = read_original_yaml(write(tmp_path, STAGE_1))
    assert read.settings["run", "init_lr"].value == 1e-4
    assert read.settings["run", "train_splits"].value == ["train"]
    assert read.is_for_training
    assert read.settings["run", "resume_ckpt_path"].value is None
    assert read.settings["datasets", "laion", "sample_ratio"].value == 115


@pytest.mark.parametrize(
    ("model_type", "arch", "template"),
    [
        ("pretrain_vicuna", "mini_gpt4", "vicuna-v0"),
        ("pretrain_vicuna0", "minigpt4", "vicuna-v0-spaced"),
        ("pretrain_llama2", "minigpt4", "llama-2"),
    ],
)
def test_prompt_is_that_of_the_demo_for_this_model_type(
    model_type: str, arch: str, template: str, tmp_path: Path
) -> None:
    read = read_original_yaml(write(tmp_path, f"model:\n  arch: {arch}\n  model_type: {model_type}\n"))
    assert read.family.template == template


def test_what_shapes_cannot_tell_may_stand_in_the_yaml_or_among_the_options(tmp_path: Path) -> None:
    path = write(tmp_path, "model:\n  arch: mini_gpt4\n  vision_config:\n    num_attention_heads: 2\n")
    read = read_original_yaml(path, ["model.qformer_config.layer_norm_eps=1e-6"])
    assert read.overrides == ["vision_config.num_attention_heads=2", "qformer_config.layer_norm_eps=1e-06"]


@pytest.mark.parametrize(
    ("text", "place", "message", "hint"),
    [
        pytest.param(
            "model:\narch: mini_gpt4\nllama_model: x\n", "line 2", "`arch` stands beside `model:`", "two spaces",
            id="the tutorial's indentation",
        ),
        pytest.param(
            "model:\n  arch: mini_gpt4\n   image_size: 224\n", "line 3", "not YAML", "indentation", id="one space more",
        ),
        pytest.param("model:\n\tarch: mini_gpt4\n", "line 2", "not YAML", "indentation", id="a tab"),
        pytest.param("model: mini_gpt4\n", "line 1", "`model` has a value", "two spaces", id="a value for a section"),
        pytest.param("model:\n", "", "no keys below `model:`", "YAML files", id="nothing"),
        pytest.param("init_lr: 1e-4\nmodel:\n  arch: mini_gpt4\n", "line 1", "belongs below `run:`", "", id="of run"),
        pytest.param(
            "model:\n  arch: mini_gpt4\n  lama_model: x\n", "line 3", "`lama_model` is not known", "llama_model?",
            id="a misspelt key",
        ),
        pytest.param(
            "model:\n  arch: mini_gpt4\nrun:\n  init_lrr: 1\n", "line 4", "`init_lrr` is not known", "init_lr?",
            id="a misspelt key of run",
        ),
        pytest.param(
            "model:\n  arch: mini_gpt5\n", "line 2", "`arch: mini_gpt5` is not known", "mini_gpt4?", id="another arch",
        ),
        pytest.param(
            "model:\n  arch: mini_gpt4\n  model_type: pretrain_vicuna1\n", "line 3", "is not known", "pretrain_vicuna",
            id="another model type",
        ),
        pytest.param(
            "model:\n  arch: minigpt_v2\n", "line 2", "MiniGPT-v2, which comes in a later version", "MiniGPT-4",
            id="the second version",
        ),
        pytest.param(
            "model:\n  arch: mini_gpt4\n  lora_r: 64\n", "line 2", "MiniGPT-v2", "", id="the second version's LoRA",
        ),
        pytest.param("model:\n  image_size: 224\n", "", "says no `arch`", "mini_gpt4", id="no arch"),
        pytest.param(
            "model:\n  arch: mini_gpt4\n  image_size: big\n", "line 3", "is 'big', expected a whole number",
            "224", id="a word for a number",
        ),
        pytest.param(
            "model:\n  arch: mini_gpt4\n  low_resource: maybe\n", "line 3", "expected True or False", "True",
            id="a word for a choice",
        ),
        pytest.param(
            "model:\n  arch: mini_gpt4\n  ckpt: [a, b]\n", "line 3", "expected a path", "pth", id="a list for a path",
        ),
        pytest.param(
            "model:\n  arch: mini_gpt4\n  arch: mini_gpt4\n", "line 3", "`arch` stands in line 2 already", "",
            id="a key twice",
        ),
        pytest.param(
            "model:\n  arch: mini_gpt4\n  ckpt: ${env.CKPT}\n", "line 3", "refers to another", "", id="a reference",
        ),
        pytest.param(
            "model: &m\n  arch: mini_gpt4\nrun: *m\n", "line 3", "uses a YAML alias", "", id="an alias",
        ),
        pytest.param(
            "model:\n  arch: mini_gpt4\n  image_size: 224\ndatasets:\n  x:\n    vis_processor:\n      train:\n"
            "        name: blip2_image_eval\n        image_size: 448\n",
            "line 9", "made 448 wide, the model's image_size is 224", "same", id="pictures of another size",
        ),
        pytest.param(
            "model:\n  arch: mini_gpt4\ndatasets:\n  x:\n    vis_processor:\n      train:\n        name: clip_eval\n",
            "line 7", "`name: clip_eval` is not known", "", id="another picture processor",
        ),
        pytest.param("- a\n- b\n", "", "holds no keys", "", id="a list"),
        pytest.param("", "", "holds no keys", "", id="an empty file"),
        pytest.param("model:\n  arch: mini_gpt4\nextra:\n  a: 1\n", "line 4", "`extra` is not known", "", id="section"),
    ],
)  # fmt: skip
def test_mistake_is_named_with_file_key_and_line(
    text: str, place: str, message: str, hint: str, tmp_path: Path
) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as error:
        read_original_yaml(path)
    assert message in error.value.message
    assert str(path) in error.value.message
    assert place in error.value.message
    assert hint in error.value.hint


def test_mistake_in_the_models_own_yaml_names_that_file(tree: Path) -> None:
    own = tree / "minigpt4/configs/models/minigpt4.yaml"
    own.write_text(MODEL.replace("image_size: 224\n  drop", "image_sice: 224\n  drop"), encoding="utf-8")
    with pytest.raises(ConfigError) as error:
        read_original_yaml(tree / "eval_configs/minigpt4_eval.yaml")
    assert f"{own}, line 5: `image_sice` is not known" in error.value.message
    assert "image_size?" in error.value.hint


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("model.ckpt", "has no value"),
        ("ckpt=x", "`ckpt` stands beside `model:`"),
        ("model.chpt=x", "`chpt` is not known"),
        ("model.low_resource=maybe", "expected True or False"),
        ("model.ckpt=[", "not YAML"),
    ],
)
def test_mistake_among_the_options_is_named(option: str, message: str, tree: Path) -> None:
    with pytest.raises(ConfigError) as error:
        read_original_yaml(tree / "eval_configs/minigpt4_eval.yaml", [option])
    assert message in error.value.message
    assert "--options" in error.value.message


def test_file_that_is_not_there_or_not_text_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read .*missing.yaml: No such file"):
        read_original_yaml(tmp_path / "missing.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="it is not text"):
        read_original_yaml(tmp_path / "binary.yaml")
