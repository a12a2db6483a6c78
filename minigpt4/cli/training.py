"""`minigpt4 train`."""

from pathlib import Path
from typing import Annotated

import typer

from minigpt4.cli.app import app, examples
from minigpt4.cli.terminal import parts_bar, quiet, training_bar


@app.command(
    epilog=examples(
        "minigpt4 train recipes/nano.yaml",
        "minigpt4 train recipes/nano.yaml --set output=runs/mine --set stages.0.steps=100",
    )
)
def train(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE.yaml")],
    overrides: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a key.")] = None,
) -> None:
    """Train, or go on with what was interrupted."""
    from minigpt4.training.recipe import read_recipe

    settings = read_recipe(recipe, overrides)
    from minigpt4.training.run import run

    quiet()
    with training_bar() as report, parts_bar() as report_parts:
        folder = run(settings, report, report_parts)
    print(folder)
