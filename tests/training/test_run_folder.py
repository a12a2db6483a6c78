"""A run's folder is of a run: a start that is refused leaves none behind, and takes nothing away that tells why."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from minigpt4.errors import ConfigError, DataError
from minigpt4.training import checkpoint as checkpoints
from minigpt4.training.run_folder import check_recipe, metrics_path, only_run
from tests.training import toy

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


def refused(output: Path, *names: str) -> None:
    """Start a run that writes files, and is refused then."""
    with pytest.raises(DataError), only_run(output):
        for name in names:
            (output / name).parent.mkdir(exist_ok=True)
            (output / name).touch()
        raise DataError("no")


def test_a_refused_start_takes_back_what_it_wrote_and_the_folders_it_made(tmp_path: Path) -> None:
    refused(tmp_path / "a/b", "recipe.json", "wandb_id.txt", "wandb/run-1", "tensorboard/events")

    assert list(tmp_path.iterdir()) == []


def test_a_file_is_no_folder_for_a_run(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("mine")
    with pytest.raises(ConfigError, match=r"run is a file, expected a folder$"), only_run(tmp_path / "run"):
        pass

    assert (tmp_path / "run").read_text() == "mine"


def test_a_folder_that_was_there_stays(tmp_path: Path) -> None:
    refused(tmp_path, "recipe.json")

    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("more", ["metrics.jsonl", "bad_samples.jsonl", "model/config.json", "checkpoints/best.json"])
def test_what_a_run_has_made_stays(more: str, tmp_path: Path) -> None:
    refused(tmp_path / "run", "recipe.json", more)

    assert (tmp_path / "run/recipe.json").exists() and (tmp_path / "run" / more).exists()


def test_nothing_of_an_earlier_start_is_taken(tmp_path: Path) -> None:
    for name in ("recipe.json", "wandb_id.txt"):
        (tmp_path / name).touch()
    refused(tmp_path, "recipe.json", "wandb_id.txt")

    assert {path.name for path in tmp_path.iterdir()} >= {"recipe.json", "wandb_id.txt"}


def test_a_start_that_is_interrupted_leaves_its_folder(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), only_run(tmp_path / "run"):
        raise KeyboardInterrupt

    assert (tmp_path / "run").is_dir()


def test_the_folder_of_a_run_belongs_to_it_alone(tmp_path: Path) -> None:
    program = "import sys, time\nfrom pathlib import Path\nfrom minigpt4.training.run_folder import only_run\n"
    program += "with only_run(Path(sys.argv[1])):\n    print('held', flush=True)\n    time.sleep(60)\n"
    with subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, env=ENVIRONMENT, text=True
    ) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        with (
            pytest.raises(ConfigError, match="another process trains in"),
            only_run(tmp_path),
        ):
            pass
        other.kill()
    with only_run(tmp_path):  # a killed run leaves nothing that would stand in the way
        pass


@pytest.mark.parametrize("content", ["", '{"seed": 1', "[]"])
def test_a_damaged_recipe_of_a_run_is_told(content: str, tmp_path: Path) -> None:
    recipe = toy.recipe(tmp_path)
    check_recipe(recipe, 1, force=False)
    metrics_path(tmp_path).touch()
    (tmp_path / "recipe.json").write_text(content)

    with pytest.raises(ConfigError, match=r"recipe\.json is damaged") as told:
        check_recipe(recipe, 1, force=True)

    assert "delete that file" in told.value.hint
    (tmp_path / "recipe.json").unlink()
    check_recipe(recipe, 1, force=False)


def test_a_changed_recipe_is_refused_with_the_keys_that_differ(tmp_path: Path) -> None:
    recipe = toy.recipe(tmp_path)
    check_recipe(recipe, 1, force=False)
    check_recipe(recipe.model_copy(update={"seed": 8}), 1, force=False)  # nothing is learnt yet: a typo, mended
    check_recipe(recipe, 1, force=False)
    metrics_path(tmp_path).touch()
    stages = [stage.model_copy(update={"learning_rate": 0.5}) for stage in recipe.stages]
    changed = recipe.model_copy(update={"seed": 9, "stages": stages, "workers": 2})

    with pytest.raises(ConfigError) as told:
        check_recipe(changed, 1, force=False)

    assert "seed (1, now 9)" in told.value.message
    assert "stages.0.learning_rate (0.01, now 0.5)" in told.value.message
    assert "workers" not in told.value.message
    assert "--force" in told.value.hint
    check_recipe(changed, 1, force=True)
    check_recipe(changed, 1, force=False)  # it is the run's recipe now


def test_what_learns_cannot_be_changed_by_force_and_the_run_goes_on_as_it_began(tmp_path: Path) -> None:
    recipe = toy.recipe(tmp_path)
    check_recipe(recipe, 1, force=False)
    metrics_path(tmp_path).touch()

    with pytest.raises(ConfigError, match=r"trainable.* now 'qformer'") as told:
        check_recipe(recipe.model_copy(update={"trainable": ["qformer"]}), 1, force=True)

    assert told.value.hint == "its checkpoints hold other numbers: set another output, or undo it"
    check_recipe(recipe, 1, force=False)


def test_a_changed_recipe_is_not_forced_on_a_run_that_has_ended(tmp_path: Path) -> None:
    recipe = toy.recipe(tmp_path)
    check_recipe(recipe, 1, force=False)
    metrics_path(tmp_path).touch()
    last = len(recipe.stages)
    for stage, hint in ((last - 1, "by --force"), (last, "that run has ended and learns no more: set another output")):
        checkpoints.write_checkpoint(tmp_path, {}, {}, checkpoints.State(stage=stage))

        changed = recipe.model_copy(update={"seed": 9})
        with pytest.raises(ConfigError) as told:
            check_recipe(changed, 1, force=stage == last)

        assert hint in told.value.hint
        assert ("--force" in told.value.hint) == (stage < last)


def test_another_number_of_processes_is_refused(tmp_path: Path) -> None:
    recipe = toy.recipe(tmp_path)
    check_recipe(recipe, 2, force=False)
    metrics_path(tmp_path).touch()

    with pytest.raises(ConfigError, match=r"processes \(2, now 1\)"):
        check_recipe(recipe, 1, force=False)
    check_recipe(recipe, 1, force=True)
