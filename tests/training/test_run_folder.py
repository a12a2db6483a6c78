"""A run's folder is of a run: a start that is refused leaves none behind, and takes nothing away that tells why."""

from pathlib import Path

import pytest

from minigpt4.errors import ConfigError, DataError
from minigpt4.training.run_folder import only_run


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
