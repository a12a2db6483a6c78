"""`minigpt4 weights import` and `export`, and the original's own options, as a user meets them."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from minigpt4.cli.options import spread_options
from tests.commands import Run, runner
from tests.weights.original import original_files

HEADS = ["vision_config.num_attention_heads=2", "qformer_config.num_attention_heads=2"]
SET = [word for setting in HEADS for word in ("--set", setting)]
OF_THE_YAML = [f"model.{setting}" for setting in HEADS]
YAML = """\
model:
  arch: mini_gpt4
  model_type: pretrain_vicuna
  low_resource: False
  llama_model: vicuna
  ckpt: pretrained_minigpt4.pth
"""


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Runs a command in this process, in a folder with a small model's files, its YAML and `cat.png`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MINIGPT4_HOME", str(tmp_path / "home"))
    original_files.write(tmp_path)
    (tmp_path / "eval.yaml").write_text(YAML, encoding="utf-8")
    Image.new("RGB", (30, 20), "red").save("cat.png")

    return runner(monkeypatch, capfd)


def paths() -> list[str]:
    return ["--vision", "eva_vit_g.pth", "--qformer", "blip2_pretrained_flant5xxl.pth", "--language-model", "vicuna"]


def test_import_by_path_prints_the_folder_and_accounts_for_every_tensor(run: Run) -> None:
    done = run("weights", "import", "-o", "model", *paths(), "--projection", "pretrained_minigpt4.pth", *SET)
    assert (done.status, done.out) == (0, "model\n")
    assert "eva_vit_g.pth: 43 tensors used" in done.err
    assert "blip2_pretrained_flant5xxl.pth: 2 tensors not needed: BLIP-2's own projection" in done.err
    assert "parameters, prompt template vicuna-v0" in done.err
    answer = run("ask", "cat.png", "what is this?", "-m", "model", "--max-new-tokens", "2", "--device", "cpu")
    assert answer.status == 0
    assert "hint: --overwrite replaces it" in run("weights", "import", "-o", "model", *paths(), *SET).err
    assert "hint: choose another place, or remove it first" in run("weights", "import", "-o", "vicuna", *paths()).err


def test_import_by_yaml_takes_paths_and_settings_from_the_command_line_first(run: Run, tmp_path: Path) -> None:
    done = run("weights", "import", "-o", "model", "--cfg-path", "eval.yaml", *SET, "--template", "llama-2")
    assert done.status == 0
    assert "prompt template llama-2" in done.err
    (tmp_path / "eval.yaml").write_text(YAML.replace("pretrained", "/path/to/pretrained"), encoding="utf-8")
    again = run("weights", "import", "-o", "again", "--cfg-path", "eval.yaml", *SET)
    assert again.status == 2
    assert again.err.startswith("error: eval.yaml, line 6: `ckpt` is still the placeholder")
    assert "hint: put the path of" in again.err
    assert run("weights", "import", "-o", "again", "--cfg-path", "eval.yaml", "--projection",
               "pretrained_minigpt4.pth", *SET).status == 0  # fmt: skip


def test_import_by_a_train_yaml_needs_no_checkpoint_and_by_an_eval_yaml_does(run: Run, tmp_path: Path) -> None:
    model = YAML.replace("  ckpt: pretrained_minigpt4.pth\n", "")
    (tmp_path / "stage1.yaml").write_text(f"{model}run:\n  init_lr: 1e-4\n  max_epoch: 4\n", encoding="utf-8")
    done = run("weights", "import", "-o", "model", "--cfg-path", "stage1.yaml", *SET)
    assert (done.status, done.out) == (0, "model\n")
    assert "there is no checkpoint, so the projection is new: train it before asking anything" in done.err
    (tmp_path / "eval.yaml").write_text(model, encoding="utf-8")
    refused = run("weights", "import", "-o", "other", "--cfg-path", "eval.yaml", *SET)
    assert refused.status == 2
    assert "`model` gives no `ckpt`" in refused.err


def test_heads_that_nothing_tells_are_asked_for_and_not_guessed(run: Run, tmp_path: Path) -> None:
    done = run("weights", "import", "-o", "model", *paths(), "--projection", "pretrained_minigpt4.pth")
    assert done.status == 2
    assert "how many heads the vision encoder has cannot be told: it is 24 wide" in done.err
    assert "--set vision_config.num_attention_heads=N" in done.err
    assert not (tmp_path / "model").exists()


def test_dry_run_says_what_would_be_and_writes_nothing(run: Run, tmp_path: Path) -> None:
    done = run("weights", "import", "-o", "model", *paths(), "--dry-run", *SET)
    assert done.status == 0
    assert "nothing was written" in done.out
    assert "the projection is new" in done.err
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    ("arguments", "error", "hint"),
    [
        ([], "weights import needs --vision", "--cfg-path"),
        (["--vision", "eva_vit_g.pth"], "weights import needs --language-model", "--cfg-path"),
        (["--vision", "no.pth", "--language-model", "vicuna"], "--vision no.pth does not exist", "path"),
        (["--vision", "vicuna", "--language-model", "vicuna"], "expected a vision encoder", "--language-model"),
        ([*paths(), "--options", "model.x=1"], "there is none", "--set"),
        ([*paths(), "--set", "vision_config.heads=2"], "vision_config.heads: there is no such key", ""),
        (["--cfg-path", "missing.yaml"], "cannot read missing.yaml", "--cfg-path"),
    ],
)
def test_mistake_is_one_sentence_and_a_hint(
    arguments: list[str], error: str, hint: str, run: Run, tmp_path: Path
) -> None:
    done = run("weights", "import", "-o", "model", *arguments)
    assert done.status == 2
    lines = [line for line in done.err.splitlines() if line.startswith(("error: ", "hint: "))]
    assert error in lines[0]
    assert hint in lines[-1]
    assert not (tmp_path / "model").exists()


def test_export_writes_the_originals_files(run: Run, tmp_path: Path) -> None:
    run("weights", "import", "-o", "model", *paths(), "--projection", "pretrained_minigpt4.pth", *SET)
    done = run("weights", "export", "model", "-o", "out")
    assert (done.status, done.out) == (0, "out\n")
    assert {"eva_vit_g.pth", "language-model", "minigpt4_eval.yaml"} <= {path.name for path in Path("out").iterdir()}
    again = run("weights", "export", "model", "-o", "out")
    assert again.status == 2
    assert again.err.splitlines() == [
        "error: `out` exists already",
        "hint: --overwrite replaces it; or choose another place",
    ]
    assert run("weights", "export", "model", "-o", "out", "--overwrite").status == 0
    only = run("weights", "export", "model", "-o", "small", "--only-checkpoint")
    assert only.status == 0
    assert not (tmp_path / "small/eva_vit_g.pth").exists()


def test_question_is_answered_by_the_originals_yaml(run: Run) -> None:
    question = ["cat.png", "what is this?", "--max-new-tokens", "2"]
    done = run("ask", *question, "--cfg-path", "eval.yaml", "--gpu-id", "0", "--device", "cpu",
               "--options", *OF_THE_YAML)  # fmt: skip
    assert done.status == 0
    assert done.out.endswith("\n")
    if not torch.cuda.is_available():
        assert "--gpu-id 0: there is no CUDA device here, the model runs on cpu instead" in done.err
    talk = run("chat", "cat.png", "--cfg-path", "eval.yaml", "--options", *OF_THE_YAML, "--max-new-tokens", "2",
               "--device", "cpu", stdin=b"what is this?\n")  # fmt: skip
    assert talk.status == 0
    assert "eval.yaml is ready" in talk.err
    as_json = run("ask", *question, "--cfg-path", "eval.yaml", "--options", *OF_THE_YAML, "--json")
    assert json.loads(as_json.out)["model"] == "eval.yaml"


def test_clients_know_a_served_model_by_the_name_of_its_yaml(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    names: list[str] = []
    monkeypatch.setattr("minigpt4.cli.serve._serve", lambda _, settings, *__: names.append(settings.model_id))
    assert run("serve", "--port", "0", "--cfg-path", "eval.yaml", "--options", *OF_THE_YAML).status == 0
    assert names == ["eval.yaml"]


@pytest.mark.parametrize(
    ("options", "error", "hint"),
    [
        ([], "how many heads", "--options model.vision_config.num_attention_heads=N"),
        (["model.ckpt=eva_vit_g.pth"], "model.ckpt", "model.vit_model"),
        (["model.vision_config.heads=2"], "--options model.vision_config.heads: there is no such key", ""),
        (["model.has_qformer=False", *OF_THE_YAML], "there is none", "model.q_former_model"),
    ],
)
def test_mistake_in_a_yaml_names_its_keys_and_no_option_that_ask_lacks(
    run: Run, options: list[str], error: str, hint: str
) -> None:
    done = run("ask", "cat.png", "what?", "--cfg-path", "eval.yaml", *(["--options", *options] if options else []))

    assert done.status == 2
    assert error in done.err.splitlines()[0]
    assert hint in done.err.splitlines()[1]
    for absent in ("--vision", "--qformer", "--language-model", "--projection", "--set"):
        assert absent not in done.err


def test_options_of_the_original_need_its_yaml(run: Run) -> None:
    done = run("ask", "cat.png", "what?", "--options", "model.ckpt=x")
    assert done.status == 2
    assert "--cfg-path" in done.err
    done = run("ask", "cat.png", "what?", "--cfg-path", "eval.yaml", "-m", "model")
    assert done.status == 2
    assert "both --cfg-path and --model" in done.err
    done = run("ask", "cat.png", "what?", "--cfg-path", "eval.yaml", "--language-model", "vicuna")
    assert "both --cfg-path and --language-model" in done.err


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        (["--options", "a.b=1"], ["--options", "a.b=1"]),
        (["--options", "a.b=1", "c.d=2", "-x"], ["--options", "a.b=1", "--options", "c.d=2", "-x"]),
        (["--options", "a.b=1", "--options", "c.d=2"], ["--options", "a.b=1", "--options", "c.d=2"]),
        (["--options", "a.b=1", "a question?"], ["--options", "a.b=1", "a question?"]),
        (["a.b=1", "--set", "c.d=2"], ["a.b=1", "--set", "c.d=2"]),
        (["--options", "a.b=1", "--set", "c.d=2"], ["--options", "a.b=1", "--set", "c.d=2"]),
        (["--options"], ["--options"]),
    ],
)
def test_one_options_takes_several_values_as_in_the_original(typed: list[str], meant: list[str]) -> None:
    assert spread_options(typed) == meant
