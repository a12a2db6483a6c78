"""`minigpt4 train` as a user meets it: a recipe, or one of the original's train YAMLs."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers.utils import logging as transformers_logging

from minigpt4 import cli
from minigpt4.training.recipe import Recipe, read_recipe
from tests.weights.original import original_files
from tests.weights.original.original_yamls import write_tree

STAGE_1 = "train_configs/minigpt4_stage1_pretrain.yaml"
STAGE_2 = "train_configs/minigpt4_stage2_finetune.yaml"
RECIPE = Path(__file__).resolve().parents[2] / "recipes/nano-stage1.yaml"
FILES = [
    "--options", "model.llama_model=weights/vicuna", "model.ckpt=weights/pretrained_minigpt4.pth",
    "model.q_former_model=weights/blip2_pretrained_flant5xxl.pth", "model.vit_model=weights/eva_vit_g.pth",
    "model.vision_config.num_attention_heads=2", "model.qformer_config.num_attention_heads=2",
]  # fmt: skip


@dataclass
class Result:
    status: int
    out: str
    err: str
    trained: list[Recipe] = field(default_factory=list)
    forced: list[bool] = field(default_factory=list)


Run = Callable[..., Result]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Runs a command in this process, in an original tree; the training itself is only written down."""
    monkeypatch.chdir(write_tree(tmp_path))
    monkeypatch.setenv("MINIGPT4_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    trained: list[Recipe] = []
    forced: list[bool] = []

    def train(recipe: Recipe, *reports: Any, force: bool) -> Path:
        trained.append(recipe)
        forced.append(force)
        return recipe.output / "alignment"

    monkeypatch.setattr("minigpt4.training.run.run", train)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()

    def result(*arguments: str) -> Result:
        monkeypatch.setattr(sys, "argv", ["minigpt4", "train", *arguments])
        capfd.readouterr()
        trained.clear()
        forced.clear()
        status = 0
        try:
            cli.main()
        except SystemExit as error:
            status = int(error.code or 0)
        return Result(status, *capfd.readouterr(), list(trained), list(forced))

    return result


def test_dry_run_prints_a_recipe_and_says_what_became_of_the_keys(run: Run, tmp_path: Path) -> None:
    done = run("--cfg-path", STAGE_2, "--dry-run", "--options", "run.max_epoch=2", "run.batch_size_train=3")
    assert (done.status, done.trained) == (0, [])
    (tmp_path / "printed.yaml").write_text(done.out, encoding="utf-8")
    recipe = read_recipe(tmp_path / "printed.yaml")
    assert (recipe.stages[0].steps, recipe.stages[0].batch_size, recipe.compat) == (400, 3, "original")
    assert "run.output_dir: " in done.err
    assert not (tmp_path / "home").exists()
    assert run("printed.yaml", "--dry-run").out == done.out


def test_dry_run_loads_no_torch(run: Run, tmp_path: Path) -> None:
    code = (
        "import sys; from minigpt4 import cli\n"
        f"sys.argv = ['minigpt4', 'train', '--cfg-path', {STAGE_1!r}, '--dry-run']\n"
        "cli.main(); print('torch' in sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert yaml.safe_load(done.stdout)["stages"][0]["steps"] == 20000
    assert done.stderr.splitlines()[-1] == "False"


def test_run_makes_the_model_folder_and_trains_on_it(run: Run, tmp_path: Path) -> None:
    (tmp_path / "weights").mkdir()
    original_files.write(tmp_path / "weights")
    done = run("--cfg-path", STAGE_2, *small_pictures(tmp_path))
    assert done.status == 0, done.err
    (recipe,) = done.trained
    folder = Path(str(recipe.model))
    assert folder.parent == tmp_path / "home/models"
    assert (folder / "config.json").is_file()
    assert (done.out, recipe.output) == (
        "output/minigpt4_stage2_finetune/alignment\n", Path("output/minigpt4_stage2_finetune")
    )  # fmt: skip
    assert f"model: {folder}" in done.err
    assert "not used for answers" not in done.err


def test_first_stage_needs_no_checkpoint(run: Run, tmp_path: Path) -> None:
    (tmp_path / "weights").mkdir()
    original_files.write(tmp_path / "weights")
    done = run("--cfg-path", STAGE_1, *(word for word in small_pictures(tmp_path) if "ckpt" not in word))
    assert done.status == 0, done.err
    assert "the projection is new" in done.err
    assert (Path(str(done.trained[0].model)) / "config.json").is_file()


def test_folder_of_the_first_stage_is_trained_further_as_it_is(run: Run, tmp_path: Path) -> None:
    (tmp_path / "runs/alignment").mkdir(parents=True)
    done = run("--cfg-path", STAGE_2, "--options", "model.ckpt=runs/alignment")
    assert done.status == 0, done.err
    assert Path(str(done.trained[0].model)) == tmp_path / "runs/alignment"


def test_only_the_first_process_speaks(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "runs/alignment").mkdir(parents=True)
    monkeypatch.setenv("RANK", "1")
    done = run("--cfg-path", STAGE_2, "--options", "model.ckpt=runs/alignment")
    assert (done.status, done.out, done.err) == (0, "", "")


def test_force_is_passed_on(run: Run, tmp_path: Path) -> None:
    (tmp_path / "runs/alignment").mkdir(parents=True)
    arguments = ("--cfg-path", STAGE_2, "--options", "model.ckpt=runs/alignment")
    assert run(*arguments).forced == [False]
    assert run(*arguments, "--force").forced == [True]


@pytest.mark.parametrize(
    ("arguments", "error", "hint"),
    [
        ([], "train needs a RECIPE.yaml, or --cfg-path", "recipes/"),
        (["a.yaml", "--cfg-path", STAGE_1], "train takes a RECIPE.yaml or --cfg-path, not both", "recipes/"),
        (["a.yaml", "--options", "run.seed=1"], "--options changes keys of a YAML of the original's", "use --set"),
        (["--cfg-path", STAGE_1, "--set", "seed=1"], "--set changes keys of a recipe", "--options"),
        (["--cfg-path", "none.yaml"], "cannot read none.yaml", "--cfg-path"),
        (["--cfg-path", STAGE_1], "`llama_model` is still the placeholder '/path/to/vicuna/weights/'", "model."),
        (["--cfg-path", STAGE_2, "--options", "model.ckpt=data", "datasets.cc_sbu_align.build_info.storage=none"],
         "--options: `datasets.cc_sbu_align.build_info.storage` names 'none', which does not exist", "put the path"),
        ([STAGE_1], "is one of the original's YAML files, expected a recipe", f"minigpt4 train --cfg-path {STAGE_1}"),
        (["--cfg-path", str(RECIPE)], "is a recipe, none of the original's YAML files", f"minigpt4 train {RECIPE}"),
        (["--cfg-path", STAGE_1, "--options", "run.seed=x"], "--options: `run.seed` is 'x'", ""),
        (["--cfg-path", STAGE_1, "--options", "run.seeed=3"], "`seeed` is not known", "did you mean seed?"),
    ],
)  # fmt: skip
def test_mistake_is_one_sentence_and_a_hint(arguments: list[str], error: str, hint: str, run: Run) -> None:
    done = run(*arguments)
    assert (done.status, done.out, done.trained) == (2, "", [])
    lines = [line for line in done.err.splitlines() if line.startswith(("error: ", "hint: "))]
    assert error in lines[0]
    assert hint in lines[-1]


def small_pictures(tree: Path) -> list[str]:
    """Write the small model's picture size into the tree, and return the options that name its files."""
    size = original_files.SMALL.patch * original_files.SMALL.grid
    for path in tree.rglob("*.yaml"):
        text = path.read_text(encoding="utf-8")
        path.write_text(text.replace("image_size: 224", f"image_size: {size}"), encoding="utf-8")
    return [*FILES, f"model.num_query_token={original_files.SMALL.queries}"]
