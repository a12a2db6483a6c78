"""A run of nano is the package's own run, with other batches and an objective of its own."""

from pathlib import Path

import pytest
import yaml

from minigpt4.errors import ConfigError, DataError
from minigpt4.training.recipe import read_recipe
from nano.run import NanoRecipe, train

RECIPE = Path(__file__).resolve().parents[2] / "nano/recipe.yaml"


def test_the_recipe_mixes_its_stages() -> None:
    recipe = read_recipe(RECIPE, ["mixture.photos=mine"], NanoRecipe)

    mixtures = [recipe.mixture_of(stage) for stage in recipe.stages]
    assert [mixture.objective for mixture in mixtures] == ["words", *["language"] * 5]
    assert {mixture.photos for mixture in mixtures} == {Path("mine")}
    assert mixtures[-1].share_second == 0.7


@pytest.mark.parametrize(
    "override",
    ["mixture.share_photos=1.5", "mixture.background=b", "stages.1.data.share_imagined=0.9", "stages.1.data.x=1"],
)
def test_a_mixture_that_cannot_be_is_refused(override: str) -> None:
    with pytest.raises(ConfigError):
        read_recipe(RECIPE, [override], NanoRecipe)


def test_a_recipe_of_the_package_needs_data(tmp_path: Path) -> None:
    content = yaml.safe_load(RECIPE.read_text())
    del content["mixture"]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))

    with pytest.raises(ConfigError, match="data is missing"):
        read_recipe(tmp_path / "recipe.yaml")


def test_a_folder_without_shards_is_told_before_anything_is_loaded(tmp_path: Path) -> None:
    recipe = read_recipe(RECIPE, [f"mixture.photos={tmp_path}", f"output={tmp_path / 'run'}"], NanoRecipe)

    with pytest.raises(DataError, match="no tar shards"):
        train(recipe)
    assert not (tmp_path / "run").exists()
